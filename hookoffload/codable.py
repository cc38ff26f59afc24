"""What may be coded losslessly, where it waits, and what it takes there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .assembly import HostSize, plain_size
from .gather import can_gather
from .lossless_encoder import CODED_DTYPES
from .lossless_layout import CodeLayout
from .master import Master
from .master_code import MasterCode
from .partition import Partition
from .plan import Plan
from .resolved_policy import ResolvedPolicy

# Less is not worth a launch of a decoder.
LEAST_CODED_BYTES = 2**16


def foreseen(count: int, dtype: torch.dtype) -> MasterCode | None:
    """Return what a code of so many values will take, without their values."""
    if dtype not in CODED_DTYPES or count * dtype.itemsize < LEAST_CODED_BYTES:
        return None
    return MasterCode(CodeLayout(dtype=dtype, count=count, base=0, patches=0), 0)


def expected_bytes(master: Master) -> int:
    """Return what a code of a master will take."""
    code = foreseen(master.count, master.codec.rest)
    return master.plain_bytes if code is None else code.nbytes


def can_pay(master: Master, tables: frozenset[int]) -> bool:
    """Tell whether a master may be coded, and is worth it.

    Args:
        master: the master.
        tables: see `looked_up`.
    """
    codec = master.codec
    one_dtype = codec.rest == codec.compute == codec.resident == master.flat.dtype
    if not (master.castable and one_dtype and codec.rest in CODED_DTYPES):
        return False
    is_table = any(id(member.tensor) in tables for member in master.members)
    return master.plain_bytes >= LEAST_CODED_BYTES and not is_table


def looked_up(modules: Iterable[nn.Module]) -> frozenset[int]:
    """Return the ids of the tables whose rows are looked up where they rest."""
    return frozenset(
        id(module._parameters.get("weight")) for module in modules if can_gather(module)
    )


def has_place_for_code(master: Master, policy: ResolvedPolicy) -> bool:
    """Tell whether a code of a master may lie where it waits.

    On disk it lies in a cache. In host RAM it may lie beside weights, but not where a
    limit counts both.
    """
    location = master.location
    if master.on_disk:
        return location is not None and location.kept is not None
    return location is not None or policy.host_limit_bytes is None


def host_sizes(found: Partition, policy: ResolvedPolicy) -> HostSize:
    """Return what tells the bytes that a master takes where it waits in host RAM."""
    if policy.codec != "lossless":
        return plain_size
    tables = looked_up(site.module for site in found.sites)

    def size(master: Master) -> int:
        # Without a kept code its size is not known: then its weights fit in any case.
        kept = None if master.location is None else master.location.kept
        if kept is None or not can_pay(master, tables):
            return master.plain_bytes
        return kept.ram_bytes

    return size


def waits_off_device(policy: ResolvedPolicy) -> bool:
    """Tell whether layers wait in host RAM or on disk, not on the compute device."""
    return policy.onload.on_disk or policy.onload.device == torch.device("cpu")


def can_code(policy: ResolvedPolicy) -> bool:
    """Tell whether all layers wait in host RAM, where "auto" can have them coded."""
    in_ram = policy.onload.device == torch.device("cpu")
    return in_ram and policy.host_limit_bytes is None


def has_link(policy: ResolvedPolicy) -> bool:
    """Tell whether weights that wait cross a link to where they compute."""
    return can_code(policy) and policy.compute_device.type != "cpu"


def codes_pay(policy: ResolvedPolicy, plan: Plan) -> bool:
    """Tell whether "auto" wants codes.

    Args:
        policy: what the user wants.
        plan: the plan without codes. If it copies nothing over a link in each pass,
            codes would only have to be decoded.
    """
    return policy.codec == "auto" and has_link(policy) and plan.pass_bytes > 0


def check_makes_codes(policy: ResolvedPolicy) -> None:
    """Raise if a policy makes no codes that `load_model` could keep.

    Raises:
        ValueError: It does not.
    """
    why = ""
    if policy.codec != "lossless":
        why = f"codec={policy.codec!r} makes none to keep"
    elif not waits_off_device(policy):
        why = f"onload.device={str(policy.onload.device)!r} has weights wait decoded"
    if why:
        raise ValueError(
            "cache_codes=True keeps what codec='lossless' makes for weights that wait "
            f"in host RAM or on disk, and {why}: leave out cache_codes, or set "
            'codec="lossless" with store="cpu" or "disk"'
        )

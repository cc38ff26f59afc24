"""Which masters are coded losslessly, and when: before the plan, which needs sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from .assembly import Assembly, assemble, only_looked_up
from .budget import BudgetExceededError, MemoryBudget
from .gather import can_gather
from .host_memory import automatic_limit
from .lossless import TIMED_BYTES, decode_seconds, fused_decoder
from .lossless_device import BYTES_PER_VALUE, CHUNK_VALUES, DeviceEncoder
from .lossless_encoder import CODED_DTYPES, ChunkEncoder
from .lossless_host import HostEncoder
from .lossless_layout import CodeLayout
from .master import Master
from .master_code import MasterCode
from .partition import Partition
from .pass_planner import PassPlanner
from .plan import Plan
from .progress import progress_bar
from .resolved_policy import ResolvedPolicy
from .safetensors_file import TensorLocation

# Less is not worth a launch of a decoder.
LEAST_CODED_BYTES = 2**16

# Behind so many, copies in host RAM and the link are what takes the time; with fewer
# than a few, they wait for each other.
_DEVICE_THREADS, _FEW_THREADS = 8, 6
# What encoders may take of a device for a moment, and the part of what is free there.
_ENCODING_BYTES, _ENCODING_SHARE = 2**31, 2


def assemble_coded(
    found: Partition,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    known: dict[int, Master],
    planner: PassPlanner,
    budget: MemoryBudget | None,
) -> Assembly:
    """Make layers as `assemble` does, with the codes that the policy asks for.

    Args:
        found: the partition.
        policy: what the user wants.
        locations: where the bytes of tensors lie that were never in memory, by name.
        known: masters from an earlier assembly of the same model, which are kept.
        planner: plans without codes, to see whether "auto" wants them.
        budget: of the compute device; None only foresees codes, and reads no value.

    Raises:
        BudgetExceededError: The limit is below the least that the layers need.
    """
    wanted: set[int] | None = None
    tables_only: frozenset[int] = frozenset()
    if policy.codec != "lossless" or not can_code(policy):
        assembly = assemble(found, policy, locations, known)
        if policy.codec is None or not can_code(policy):
            return assembly
        order = tuple(sorted(assembly.moving))
        tables_only = frozenset(only_looked_up(found))
        planner.set_assembly(assembly, order, tables_only)
        if not codes_pay(policy, planner.plan):
            return assembly
        known = assembly.masters
        # See [Note: what "auto" codes].
        streamed = (assembly.layers[index] for index in planner.plan.streamed)
        masters = (master for layer in streamed for master in layer.masters)
        wanted = {id(m) for m in masters if m.location is not None}
        if not wanted:
            return assembly
    tables = looked_up(site.module for site in found.sites)

    new: list[Master] = []

    def prepare(masters: list[Master]) -> None:
        chosen = [m for m in masters if m.code is None and can_pay(m, tables)]
        if wanted is not None:
            chosen = [master for master in chosen if id(master) in wanted]
            new.extend(chosen)
        if budget is not None:
            _encode(chosen, policy, budget, Master.encode)
            return
        for master in chosen:
            code = foreseen(master.count, master.codec.rest)
            if code is not None:
                master.code_as(code)

    with torch.inference_mode(False):
        coded = assemble(found, policy, locations, known, prepare)
    if wanted is not None and not _fits(coded, tables_only, planner):
        for master in new:
            master.forget_code()
        coded = assemble(found, policy, locations, known)
    return coded


def _fits(
    assembly: Assembly, tables_only: frozenset[int], planner: PassPlanner
) -> bool:
    """Tell whether the limit has room for what layers are decoded into."""
    try:
        planner.set_assembly(assembly, tuple(sorted(assembly.moving)), tables_only)
    except BudgetExceededError:
        return False
    return True


def foreseen(count: int, dtype: torch.dtype) -> MasterCode | None:
    """Return what a code of so many values will take, without their values."""
    if dtype not in CODED_DTYPES or count * dtype.itemsize < LEAST_CODED_BYTES:
        return None
    return MasterCode(CodeLayout(dtype=dtype, count=count, base=0, patches=0), 0)


def can_code(policy: ResolvedPolicy) -> bool:
    """Tell whether all layers wait in host RAM; files stay as they are."""
    in_ram = policy.onload.device == torch.device("cpu")
    return in_ram and policy.host_limit_bytes is None


def codes_pay(policy: ResolvedPolicy, plan: Plan) -> bool:
    """Tell whether "auto" wants codes.

    Args:
        policy: what the user wants.
        plan: the plan without codes. If it copies nothing over a link in each pass,
            codes would only have to be decoded.
    """
    return policy.codec == "auto" and has_link(policy) and plan.pass_bytes > 0


def has_link(policy: ResolvedPolicy) -> bool:
    """Tell whether weights that wait cross a link to where they compute."""
    return can_code(policy) and policy.compute_device.type != "cpu"


def looked_up(modules: Iterable[nn.Module]) -> frozenset[int]:
    """Return the ids of the tables whose rows are looked up where they rest."""
    return frozenset(
        id(module._parameters.get("weight")) for module in modules if can_gather(module)
    )


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


def renew_codes(
    masters: list[Master], policy: ResolvedPolicy, budget: MemoryBudget
) -> None:
    """Encode again what was dropped, doubted or written to."""
    _encode([m for m in masters if m.has_old_code], policy, budget, Master.encode)


def make_codes(
    masters: list[Master], policy: ResolvedPolicy, budget: MemoryBudget
) -> list[tuple[Master, MasterCode]]:
    """Encode masters without giving them their codes; those that would not shrink go.

    Layers have to be made anew when masters get codes: behind an interrupt here,
    everything is as before.
    """
    made: list[tuple[Master, MasterCode]] = []

    def make(master: Master, encoder: ChunkEncoder) -> None:
        code = master.make_code(encoder)
        if code is not None:
            made.append((master, code))

    _encode(masters, policy, budget, make)
    return made


def _encode(
    masters: list[Master],
    policy: ResolvedPolicy,
    budget: MemoryBudget,
    work: Callable[[Master, ChunkEncoder], None],
) -> None:
    """Encode masters by several threads, on the device if it has room for that."""
    if not masters:
        return
    device = policy.compute_device
    threads, chunk_values = _device_encoders(policy, budget)
    if threads:
        taken = threads * chunk_values * BYTES_PER_VALUE
        budget.reserve("encoding", taken)
        try:
            make = partial(DeviceEncoder, device, chunk_values)
            _encode_in_threads(masters, threads, make, work)
            if taken >= 2 * TIMED_BYTES:
                decode_seconds(device, TIMED_BYTES)  # for figures
        finally:
            torch.cuda.empty_cache()  # no other stream can use what these took
            budget.release("encoding", taken)
    else:
        _encode_in_threads(masters, torch.get_num_threads(), HostEncoder, work)
    if device.type == "cuda":
        fused_decoder(device)  # compiled now rather than in the first forward


def _device_encoders(policy: ResolvedPolicy, budget: MemoryBudget) -> tuple[int, int]:
    """Return how many threads encode on the device, and the values of their chunks."""
    device, limit = policy.compute_device, policy.limit_bytes
    # Who wants as little as possible there shall not find it full at attach.
    if device.type != "cuda" or limit == 0:
        return 0, 0
    most = min(_ENCODING_BYTES, automatic_limit(device) // _ENCODING_SHARE)
    if limit is not None:
        most = min(most, limit - budget.total_used)
    threads = chunk_values = 0
    for chunk_values in CHUNK_VALUES:
        room = max(most, 0) // (chunk_values * BYTES_PER_VALUE)
        threads = min(room, _DEVICE_THREADS, os.cpu_count() or 1)
        if threads >= min(_FEW_THREADS, os.cpu_count() or 1):
            break
    return threads, chunk_values


def _encode_in_threads(
    masters: list[Master],
    threads: int,
    make_encoder: Callable[[], ChunkEncoder],
    work: Callable[[Master, ChunkEncoder], None],
) -> None:
    idle: list[ChunkEncoder] = []

    def encode(master: Master) -> int:
        try:
            encoder = idle.pop()
        except IndexError:
            encoder = make_encoder()
        work(master, encoder)
        idle.append(encoder)
        return master.plain_bytes

    # The largest first, so that all threads end at about the same time.
    ordered = sorted(masters, key=lambda master: -master.plain_bytes)
    total = sum(master.plain_bytes for master in masters)
    with progress_bar("encoding weights", total) as bar:
        if threads == 1 or len(masters) == 1:
            for master in ordered:
                bar.update(encode(master))
            return
        with ThreadPoolExecutor(threads) as pool:
            for nbytes in pool.map(encode, ordered):
                bar.update(nbytes)

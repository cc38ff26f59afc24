"""Plans of checkpoints from the headers of their files; [Note: planning without torch].

A checkpoint tells less than a model. Its tensors are grouped by the names of their
modules, and each is taken to be read by every pass, in the order of the names; which
of them are buffers, or tables whose rows are looked up, only the model knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from .alignment import align
from .checkpoint_index import CheckpointPaths, find_tensors
from .coded_residents import fastest
from .cost import Rates
from .opened_file import GGUF, read_extents
from .plan import LayerSpec, Plan
from .planner import make_plan
from .safetensors_header import ITEMSIZES, TensorExtent
from .tiers import host_bytes_left, host_tier

# Tensors that belong to the root itself have no module's name.
_ROOT = "(root)"


class HeldAs(NamedTuple):
    """The dtypes of one tensor, by the format's codes; see `codec`."""

    rest: str
    resident: str
    compute: str


def held_as_it_is(code: str, on_disk: bool) -> HeldAs:
    """Casts nothing."""
    return HeldAs(code, code, code)


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Where a checkpoint's layers would rest and compute, and as what.

    Attributes:
        device: The compute device by name.
        on_disk: Whether layers rest in their files; else in host RAM.
        host_limit_bytes: The most host RAM for layers, where the others rest in their
            files; None: all rest as `on_disk` says.
        may_stay: Whether a layer may be resident.
        held_as: The dtypes of a tensor whose file has the given one, where it rests on
            disk or not.
        coded_bytes: What so many values of a dtype take where they are coded; 0 where
            they are not.
        codes_kept: Whether a cache has the codes: then layers are coded on disk, too,
            and what they take is known before they are divided.
    """

    device: str
    on_disk: bool
    host_limit_bytes: int | None = None
    may_stay: bool = True
    held_as: Callable[[str, bool], HeldAs] = held_as_it_is
    coded_bytes: Callable[[str, int], int] | None = None
    codes_kept: bool = False

    @property
    def kind(self) -> str:
        """The kind of the compute device."""
        return self.device.partition(":")[0]


def plan_of_headers(
    checkpoint: CheckpointPaths,
    tiers: Tiers,
    *,
    limit_bytes: int | None,
    activation_bytes: int = 0,
    rates: Rates | None = None,
) -> Plan:
    """Plans for a checkpoint from the headers of its files; reads no tensor.

    Args:
        checkpoint: As for `load_model`.
        tiers: Where it rests and computes.
        limit_bytes: As for `make_plan`.
        activation_bytes: Bytes to leave for what the model computes.
        rates: How fast the machine is, if that is known.

    Raises:
        CheckpointError: A file is missing or damaged.
        BudgetExceededError: The limit is below the least that the model needs.
    """
    modules = _by_module(find_tensors(checkpoint, _read_extents))
    names = list(modules)
    chains = _chains(names)
    held = {index for chain in chains for index in chain[:-1]}

    # Of thousands of layers most are of a few kinds.
    kinds = [tuple((one.code, one.nbytes) for one in own) for own in modules.values()]
    sized = cache(partial(_sized, tiers))

    def specs_of(sizes_of: Callable[[int], dict[str, Any]]) -> list[LayerSpec]:
        return [
            LayerSpec(name=name or _ROOT, held=index in held, **sizes_of(index))
            for index, name in enumerate(names)
        ]

    if tiers.host_limit_bytes is None:
        specs = specs_of(lambda index: sized(kinds[index], tiers.on_disk))
    else:
        known = tiers if tiers.codes_kept else replace(tiers, coded_bytes=None)
        in_ram_sized = cache(partial(_sized, known))

        def of_either_tier(index: int) -> dict[str, Any]:
            waiting = in_ram_sized(kinds[index], False)["host_bytes"]
            return {**sized(kinds[index], True), "host_bytes": waiting}

        in_ram = _host_tier(
            specs_of(of_either_tier), tiers.host_limit_bytes, tiers.kind
        )
        specs = specs_of(lambda index: sized(kinds[index], index not in in_ram))

    def plan_at(code_share: float) -> Plan:
        plan = make_plan(
            specs,
            order=[i for i, spec in enumerate(specs) if not spec.in_place],
            chains=chains,
            limit_bytes=limit_bytes,
            activation_bytes=activation_bytes,
            code_share=code_share,
        )
        return replace(plan, device=tiers.device, rates=rates)

    return plan_at(1.0) if rates is None else fastest(plan_at, rates)


def _read_extents(path: Path) -> dict[str, TensorExtent]:
    if path.suffix.lower() != GGUF:
        return read_extents(path)
    # Only these need torch, and the package gguf that knows their packings.
    from .gguf_file import GgufFile

    file = GgufFile(path)
    file.close()
    return file.extents


def _host_tier(specs: list[LayerSpec], host_limit: int, kind: str) -> frozenset[int]:
    """Chooses the layers that wait in host RAM, as attach would.

    Args:
        specs: Each as if read from disk, with what it would take in host RAM.
        host_limit: The host limit in bytes.
        kind: Of the compute device.
    """
    room = host_bytes_left(specs, host_limit, kind)
    return host_tier(specs, range(len(specs)), room)


def dtype_label(dtypes: Iterable[tuple[str, str]]) -> str:
    """Names the dtypes of a layer for readers.

    Args:
        dtypes: Of each tensor, at rest and in its forward.
    """
    labels = sorted({" > ".join(dict.fromkeys(pair)) for pair in dtypes})
    return " + ".join(labels) if len(labels) <= 2 else "mixed"


def _by_module(
    tensors: dict[str, TensorExtent],
) -> dict[str, list[TensorExtent]]:
    """Groups tensors by the module that owns them: a.b.weight is of a.b."""
    modules: dict[str, list[TensorExtent]] = {}
    for name, extent in tensors.items():
        modules.setdefault(name.rpartition(".")[0], []).append(extent)
    return {name: modules[name] for name in sorted(modules, key=_natural)}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts blocks.2 before blocks.10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def _chains(names: list[str]) -> list[tuple[int, ...]]:
    """Lists each module behind those that it lies in: they run while it does."""
    numbers = {name: index for index, name in enumerate(names)}
    chains = []
    for name in names:
        parts = name.split(".") if name else []
        outer = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        chains.append(tuple(numbers[at] for at in outer if at in numbers))
    return chains


def _sized(
    tiers: Tiers, tensors: tuple[tuple[str, int], ...], on_disk: bool
) -> dict[str, Any]:
    """Sizes a layer as `Layer.measure` does, from dtypes and bytes alone.

    Args:
        tiers: Where it rests and computes.
        tensors: The code and the bytes of each.
        on_disk: Whether it waits in its file.

    Returns:
        The fields of a `LayerSpec` that follow from them.
    """
    may_stay = tiers.may_stay
    region = copied = decoded = cast = resident = resident_cast = waiting = 0
    readable = tiers.kind == "cpu" and not on_disk
    as_it_is, as_copied, any_coded = True, True, False
    dtypes = []
    for code, nbytes in tensors:
        held_as = tiers.held_as(code, on_disk)
        count = nbytes // ITEMSIZES[code]
        coded = 0
        codable = not on_disk or tiers.codes_kept
        if tiers.coded_bytes is not None and codable and set(held_as) == {code}:
            coded = tiers.coded_bytes(code, count)
        label = (held_as.rest, held_as.compute)
        dtypes.append((f"{code} coded",) * 2 if coded else label)
        casts = held_as.rest != held_as.compute or coded > 0
        rest = count * ITEMSIZES[held_as.rest]
        waiting += 0 if on_disk else coded or rest
        if not nbytes or (readable and not casts):
            continue
        decoded += rest
        any_coded |= coded > 0
        rest = coded or rest
        copied += rest
        uncast = held_as.resident == held_as.rest
        if not readable:
            region += align(rest)
        elif uncast and not coded:
            may_stay = False
        as_copied &= not readable and uncast
        as_it_is &= as_copied and not coded
        if casts:
            cast += align(count * ITEMSIZES[held_as.compute])
        if held_as.resident != held_as.compute:
            resident_cast += align(count * ITEMSIZES[held_as.compute])
        resident += align(count * ITEMSIZES[held_as.resident])
    return {
        "stream_bytes": region,
        "copy_bytes": copied,
        "cast_bytes": cast,
        "resident_bytes": resident,
        "resident_cast_bytes": resident_cast,
        "transit_bytes": 0 if as_it_is else region,
        "can_stay": may_stay and copied > 0,
        "disk_bytes": copied if on_disk else 0,
        "host_bytes": waiting,
        "decoded_bytes": decoded if any_coded else 0,
        "coded_bytes": region if any_coded and as_copied else 0,
        "dtype": dtype_label(dtypes),
    }

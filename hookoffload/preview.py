"""Plans of models and checkpoints that are not attached: nothing moves, nothing loads.

A checkpoint tells less than a model. Its tensors are grouped by the names of their
modules, and each is taken to be read by every pass, in the order of the names; which
of them are buffers, or tables whose rows are looked up, only the model knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from .assembly import Assembly, assemble
from .budget import MemoryBudget
from .checkpoint import open_checkpoint
from .codec import Codec, choose_codec
from .cost import Rates
from .device_memory import DeviceMemory, align
from .gather import can_gather
from .layer import Layer
from .partition import SiteSketch, check_tensors, partition
from .pass_planner import PassPlanner
from .plan import LayerSpec, Plan
from .planner import make_plan
from .policy import OffloadPolicy, ResolvedPolicy
from .safetensors_file import TensorLocation
from .safetensors_header import CODES
from .session import _GATHER_BYTES, Session

_Path = str | os.PathLike[str]
# What `load_model` takes too.
Checkpoint = _Path | list[_Path] | tuple[_Path, ...]

# Tensors that belong to the root itself have no module's name.
_ROOT = "(root)"


def plan_of_session(session: Session, rates: Rates | None) -> Plan:
    """Returns the plan that stands for an attached model."""
    return _described(session.plan, session.layers, session.policy, rates)


def plan_of_model(model: nn.Module, policy: OffloadPolicy, rates: Rates | None) -> Plan:
    """Plans for a model as attach would; changes nothing.

    Raises:
        ValueError: The policy does not fit this model.
        BudgetExceededError: The limit is below the least that the model needs.
    """
    check_tensors(model)
    resolved = policy.resolve(here=False)
    found = partition(model, resolved.module_map.for_model(model))
    assembly = assemble(found, resolved, {}, {})
    budget = MemoryBudget(None)
    memory = DeviceMemory(resolved.compute_device, budget)
    planner = PassPlanner(resolved, budget, memory)
    order = tuple(sorted(assembly.moving))
    planner.set_assembly(assembly, order, _looked_up(assembly, resolved))
    return _described(planner.plan, assembly.layers, resolved, rates)


def plan_of_checkpoint(
    checkpoint: Checkpoint,
    policy: OffloadPolicy,
    rates: Rates | None,
    *,
    activation_bytes: int = 0,
) -> Plan:
    """Plans for a checkpoint from the headers of its files; reads no tensor.

    Args:
        checkpoint: As for `load_model`.
        policy: The limit, the placements and the dtypes; its module map is not used.
        rates: How fast the machine is, if that is known.
        activation_bytes: Bytes to leave for what the model computes.

    Raises:
        CheckpointError: A file is missing or damaged.
        ValueError: The policy keeps the whole model on the compute device.
        BudgetExceededError: The limit is below the least that the model needs.
    """
    resolved = policy.resolve(here=False)
    on_device = not resolved.onload.on_disk and resolved.onload.device != _CPU
    if on_device:
        raise ValueError(
            f"onload=Placement(device={str(resolved.onload.device)!r}) keeps the whole "
            "model on the compute device, so there is nothing to plan; onload to "
            '"cpu" or "disk"'
        )
    modules = _by_module(open_checkpoint(checkpoint))
    names = list(modules)
    chains = _chains(names)
    held = {index for chain in chains for index in chain[:-1]}
    specs = [
        _spec(name or _ROOT, modules[name], resolved, held=index in held)
        for index, name in enumerate(names)
    ]
    moving = [i for i, spec in enumerate(specs) if not spec.in_place]
    plan = make_plan(
        specs,
        order=moving,
        chains=chains,
        limit_bytes=resolved.limit_bytes,
        activation_bytes=activation_bytes,
    )
    return replace(plan, device=str(resolved.compute_device), rates=rates)


_CPU = torch.device("cpu")


def _described(
    plan: Plan, layers: Sequence[Layer], policy: ResolvedPolicy, rates: Rates | None
) -> Plan:
    """Adds to a plan what only its readers need."""
    on_disk = policy.onload.on_disk
    specs = tuple(
        replace(
            spec,
            disk_bytes=spec.copy_bytes if on_disk else 0,
            dtype=_dtype_label(master.codec for master in layer.masters),
        )
        for spec, layer in zip(plan.layers, layers, strict=True)
    )
    device = str(policy.compute_device)
    return replace(plan, layers=specs, device=device, rates=rates)


def _looked_up(assembly: Assembly, policy: ResolvedPolicy) -> frozenset[int]:
    """Finds tables whose rows are looked up where they rest, as a session does."""
    moved: set[int] = set()
    for site in assembly.sites:
        layers = [assembly.layers[i] for i in site.layers if i in assembly.moving]
        if not (len(layers) == 1 and _is_looked_up(site, layers[0], policy)):
            moved.update(layer.index for layer in layers)
    return frozenset(assembly.moving - moved)


def _is_looked_up(site: SiteSketch, layer: Layer, policy: ResolvedPolicy) -> bool:
    masters = layer.masters
    alone = len(masters) == 1 and len(masters[0].members) == 1
    if not (alone and can_gather(site.module)):
        return False
    on_cpu = policy.compute_device.type == "cpu"
    in_file = on_cpu and not masters[0].codec.casts_streamed
    return in_file or masters[0].nbytes >= _GATHER_BYTES


def _by_module(
    locations: dict[str, TensorLocation],
) -> dict[str, list[TensorLocation]]:
    """Groups tensors by the module that owns them: a.b.weight is of a.b."""
    for file in {location.file for location in locations.values()}:
        file.close()  # the headers said everything
    modules: dict[str, list[TensorLocation]] = {}
    for name, location in locations.items():
        modules.setdefault(name.rpartition(".")[0], []).append(location)
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


def _spec(
    name: str, tensors: list[TensorLocation], policy: ResolvedPolicy, *, held: bool
) -> LayerSpec:
    """Sizes a layer as `Layer.measure` does, from dtypes and counts alone."""
    on_disk = policy.onload.on_disk
    readable = policy.compute_device.type == "cpu" and not on_disk
    storage = None if on_disk else policy.onload.dtype
    kept = None if policy.preparing is None else policy.preparing.dtype
    may_stay = policy.preparing is not None
    region = copied = cast = resident = resident_cast = 0
    as_it_is = True
    codecs = []
    for tensor in tensors:
        codec = _codec(tensor.dtype, storage, kept, policy.compute_dtype)
        codecs.append(codec)
        if not tensor.nbytes or (readable and not codec.casts_streamed):
            continue
        count = tensor.nbytes // tensor.dtype.itemsize
        rest = count * codec.rest.itemsize
        copied += rest
        if not readable:
            region += align(rest)
        elif codec.resident == codec.rest:
            may_stay = False
        as_it_is &= not readable and codec.resident == codec.rest
        if codec.casts_streamed:
            cast += align(count * codec.compute.itemsize)
        if codec.casts_resident:
            resident_cast += align(count * codec.compute.itemsize)
        resident += align(count * codec.resident.itemsize)
    return LayerSpec(
        name=name,
        stream_bytes=region,
        copy_bytes=copied,
        cast_bytes=cast,
        resident_bytes=resident,
        resident_cast_bytes=resident_cast,
        transit_bytes=0 if as_it_is else region,
        held=held,
        can_stay=may_stay and copied > 0,
        disk_bytes=copied if on_disk else 0,
        dtype=_dtype_label(codecs),
    )


@cache
def _codec(
    dtype: torch.dtype,
    storage: torch.dtype | None,
    resident: torch.dtype | None,
    compute: torch.dtype | None,
) -> Codec:
    return choose_codec(
        torch.empty(0, dtype=dtype),
        storage_dtype=storage,
        resident_dtype=resident,
        compute_dtype=compute,
    )


def _dtype_label(codecs: Iterable[Codec]) -> str:
    labels = sorted(
        {
            " > ".join(dict.fromkeys((_short(codec.rest), _short(codec.compute))))
            for codec in codecs
        }
    )
    return " + ".join(labels) if len(labels) <= 2 else "mixed"


def _short(dtype: torch.dtype) -> str:
    return CODES.get(dtype) or str(dtype).removeprefix("torch.")

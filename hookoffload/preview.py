"""Plans of models that are not attached, and of checkpoints under a policy.

Nothing moves and nothing loads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .assembly import Assembly
from .budget import BudgetExceededError, MemoryBudget
from .checkpoint_plan import HeldAs, Tiers, dtype_label, plan_of_headers
from .codable import can_code, check_makes_codes, foreseen
from .codec import Codec, choose_codec
from .coded_residents import LEAST_GAIN
from .coding import assemble_coded
from .cost import Rates
from .device_memory import DeviceMemory
from .gather import lookup_of
from .layer import Layer
from .lossless import known_decode_seconds
from .partition import partition
from .pass_planner import PassPlanner
from .placement import CPU
from .plan import Plan
from .policy import OffloadPolicy
from .registered import check_tensors
from .resolved_policy import ResolvedPolicy
from .session import Session
from .torch_dtypes import CODES, dtype_of

_Path = str | os.PathLike[str]
# What `load_model` takes too.
Checkpoint = _Path | list[_Path] | tuple[_Path, ...]


def plan_of_session(session: Session, rates: Rates | None) -> Plan:
    """Returns the plan that stands for an attached model."""
    known = known_decode_seconds(session.policy.compute_device)
    if rates is not None and session.plan.decoded_bytes and known:
        rate = rates.decode_bytes_per_second or 1 / known
        rates = replace(rates, decode_bytes_per_second=rate)
    return _described(session.plan, session.layers, session.policy, rates)


def plan_of_model(model: nn.Module, policy: OffloadPolicy, rates: Rates | None) -> Plan:
    """Plans for a model as attach would; changes nothing.

    Raises:
        ValueError: The policy does not fit this model.
        BudgetExceededError: The limit is below the least that the model needs.
    """
    check_tensors(model, values=False)
    if policy.codec == "auto":
        raw = plan_of_model(model, replace(policy, codec=None), rates)
        if not can_code(policy.resolve(here=False)):
            return raw
        lossless = replace(policy, codec="lossless")
        return _faster(raw, lambda: plan_of_model(model, lossless, rates))
    resolved = policy.resolve(here=False)
    found = partition(model, resolved.module_map.for_model(model))
    budget = MemoryBudget(None)
    memory = DeviceMemory(resolved.compute_device, budget)
    planner = PassPlanner(resolved, budget, memory)
    assembly = assemble_coded(found, resolved, {}, {}, planner, None)
    order = tuple(sorted(assembly.moving))
    planner.set_assembly(assembly, order, _looked_up(assembly, resolved))
    if rates is not None:
        planner.weigh_codes(rates)
    return _described(planner.plan, assembly.layers, resolved, rates)


def plan_of_checkpoint(
    checkpoint: Checkpoint,
    policy: OffloadPolicy,
    rates: Rates | None,
    *,
    cache_codes: bool = False,
) -> Plan:
    """Plans for a checkpoint from the headers of its files; reads no tensor.

    Args:
        checkpoint: As for `load_model`.
        policy: The limit, the placements and the dtypes; its module map is not used.
        rates: How fast the machine is, if that is known.
        cache_codes: As for `load_model`.

    Raises:
        CheckpointError: A file is missing or damaged.
        ValueError: The policy keeps the whole model on the compute device.
        BudgetExceededError: The limit is below the least that the model needs.
    """
    resolved = policy.resolve(here=False)
    if cache_codes:
        check_makes_codes(resolved)
    on_disk = resolved.onload.on_disk
    if not on_disk and resolved.onload.device != CPU:
        raise ValueError(
            f"onload=Placement(device={str(resolved.onload.device)!r}) keeps the whole "
            "model on the compute device, so there is nothing to plan; onload to "
            '"cpu" or "disk"'
        )
    tiers = Tiers(
        device=str(resolved.compute_device),
        on_disk=on_disk,
        host_limit_bytes=resolved.host_limit_bytes,
        may_stay=resolved.preparing is not None,
        held_as=partial(_held_as, resolved),
    )
    coded = replace(tiers, coded_bytes=_coded_bytes, codes_kept=cache_codes)
    if resolved.codec == "lossless":
        tiers = coded
    limit = resolved.limit_bytes
    plan = plan_of_headers(checkpoint, tiers, limit_bytes=limit, rates=rates)
    if resolved.codec != "auto" or not can_code(resolved):
        return plan
    return _faster(
        plan,
        lambda: plan_of_headers(checkpoint, coded, limit_bytes=limit, rates=rates),
    )


def _faster(raw: Plan, make_coded: Callable[[], Plan]) -> Plan:
    """Chooses as "auto" does; where not all is known, the link is the limit."""
    if not raw.link_bytes:
        return raw
    try:
        coded = make_coded()
    except BudgetExceededError:
        return raw  # there is no room to decode into
    one, other = raw.predict(), coded.predict()
    if one is None or other is None or one.compute_seconds is None:
        return coded
    return coded if other.seconds < one.seconds * (1 - LEAST_GAIN) else raw


def _coded_bytes(code: str, count: int) -> int:
    found = foreseen(count, dtype_of(code, "the checkpoint"))
    return 0 if found is None else found.nbytes


def _held_as(policy: ResolvedPolicy, code: str, on_disk: bool) -> HeldAs:
    kept = policy.preparing
    codec = choose_codec(
        torch.empty(0, dtype=dtype_of(code, "the checkpoint")),
        storage_dtype=None if on_disk else policy.onload.dtype,
        resident_dtype=None if kept is None else kept.dtype,
        compute_dtype=policy.compute_dtype,
    )
    return HeldAs(CODES[codec.rest], CODES[codec.resident], CODES[codec.compute])


def _described(
    plan: Plan, layers: Sequence[Layer], policy: ResolvedPolicy, rates: Rates | None
) -> Plan:
    """Adds to a plan what only its readers need."""
    specs = tuple(
        replace(
            spec,
            dtype=dtype_label(_labels(master.codec) for master in layer.masters),
        )
        for spec, layer in zip(plan.layers, layers, strict=True)
    )
    device = str(policy.compute_device)
    return replace(plan, layers=specs, device=device, rates=rates)


def _looked_up(assembly: Assembly, policy: ResolvedPolicy) -> frozenset[int]:
    """Finds tables whose rows are looked up where they rest, as a session does."""
    moving = assembly.moving
    moved: set[int] = set()
    for site in assembly.sites:
        layers = [assembly.layers[i] for i in site.layers if i in moving]
        if lookup_of(site.module, layers, policy.compute_device) is None:
            moved.update(layer.index for layer in layers)
    return frozenset(moving - moved)


def _labels(codec: Codec) -> tuple[str, str]:
    if codec.coded:
        return (f"{_short(codec.rest)} coded",) * 2
    return _short(codec.rest), _short(codec.compute)


def _short(dtype: torch.dtype) -> str:
    return CODES.get(dtype) or str(dtype).removeprefix("torch.")

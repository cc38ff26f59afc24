"""Attach, detach, and what lies between."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from .partition import check_tensors
from .policy import OffloadPolicy
from .preview import (
    Checkpoint,
    plan_of_checkpoint,
    plan_of_model,
    plan_of_session,
)
from .progress import progress_shown
from .safetensors_file import TensorLocation
from .session import Session
from .state_hooks import owner_of, session_of

if TYPE_CHECKING:
    from .cost import Rates
    from .plan import Plan
    from .run_report import Report
    from .stats import OffloadStats

logger = logging.getLogger(__name__)

_ATTACHING = threading.RLock()

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def attach_offload_hooks(
    model: ModuleT, policy: OffloadPolicy | None = None, *, progress: bool = True
) -> ModuleT:
    """Let a model run although its weights do not fit the compute device.

    Hooks bring each layer's weights to the device for its forward; a plan decides
    which of them stay there, so that the whole run keeps the limit. No module and no
    parameter is replaced, and nothing is moved before the plan stands: whatever is
    wrong, the error comes with the model as it was.

    Args:
        model: any module, its parameters in host RAM (or on a device, from which
            they are taken).
        policy: how much memory, where and in which dtypes; default: unlimited, on the
            accelerator if there is one.
        progress: show bars for what takes longer than a second.

    Returns:
        The same model.

    Raises:
        ValueError: The policy does not fit this model or machine.
        BudgetExceededError: The limit is below the least that the model needs; the
            message says how much that is and why.
        RuntimeError: The model, or a part of it, is attached already.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> model = attach_offload_hooks(model, OffloadPolicy(store="disk", limit_gb=1))
        >>> with torch.no_grad():
        ...     model(torch.zeros(1, 8)).shape
        torch.Size([1, 8])
        >>> model = detach(model)
    """
    with progress_shown(progress):
        return _attach(model, policy or OffloadPolicy(), {})


def _attach(
    model: ModuleT, policy: OffloadPolicy, locations: dict[str, TensorLocation]
) -> ModuleT:
    _check_policy(policy)
    with _ATTACHING:  # of two threads with one model, the second finds it attached
        _check_model(model)
        _check_owners(model)
        resolved = policy.resolve()
        check_tensors(model)
        session = Session(model, resolved, locations, poison=policy.debug)
        _warn_of_unmatched(session)
        session.begin()
    return model


def detach(model: ModuleT) -> ModuleT:
    """Undo `attach_offload_hooks`: no hook is left, every tensor is where it was.

    Works after any exception, also one raised in the middle of a forward. A model
    whose ``storage_dtype`` was narrower than its own keeps the rounded values. One
    that `load_model` left on disk stays a memory map of its files: nothing is read
    until it is used.

    Args:
        model: an attached model.

    Returns:
        The same model.

    Raises:
        RuntimeError: The model is not attached, or is running.

    Example:
        >>> import torch
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2))
        >>> detach(model)
        Linear(in_features=2, out_features=2, bias=True)
    """
    session = _session(model, "detach")
    with session.by_hand("detach"):
        session.end()
    return model


@contextmanager
def offloaded(
    model: ModuleT, policy: OffloadPolicy | None = None, **fields: Any
) -> Iterator[ModuleT]:
    """Attach for the length of a ``with`` block.

    Args:
        model: any module.
        policy: as for `attach_offload_hooks`.
        **fields: fields of `OffloadPolicy`, instead of a policy.

    Raises:
        ValueError: Both a policy and fields are given.

    Example:
        >>> import torch
        >>> with offloaded(torch.nn.Linear(2, 2), limit_gb=2) as model:
        ...     with torch.no_grad():
        ...         model(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """
    if policy is not None and fields:
        raise ValueError(
            f"offloaded() takes either a policy or fields of one, not both: "
            f"policy={policy!r} and {', '.join(fields)}"
        )
    attach_offload_hooks(model, policy or OffloadPolicy(**fields))
    try:
        yield model
    finally:
        if session_of(model) is not None:
            detach(model)


def onload(model: nn.Module) -> None:
    """Bring an attached model to its onload placement now, not at its next forward.

    Args:
        model: an attached model.

    Raises:
        RuntimeError: The model is not attached, or is running.
    """
    session = _session(model, "onload")
    with session.by_hand("onload"):
        session.onload()


def offload(model: nn.Module) -> None:
    """Bring an attached model to its offload placement.

    The library keeps no memory of the compute device for it, and none of the host's if
    it offloads to disk. The next forward brings it back by itself.

    Args:
        model: an attached model.

    Raises:
        RuntimeError: The model is not attached, or is running.
    """
    session = _session(model, "offload")
    with session.by_hand("offload"):
        session.offload()


def set_limit(model: nn.Module, limit_gb: float | Literal["auto"] | None) -> None:
    """Give an attached model another limit, from its next forward on.

    Few layers move: the residents of the smaller limit are among those of the larger.

    Args:
        model: an attached model.
        limit_gb: in GiB; None is unlimited, 0 as little as possible, "auto" what is
            free on the compute device now, less a tenth.

    Raises:
        ValueError: The limit is not a number, or negative.
        BudgetExceededError: It is below the least that the model needs; the old limit
            stands.
        RuntimeError: The model is not attached, or is running.

    Example:
        >>> import torch
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2))
        >>> set_limit(model, 1.5)
        >>> offload_stats(model).limit_bytes / 2**30
        1.5
        >>> model = detach(model)
    """
    session = _session(model, "set_limit")
    device = session.policy.compute_device
    asked = OffloadPolicy(limit_gb=limit_gb, compute_device=device)
    limit = asked.resolve().limit_bytes
    with session.by_hand("set_limit"):
        session.set_limit(limit)


def offload_plan(
    model_or_checkpoint: nn.Module | Checkpoint,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
) -> Plan:
    """Return what is resident, what streams, and what a pass costs.

    Nothing runs, moves or loads for it. A checkpoint is planned from the headers of
    its files: its tensors are grouped by the names of their modules, and each counts
    as read by every pass, because only the model knows better.

    Args:
        model_or_checkpoint: an attached model; any other model, with a policy; or a
            checkpoint as `load_model` takes it: a safetensors file, several, or a
            folder.
        policy: what to plan for; default for a checkpoint: unlimited. Its devices
            need not be there. An attached model has its own.
        rates: how fast the machine is; with them the plan says how long a pass takes.

    Returns:
        The plan; ``print`` it for a table in GiB.

    Raises:
        RuntimeError: The model is not attached, and no policy is given.
        ValueError: The policy does not fit, or the model is attached and has one.
        CheckpointError: A file is missing or damaged.
        BudgetExceededError: The limit is below the least that the model needs.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(8)])
        >>> policy = OffloadPolicy(limit_gb=0.005, compute_device="cuda")
        >>> offload_plan(model, policy)
        Plan(2 of 8 layers resident, 6 streamed)
    """
    if isinstance(model_or_checkpoint, str | os.PathLike | list | tuple):
        _check_policy(policy or OffloadPolicy())
        checkpoint = model_or_checkpoint
        return plan_of_checkpoint(checkpoint, policy or OffloadPolicy(), rates)
    model = model_or_checkpoint
    if policy is None or (isinstance(model, nn.Module) and session_of(model)):
        session = _session(model, "offload_plan", "; or pass a policy to plan for")
        if policy is not None:
            raise ValueError(
                f"{type(model).__name__} is attached and has a policy: leave policy "
                "out. offload_plan(model).curve(limits_gb=[...]) plans for other limits"
            )
        return plan_of_session(session, rates)
    _check_model(model)
    _check_policy(policy)
    return plan_of_model(model, policy, rates)


def offload_stats(model: nn.Module) -> OffloadStats:
    """Return what has happened since attach: bytes, peak, stalls, hits and misses.

    Args:
        model: an attached model.

    Raises:
        RuntimeError: The model is not attached.
    """
    return _session(model, "offload_stats").stats()


def report(model: nn.Module) -> Report:
    """Return what a model has done that was attached with ``record=True``.

    Args:
        model: an attached model.

    Returns:
        The report; ``print`` it, or ``save`` it as a page to look at.

    Raises:
        RuntimeError: The model is not attached, does not record, or is running.

    Example:
        >>> import torch
        >>> policy = OffloadPolicy(compute_device="cpu", store="disk", record=True)
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2), policy)
        >>> with torch.no_grad():
        ...     output = model(torch.zeros(1, 2))
        >>> report(model)
        Report(Linear on cpu, 1 forwards, 1 of them in detail, 1 layers)
        >>> model = detach(model)
    """
    session = _session(model, "report")
    with session.by_hand("report"):
        return session.report()


def _session(model: nn.Module, what: str, or_else: str = "") -> Session:
    session = session_of(model) if isinstance(model, nn.Module) else None
    if session is None:
        raise RuntimeError(
            f"{what}: {type(model).__name__} has no offload hooks; call "
            f"attach_offload_hooks(model, policy) first{or_else}"
        )
    if session.model is not model:
        raise RuntimeError(
            f"{what}: {type(model).__name__} is a part of a "
            f"{type(session.model).__name__} that has offload hooks; pass that"
        )
    return session


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        session = session_of(module)
        if session is not None:
            what = name or type(model).__name__
            raise RuntimeError(
                f"{what} has offload hooks already (attached as "
                f"{type(session.model).__name__}); call detach on that model first"
            )
        if getattr(module, "_hf_hook", None) is not None:
            raise RuntimeError(
                f"{name or type(model).__name__} carries accelerate's hooks "
                f"({type(module._hf_hook).__name__}: device_map, cpu_offload or "
                "enable_model_cpu_offload), which move the same weights. Call "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True) first, "
                "or load without device_map"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or type(model).__name__} was compiled in place "
                "(module.compile()), and hooks that come later may not run around "
                "compiled calls. Attach first, and compile after that"
            )


def _check_owners(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner = owner_of(tensor)
        if owner is not None and not owner.ended:
            raise RuntimeError(
                f"{name} belongs to a {type(owner.model).__name__} that has offload "
                "hooks attached already, and two models cannot both move it. Call "
                "detach on that model first, or attach one module that holds both"
            )


def _check_policy(policy: OffloadPolicy) -> None:
    if not isinstance(policy, OffloadPolicy):
        raise ValueError(
            f"policy must be an OffloadPolicy, not {type(policy).__name__}; for "
            "example OffloadPolicy(limit_gb=2)"
        )


def _warn_of_unmatched(session: Session) -> None:
    if session.policy.module_map.is_registry:
        return  # written for every model of a family: not each entry need match
    for key, near in session.map.unmatched(session.model.modules()):
        hint = f"; the model has {', '.join(near)}" if near else ""
        logger.warning("module_map: no module of the model is a %s%s", key, hint)

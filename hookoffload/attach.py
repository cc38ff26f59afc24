"""Attach, detach, and what lies between."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import nn

from .budget import GIB
from .checks import check_model, check_owners, check_policy, warn_of_unmatched
from .figures import report_of, stats_of
from .group import Group
from .joining import Handover, loaded_alone
from .limits import to_bytes
from .members import Models, Pipeline, are_several, distinct, group_of, members_of
from .pipeline_hook import PipelineHook
from .plan import Plan, Plans
from .policy import OffloadPolicy
from .preview import (
    Checkpoint,
    plan_of_checkpoint,
    plan_of_model,
    plan_of_session,
)
from .progress import progress_shown
from .registered import check_packed, check_tensors
from .safetensors_file import TensorLocation
from .session import Session
from .state_hooks import session_of
from .stats import OffloadStats
from .tensor_bytes import distinct_bytes
from .tiers import host_shares

if TYPE_CHECKING:
    from .cost import Rates
    from .run_report import Report

_ATTACHING = threading.RLock()

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ModelsT = TypeVar("ModelsT", bound=Models)


def attach_offload_hooks(
    models: ModelsT, policy: OffloadPolicy | None = None, *, progress: bool = True
) -> ModelsT:
    """Let models run although their weights do not fit the compute device.

    Hooks bring each layer's weights to the device for its forward; a plan decides
    which of them stay there, so that the whole run keeps the limit. No module and no
    parameter is replaced, and nothing is moved before the plan stands: whatever is
    wrong, the error comes with the models as they were.

    Several models share one limit. Each becomes active by being called; what the others
    keep on the device gives way only as far as the active one needs it.

    Args:
        models: any module, its parameters in host RAM (or on a device, from which
            they are taken); a mapping of names to modules; or anything that has one as
            ``.components``, as diffusers' pipelines do. Components that are not
            modules are left alone. Those that `load_model` attached join the others
            from where they lie, in RAM or in their files.
        policy: how much memory, where and in which dtypes; default: unlimited, on the
            accelerator if there is one.
        progress: show bars for what takes longer than a second.

    Returns:
        The same object.

    Raises:
        ValueError: The policy does not fit these models or this machine, or two of
            the models share modules or tensors.
        BudgetExceededError: The limit is below the least that a model needs; the
            message says how much that is and why.
        RuntimeError: A model, or a part of it, is attached already, or carries
            accelerate's hooks.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> model = attach_offload_hooks(model, OffloadPolicy(store="disk", limit_gb=1))
        >>> with torch.no_grad():
        ...     model(torch.zeros(1, 8)).shape
        torch.Size([1, 8])
        >>> model = detach(model)
    """
    policy = policy or OffloadPolicy()
    with progress_shown(progress):
        if are_several(models):
            _attach_several(models, policy)
        else:
            model: Any = models
            _attach(model, policy, {})
    return models


def _attach(
    model: ModuleT, policy: OffloadPolicy, locations: dict[str, TensorLocation]
) -> ModuleT:
    check_policy(policy)
    with _ATTACHING:  # of two threads with one model, the second finds it attached
        check_model(model)
        check_owners(model)
        resolved = policy.resolve()
        check_tensors(model)
        check_packed(model, resolved.compute_device)
        session = Session(model, resolved, locations, poison=policy.debug)
        warn_of_unmatched([session])
        session.begin()
    return model


def _attach_several(
    models: Mapping[str, Any] | Pipeline, policy: OffloadPolicy
) -> None:
    check_policy(policy)
    with _ATTACHING, ExitStack() as undo:
        members = distinct(members_of(models))
        resolved = policy.resolve()
        group = Group(resolved, members)
        loaded = {n: s for n, m in members.items() if (s := loaded_alone(m))}
        for name, model in members.items():
            if name not in loaded:
                with _named(name):
                    check_model(model)
                    check_owners(model)
                    check_tensors(model)
                    check_packed(model, resolved.compute_device)
        joined: dict[str, Handover] = {}
        for name, session in loaded.items():
            joined[name] = Handover(session)
            undo.callback(joined[name].take_back)
            with _named(name):
                joined[name].begin()
        for name, model in members.items():
            places = joined[name].locations if name in joined else {}
            with _named(name):
                shared = group.share(name, resolved)
                group.members[name] = Session(
                    model, shared, places, poison=policy.debug, group=group
                )
        warn_of_unmatched(group.sessions)
        for name, session in group.members.items():
            with _named(name):
                session.begin()
            undo.callback(session.end)
            PipelineHook(session, name).register()
        undo.pop_all()
        for name, handover in joined.items():
            handover.done(group.members[name])


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in an error which of several models it is about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise


def detach(models: ModelsT) -> ModelsT:
    """Undo `attach_offload_hooks`: no hook is left, every tensor is where it was.

    Works after any exception, also one raised in the middle of a forward. A model
    whose ``storage_dtype`` was narrower than its own keeps the rounded values. One
    that `load_model` left on disk stays a memory map of its files: nothing is read
    until it is used.

    Args:
        models: what was attached. Models that share a limit are detached together.

    Returns:
        The same object.

    Raises:
        RuntimeError: It is not attached, or is running.

    Example:
        >>> import torch
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2))
        >>> detach(model)
        Linear(in_features=2, out_features=2, bias=True)
    """
    sessions = _sessions(models, "detach")
    _require_whole(models, sessions, "detach")
    with ExitStack() as owned, ExitStack() as ends:
        for session in sessions:
            owned.enter_context(session.by_hand("detach"))
        for session in sessions:
            ends.callback(session.end)  # each, whatever becomes of the others
    return models


@contextmanager
def offloaded(
    models: ModelsT, policy: OffloadPolicy | None = None, **fields: Any
) -> Iterator[ModelsT]:
    """Attach for the length of a ``with`` block.

    Args:
        models: as for `attach_offload_hooks`.
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
    attach_offload_hooks(models, policy or OffloadPolicy(**fields))
    try:
        yield models
    finally:
        if _are_attached(models):
            detach(models)


def onload(models: Models) -> None:
    """Bring attached models to their onload placement now, not at the next forward.

    Args:
        models: what was attached, or one of several models.

    Raises:
        RuntimeError: They are not attached, or are running.
    """
    for session in _sessions(models, "onload"):
        with session.by_hand("onload"):
            session.onload()


def offload(models: Models) -> None:
    """Bring attached models to their offload placement.

    The library keeps no memory of the compute device for them, and none of the host's
    if they offload to disk. The next forward brings a model back by itself.

    Args:
        models: what was attached, or one of several models.

    Raises:
        RuntimeError: They are not attached, or are running.
    """
    for session in _sessions(models, "offload"):
        with session.by_hand("offload"):
            session.offload()


def activate(models: Models, names: Sequence[str]) -> None:
    """Say which of several models are needed now: they onload, the others offload.

    There is no need to: a model becomes active by being called, and what then gives
    way is chosen by the order in which models were called before. This is for what
    only the program knows. Models that are named together also keep their place in
    host RAM while they are called in turns, where others that offload to disk leave
    it; that ends when a model is called that was not named.

    Args:
        models: what was attached: a mapping of modules, or a pipeline.
        names: the models that are needed; none: all offload.

    Raises:
        ValueError: A name is unknown.
        RuntimeError: The models are not attached, or one of them is running.

    Example:
        >>> import torch
        >>> models = {"text": torch.nn.Linear(2, 2), "vae": torch.nn.Linear(2, 2)}
        >>> models = attach_offload_hooks(models, OffloadPolicy(compute_device="cpu"))
        >>> activate(models, ["vae"])
        >>> activate(models, [])
        >>> models = detach(models)
    """
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is a string; give a list: [{names!r}]")
    if not are_several(models):
        raise ValueError(
            "activate takes what holds several models, a mapping or a pipeline, and "
            f"not a {type(models).__name__}; for one model there are onload and offload"
        )
    sessions = _sessions(models, "activate")
    members = members_of(models)
    chosen = []
    for name in names:
        session = session_of(members[name]) if name in members else None
        if session is None:
            raise ValueError(
                f"there is no model {name!r} among those that are attached: "
                f"{', '.join(n for n, m in members.items() if session_of(m))}"
            )
        chosen.append(session)
    group = sessions[0].group
    assert group is not None, "several models are attached as a group"
    group.choose(chosen)


def set_limit(
    models: Models,
    limit_gb: float | Literal["auto", "same"] | None = "same",
    *,
    host_limit_gb: float | Literal["same"] | None = "same",
) -> None:
    """Give attached models other limits, from the next forward on.

    Few layers move: the residents of the smaller limit are among those of the larger,
    and so are the layers that wait in host RAM. What leaves RAM goes back to the file
    that it was read from, if that still holds it; else it is written to ``disk_dir``.

    Args:
        models: what was attached. Models that share a limit have one for all of them.
        limit_gb: in GiB; None is unlimited, 0 as little as possible, "auto" what is
            free on the compute device now, less a tenth. "same" is that of before.
        host_limit_gb: the most host RAM for weights that wait, in GiB; as the field of
            `OffloadPolicy`. None: no such limit. "same" is that of before.

    Raises:
        ValueError: A limit is not a number, or negative, or contradicts the policy.
        BudgetExceededError: It is below the least that a model needs; the old limits
            stand.
        CheckpointError: What leaves RAM cannot be written; the old limits stand.
        RuntimeError: The models are not attached, or are running.

    Example:
        >>> import torch
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2))
        >>> set_limit(model, 1.5, host_limit_gb=4)
        >>> offload_stats(model).limit_bytes / 2**30
        1.5
        >>> model = detach(model)
    """
    sessions = _sessions(models, "set_limit")
    _require_whole(models, sessions, "set_limit")
    group = sessions[0].group
    policy = sessions[0].policy if group is None else group.policy
    policy = policy.with_limits(limit_gb, host_limit_gb)
    with ExitStack() as owned:
        for session in sessions:
            owned.enter_context(session.by_hand("set_limit"))
        if group is None:
            sessions[0].limits.keep(policy)
        else:
            group.set_limits(policy)


@overload
def offload_plan(
    models: nn.Module | Checkpoint,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
) -> Plan: ...


@overload
def offload_plan(
    models: Mapping[str, Any] | Pipeline,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
) -> Plans: ...


def offload_plan(
    models: Models | Checkpoint,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
) -> Plan | Plans:
    """Return what is resident, what streams, and what a pass costs.

    Nothing runs, moves or loads for it. A checkpoint is planned from the headers of
    its files: its tensors are grouped by the names of their modules, and each counts
    as read by every pass, because only the model knows better.

    Args:
        models: an attached model; any other model, with a policy; several of either
            kind, as `attach_offload_hooks` takes them; or a checkpoint as `load_model`
            takes it: a safetensors file, several, or a folder.
        policy: what to plan for; default for a checkpoint: unlimited. Its devices
            need not be there. An attached model has its own.
        rates: how fast the machine is; with them the plan says how long a pass takes.

    Returns:
        The plan; ``print`` it for a table in GiB. Of several models a mapping of
        their names to their plans, each as if the model had the limit for itself.

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
    if isinstance(models, str | os.PathLike | list | tuple):
        check_policy(policy or OffloadPolicy())
        return plan_of_checkpoint(models, policy or OffloadPolicy(), rates)
    if are_several(models):
        members = distinct(members_of(models))
        if policy is None or _are_attached(models):
            members = {
                name: model for name, model in members.items() if session_of(model)
            }
        if policy is None:
            _sessions(models, "offload_plan", "; or pass a policy to plan for")
        policies = _policies(members, policy)
        return Plans({n: _plan_of(m, policies[n], rates) for n, m in members.items()})
    return _plan_of(models, policy, rates)


def _policies(
    members: Mapping[str, nn.Module], policy: OffloadPolicy | None
) -> dict[str, OffloadPolicy | None]:
    """Return a policy for each of several models, with its share of the host limit."""
    if policy is None or policy.host_limit_gb is None:
        return dict.fromkeys(members, policy)
    sizes = {
        name: distinct_bytes(model.parameters()) for name, model in members.items()
    }
    shares = host_shares(to_bytes(policy.host_limit_gb), sizes)
    return {
        name: replace(policy, host_limit_gb=(share or 0) / GIB)
        for name, share in shares.items()
    }


def _plan_of(model: Any, policy: OffloadPolicy | None, rates: Rates | None) -> Plan:
    if policy is None or (isinstance(model, nn.Module) and session_of(model)):
        what = "; or pass a policy to plan for"
        session = _session(model, "offload_plan", what)
        if policy is not None:
            raise ValueError(
                f"{type(model).__name__} is attached and has a policy: leave policy "
                "out. offload_plan(model).curve(limits_gb=[...]) plans for other limits"
            )
        return plan_of_session(session, rates)
    check_model(model)
    check_policy(policy)
    return plan_of_model(model, policy, rates)


def offload_stats(models: Models) -> OffloadStats:
    """Return what has happened since attach: bytes, peak, stalls, hits and misses.

    Args:
        models: what was attached, or one of several models. Of all of them, the
            figures are sums, and the peak is that of the limit which they share.

    Raises:
        RuntimeError: They are not attached.
    """
    sessions = _sessions(models, "offload_stats")
    group = sessions[0].group
    if group is None or not are_several(models):
        return stats_of(sessions[0])
    by_model = {n: stats_of(s) for n, s in group.members.items() if not s.ended}
    host_limit = group.policy.host_limit_bytes
    return OffloadStats.of_several(by_model, group.budget, host_limit)


def report(model: nn.Module) -> Report:
    """Return what a model has done that was attached with ``record=True``.

    Args:
        model: an attached model; of several, one of them.

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
        return report_of(session)


def _sessions(models: Models, what: str, or_else: str = "") -> list[Session]:
    """Return the sessions of what is attached.

    Raises:
        RuntimeError: It is not, or is a part of what is.
    """
    if are_several(models):
        group = group_of(models)
        if group is not None:
            return group.sessions
    session = session_of(models) if isinstance(models, nn.Module) else None
    if session is None:
        raise RuntimeError(
            f"{what}: {type(models).__name__} has no offload hooks; call "
            f"attach_offload_hooks(model, policy) first{or_else}"
        )
    if session.model is not models:
        raise RuntimeError(
            f"{what}: {type(models).__name__} is a part of a "
            f"{type(session.model).__name__} that has offload hooks; pass that"
        )
    return [session]


def _session(model: nn.Module, what: str, or_else: str = "") -> Session:
    """Return the session of one model."""
    if are_several(model):
        raise ValueError(
            f"{what} takes one model, and {type(model).__name__} holds several: "
            f"{', '.join(members_of(model))}. Pass one of these"
        )
    return _sessions(model, what, or_else)[0]


def _are_attached(models: Models) -> bool:
    if are_several(models):
        return group_of(models) is not None
    return isinstance(models, nn.Module) and session_of(models) is not None


def _require_whole(models: Models, sessions: list[Session], what: str) -> None:
    """Raise if one of several models is given where only all of them make sense."""
    group = sessions[0].group
    if group is not None and not are_several(models):
        raise RuntimeError(
            f"{what}: {group.name_of(sessions[0])} shares its limit with other models "
            f"({', '.join(group.members)}); pass the pipeline, or the mapping of all"
        )

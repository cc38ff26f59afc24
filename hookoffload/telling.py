"""What a program can ask: plans, figures, reports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from .attached import are_attached, one_session, sessions_of
from .budget import GIB
from .checks import check_model, check_policy
from .figures import report_of, stats_of
from .limits import to_bytes
from .members import Models, Pipeline, are_several, distinct, members_of
from .plan import Plan, Plans
from .policy import OffloadPolicy
from .preview import (
    Checkpoint,
    plan_of_checkpoint,
    plan_of_model,
    plan_of_session,
)
from .state_hooks import session_of
from .stats import OffloadStats
from .tensor_bytes import distinct_bytes
from .tiers import host_shares

if TYPE_CHECKING:
    from .cost import Rates
    from .run_report import Report


@overload
def offload_plan(
    models: nn.Module | Checkpoint,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
    cache_codes: bool = False,
) -> Plan: ...


@overload
def offload_plan(
    models: Mapping[str, Any] | Pipeline,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
    cache_codes: bool = False,
) -> Plans: ...


def offload_plan(
    models: Models | Checkpoint,
    policy: OffloadPolicy | None = None,
    *,
    rates: Rates | None = None,
    cache_codes: bool = False,
) -> Plan | Plans:
    """Return what is resident, what streams, and what a pass costs.

    Nothing runs, moves or loads for it. A checkpoint is planned from the headers of
    its files: its tensors are grouped by the names of their modules, and each counts
    as read by every pass, because only the model knows better.

    Args:
        models: an attached model; any other model, with a policy, also one on the meta
            device, without values; several of either kind, as `attach_offload_hooks`
            takes them; or a checkpoint as `load_model` takes it: a safetensors or GGUF
            file, several, or a folder.
        policy: what to plan for; default for a checkpoint: unlimited. Its devices
            need not be there. An attached model has its own.
        rates: how fast the machine is; with them the plan says how long a pass takes.
        cache_codes: as for `load_model`, and for a checkpoint only.

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
        return plan_of_checkpoint(
            models, policy or OffloadPolicy(), rates, cache_codes=cache_codes
        )
    if cache_codes:
        raise ValueError(
            "cache_codes=True says how a checkpoint will be loaded; leave it out for "
            "models, whose plan tells by itself what is coded"
        )
    if are_several(models):
        members = distinct(members_of(models))
        if policy is None or are_attached(models):
            members = {
                name: model for name, model in members.items() if session_of(model)
            }
        if policy is None:
            sessions_of(models, "offload_plan", "; or pass a policy to plan for")
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
        session = one_session(model, "offload_plan", what)
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
    sessions = sessions_of(models, "offload_stats")
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
        >>> from hookoffload import attach_offload_hooks, detach
        >>> policy = OffloadPolicy(compute_device="cpu", store="disk", record=True)
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2), policy)
        >>> with torch.no_grad():
        ...     output = model(torch.zeros(1, 2))
        >>> report(model)
        Report(Linear on cpu, 1 forwards, 1 of them in detail, 1 layers)
        >>> model = detach(model)
    """
    session = one_session(model, "report")
    with session.ownership.by_hand("report"):
        return report_of(session)

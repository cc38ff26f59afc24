"""Attach and detach."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from .attached import are_attached, require_whole, sessions_of
from .cached_codes import CodeCache
from .checks import check_model, check_owners, check_policy, warn_of_unmatched
from .fp8_choice import tell_of_wide_linears
from .group import Group
from .joining import Handover, loaded_alone
from .members import Models, Pipeline, are_several, distinct, members_of
from .pipeline_hook import PipelineHook
from .policy import OffloadPolicy
from .progress import progress_shown
from .registered import check_packed, check_tensors
from .safetensors_file import TensorLocation
from .session import Session

if TYPE_CHECKING:
    pass

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
            attach_one(model, policy, {})
    return models


def attach_one(
    model: ModuleT,
    policy: OffloadPolicy,
    locations: dict[str, TensorLocation],
    code_cache: CodeCache | None = None,
) -> ModuleT:
    """Attach a model some of whose tensors lie in files, by name.

    Args:
        model: the model.
        policy: what the user wants.
        locations: where tensors lie; with a cache, that of their codes is added.
        code_cache: where their codes are kept, if they are to be.
    """
    check_policy(policy)
    with _ATTACHING:  # of two threads with one model, the second finds it attached
        check_model(model)
        check_owners(model)
        resolved = policy.resolve()
        check_tensors(model)
        check_packed(model, resolved.compute_device)
        session = Session(
            model, resolved, locations, poison=policy.debug, code_cache=code_cache
        )
        warn_of_unmatched([session])
        tell_of_wide_linears([session])
        session.begin()
    return model


def _attach_several(
    models: Mapping[str, Any] | Pipeline, policy: OffloadPolicy
) -> None:
    check_policy(policy)
    with _ATTACHING, ExitStack() as undo:
        members = distinct(members_of(models))
        resolved = policy.resolve()
        loaded = {n: s for n, m in members.items() if (s := loaded_alone(m))}
        for name, model in members.items():
            if name not in loaded:
                with _named(name):
                    check_model(model)
                    check_owners(model)
                    check_tensors(model)
                    check_packed(model, resolved.compute_device)
        group = Group(resolved, members)
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
        tell_of_wide_linears(group.sessions)
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
    sessions = sessions_of(models, "detach")
    require_whole(models, sessions, "detach")
    with ExitStack() as owned, ExitStack() as ends:
        for session in sessions:
            owned.enter_context(session.ownership.by_hand("detach"))
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
        if are_attached(models):
            detach(models)

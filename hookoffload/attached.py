"""What is attached: from what a user passes to sessions."""

from __future__ import annotations

from torch import nn

from .members import Models, are_several, group_of, members_of
from .session import Session
from .state_hooks import session_of


def sessions_of(models: Models, what: str, or_else: str = "") -> list[Session]:
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


def one_session(model: nn.Module, what: str, or_else: str = "") -> Session:
    """Return the session of one model.

    Raises:
        RuntimeError: It is not attached.
        ValueError: It holds several.
    """
    if are_several(model):
        raise ValueError(
            f"{what} takes one model, and {type(model).__name__} holds several: "
            f"{', '.join(members_of(model))}. Pass one of these"
        )
    return sessions_of(model, what, or_else)[0]


def are_attached(models: Models) -> bool:
    """Tell whether there is anything to detach."""
    if are_several(models):
        return group_of(models) is not None
    return isinstance(models, nn.Module) and session_of(models) is not None


def require_whole(models: Models, sessions: list[Session], what: str) -> None:
    """Raise if one of several models is given where only all of them make sense."""
    group = sessions[0].group
    if group is not None and not are_several(models):
        raise RuntimeError(
            f"{what}: {group.name_of(sessions[0])} shares its limit with other models "
            f"({', '.join(group.members)}); pass the pipeline, or the mapping of all"
        )

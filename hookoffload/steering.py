"""What a program does to attached models by hand: where they are, and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

from .attached import require_whole, sessions_of
from .members import Models, are_several, members_of
from .state_hooks import session_of


def onload(models: Models) -> None:
    """Bring attached models to their onload placement now, not at the next forward.

    Args:
        models: what was attached, or one of several models.

    Raises:
        RuntimeError: They are not attached, or are running.
    """
    for session in sessions_of(models, "onload"):
        with session.ownership.by_hand("onload"):
            session.placement.onload()


def offload(models: Models) -> None:
    """Bring attached models to their offload placement.

    The library keeps no memory of the compute device for them, and none of the host's
    if they offload to disk. The next forward brings a model back by itself.

    Args:
        models: what was attached, or one of several models.

    Raises:
        RuntimeError: They are not attached, or are running.
    """
    for session in sessions_of(models, "offload"):
        with session.ownership.by_hand("offload"):
            session.placement.offload()


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
        >>> from hookoffload import OffloadPolicy, attach_offload_hooks, detach
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
    sessions = sessions_of(models, "activate")
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
        >>> from hookoffload import attach_offload_hooks, detach, offload_stats
        >>> model = attach_offload_hooks(torch.nn.Linear(2, 2))
        >>> set_limit(model, 1.5, host_limit_gb=4)
        >>> offload_stats(model).limit_bytes / 2**30
        1.5
        >>> model = detach(model)
    """
    sessions = sessions_of(models, "set_limit")
    require_whole(models, sessions, "set_limit")
    group = sessions[0].group
    policy = sessions[0].policy if group is None else group.policy
    policy = policy.with_limits(limit_gb, host_limit_gb)
    with ExitStack() as owned:
        for session in sessions:
            owned.enter_context(session.ownership.by_hand("set_limit"))
        if group is None:
            sessions[0].limits.keep(policy)
        else:
            group.set_limits(policy)

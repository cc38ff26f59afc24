"""What is looked at before anything is attached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from torch import nn

from .policy import OffloadPolicy
from .refusals import require_no_group_offloading
from .registered import plain_tensors
from .state_hooks import owner_of, session_of
from .wrappers import require_undivided

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)


def check_model(model: nn.Module) -> None:
    """Refuse a model that something else moves already."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        session = session_of(module)
        if session is not None:
            what = name or type(model).__name__
            raise RuntimeError(
                f"{what} has offload hooks already (attached as {session.label}); "
                "call detach on what was attached first"
            )
        require_no_group_offloading(name or "the model", module)
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
        if type(module).__name__ == "OptimizedModule" and _is_most_of(module, model):
            logger.warning(
                "%s was compiled as a whole (torch.compile) and moves as one layer: "
                "all of its weights are on the compute device during its forward. "
                "Attach first and compile after that, or compile its blocks",
                name or "the model",
            )
    require_undivided(model)


def _is_most_of(module: nn.Module, model: nn.Module) -> bool:
    """Tell whether a module has more than half of a model's weights."""
    inside, all_of_it = (sum(p.nbytes for p in m.parameters()) for m in (module, model))
    return 2 * inside > all_of_it


def check_owners(model: nn.Module) -> None:
    """Refuse a model whose tensors another attached one moves."""
    for name, tensor in plain_tensors(model):
        owner = owner_of(tensor)
        if owner is not None and not owner.ended:
            raise RuntimeError(
                f"{name} belongs to {owner.label}, which has offload hooks attached "
                "already, and two models cannot both move it. Call detach on that "
                "model first, or attach one module that holds both"
            )


def check_policy(policy: OffloadPolicy) -> None:
    """Refuse what is no policy."""
    if not isinstance(policy, OffloadPolicy):
        raise ValueError(
            f"policy must be an OffloadPolicy, not {type(policy).__name__}; for "
            "example OffloadPolicy(limit_gb=2)"
        )


def warn_of_unmatched(sessions: Sequence[Session]) -> None:
    """Name the entries of the user's map that match no module of any model."""
    first = sessions[0]
    if first.policy.module_map.is_registry:
        return  # written for every model of a family: not each entry need match
    modules = chain.from_iterable(session.model.modules() for session in sessions)
    for key, near in first.map.unmatched(modules):
        hint = f"; the model has {', '.join(near)}" if near else ""
        logger.warning("module_map: no module of the model is a %s%s", key, hint)

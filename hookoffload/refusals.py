"""What hangs on a user's modules: it refuses to be copied, and can be found again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from torch import nn

if TYPE_CHECKING:
    from .session import Session


class NotCopied:
    """Base of what hangs on a user's modules: a copied hook would run the original.

    Attributes:
        session: what it belongs to.
    """

    __slots__ = ()

    session: Session

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse to be copied with the model."""
        refuse_copy(self.session)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled with the model."""
        refuse_copy(self.session)


def refuse_copy(session: Session) -> NoReturn:
    """Raise the error that names what to do."""
    raise RuntimeError(
        f"{session.label} has offload hooks attached and cannot be copied or pickled; "
        f"call {session.undo} first and attach again after, or save its state_dict()"
    )


def require_no_group_offloading(name: str, module: nn.Module) -> None:
    """Raise if diffusers' own offloading moves a module's weights as well.

    It says so by an attribute, which it sets at any time and asks nobody.
    """
    registry = module.__dict__.get("_diffusers_hook")
    if any("group_offloading" in key for key in getattr(registry, "hooks", ())):
        raise RuntimeError(
            f"{name} ({type(module).__name__}) has diffusers' group offloading, which "
            "moves the same weights. Use one of the two: attach offload hooks to "
            "models without it, and call detach before enable_group_offload"
        )


def purge_hooks(session: Session) -> None:
    """Take every hook of a session off its model, also those without a handle."""
    named = session.model.__dict__.get("_hf_hook")  # see `PipelineHook`
    if isinstance(named, NotCopied):
        del session.model.__dict__["_hf_hook"]
    for module in session.model.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._state_dict_pre_hooks,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
            module._load_state_dict_post_hooks,
        ):
            for key, hook in list(hooks.items()):
                # Bound methods, partials of them, and PyTorch's own wrapper of them.
                inner = getattr(hook, "func", None) or getattr(hook, "hook", None)
                owner = getattr(inner or hook, "__self__", None)
                if isinstance(owner, NotCopied) and owner.session is session:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)


def hint_at_accelerate(model: nn.Module) -> str:
    """Say who took a model's values, if accelerate's hooks were hung while attached."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if type(hook).__module__.startswith("accelerate"):
            return (
                f". {name or type(model).__name__} has been given accelerate's hooks "
                f"({type(hook).__name__}) meanwhile, which move the same weights: "
                "accelerate.hooks.remove_hook_from_submodules(model) brings them back"
            )
    return ""

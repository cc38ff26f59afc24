"""What diffusers asks a pipeline's models: where they compute, and who moves them."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .refusals import NotCopied
from .session import Session


class PipelineHook(NotCopied):
    """Stands where accelerate puts its own hook, and moves nothing.

    [Note: the execution device] A diffusers pipeline makes latents and other inputs on
    its ``_execution_device``. It finds that as the ``execution_device`` of what its
    models carry as ``_hf_hook``, else takes the device of a model's first parameter,
    which is that of host RAM. So each of several models gets this attribute, as
    accelerate's ``cpu_offload`` sets it; detach deletes it. What takes accelerate's
    hooks off to put its own in their place (``enable_model_cpu_offload``) calls
    `detach_hook` before it does anything else, and is refused there.

    Args:
        session: what the model is attached to.
        name: the model's name among the others.

    Attributes:
        execution_device: the compute device.
        io_same_device: accelerate's hooks have it, and transformers sets it. Outputs
            stay on the compute device all the same.
    """

    __slots__ = ("_name", "execution_device", "io_same_device", "session")

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.execution_device = session.policy.compute_device
        self.io_same_device = False
        self._name = name

    def register(self) -> None:
        """Set the attribute."""
        self.session.model.__dict__["_hf_hook"] = self

    def pre_forward(
        self, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Do nothing: parts that ``encode`` or ``decode`` call have hooks."""
        return args, kwargs

    def detach_hook(self, module: nn.Module) -> NoReturn:
        """Refuse to give way to another one."""
        raise RuntimeError(
            f"{self._name} ({type(module).__name__}) has offload hooks attached, which "
            f"move its weights. Call {self.session.undo} before "
            "enable_model_cpu_offload, enable_sequential_cpu_offload or the like"
        )

"""Low-rank adapters: what they hold on the compute device, and the hooks that add them.

[Note: numerics of adapters] A layer with adapters returns

    forward(x) + up(down(x))

where ``down`` and ``up`` hold the factors of all its LoRAs one below the other, and
``up`` has each one's ``scale * alpha / rank`` multiplied in before it is rounded, once,
to the dtype in which the layer computes. The base weight is never touched. So the
result equals that of a LoRA that is not merged up to the rounding of that dtype; it is
not, bit for bit, what a merged weight gives, which rounds ``weight + up @ down``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .alignment import align
from .budget import BudgetExceededError, format_gib
from .device_memory import Block
from .refusals import NotCopied

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

_CONVOLUTIONS = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
ADAPTABLE = (nn.Linear, *_CONVOLUTIONS)


class Adapter(NotCopied, ABC):
    """The LoRAs of one layer, as one pair of factors.

    Args:
        session: what the layer is attached to.
        module: the layer.
        down: first factor, in host RAM.
        up: second factor, in host RAM; see the subclasses for its shape.
    """

    __slots__ = ("_fresh", "_handle", "_host", "down", "module", "session", "up")

    rank_dim: int  # of `up`

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> None:
        self.session = session
        self.module = module
        self.down = down
        self.up = up
        self._host: tuple[torch.Tensor, torch.Tensor] | None = (down, up)
        self._handle: RemovableHandle | None = None
        # Whether the layer's own forward makes an output that nobody else holds.
        own: Any = next(c for c in type(module).__mro__ if c in ADAPTABLE)
        self._fresh = type(module).forward is own.forward and "forward" not in vars(
            module
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the compute device."""
        return align(self.down.nbytes) + align(self.up.nbytes)

    def joined(self, other: Adapter) -> Adapter:
        """Return an adapter that adds what this one and another one add."""
        down, up = self._at_rest()
        more_down, more_up = other._at_rest()
        return type(self)(
            self.session,
            self.module,
            torch.cat([down, more_down]),
            torch.cat([up, more_up], self.rank_dim),
        )

    def place(self, memory: torch.Tensor) -> None:
        """Compute with copies of the factors in ``memory``, `nbytes` bytes of it."""
        down = _copied(self.down, memory)
        up = _copied(self.up, memory[align(self.down.nbytes) :])
        self.down, self.up = down, up
        if memory.device.type == "cpu":
            self._host = None  # the host needs no second copy

    def put_to_rest(self) -> None:
        """Let go of the memory of the compute device."""
        self._host = self.down, self.up = self._at_rest()

    def _at_rest(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._host or (self.down.clone(), self.up.clone())

    def register(self) -> None:
        """Hang the hook on the layer.

        Prepended: the user's hooks see the output with the LoRA in it, and nobody has
        kept the output before.
        """
        if self._handle is None:
            self._handle = self.module.register_forward_hook(
                self.post, prepend=True, with_kwargs=True
            )

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @abstractmethod
    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Add the product to the output; in place where nobody can tell."""

    def _may_write(self, x: torch.Tensor, output: torch.Tensor) -> bool:
        """Tell whether the output is this call's own, plain, and as precise as it is.

        A hook that ran earlier may have kept it, or returned something else.
        """
        handle = self._handle
        return (
            self._fresh
            and type(output) is torch.Tensor
            and type(x) is torch.Tensor
            and x.dtype == output.dtype == self.down.dtype
            and not output.is_nested
            and output.is_contiguous()
            and not torch_module._global_forward_hooks
            and handle is not None
            and next(iter(self.module._forward_hooks)) == handle.id
        )

    def _sum(self, output: Any, delta: torch.Tensor) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise RuntimeError(
                f"{type(self.module).__name__} returns a {type(output).__name__} and "
                "not a tensor, so its LoRA cannot be added. Call clear_lora(model)"
            )
        return output + delta.to(output.dtype)


class LinearAdapter(Adapter):
    """Factors ``(rank, in)`` and ``(rank, out)``."""

    __slots__ = ()

    rank_dim = 0

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Add the product to the output."""
        x = args[0] if args else kwargs["input"]
        down, up = self.down, self.up
        if self._may_write(x, output):
            hidden = functional.linear(x, down)
            rank, width = up.shape
            output.view(-1, width).addmm_(hidden.reshape(-1, rank), up)
            return None
        hidden = functional.linear(x.to(down.dtype), down)
        return self._sum(output, torch.matmul(hidden, up))


class ConvAdapter(Adapter):
    """Factors ``(rank, in, *kernel)`` and ``(out, rank, 1, ...)``."""

    __slots__ = ()

    rank_dim = 1

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Add the product to the output."""
        x = args[0] if args else kwargs["input"]
        layer: Any = self.module
        down = self.down
        convolve = next(f for c, f in _CONVOLUTIONS.items() if isinstance(layer, c))
        write = self._may_write(x, output)
        padded, padding = x.to(down.dtype), layer.padding
        if layer.padding_mode != "zeros":
            padded = functional.pad(
                padded, layer._reversed_padding_repeated_twice, layer.padding_mode
            )
            padding = 0
        hidden = convolve(padded, down, None, layer.stride, padding, layer.dilation)
        delta = convolve(hidden, self.up)
        if write:
            output.add_(delta)
            return None
        return self._sum(output, delta)


class Adapters:
    """All adapters of one attached model.

    Args:
        session: what they belong to.
    """

    __slots__ = ("_block", "_by_module", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by_module: dict[int, Adapter] = {}
        self._block: Block | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return _total(self._by_module)

    def add(self, adapters: Iterable[Adapter]) -> None:
        """Add to what there is, all or none of them.

        Raises:
            BudgetExceededError: The limit leaves no room beside the least that the
                model needs.
        """
        wanted = dict(self._by_module)
        for adapter in adapters:
            before = wanted.get(id(adapter.module))
            wanted[id(adapter.module)] = before.joined(adapter) if before else adapter
        nbytes = _total(wanted)
        try:
            self._session.planner.set_adapter_bytes(nbytes)
        except BudgetExceededError as error:
            raise BudgetExceededError(
                f"no room for {format_gib(nbytes)} of LoRA factors on the compute "
                f"device, and none was applied: {error}"
            ) from error
        self._replace(wanted)

    def clear(self) -> None:
        """Take all of them off."""
        self._session.planner.set_adapter_bytes(0)
        self._replace({})

    def onload(self) -> None:
        """Bring the factors to the compute device, if they are not there."""
        nbytes = _total(self._by_module)
        if self._block is not None or not nbytes:
            return
        self._session.placement.make_room(nbytes)
        self._block = self._session.mover.memory.allocate("adapters", nbytes)
        memory = self._block.bytes
        for adapter in self._by_module.values():
            adapter.place(memory[: adapter.nbytes])
            memory = memory[adapter.nbytes :]

    def release(self) -> None:
        """Have the factors in host RAM, and give the memory back."""
        for adapter in self._by_module.values():
            adapter.put_to_rest()
        if self._block is not None:
            self._session.mover.memory.free(self._block)
            self._block = None

    def forget(self) -> None:
        """Take the hooks off and drop the factors, behind detach."""
        for adapter in self._by_module.values():
            adapter.remove()
        self.release()
        self._by_module = {}

    def warn_of_unused(self) -> None:
        """Say which adapters do nothing, after a forward has shown it."""
        if not self._by_module:
            return
        names = {name for _, name in self._session.passes.joined}
        for name, module in self._session.model.named_modules():
            if id(module) in self._by_module and f"{name}.weight" in names:
                logger.warning(
                    "the LoRA of %s has no effect: another module reads its weight "
                    "without calling it. Merge the LoRA into the weights instead",
                    name,
                )

    def _replace(self, wanted: dict[int, Adapter]) -> None:
        """Put other adapters in the place of these, for which the plan has room."""
        before = self._by_module
        try:
            self._switch(wanted)
        except BaseException:
            self._session.planner.set_adapter_bytes(_total(before))
            self._switch(before)
            raise

    def _switch(self, wanted: dict[int, Adapter]) -> None:
        session = self._session
        self.forget()
        self._by_module = wanted
        # Where all layers stayed there were no hooks, and now they may not all stay.
        session.hooks.hang_all()
        session.passes.keep_to_plan()
        if session.placement.onloaded:
            self.onload()
        for adapter in wanted.values():
            adapter.register()


def _total(adapters: dict[int, Adapter]) -> int:
    return sum(adapter.nbytes for adapter in adapters.values())


def _copied(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    copy = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)

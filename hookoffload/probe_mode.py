"""What the probe puts on PyTorch's stack of modes, and what Ctrl-C leaves there.

[Note: modes left behind]
Ctrl-C ends a pass without its post hooks, and the mode stays on the stack of its
thread; nobody but that thread can take it off. Until then it must do no harm: it refers
to its probe weakly, so that the model can go, and a probe that ended or whose pass is
no longer under way looks at nothing. It is taken off where the same thread calls or
detaches any model that has hooks of this library. That also ends ``force_eager``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .compiling import run_uncompiled

if TYPE_CHECKING:
    from .probe import Probe


class ProbeMode(TorchFunctionMode):
    """Hands the calls of torch functions in one thread to a probe, while there is one.

    Args:
        probe: looks at them.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self._probe = weakref.ref(probe)
        self._pushed = False
        self._compiled = False
        self._stance: AbstractContextManager[Any] | None = None

    def begin(self, model: nn.Module, *, compiled: bool) -> None:
        """Go on the stack; parts of the model that were compiled run as written.

        Where the whole model is compiled, Dynamo would trace under the mode, and what
        it makes of that is wrong for some models.
        """
        self._stance = run_uncompiled(model)
        self._compiled = compiled
        self.put_on()

    def end(self) -> None:
        """Undo `begin`, as far as this thread can."""
        self.take_off()
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)

    def put_on(self) -> None:
        """Go on the stack of this thread."""
        if self._compiled:
            return
        TorchFunctionMode.__enter__(self)
        self._pushed = True

    def take_off(self) -> bool:
        """Leave the stack, if no other mode is further in; tell whether it has."""
        if not self._pushed or _innermost() is not self:
            return False
        TorchFunctionMode.__exit__(self, None, None, None)
        self._pushed = False
        return True

    def is_left_behind(self) -> bool:
        """Tell whether the pass that it watched is not under way in this thread."""
        probe = self._probe()
        return probe is None or not probe.is_watching()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Have the probe make the call."""
        probe = self._probe()
        if probe is None:
            return func(*args, **(kwargs or {}))
        return probe.call(func, args, kwargs or {})


def take_off_left_modes() -> None:
    """Take off what interrupted passes have left on this thread's stack of modes."""
    mode = _innermost()
    while isinstance(mode, ProbeMode) and mode.is_left_behind():
        mode.end()
        mode = _innermost()


def _innermost() -> object:
    return torch.overrides._get_current_function_mode()

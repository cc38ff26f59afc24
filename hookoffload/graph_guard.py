"""The hook by which PyTorch asks about each tensor that it saves for backward.

[Note: guards left behind]
It belongs to a thread. Ctrl-C ends a call without its post hooks, and the hook stays
there: ``torch.func`` would refuse to work in that thread. It refers to the model weakly
and comes off where the same thread calls or detaches any model that has hooks of this
library; what another thread notes, the thread itself has to do.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .escapes import Escapes


class GraphGuard:
    """Asks about what one thread saves for backward, from `enter` to `leave`.

    Args:
        escapes: knows what must not be saved.
    """

    __slots__ = ("_around", "_ended", "_escapes", "_hooks")

    def __init__(self, escapes: Escapes) -> None:
        self._escapes = weakref.ref(escapes)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            self._look, self._given_back
        )
        self._around: tuple[Any, Any] | None = None
        self._ended = False

    def enter(self) -> None:
        """Begin to look.

        Raises:
            RuntimeError: A transform is under way that does not allow it.
        """
        torch.empty(0).data_ptr()  # jvp wraps all that is made inside it
        if _innermost_hooks is not None:
            self._around = _innermost_hooks(True)
        self._hooks.__enter__()
        _THREAD.guards.append(self)

    def leave(self) -> None:
        """Look at nothing any more, and come off if this is the thread."""
        self._ended = True
        if self in _THREAD.guards and self.is_innermost():
            self.take_off()

    def take_off(self) -> None:
        """Leave this thread's stack of hooks."""
        _THREAD.guards.remove(self)
        self._hooks.__exit__()
        # They refer to this object: nothing that the hooks around keep for backward
        # may wait for Python's collector.
        del self._hooks

    def is_innermost(self) -> bool:
        """Tell whether no hooks were put on this thread's stack after these."""
        if _innermost_hooks is None:
            return True  # nobody can tell
        hooks = _innermost_hooks(True)
        return hooks is not None and hooks[0] is self._hooks.pack_hook

    def is_left_behind(self) -> bool:
        """Tell whether the call that it was made for is not under way any more."""
        escapes = self._escapes()
        return self._ended or escapes is None or not escapes.is_under_way()

    def _look(self, tensor: torch.Tensor) -> Any:
        escapes = self._escapes()
        if escapes is not None and not self._ended:
            escapes.require_not_kept(tensor)
        # PyTorch asks the innermost only, and checkpoints count what they are asked.
        return tensor if self._around is None else self._around[0](tensor)

    def _given_back(self, saved: Any) -> Any:
        return saved if self._around is None else self._around[1](saved)


# Of torch 2.7 and later; whether to ignore that something is traced.
_innermost_hooks: Callable[[bool], tuple[Any, Any] | None] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


class _Thread(threading.local):
    """The guards that are on the current thread's stack, the innermost last."""

    def __init__(self) -> None:
        self.guards: list[GraphGuard] = []


_THREAD = _Thread()


def take_off_left_guards() -> None:
    """Take off what interrupted calls have left in this thread."""
    while _THREAD.guards and _THREAD.guards[-1].is_left_behind():
        if not _THREAD.guards[-1].is_innermost():
            return  # the program's own hooks go first
        _THREAD.guards[-1].take_off()

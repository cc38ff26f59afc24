"""Who is inside the model: one thread at a time, however deep, and how it ended.

[Note: who runs]
The first hooked module that a thread calls makes that thread the owner; every hooked
call nested in it counts one level; the last post hook gives the model back. Another
thread waits at its first pre hook, so two threads that call one model take turns.

PyTorch runs ``always_call`` hooks when a forward ends with an ``Exception``. Ctrl-C is
not one: the post hooks never run and the count stays behind. Nothing in the hooks can
see that, but the interpreter's stack can: a call that is really under way has a frame
of ``nn.Module._call_impl`` for its module. The stack is read only where the counts
look odd (a module that seems to be inside itself, an owner that others wait for).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import stateless

_CALL_CODE = nn.Module._call_impl.__code__
_FUNCTIONAL_CODE = stateless._functional_call.__code__


def in_functional_call() -> bool:
    """Tell whether ``torch.func.functional_call`` has lent a model other tensors."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CODE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def calls_under_way(thread: int | None = None) -> Iterator[nn.Module]:
    """Yield the modules that a thread is calling, innermost first."""
    if thread is None:
        frame = sys._getframe(1)
    else:
        found = sys._current_frames().get(thread)
        if found is None:
            return
        frame = found
    current = frame
    while current is not None:
        if current.f_code is _CALL_CODE:
            yield current.f_locals["self"]
        current = current.f_back  # type: ignore[assignment]


def count_calls(module: nn.Module) -> int:
    """Count how many calls of a module the current thread is inside of."""
    return sum(called is module for called in calls_under_way())


class CallTracker:
    """Lets one thread at a time into a model; counts the nesting of its calls.

    Args:
        modules: ids of the modules whose calls count as being inside the model.
    """

    __slots__ = ("_free", "_modules", "depth", "owner")

    def __init__(self, modules: frozenset[int]) -> None:
        self._modules = modules
        self._free = threading.Condition()
        self.owner: int | None = None
        self.depth = 0

    def enter(self) -> bool:
        """Go one level deeper, waiting until no other thread is inside.

        Returns:
            Whether the level was taken over from a thread that was interrupted.
        """
        me = threading.get_ident()
        if self.owner == me:
            self.depth += 1
            return False
        with self._free:
            stale = False
            while self.owner is not None:
                if not self._free.wait(timeout=0.2) and not self._owner_is_inside():
                    stale = self.owner is not None
                    break
            self.owner = me
            self.depth = 1
            return stale

    def leave(self) -> None:
        """Come one level up; at the top, let the next thread in."""
        self.depth -= 1
        if self.depth == 0:
            self.release()

    def release(self) -> None:
        """Let the next thread in, whatever the depth."""
        with self._free:
            self.owner = None
            self.depth = 0
            self._free.notify()

    def knows(self, module: nn.Module) -> bool:
        """Tell whether a call of a module counts as being inside the model."""
        return id(module) in self._modules

    def runs_here(self) -> bool:
        """Tell whether the current thread really is inside the model."""
        return any(id(m) in self._modules for m in calls_under_way())

    def _owner_is_inside(self) -> bool:
        called = calls_under_way(self.owner)
        return any(id(module) in self._modules for module in called)

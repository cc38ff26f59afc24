"""Who is inside the model: one thread at a time, however deep, and how it ended.

[Note: who runs]
The first hooked module that a thread calls makes that thread the owner; every hooked
call nested in it counts one level; the last post hook gives the model back. Another
thread waits at its first pre hook, so two threads that call one model take turns.
Saving, loading and what a program does to a model by hand (`detach`, `offload`) own it
in the same way.

A forward may have threads of its own call its children, and wait for them. Then the
owner sits in one of the standard library's waits, called from code that is not this
library's, so it is between two hooks and nothing of the session is half done. The
waiting thread becomes a guest: it owns the model one level deeper until it has come
out of the call, and the owner, should it wake up before, waits at its next hook.

PyTorch runs ``always_call`` hooks when a forward ends with an ``Exception``. Ctrl-C is
not one: the post hooks never run and the count stays behind. Nothing in the hooks can
see that, but the interpreter's stack can: a call that is really under way has a frame
of ``nn.Module._call_impl`` for its module. The stack is read only where the counts
look odd (a module that seems to be inside itself, an owner that others wait for).
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing.pool
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch import nn
from torch.nn.utils import stateless

logger = logging.getLogger(__name__)

_CALL_CODE = nn.Module._call_impl.__code__
_FUNCTIONAL_CODE = stateless._functional_call.__code__
_STATE_CODES = frozenset(
    {nn.Module.state_dict.__code__, nn.Module.load_state_dict.__code__}
)

# Where a thread waits for another one; and whose waits are none of the model's.
_WAITS = (
    threading.__file__,
    queue.__file__,
    str(Path(concurrent.futures.__file__).parent),
    str(Path(multiprocessing.pool.__file__).parent),
)
_OURS = str(Path(__file__).parent) + os.sep

_LOOK_SECONDS = 0.01  # how often a waiting thread looks what the owner does
_LOOKS_BEFORE_WARNING = 3000


def in_functional_call() -> bool:
    """Tell whether ``torch.func.functional_call`` has lent a model other tensors."""
    return any(frame.f_code is _FUNCTIONAL_CODE for frame in _frames(None))


def calls_under_way(thread: int | None = None) -> Iterator[nn.Module]:
    """Yield the modules that a thread is calling, innermost first."""
    for frame in _frames(thread):
        if frame.f_code is _CALL_CODE:
            yield frame.f_locals["self"]


def count_calls(module: nn.Module) -> int:
    """Count how many calls of a module the current thread is inside of."""
    return sum(called is module for called in calls_under_way())


def in_state_dict(thread: int | None = None) -> bool:
    """Tell whether a thread is saving or loading a state dict, of whatever module."""
    return any(frame.f_code in _STATE_CODES for frame in _frames(thread))


def _frames(thread: int | None) -> Iterator[FrameType]:
    """Yield the frames of a thread, innermost first; None is the current one."""
    if thread is None:
        frame: FrameType | None = sys._getframe(1)
    else:
        frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits_for_another(thread: int) -> bool:
    """Tell whether a thread is in a wait that neither Python nor this library began."""
    waits = False
    for frame in _frames(thread):
        file = frame.f_code.co_filename
        if not file.startswith(_WAITS):
            return waits and not file.startswith(_OURS)
        waits = True
    return False


class CallTracker:
    """Lets one thread at a time into a model; counts the nesting of its calls.

    Args:
        modules: ids of the modules whose calls count as being inside the model.

    Attributes:
        owner: the thread that is inside.
        depth: how many levels deep.
    """

    __slots__ = (
        "_free",
        "_held_from",
        "_lenders",
        "_lock",
        "_modules",
        "_waiting",
        "depth",
        "owner",
    )

    def __init__(self, modules: frozenset[int]) -> None:
        self._modules = modules
        self._lock = threading.RLock()  # entered directly: twice in every hooked call
        self._free = threading.Condition(self._lock)
        self._lenders: list[tuple[int, int]] = []  # owners that wait for guests
        self._waiting: deque[int] = deque()  # first come, first served
        self.owner: int | None = None
        self.depth = 0
        self._held_from = 0  # the level from which on the owner is inside by hand

    @property
    def held(self) -> bool:
        """Whether the owner is inside by hand (`detach`), not by a call."""
        return self._held_from > 0

    def enter(self, *, by_hand: bool = False) -> bool:
        """Go one level deeper, waiting until no other thread is inside.

        Args:
            by_hand: not from a hook: no frame of a call shows that it goes on.

        Returns:
            Whether the level was taken over from a thread that was interrupted.
        """
        me = threading.get_ident()
        with self._lock:
            stale = False
            if self.owner != me:
                if self._has_lent(me):
                    self._wait_for_guests(me)
                elif self.owner is not None or self._waiting:
                    self._waiting.append(me)
                    try:
                        stale = self._wait_for_turn()
                    finally:
                        self._waiting.remove(me)
                self.owner = me
            self.depth += 1
            if by_hand and not self._held_from:
                self._held_from = self.depth
            return stale

    def _wait_for_turn(self) -> bool:
        me, looks = threading.get_ident(), 0
        while self.owner is not None or self._waiting[0] != me:
            self._free.wait(timeout=_LOOK_SECONDS)
            owner = self.owner
            if owner is None:
                continue
            if not self._owner_is_inside(owner):
                self._lenders.clear()
                self.depth = self._held_from = 0
                return True
            if not self.held and _waits_for_another(owner):
                self._lenders.append((owner, self.depth))
                break
            looks += 1
            if looks == _LOOKS_BEFORE_WARNING:
                logger.warning(
                    "this thread has waited %.0f s for another one, which is inside "
                    "the same model. If that one waits for this one, they wait for "
                    "ever: only waits of Thread.join, queue.Queue, threading's events "
                    "and concurrent.futures are seen",
                    _LOOKS_BEFORE_WARNING * _LOOK_SECONDS,
                )
        return False

    def resume(self) -> None:
        """Wait until the guests of the current thread have left."""
        me = threading.get_ident()
        if self.owner != me:
            with self._free:
                self._wait_for_guests(me)

    def leave(self) -> None:
        """Come one level up; at the top, let the next thread in."""
        with self._lock:
            self.depth -= 1
            if self.depth < self._held_from:
                self._held_from = 0
            if self._lenders and self.depth == self._lenders[-1][1]:
                self.owner, self.depth = self._lenders.pop()
                self._free.notify_all()
            elif self.depth == 0:
                self.owner = None
                self._free.notify_all()

    def back_to_outermost(self) -> None:
        """Forget the levels that an interrupt left behind; one goes on."""
        self.depth = 1
        self._held_from = min(self._held_from, 1)

    @property
    def is_guest(self) -> bool:
        """Whether the owner is a guest of a thread further out."""
        return bool(self._lenders)

    def knows(self, module: nn.Module) -> bool:
        """Tell whether a call of a module counts as being inside the model."""
        return id(module) in self._modules

    def runs_here(self) -> bool:
        """Tell whether the current thread really is inside the model."""
        return any(id(m) in self._modules for m in calls_under_way())

    def is_running(self) -> bool:
        """Tell whether a thread really is inside, and not a level left behind."""
        if not self.depth or self.owner is None:
            return False
        owners = [self.owner, *(lender for lender, _ in self._lenders)]
        return any(map(self._owner_is_inside, owners))

    def _has_lent(self, me: int) -> bool:
        return any(lender == me for lender, _ in self._lenders)

    def _wait_for_guests(self, me: int) -> None:
        while self.owner != me and self._has_lent(me):
            self._free.wait(timeout=1)

    def _owner_is_inside(self, owner: int) -> bool:
        """Tell whether the owner is inside and did not leave levels behind.

        It runs on while this thread looks at its frames, and a generator's that was the
        innermost leads nowhere once it has yielded. So it counts as outside only where
        it is not seen inside twice, one look right behind the other.
        """
        return self._is_seen_inside(owner) or self._is_seen_inside(owner)

    def _is_seen_inside(self, owner: int) -> bool:
        if self.held:
            return any(f.f_code.co_filename.startswith(_OURS) for f in _frames(owner))
        called = calls_under_way(owner)
        inside = any(id(module) in self._modules for module in called)
        return inside or in_state_dict(owner)


class TurnTaker(CallTracker):
    """Tracks one of several models, of which one thread at a time is inside any.

    Args:
        modules: as for `CallTracker`.
        turns: tracks all of them. It is entered first and left last, at every level, so
            that two threads never hold what the other one waits for. Levels that an
            interrupt leaves behind in it do no harm: whoever waits finds the owner
            outside.
    """

    __slots__ = ("_turns",)

    def __init__(self, modules: frozenset[int], turns: CallTracker) -> None:
        super().__init__(modules)
        self._turns = turns

    def enter(self, *, by_hand: bool = False) -> bool:
        """Go one level deeper, when no other thread is inside any of the models."""
        self._turns.enter(by_hand=by_hand)
        try:
            return super().enter(by_hand=by_hand)
        except BaseException:
            self._turns.leave()
            raise

    def resume(self) -> None:
        """Wait until the guests of the current thread have left."""
        self._turns.resume()
        super().resume()

    def leave(self) -> None:
        """Come one level up."""
        super().leave()
        self._turns.leave()

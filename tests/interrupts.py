"""Ctrl-C at a chosen moment, at every one in turn; and a way out of what hangs."""

from __future__ import annotations

import inspect
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hookoffload

_LIBRARY = str(Path(hookoffload.__file__).parent)

Site = tuple[CodeType, int]


class Steps:
    """Counts the steps of the library in this thread, and interrupts at one of them.

    A step is the call of one of the library's functions.

    Attributes:
        count: steps so far.
        sites: for each step what was called, and in which line.
        interrupted: where the interrupt fell, None if nowhere.
    """

    def __init__(self, interrupt_at: int | None) -> None:
        self.count = 0
        self.sites: list[Site] = []
        self.interrupted: str | None = None
        self._at = interrupt_at
        self._ours: dict[CodeType, bool] = {}

    def trace(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            # Closing a generator counts as a call, and what it raises is swallowed.
            ours = code.co_filename.startswith(_LIBRARY)
            ours = ours and not code.co_flags & inspect.CO_GENERATOR
            self._ours[code] = ours
        if ours and event == "call":
            self._step(frame)

    def _step(self, frame: FrameType) -> None:
        caller = frame.f_back
        line = 0 if caller is None else caller.f_lineno
        if self.count == self._at:
            name = Path(frame.f_code.co_filename).name
            self.interrupted = f"{frame.f_code.co_name} ({name}), called in line {line}"
            raise KeyboardInterrupt(self.interrupted)  # which ends the tracing, too
        self.sites.append((frame.f_code, line))
        self.count += 1


@contextmanager
def interrupted_at(step: int | None) -> Iterator[Steps]:
    """Raise KeyboardInterrupt when the library makes its step of that number.

    Args:
        step: the number, from 0; None only counts.
    """
    steps = Steps(step)
    before, trace = sys.gettrace(), steps.trace
    sys.settrace(trace)  # it has no reference of its own to what it calls
    try:
        yield steps
    finally:
        sys.settrace(before)


def steps_of(action: Callable[[], Any], *, per_site: int = 1) -> list[int]:
    """Return steps of an action, so that each place that calls something has some.

    Args:
        action: what to count the steps of; it is done once.
        per_site: how many steps of each place, chosen at random but always the same.
    """
    with interrupted_at(None) as steps:
        action()
    by_site: dict[Site, list[int]] = defaultdict(list)
    for number, site in enumerate(steps.sites):
        by_site[site].append(number)
    chance = random.Random(0)
    chosen: set[int] = set()
    for numbers in by_site.values():
        chosen.update(chance.sample(numbers, min(per_site, len(numbers))))
    return sorted(chosen)


class NthCall:
    """Stands for a function and interrupts one of its calls.

    Args:
        function: what it stands for.
        number: the call that is interrupted, from 0.
        after: do the call's work first.
    """

    def __init__(
        self, function: Callable[..., Any], number: int, *, after: bool = False
    ) -> None:
        self.function = function
        self.number = number
        self.after = after
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.calls == self.number
        self.calls += 1
        if mine and not self.after:
            raise KeyboardInterrupt
        result = self.function(*args, **kwargs)
        if mine:
            raise KeyboardInterrupt
        return result

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        """Bind like a function, so that it can stand for a method."""
        if owner is None:
            return self
        return lambda *args, **kwargs: self(owner, *args, **kwargs)


class HangError(AssertionError):
    """Something waits for what never comes."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise HangError in the main thread, again and again, after so many seconds."""

    def alarm(*_: Any) -> None:
        raise HangError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

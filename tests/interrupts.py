"""Ctrl-C at a chosen moment: between two steps of the library, at every one in turn."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hookoffload

_LIBRARY = str(Path(hookoffload.__file__).parent)


class Steps:
    """Counts the steps of the library in this thread, and interrupts at one of them.

    A step is the call of one of the library's functions.

    Attributes:
        count: steps so far.
        interrupted: where the interrupt fell.
    """

    def __init__(self, interrupt_at: int | None, error: type[BaseException]) -> None:
        self.count = 0
        self.interrupted: str | None = None
        self._at = interrupt_at
        self._error = error
        self._ours: dict[CodeType, bool] = {}

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            # Closing a generator counts as a call, but nothing that it raises comes out.
            ours = code.co_filename.startswith(_LIBRARY)
            ours = ours and not code.co_flags & inspect.CO_GENERATOR
            self._ours[code] = ours
        if ours and event == "call":
            self.step(frame)
        return None

    def step(self, frame: FrameType) -> None:
        if self.count == self._at:
            sys.settrace(None)
            code = frame.f_code
            place = Path(code.co_filename).name
            self.interrupted = f"{place}:{frame.f_lineno} {code.co_name}"
            raise self._error(f"at step {self.count}, {self.interrupted}")
        self.count += 1


@contextmanager
def interrupted_at(
    step: int | None, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[Steps]:
    """Raise ``error`` when the library, in this thread, makes its step of that number.

    Args:
        step: the number, from 0; None only counts.
        error: what to raise.
    """
    steps = Steps(step, error)
    before = sys.gettrace()
    sys.settrace(steps.trace)
    try:
        yield steps
    finally:
        sys.settrace(before)


def count_steps(action: Callable[[], Any]) -> int:
    """Return how many steps the library makes in an action."""
    with interrupted_at(None) as steps:
        action()
    return steps.count


class NthCall:
    """Stands for a function and raises at one of its calls, before or after the work.

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

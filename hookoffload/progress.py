"""Progress bars: shown for long work, on a terminal, otherwise silent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_SHOWN: ContextVar[bool] = ContextVar("hookoffload progress bars", default=True)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Show the bars that are made inside, or none of them; further out none is none."""
    token = _SHOWN.set(shown and _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(token)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that starts no monitor thread: it would outlive the work."""

    monitor_interval = 0


def progress_bar(what: str, total_bytes: int) -> tqdm[Any]:
    """Return a bar over bytes that appears when the work takes longer than a second.

    Args:
        what: the work, as a person would call it.
        total_bytes: how many bytes there are to do.
    """
    return _Bar(
        desc=f"hookoffload: {what}",
        total=total_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=1.0,
        leave=False,
        # None: where standard error is no terminal.
        disable=None if _SHOWN.get() and not _turned_off() else True,
    )


def _turned_off() -> bool:
    """Whether the user wants no bar; tqdm asks only where `disable` is not given."""
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0")

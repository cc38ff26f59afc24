"""Processes that are killed at a chosen moment."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest

KILLED = -signal.SIGKILL
_CHANGES = (
    "fsync",
    "link",
    "mkdir",
    "open",
    "pwrite",
    "rename",
    "replace",
    "rmdir",
    "unlink",
)


def in_child(action: Callable[[], object]) -> int:
    """Do something in a forked child, and return its exit code, negative for a signal.

    The child ends at once: no exit handler of the tests runs in it.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()  # nobody else would
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Do something in a child that is killed before its n-th change of the disk.

    Returns:
        Whether there was a change of that number.
    """

    def until_then() -> None:
        with pytest.MonkeyPatch.context() as patch:
            before_each_change(patch, number, _die)
            action()

    code = in_child(until_then)
    assert code in (0, KILLED), f"the child failed: {code}"
    return code == KILLED


def before_each_change(
    patch: pytest.MonkeyPatch, number: int, then: Callable[[], None]
) -> None:
    """Have something done before the n-th call, from 0, that may change the disk."""
    calls = iter(range(10**9))

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                then()
            return original(*args, **kwargs)

        return call

    for name in _CHANGES:
        patch.setattr(os, name, counted(getattr(os, name)))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

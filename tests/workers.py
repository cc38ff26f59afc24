"""Threads that cannot block the tests."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

PATIENCE = 20.0  # seconds after which a thread counts as blocked


class Worker:
    """Runs an action in a daemon thread: one that hangs fails its test and no other."""

    def __init__(self, action: Callable[..., Any], *args: Any) -> None:
        self._action = functools.partial(action, *args)
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._action()
        except BaseException as error:
            self._error = error

    def result(self, patience: float = PATIENCE) -> Any:
        """Return what the action returned, or raise what it raised."""
        self._thread.join(patience)
        assert not self._thread.is_alive(), "the thread is blocked"
        if self._error is not None:
            raise self._error
        return self._value


def in_thread(action: Callable[..., Any], *args: Any) -> Any:
    """Do something in another thread and wait for it."""
    return Worker(action, *args).result()


def in_threads(action: Callable[[int], Any], count: int) -> list[Any]:
    """Do something in several threads at once; each gets its number."""
    workers = [Worker(action, number) for number in range(count)]
    return [worker.result() for worker in workers]

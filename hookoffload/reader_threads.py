"""Threads that read: one does not keep a disk busy."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable

Task = Callable[[], None]
_Tasks = queue.SimpleQueue["Task | None"]

# One thread does not keep a disk busy; many more than cores only wait for memory.
_FEWEST_THREADS, _MOST_THREADS = 4, 16


def reader_count() -> int:
    """Returns how many threads read on this machine."""
    return max(_FEWEST_THREADS, min(os.cpu_count() or 1, _MOST_THREADS))


class ReaderThreads:
    """Daemon threads that perform tasks, begun in the order in which they are given.

    Tasks are given by one thread. Errors are theirs to keep.
    """

    __slots__ = (
        "__weakref__",
        "_count",
        "_finalizer",
        "_left",
        "_maker",
        "_queues",
        "_threads",
    )

    def __init__(self) -> None:
        self._count = reader_count()
        self._queues: list[_Tasks] = []  # the last one is that of the living threads
        self._left = _Left()
        self._threads: list[threading.Thread] = []
        self._maker = 0  # the process that the threads are in
        # What is dropped without `join` ends its threads too.
        self._finalizer = weakref.finalize(self, _end, self._queues, self._count)

    def submit(self, task: Task) -> None:
        """Have a task performed by the next thread that is free."""
        if self._maker != os.getpid():
            self._start()  # for the first time, or this process was forked
        self._left.add()
        self._queues[-1].put(task)

    def _start(self) -> None:
        tasks: _Tasks = queue.SimpleQueue()
        self._left = _Left()
        self._queues.append(tasks)
        self._threads = []
        for _ in range(self._count):
            thread = threading.Thread(
                target=_perform,
                args=(tasks, self._left),
                name="hookoffload-reads",
                daemon=True,
            )
            thread.start()
            self._threads.append(thread)
        self._maker = os.getpid()

    def drain(self) -> None:
        """Return when every task has been performed."""
        if self._maker == os.getpid():
            self._left.wait()

    def join(self) -> None:
        """End the threads behind the tasks that they were given."""
        _end(self._queues, self._count)  # not by the finalizer: it runs once
        if self._maker == os.getpid():
            for thread in self._threads:
                thread.join()
        self._maker = 0
        self._finalizer.detach()


class _Left:
    """Counts tasks that have not been performed."""

    __slots__ = ("_changed", "_count")

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def add(self) -> None:
        with self._changed:
            self._count += 1

    def remove(self) -> None:
        with self._changed:
            self._count -= 1
            if not self._count:
                self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._count)


def _perform(tasks: _Tasks, left: _Left) -> None:
    while (task := tasks.get()) is not None:
        try:
            task()
        finally:
            del task  # nothing keeps a model's bytes while there is nothing to do
            left.remove()


def _end(queues: list[_Tasks], count: int) -> None:
    for tasks in queues:
        for _ in range(count):
            tasks.put(None)

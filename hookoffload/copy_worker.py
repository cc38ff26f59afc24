"""The thread that sees to copies which take more than queueing."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from typing import Protocol

from .copies import Copy

_Jobs = queue.SimpleQueue["Copy | threading.Event | None"]


def _end_jobs(queues: list[_Jobs]) -> None:
    for jobs in queues:
        jobs.put(None)


class Performer(Protocol):
    """What a worker does with copies."""

    def perform(self, copy: Copy) -> None:
        """Perform a copy, or see to it; sets ``queued`` when it is."""

    def drained(self) -> None:
        """Finish what is under way and forget what nobody has asked for."""

    def close(self) -> None:
        """End the threads, behind `drained`."""


class Worker:
    """A daemon thread that performs copies in order, without keeping its engine."""

    def __init__(self, performer: Performer) -> None:
        self._jobs: list[_Jobs] = []  # the last one is the thread's
        self._performer = performer
        self._thread: threading.Thread | None = None  # from the first copy on
        # A model that is dropped without detach ends its thread too.
        self._finalizer = weakref.finalize(self, _end_jobs, self._jobs)
        _WORKERS.add(self)

    @staticmethod
    def _run(jobs: _Jobs, performer: Performer) -> None:
        while (job := jobs.get()) is not None:
            if isinstance(job, threading.Event):
                performer.drained()
                job.set()
                continue
            try:
                performer.perform(job)
            except BaseException as error:
                job.error = error  # raised by `wait`, where somebody can act on it
                job.finish()
            del job

    def put(self, copy: Copy) -> None:
        """Have a copy performed behind those before it."""
        if copy.queued is None or copy.is_left_behind:
            copy.queued = threading.Event()
        copy.process = os.getpid()
        if self._thread is None or not self._thread.is_alive():
            self._start()  # for the first time, or this process was forked
        self._jobs[-1].put(copy)

    def _start(self) -> None:
        jobs: _Jobs = queue.SimpleQueue()
        # Known first, so that `join` ends a thread that Ctrl-C found half started.
        self._jobs.append(jobs)
        thread = threading.Thread(
            target=self._run,
            args=(jobs, self._performer),
            name="hookoffload-copies",
            daemon=True,
        )
        thread.start()
        self._thread = thread

    def wait(self, copy: Copy) -> None:
        """Return when a copy has been performed, if need be again after a fork."""
        if copy.is_left_behind:
            self.put(copy)
        while copy.queued is not None and not copy.queued.wait(timeout=1.0):
            if self._thread is None or not self._thread.is_alive():
                self.put(copy)

    def finish(self, copy: Copy) -> float:
        """Return when a copy has been performed, and how many seconds that took.

        Raises:
            BaseException: What went wrong in it.
        """
        stalled = 0.0
        if copy.queued is not None and not copy.queued.is_set():
            began = time.perf_counter()
            self.wait(copy)
            ended = time.perf_counter()
            stalled = ended - began
            if copy.entry is not None:
                copy.entry.stall(began, ended)
        if copy.error is not None:
            raise copy.error
        return stalled

    def drain(self) -> None:
        """Return when every copy so far has been performed."""
        if self._thread is not None and self._thread.is_alive():
            reached = threading.Event()
            self._jobs[-1].put(reached)
            reached.wait()

    def join(self) -> None:
        """End the thread behind the copies that it has."""
        _end_jobs(self._jobs)  # not by the finalizer: it runs once, Ctrl-C or not
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        self._performer.close()
        self._finalizer.detach()


# At the end of the program, threads that were stopped inside PyTorch would abort it.
_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _join_workers() -> None:
    for worker in list(_WORKERS):
        worker.join()

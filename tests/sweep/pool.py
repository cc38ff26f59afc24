"""Worker processes: one that crashes or hangs takes only its class with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from .trial import Place, Result

# A worker is replaced after so many classes: what one leaves behind does not pile up.
_CLASSES_A_WORKER = 150
# Address space of one worker: a model that is not small fails instead of swapping.
_WORKER_BYTES = 16 * 2**30


@dataclass(frozen=True, kw_only=True)
class Task:
    """One class to try.

    Attributes:
        library: "transformers" or "diffusers".
        name: of the class.
        place: where to run it.
    """

    library: str
    name: str
    place: Place


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs,), daemon=True
        )
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.begun = 0.0
        self.done = 0

    def give(self, task: Task) -> None:
        self.task = task
        self.begun = time.monotonic()
        self.pipe.send(task)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.close()  # an idle worker ends by itself
        if self.task is None:
            self.process.join(5)
        self.process.kill()
        self.process.join()


def run_tasks(
    tasks: Sequence[Task], *, jobs: int, timeout: float, most: float | None = None
) -> Iterator[tuple[Task, Result]]:
    """Try classes in worker processes, and yield what comes of each when it is there.

    Args:
        tasks: the classes.
        jobs: worker processes at a time.
        timeout: seconds for one class.
        most: seconds for all; what is not done by then is left out.
    """
    end = None if most is None else time.monotonic() + most
    waiting = list(reversed(tasks))
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            if end is not None and time.monotonic() >= end:
                return
            while waiting and len(workers) < jobs:
                workers.append(_Worker())
            for worker in workers:
                if worker.task is None and waiting:
                    worker.give(waiting.pop())
            for worker in list(workers):
                finished = _finished(worker, timeout)
                if finished is None:
                    continue
                yield finished
                # Behind an error of the device, each call of the process has one.
                broken = worker.task is not None or "CUDA error" in finished[1].reason
                if broken or worker.done >= _CLASSES_A_WORKER:
                    worker.end()
                    workers.remove(worker)
            busy: list[Connection] = [w.pipe for w in workers if w.task is not None]
            if busy:
                wait(busy, timeout=1.0)
    finally:
        for worker in workers:
            worker.end()


def _finished(worker: _Worker, timeout: float) -> tuple[Task, Result] | None:
    """Return a worker's result; its task stays if it must not be used again."""
    task = worker.task
    if task is None:
        return None
    seconds = time.monotonic() - worker.begun
    try:
        if worker.pipe.poll():
            result: Result = worker.pipe.recv()
            worker.task = None
            worker.done += 1
            return task, result
    except (EOFError, OSError):
        worker.process.join(5)
        reason = f"the process ended with exit code {worker.process.exitcode}"
        return task, _broken(task, reason, seconds)
    if seconds > timeout:
        return task, _broken(task, f"not done after {timeout:.0f} seconds", seconds)
    return None


def _broken(task: Task, reason: str, seconds: float) -> Result:
    return Result(name=task.name, outcome="failed", reason=reason, seconds=seconds)


def _serve(pipe: Connection) -> None:
    """Try what comes through the pipe until it is closed."""
    from . import classes

    classes.prepare_process(_WORKER_BYTES)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        pipe.send(classes.try_class(task.library, task.name, task.place))

"""Page-locking what has been read while the rest is still being read.

Where a disk is read, locking costs no time then. From a warm page cache both touch the
process's memory, and take about as long together as one after the other: 14 GiB took
0.9 s on an H200's machine either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from threading import Event

from .filling import Filled
from .master import Master
from .pinning import PageLock


@contextmanager
def locking_beside(lock: PageLock, masters: Sequence[Master]) -> Iterator[Filled]:
    """Yield what page-locks masters in a thread of its own, as they are filled.

    All of them are locked, or being locked no more, when the block ends. Where the cap
    does not take them all nothing is locked beside: those left out are spread evenly,
    and that can only be chosen among all.

    Args:
        lock: the session's; nobody else uses it meanwhile.
        masters: those that are going to wait in host RAM.
    """
    if not lock.takes(sum(master.nbytes for master in masters)):
        yield lambda filled: None
        return
    pending: list[Future[None]] = []
    ended = Event()
    thread = ThreadPoolExecutor(1, thread_name_prefix="hookoffload-lock")

    def locked(filled: Sequence[Master]) -> None:
        if not ended.is_set():
            lock.lock(filled)

    def begin(filled: Sequence[Master]) -> None:
        # Whether bars are shown is the caller's choice, for this thread too.
        pending.append(thread.submit(copy_context().run, locked, filled))

    try:
        yield begin
        for future in pending:
            future.result()
    finally:
        ended.set()
        _wait_for(thread)


def _wait_for(thread: ThreadPoolExecutor) -> None:
    """Return when one thread has done what it was given, whatever interrupts that.

    Who puts the weights back next unlocks them, and nothing may be locked behind that.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            # Not by `shutdown`: Python 3.10 to 3.12 take a thread for ended whose
            # `join` was interrupted. What comes last waits for all before it.
            thread.submit(int).result()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    thread.shutdown()
    if interrupt is not None:
        raise interrupt

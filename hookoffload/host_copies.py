"""The copy engine of a CPU: reader threads are its copy stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .copies import POISON, Copy
from .copy_worker import Worker
from .disk_reads import CHUNK_BYTES, Chunk, Part, chunks_of
from .reader_threads import ReaderThreads
from .staging import Coming

# Less is read sooner than another thread wakes up for it.
_HANDED_OVER_BYTES = 2**18


class HostCopyEngine:
    """Copies on a CPU compute device: reader threads, real asynchrony."""

    def __init__(self) -> None:
        self._worker = Worker(_HostReads(ReaderThreads()))
        self._stalled = 0.0

    def start(self, copy: Copy) -> None:
        """Begin a copy."""
        self._worker.put(copy)

    def wait(self, copy: Copy) -> None:
        """Return when the bytes are there."""
        self._stalled += self._worker.finish(copy)

    def expect(self, coming: Sequence[Coming], nbytes: int) -> None:
        """Do nothing: files are read into the window, as far ahead as that goes."""

    def staging_bytes(self) -> int:
        """Host RAM that is taken for what is read ahead: none but the window."""
        return 0

    def done(self) -> object | None:
        """Return None: a forward on the CPU has ended when its hook runs."""
        return None

    def computed(self) -> object | None:
        """Return None, see `done`."""
        return None

    def order_after(self, tokens: Sequence[object]) -> None:
        """Do nothing: compute on a CPU runs in program order."""

    def note_filled(self) -> None:
        """Do nothing: what was waited for is there for every thread."""

    def see_filled(self) -> None:
        """Do nothing, see `note_filled`."""

    def fence(self) -> None:
        """Do nothing: memory on a CPU is free when it is released."""

    def poison(self, destination: torch.Tensor, token: object | None) -> None:
        """Overwrite released memory."""
        destination.fill_(POISON)

    def drain(self) -> None:
        """Return when no copy is under way."""
        self._worker.drain()

    def stall_seconds(self) -> float:
        """Seconds for which compute has waited for copies, so far."""
        return self._stalled

    def close(self) -> None:
        """End the worker thread."""
        self._worker.join()


class _HostReads:
    """What the worker does on a CPU: it has copies read into their regions."""

    def __init__(self, readers: ReaderThreads) -> None:
        self._readers = readers

    def perform(self, copy: Copy) -> None:
        chunks = chunks_of([master for master, _ in copy.pieces], CHUNK_BYTES)
        left = _ChunksLeft(copy, len(chunks))
        for chunk in chunks:
            if copy.nbytes <= _HANDED_OVER_BYTES:
                left.read(chunk)
            else:
                self._readers.submit(partial(left.read, chunk))

    def drained(self) -> None:
        self._readers.drain()

    def close(self) -> None:
        self._readers.join()


class _ChunksLeft:
    """A copy that several threads perform; whoever comes last ends it."""

    __slots__ = ("_copy", "_count", "_lock", "_places")

    def __init__(self, copy: Copy, count: int) -> None:
        self._copy = copy
        self._places = dict(copy.pieces)
        self._count = count
        self._lock = threading.Lock()
        if copy.entry is not None:
            copy.entry.begin()
        if not count:
            self._end()

    def read(self, chunk: Chunk) -> None:
        """Read one of its chunks."""
        try:
            read_into(self._copy, chunk, self._place)
        except BaseException as error:
            self._copy.error = error
        with self._lock:
            self._count -= 1
            last = not self._count
        if last:
            self._end()

    def _place(self, part: Part) -> torch.Tensor:
        destination = self._places[part.master]
        return destination[part.start : part.start + part.nbytes]

    def _end(self) -> None:
        if self._copy.entry is not None:
            self._copy.entry.end()
        self._copy.finish()


def read_into(
    copy: Copy, chunk: Chunk, place_of: Callable[[Part], torch.Tensor]
) -> None:
    """Read a chunk of a copy to where its parts belong, and note how long it took."""
    began = time.perf_counter()
    with torch.inference_mode(False):
        chunk.read_into(place_of)
    if copy.entry is not None and chunk.from_file:
        copy.entry.read(began, time.perf_counter(), chunk.nbytes)

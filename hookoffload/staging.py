"""Page-locked buffers that are filled from files ahead of the copies out of them.

[Note: reading ahead] The layers that are not page-locked pass in a known order, again
and again. The ring of buffers holds what comes next in it, as far as it reaches, over
the end of a pass and whatever the window has room for: so the disk reads on while
layers from RAM are copied and computed. A buffer is given to the next chunk in the
order at once; the thread that reads into it first waits for the event behind the copy
out of it.

What was read may be outdated when it is asked for: the revision of its masters tells,
which counts what was written to them and is looked at before each copy is begun. What
counts nowhere is safe behind `reset`, as behind a cancelled copy.

Everything here but `expect` is done by the engine's worker thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from .disk_reads import Chunk, Part, chunks_of
from .master import Master
from .reader_threads import ReaderThreads

BUFFER_BYTES = 8 * 2**20
_FEWEST_BUFFERS = 3

Masters = tuple[Master, ...]
# What has to be read for a layer, and whether that is all: it stays on the device.
Coming = tuple[Masters, bool]


class Token(Protocol):
    """What a buffer's next owner waits for."""

    def synchronize(self) -> None:
        """Return when it has happened."""


class StagedRead:
    """A chunk that is being read, or has been, and the buffer that it is in.

    Attributes:
        chunk: what is read.
        masters: those of the layer that it is read for.
        is_first: whether it is the first chunk of the layer.
        is_last: whether it is the last one.
        buffer: where it goes.
        began: when reading began.
        ended: when it ended.
    """

    __slots__ = (
        "_after",
        "_cancelled",
        "_done",
        "_error",
        "_revision",
        "began",
        "buffer",
        "chunk",
        "ended",
        "is_first",
        "is_last",
        "masters",
    )

    def __init__(
        self, masters: Masters, chunk: Chunk, *, is_first: bool, is_last: bool
    ) -> None:
        self.masters = masters
        self.chunk = chunk
        self.is_first = is_first
        self.is_last = is_last
        self.buffer: torch.Tensor
        self.began = self.ended = 0.0
        self._after: Token | None = None
        self._revision = -1
        self._cancelled = False
        self._done = threading.Event()
        self._error: BaseException | None = None

    def begin(
        self, buffer: torch.Tensor, after: Token | None, readers: ReaderThreads
    ) -> None:
        """Have it read into a buffer, behind what happens to that before."""
        self.buffer = buffer
        self._after = after
        self._revision = _revision(self.masters)
        readers.submit(self._read)

    def _read(self) -> None:
        try:
            if self._after is not None:
                self._after.synchronize()
            if not self._cancelled:
                self.began = time.perf_counter()
                offsets = self.offsets()
                self.chunk.read_into(lambda part: self.place(part, offsets))
                self.ended = time.perf_counter()
        except BaseException as error:
            self._error = error  # raised by `wait`
        self._done.set()

    def offsets(self) -> dict[Part, int]:
        """Return where each part begins in the buffer."""
        offsets, end = {}, 0
        for part in self.chunk.parts:
            offsets[part] = end
            end += part.nbytes
        return offsets

    def place(self, part: Part, offsets: dict[Part, int]) -> torch.Tensor:
        """Return a part's bytes in the buffer."""
        return self.buffer[offsets[part] : offsets[part] + part.nbytes]

    def wait(self) -> None:
        """Return when it has been read.

        Raises:
            CheckpointError: It could not be.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error

    def cancel(self) -> torch.Tensor:
        """Give it up; returns the buffer, which nobody uses any more."""
        self._cancelled = True
        self._done.wait()
        return self.buffer

    def is_current(self) -> bool:
        """Tell whether nothing was written to the masters since it was begun."""
        return self._revision == _revision(self.masters)


class Staging:
    """The ring.

    Args:
        readers: who read.
        allocate: makes a page-locked buffer of so many bytes.
    """

    def __init__(
        self, readers: ReaderThreads, allocate: Callable[[int], torch.Tensor]
    ) -> None:
        self._readers = readers
        self._allocate = allocate
        self._expected: tuple[Sequence[Coming], int] = ((), _FEWEST_BUFFERS)
        self._following: tuple[Sequence[Coming], int] | None = None
        self._positions: dict[Masters, list[int]] = {}
        self._taken: set[Masters] = set()
        self._at = -1
        self._next: Iterator[StagedRead] = iter(())
        self._ahead: deque[StagedRead] = deque()
        self._free: deque[tuple[torch.Tensor, Token | None]] = deque()
        self._made = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that there are."""
        return self._made * BUFFER_BYTES

    def expect(self, coming: Sequence[Coming], nbytes: int) -> None:
        """Read in this order from now on, round and round.

        Args:
            coming: the layers in the order of a pass.
            nbytes: how large the ring may be.
        """
        self._expected = (coming, max(nbytes // BUFFER_BYTES, _FEWEST_BUFFERS))

    def take(self, masters: Masters) -> Iterator[StagedRead]:
        """Yield a layer's chunks as they have been read; each must be given back.

        Raises:
            CheckpointError: One could not be read.
        """
        if self._following is not self._expected:
            self._follow(self._expected)
        if not self._is_ahead(masters):
            self._give_up()
            self._next = self._sequence(masters)
        self._taken.add(masters)
        is_last = not masters
        while not is_last:
            self._fill()
            read = self._ahead.popleft()
            try:
                read.wait()
            except BaseException:
                self._free.append((read.buffer, None))
                self._give_up()
                raise
            yield read
            is_last = read.is_last
        self._fill()

    def give_back(self, read: StagedRead, after: Token) -> None:
        """Take back the buffer of what was yielded, to be reused behind a token."""
        self._free.append((read.buffer, after))

    def reset(self) -> None:
        """Forget what was read ahead; with nothing to expect, the buffers go too."""
        self._give_up()
        if not self._expected[0]:
            self._free.clear()
            self._made = 0
            self._following, self._positions = None, {}
            self._taken = set()

    def close(self) -> None:
        """End the threads, behind the worker's end."""
        self._readers.join()

    def _follow(self, expected: tuple[Sequence[Coming], int]) -> None:
        self._give_up()
        self._following = expected
        self._at = -1
        self._positions, self._taken = {}, set()
        for position, (masters, _) in enumerate(expected[0]):
            self._positions.setdefault(masters, []).append(position)

    def _is_ahead(self, masters: Masters) -> bool:
        """Tell whether a layer comes next; drops those in front that were left out."""
        for skipped, read in enumerate(self._ahead):
            if read.is_first and read.masters == masters and read.is_current():
                for _ in range(skipped):
                    self._free.append((self._ahead.popleft().cancel(), None))
                return True
        return False

    def _give_up(self) -> None:
        self._next = iter(())
        while self._ahead:
            self._free.append((self._ahead.popleft().cancel(), None))

    def _sequence(self, masters: Masters) -> Iterator[StagedRead]:
        """Yield the reads for a layer, then for those that come behind it."""
        yield from _reads_of(masters)
        expected = self._expected[0]
        places = self._positions.get(masters)
        if not places:
            return
        self._at = next((place for place in places if place > self._at), places[0])
        left_out = 0
        while left_out < len(expected):
            self._at = (self._at + 1) % len(expected)
            masters, once = expected[self._at]
            if once and masters in self._taken:
                left_out += 1
                continue
            left_out = 0
            yield from _reads_of(masters)

    def _fill(self) -> None:
        """Have every buffer that is free read into."""
        assert self._following is not None, "a layer is taken in an order"
        while self._free or self._made < self._following[1]:
            read = next(self._next, None)
            if read is None:
                return
            if self._free:
                buffer, after = self._free.popleft()
            else:
                buffer, after = self._allocate(BUFFER_BYTES), None
                self._made += 1
            read.begin(buffer, after, self._readers)
            self._ahead.append(read)


def _reads_of(masters: Masters) -> Iterator[StagedRead]:
    chunks = chunks_of(masters, BUFFER_BYTES)
    for number, chunk in enumerate(chunks, start=1):
        last = number == len(chunks)
        yield StagedRead(masters, chunk, is_first=number == 1, is_last=last)


def _revision(masters: Masters) -> int:
    return sum(master.copied_revision for master in masters)

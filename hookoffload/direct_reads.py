"""Reads past the page cache, for files that it cannot hold.

[Note: direct reads] A pass reads the same files from beginning to end, again and again.
What is larger than the page cache pushes its own beginning out before that is needed
again: the cache never helps, and filling it costs the processor as much as a copy.
`O_DIRECT` leaves it alone. It takes whole blocks at aligned places, which tensors in
files are not; so blocks are read into a buffer of the thread's and copied from there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# Blocks of every disk that is sold, and pages of most machines.
ALIGNMENT = 4096
_BUFFER_BYTES = 8 * 2**20 + 2 * ALIGNMENT
# What is read to compare: long enough for a rate, short enough to be waited for.
_PROBE_BYTES = 16 * 2**20
# A little slower still pays: the processor has nothing to do with it.
_WORTH = 0.9

_buffers = threading.local()


class DirectReader:
    """A second descriptor of an open file, whose reads go past the page cache.

    Args:
        path: The file.
        opened: What the system said of it when it was opened.

    Raises:
        OSError: The system or the file system has no such reads, or the path holds
            another file by now.
    """

    __slots__ = ("fd",)

    def __init__(self, path: Path, opened: os.stat_result) -> None:
        flag = getattr(os, "O_DIRECT", None)
        if flag is None:
            raise OSError("no O_DIRECT on this system")
        self.fd = os.open(path, os.O_RDONLY | flag)
        now = os.fstat(self.fd)
        if (now.st_dev, now.st_ino) != (opened.st_dev, opened.st_ino):
            self.close()
            raise OSError(f"{path} was replaced")

    def read(self, views: Sequence[memoryview], position: int) -> int:
        """Fills memory as `os.preadv` does; returns how many bytes there were.

        Raises:
            OSError: The system refuses.
        """
        buffer = _buffer()
        start = position // ALIGNMENT * ALIGNMENT
        head = position - start
        wanted = sum(map(len, views))
        blocks = -(-(head + wanted) // ALIGNMENT) * ALIGNMENT
        with memoryview(buffer) as whole:
            count = os.preadv(self.fd, [whole[: min(blocks, len(whole))]], start)
        left = found = max(min(count - head, wanted), 0)
        source = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + head
        for view in views:
            size = min(len(view), left)
            if not size:
                break
            # Unlike an assignment it lets other threads run meanwhile.
            ctypes.memmove(
                ctypes.addressof(ctypes.c_char.from_buffer(view)), source, size
            )
            source += size
            left -= size
        return found

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)


def direct_pays(fd: int, reader: DirectReader, nbytes: int) -> bool:
    """Compares both ways on parts of a file that the page cache is made to forget.

    Args:
        fd: The file, opened as usual.
        reader: The same file.
        nbytes: Its size.
    """
    span = min(_PROBE_BYTES, nbytes // 4) // ALIGNMENT * ALIGNMENT
    if not span:
        return False
    seconds = {True: 0.0, False: 0.0}
    try:
        for turn, direct in enumerate((False, True, True, False)):
            start = turn * span
            _forget(fd, start, span)
            seconds[direct] += _read_seconds(
                fd, reader if direct else None, start, span
            )
    except OSError:
        return False  # some file systems refuse at the first read
    return seconds[True] * _WORTH <= seconds[False]


def _read_seconds(
    fd: int, reader: DirectReader | None, start: int, nbytes: int
) -> float:
    with mmap.mmap(-1, nbytes) as target, memoryview(target) as view:
        began, done = time.perf_counter(), 0
        while done < nbytes:
            part = view[done : done + 8 * 2**20]
            count = (
                os.preadv(fd, [part], start + done)
                if reader is None
                else reader.read([part], start + done)
            )
            part.release()
            if not count:
                raise OSError("the file ended")
            done += count
        return time.perf_counter() - began


def _forget(fd: int, start: int, nbytes: int) -> None:
    with suppress(OSError, AttributeError):
        os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)


def _buffer() -> mmap.mmap:
    buffer: mmap.mmap | None = getattr(_buffers, "buffer", None)
    if buffer is None:
        buffer = _buffers.buffer = mmap.mmap(-1, _BUFFER_BYTES)
    return buffer

"""What has to be read for a layer, cut into pieces that threads read side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .master import Master
from .tensor_bytes import memory

# Several must be under way to keep a disk busy, and each must be worth its call.
CHUNK_BYTES = 4 * 2**20
# Linux takes no more pieces of memory in one call.
_MOST_PARTS = 1024


class Part:
    """Bytes of one master: from byte ``start`` on, so many.

    Attributes:
        master: the master.
        start: the first byte, counted from the master's.
        nbytes: how many.
    """

    __slots__ = ("master", "nbytes", "start")

    def __init__(self, master: Master, start: int, nbytes: int) -> None:
        self.master = master
        self.start = start
        self.nbytes = nbytes


class Chunk:
    """What one call reads: neighbours in a file, or a part of a master in RAM."""

    __slots__ = ("nbytes", "parts")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.nbytes = 0

    @property
    def from_file(self) -> bool:
        """Whether it is read from a file."""
        return not self.parts[0].master.in_ram

    def add(self, part: Part) -> None:
        """Take one more part, the next in the file."""
        self.parts.append(part)
        self.nbytes += part.nbytes

    def read_into(self, place_of: Callable[[Part], torch.Tensor]) -> None:
        """Fill memory.

        Args:
            place_of: returns the contiguous ``uint8`` CPU tensor that a part fills.

        Raises:
            CheckpointError: The file ends early or cannot be read.
        """
        locations = [part.master.source for part in self.parts]
        known = [location for location in locations if location is not None]
        if len(known) < len(self.parts):  # in RAM, maybe since the chunk was cut
            for part in self.parts:
                part.master.read_into(place_of(part), part.start)
            return
        known[0].file.read_parts(
            [
                (location, part.start, memory(place_of(part)))
                for location, part in zip(known, self.parts, strict=True)
            ]
        )


def chunks_of(masters: Sequence[Master], most: int) -> list[Chunk]:
    """Cut the bytes of masters into chunks, neighbours in a file together.

    Args:
        masters: in RAM or in files.
        most: the most bytes of a chunk.
    """
    chunks: list[Chunk] = []
    behind: object = None  # where the last chunk ends
    for master in sorted(masters, key=_place):
        done = 0
        while done < master.nbytes:
            here = _position(master, done)
            chunk = chunks[-1] if chunks and here == behind is not None else None
            if chunk is None or chunk.nbytes == most or len(chunk.parts) == _MOST_PARTS:
                chunk = Chunk()
                chunks.append(chunk)
            part = Part(master, done, min(most - chunk.nbytes, master.nbytes - done))
            chunk.add(part)
            done += part.nbytes
            behind = _position(master, done)
    return chunks


def _place(master: Master) -> tuple[int, int]:
    location = master.source
    return (0, 0) if location is None else (id(location.file), location.offset)


def _position(master: Master, start: int) -> object:
    """Return where a byte lies in its file; None in RAM, where nothing is beside it."""
    location = master.source
    return None if location is None else (id(location.file), location.offset + start)

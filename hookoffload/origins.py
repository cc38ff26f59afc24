"""Where masters in host RAM were read from, so that they can go back there.

A layer that has to leave RAM for a file (`set_limit` with a smaller host limit) is not
written a second time where its file still holds its bytes. The user's file is read once
more and compared, because writes to a tensor in RAM need not be counted anywhere; in
the library's own file it is written to its old place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from .master import Master
from .progress import progress_bar
from .reader_threads import reader_count
from .readers import empty_in_ram
from .safetensors_file import CheckpointFile, TensorLocation
from .safetensors_header import CheckpointError
from .tensor_bytes import chunk_sizes

_Place = tuple[Master, TensorLocation]


class Origins:
    """The places in files that masters in host RAM came from."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[Master, TensorLocation] = {}

    def note(self, places: Iterable[_Place]) -> None:
        """Remember where masters were read from."""
        self._places.update(places)

    def keep_only(self, masters: Iterable[Master]) -> None:
        """Forget others, which would keep their bytes for as long."""
        there = self._places
        self._places = {m: there[m] for m in masters if m in there}

    @property
    def files(self) -> set[CheckpointFile]:
        """The files that there is a way back to."""
        return {place.file for place in self._places.values()}

    def forget(self) -> None:
        """Remember nothing."""
        self._places.clear()

    def take_back(self, masters: Iterable[Master]) -> None:
        """Have masters rest in their files again, where these hold their bytes.

        Raises:
            CheckpointError: The library's own file cannot be written.
        """
        places = list(self._places_of(masters))
        if not places:
            return
        total = sum(location.nbytes for _, location in places)
        with (
            progress_bar("returning weights to files", total) as bar,
            ThreadPoolExecutor(reader_count()) as pool,
        ):
            held = pool.map(_is_held, places)
            for (master, location), is_held in zip(places, held, strict=True):
                if is_held:
                    master.become(location.file.mapped(location).view(-1), location)
                bar.update(location.nbytes)

    def _places_of(self, masters: Iterable[Master]) -> Iterator[_Place]:
        again: dict[CheckpointFile, CheckpointFile | None] = {}
        for master in masters:
            place = self._places.get(master)
            if place is None or master.location is not None or not master.count:
                continue
            if place.dtype != master.flat.dtype:
                continue
            if place.file not in again:
                again[place.file] = place.file.reopened()
            file = again[place.file]
            if file is not None:
                yield master, replace(place, file=file)


@torch.inference_mode(False)
@torch.no_grad()
def _is_held(place: _Place) -> bool:
    """Tell whether a file holds a master's bytes, or have it do so if it is ours."""
    master, location = place
    if location.file.writable_shared:
        location.file.write_from(location, master.flat)
        return True
    done = 0
    # Of its own: what glibc frees in one of many threads can stay this process's.
    buffer = empty_in_ram((max(chunk_sizes(location.nbytes)),), torch.uint8)
    for count in chunk_sizes(location.nbytes):
        part = buffer[:count]
        try:
            location.file.read_into(location, part, done)
        except CheckpointError:
            return False  # cut short, or the disk fails: RAM has the right bytes
        if not part.equal(master.bytes[done : done + count]):
            return False
        done += count
    return True

"""Masters that are read from their files into host RAM, where they stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from .master import Master
from .progress import progress_bar
from .readers import Read, empty_in_ram, read_tensors

Filled: TypeAlias = Callable[[Sequence[Master]], None]
"""Called with masters that have been read, while others are still to come."""

# What follows (page-locking) begins when so much is there: a fortieth of 40 GB.
_GROUP_BYTES = 2**30


def read_masters(
    masters: Sequence[Master], dtype: torch.dtype | None, filled: Filled | None = None
) -> None:
    """Read masters from their files into host RAM.

    Args:
        masters: what to read; each has a location in a file.
        dtype: what those are cast to that may be cast; None: nothing is.
        filled: called with each group of them that is there.

    Raises:
        CheckpointError: A file ends early or cannot be read. Groups before are in RAM.
    """
    if not masters:
        return
    groups = list(_groups(masters, dtype))
    total = sum(location.nbytes for group in groups for _, (location, _) in group)
    with progress_bar("reading weights", total) as bar:
        for group in groups:
            read_tensors([read for _, read in group], bar.update)
            for master, (_, flat) in group:
                master.become(flat, None)
            if filled is not None:
                filled([master for master, _ in group])


def _groups(
    masters: Sequence[Master], dtype: torch.dtype | None
) -> Iterator[list[tuple[Master, Read]]]:
    """Cut masters into groups of about `_GROUP_BYTES`, in the order of their files."""
    reads = [(master, _read_of(master, dtype)) for master in masters]
    reads.sort(key=lambda pair: (str(pair[1][0].file.path), pair[1][0].offset))
    group: list[tuple[Master, Read]] = []
    size = 0
    for master, read in reads:
        group.append((master, read))
        size += read[0].nbytes
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _read_of(master: Master, dtype: torch.dtype | None) -> Read:
    """Pair where a master lies with memory, which takes nothing until it is filled."""
    assert master.location is not None, f"{master.name} is in RAM already"
    cast = dtype is not None and master.castable
    wanted = dtype if dtype is not None and cast else master.flat.dtype
    return master.location, empty_in_ram((master.count,), wanted)

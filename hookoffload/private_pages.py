"""Which memory of a file's private map was written to, and is no longer the file's."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator

import torch

# Flags in an entry of /proc/self/pagemap (Linux, Documentation/admin-guide/mm/pagemap).
_FILE_PAGE = 1 << 61
_SWAPPED = 1 << 62
_PRESENT = -(1 << 63)  # bit 63, in a signed integer

_TABLE = "/proc/self/pagemap"
_ENTRIES_AT_ONCE = 2**17  # 1 MiB of entries, for 512 MiB of memory


def can_be_told() -> bool:
    """Tell whether the system says which memory was written to."""
    return os.access(_TABLE, os.R_OK)


def written_privately(tensors: Iterable[torch.Tensor]) -> Iterator[bool]:
    """Tell for each tensor whether a page of it was copied because it was written to.

    Args:
        tensors: flat CPU tensors in private maps of files.

    Yields:
        False too where the system does not say (it is not Linux, or hides the table).
    """
    try:
        table = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield from (False for _ in tensors)
        return
    try:
        for tensor in tensors:
            yield any(map(_has_copies, _entries(table, tensor)))
    finally:
        os.close(table)


def _entries(table: int, tensor: torch.Tensor) -> Iterator[bytearray]:
    first = tensor.data_ptr() // mmap.PAGESIZE
    end = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)
    for begin in range(first, end, _ENTRIES_AT_ONCE):
        count = min(_ENTRIES_AT_ONCE, end - begin)
        yield bytearray(os.pread(table, 8 * count, 8 * begin))


def _has_copies(entries: bytearray) -> bool:
    if not entries:
        return False
    flags = torch.frombuffer(entries, dtype=torch.int64)
    swapped = (flags & _SWAPPED) != 0
    anonymous = ((flags & _PRESENT) != 0) & ((flags & _FILE_PAGE) == 0)
    return bool((swapped | anonymous).any())

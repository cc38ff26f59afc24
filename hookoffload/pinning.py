"""Page-locking masters where they lie, so that copies run at the speed of the link.

[Note: page-locking]
CUDA can lock memory that exists already (``cudaHostRegister``): nothing is copied and
nothing is rounded up, unlike allocating page-locked memory and moving the weights
there. Whole pages are locked. A page that the weights share with other data must not
be: a copy from other memory that lies half on it fails ("invalid argument"), and it
would be a user's input. Large tensors have pages of their own; what comes from the
middle of malloc's heap (glibc gives it up to 32 MiB at once) is moved: small ones
together into a slab that is locked as one, others into maps of their own (and all of
them back at detach). A range must be unlocked before its memory goes back to the
system; `PageLock` therefore holds the tensors until it has done so.

What is not locked (the cap is met, the system refuses, another device type) goes
through the copy engine's staging buffers instead: slower, and otherwise the same.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .alignment import SMALL_TENSOR_BYTES, align
from .budget import format_gib
from .host_memory import (
    default_cap,
    empty_pages,
    is_from_empty_pages,
    trim_heap,
)
from .locked_pages import lock_pages, unlock_pages
from .master import Master
from .progress import progress_bar

logger = logging.getLogger(__name__)
_HEAP_ALIGNMENT = 64  # what PyTorch's own CPU allocator gives
# Moved out of the heap before that is trimmed, and how many times at least.
_TRIM_BYTES, _TRIMS = 2**28, 8


class PageLock:
    """The masters of one session that are page-locked.

    Args:
        device: the compute device.
        cap_bytes: the most to lock; None decides from the memory of this machine.
        sharing: the locks of all models that share the cap; this one is added.
    """

    __slots__ = (
        "__weakref__",
        "_cap",
        "_device",
        "_locked",
        "_moved",
        "_release",
        "_sharing",
        "_users",
        "_warned",
        "locked_bytes",
    )

    def __init__(
        self,
        device: torch.device,
        cap_bytes: int | None,
        sharing: list[PageLock] | None = None,
    ) -> None:
        self._sharing = [] if sharing is None else sharing
        self._sharing.append(self)
        self._device = device
        self._cap = cap_bytes
        # By where a range starts: what lies in it; how long it is, and whose.
        self._locked: dict[int, list[torch.Tensor]] = {}
        self._users: dict[int, tuple[int, list[Master]]] = {}
        self._moved: list[Master] = []  # into slabs
        self._warned = False
        self.locked_bytes = 0
        # Also when a model is dropped without detach.
        self._release = weakref.finalize(self, _unlock, self._locked)

    def takes(self, nbytes: int) -> bool:
        """Tell whether this device locks pages, and the cap has room for so many."""
        return self._device.type == "cuda" and nbytes <= self._room()

    def _room(self) -> int:
        cap = default_cap() if self._cap is None else self._cap
        return cap - sum(lock.locked_bytes for lock in self._sharing)

    def lock(self, masters: Sequence[Master]) -> None:
        """Lock masters in host RAM; those left out are spread evenly over the list."""
        waiting = [m for m in masters if m.in_ram and m.count and not m.pinned]
        if self._device.type != "cuda" or not waiting:
            return
        total = sum(master.nbytes for master in waiting)
        chosen = _evenly(waiting, min(max(self._room(), 0) / total, 1.0))
        # Codes have pages of their own from the start.
        maps = _starts_of_maps()
        guests = [
            master
            for master in chosen
            if master.code is None and not _has_own_pages(master.flat, maps)
        ]
        if guests:
            _move_out_of_heap(guests)
            self._moved += guests
        refused = 0
        chosen_bytes = sum(master.nbytes for master in chosen)
        with progress_bar("page-locking weights", chosen_bytes) as bar:
            for start, end, members in _page_ranges(chosen):
                nbytes = sum(m.nbytes for m in members)
                bar.update(nbytes)
                if not lock_pages(start, end - start, self._device):
                    refused += nbytes
                    continue
                self._locked[start] = [master.bytes for master in members]
                self._users[start] = (end - start, members)
                self.locked_bytes += end - start
                for master in members:
                    master.pinned = True
        left = total - chosen_bytes + refused
        if left and not self._warned:  # weights may come from disk many times
            self._warned = True
            logger.warning(
                "%s of %s of weights in host RAM are not page-locked (%s) and are "
                "copied more slowly. pin_limit_gb= sets how much may be locked",
                format_gib(left),
                format_gib(total),
                "the system refused" if refused else "the cap is met",
            )

    def unlock(self, masters: Iterable[Master]) -> None:
        """Unlock everything; the masters may be freed afterwards.

        They must be at rest. Those that were moved into a slab get memory of their own.
        """
        for master in masters:
            master.pinned = False
        _unlock(self._locked)
        self._users = {}
        self.locked_bytes = 0
        for master in self._moved:
            if master.in_ram:
                master.reconcile(lenient=True)  # it may have been given other data
                master.become(master.flat.clone(), None)
        self._moved = []

    def unlock_coded(self, masters: Iterable[Master]) -> None:
        """Unlock the weights of masters of which codes are copied from now on.

        They must be at rest. What shares a locked range with others stays locked.
        """
        coded = set(masters)
        for master in coded:
            master.pinned = False
        for start, (nbytes, users) in list(self._users.items()):
            if not coded.issuperset(users):
                continue
            unlock_pages(start)
            del self._locked[start], self._users[start]
            self.locked_bytes -= nbytes


def _has_own_pages(flat: torch.Tensor, maps: set[int]) -> bool:
    """Tell whether no other allocation lies on the pages of a tensor's storage.

    True for files and other maps that begin with the storage, for `empty_pages`, and
    for what glibc's malloc gave a map of its own, as it does from 32 MiB on at the
    latest. That is read off the two words which glibc keeps in front of an allocation:
    the distance to the start of the map, and the size with flag 2 ("mmapped") alone;
    start and end of the map must then fall on pages (malloc/malloc.c, "struct
    malloc_chunk"). In doubt the answer is no.

    Args:
        flat: the tensor.
        maps: addresses at which the process's memory maps begin.
    """
    page = mmap.PAGESIZE
    storage = flat.untyped_storage()
    start, nbytes = storage.data_ptr(), storage.nbytes()
    if start % page == 0:
        return start in maps or is_from_empty_pages(start)
    if start % page < 16 or not sys.platform.startswith("linux"):
        return False
    chunk = start - 16
    before, word = (ctypes.c_size_t * 2).from_address(chunk)
    size = word & ~7
    spare = chunk + size - (start + nbytes)
    return (
        word & 7 == 2
        and (chunk - before) % page == 0
        and (before + size) % page == 0
        and 0 <= spare <= page + _HEAP_ALIGNMENT
    )


def _starts_of_maps() -> set[int]:
    """Return the addresses at which this process's memory maps begin."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split("-", 1)[0], 16) for line in lines}


def _move_out_of_heap(masters: Sequence[Master]) -> None:
    """Move masters that share pages with other data into pages of their own.

    Large ones one by one, and what they leave goes back to the system in between: a
    model of which no weight is larger than 32 MiB may lie in the heap as a whole.
    """
    small = [master for master in masters if master.nbytes < SMALL_TENSOR_BYTES]
    if small:
        _move_into_slab(small)
    left = 0
    total = sum(master.nbytes for master in masters)
    for master in masters:
        if master.nbytes < SMALL_TENSOR_BYTES:
            continue  # in the slab
        _move(master, empty_pages(master.nbytes))
        left += master.nbytes
        if left >= min(_TRIM_BYTES, total // _TRIMS):
            trim_heap()
            left = 0
    trim_heap()


def _move_into_slab(masters: Sequence[Master]) -> None:
    offsets, end = [], 0
    for master in masters:
        offsets.append(end)
        end += align(master.nbytes)  # as in the window, see `joined_moves`
    slab = empty_pages(end)
    for master, offset in zip(masters, offsets, strict=True):
        _move(master, slab[offset : offset + master.nbytes])


def _move(master: Master, pages: torch.Tensor) -> None:
    master.reconcile(lenient=True)  # it may have been given other data
    place = pages.view(master.flat.dtype)
    place.copy_(master.flat)
    master.become(place, None)


def _evenly(masters: list[Master], share: float) -> list[Master]:
    """Choose about this share of the bytes, spread over the list."""
    chosen: list[Master] = []
    seen = taken = 0
    for master in masters:
        seen += master.nbytes
        if taken + master.nbytes <= seen * share:
            chosen.append(master)
            taken += master.nbytes
    return chosen


def _page_ranges(masters: list[Master]) -> list[tuple[int, int, list[Master]]]:
    """Return ranges of whole pages, disjoint, with the masters that lie in each.

    Neighbours in one storage are in one range, also where a page ends between them: a
    copy of both (see `joined_moves`) must not go from one locked range into another.
    """
    page = mmap.PAGESIZE
    spans = []
    for master in masters:
        start = master.bytes.data_ptr()
        end = start + master.nbytes
        spans.append((start // page * page, -(-end // page) * page, master))
    spans.sort(key=lambda span: span[0])
    ranges: list[tuple[int, int, list[Master]]] = []
    for start, end, master in spans:
        if ranges and _goes_on(ranges[-1], start, master):
            low, high, members = ranges[-1]
            ranges[-1] = (low, max(high, end), [*members, master])
        else:
            ranges.append((start, end, [master]))
    return ranges


def _goes_on(before: tuple[int, int, list[Master]], start: int, master: Master) -> bool:
    _, high, members = before
    if start != high:
        return start < high
    last, storage = members[-1].bytes.untyped_storage(), master.bytes.untyped_storage()
    return bool(storage._cdata == last._cdata)


def _unlock(locked: dict[int, list[torch.Tensor]]) -> None:
    for start in locked:
        unlock_pages(start)
    locked.clear()

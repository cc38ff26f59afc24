"""Page-locking masters where they lie, so that copies run at the speed of the link.

[Note: page-locking]
CUDA can lock memory that exists already (``cudaHostRegister``): nothing is copied and
nothing is rounded up, unlike allocating page-locked memory and moving the weights
there. Whole pages are locked, and locking a page twice fails, so the pages of tensors
that share some are locked as one range. A range must be unlocked before its memory
goes back to the system; `PageLock` therefore holds the tensors until it has done so.

What is not locked (the cap is met, the system refuses, another device type) goes
through the copy engine's staging buffers instead: slower, and otherwise the same.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .budget import format_gib
from .store import Master

logger = logging.getLogger(__name__)

# Of the memory that is there: the system and other programs must be able to work, and
# locked pages can neither be swapped out nor moved.
_LOCKED_SHARE = 0.9


class PageLock:
    """The masters of one session that are page-locked.

    Args:
        device: the compute device.
        cap_bytes: the most to lock; None decides from the memory of this machine.
    """

    __slots__ = (
        "__weakref__",
        "_cap",
        "_device",
        "_held",
        "_ranges",
        "_release",
        "locked_bytes",
    )

    def __init__(self, device: torch.device, cap_bytes: int | None) -> None:
        self._device = device
        self._cap = cap_bytes
        self._held: list[torch.Tensor] = []
        self._ranges: list[int] = []
        self.locked_bytes = 0
        # Also when a model is dropped without detach.
        self._release = weakref.finalize(self, _unlock, self._ranges, self._held)

    def lock(self, masters: Sequence[Master]) -> None:
        """Lock masters in host RAM; those left out are spread evenly over the list."""
        waiting = [m for m in masters if m.in_ram and m.count and not m.pinned]
        if self._device.type != "cuda" or not waiting:
            return
        total = sum(master.nbytes for master in waiting)
        cap = (_default_cap() if self._cap is None else self._cap) - self.locked_bytes
        chosen = _evenly(waiting, min(max(cap, 0) / total, 1.0))
        refused = 0
        for start, end, members in _page_ranges(chosen):
            if not _register(start, end - start, self._device):
                refused += sum(m.nbytes for m in members)
                continue
            self._ranges.append(start)
            self.locked_bytes += end - start
            for master in members:
                self._held.append(master.flat)
                master.pinned = True
        chosen_bytes = sum(master.nbytes for master in chosen)
        left = total - chosen_bytes + refused
        if left:
            logger.warning(
                "%s of %s of weights in host RAM are not page-locked (%s) and are "
                "copied more slowly. pin_limit_gb= sets how much may be locked",
                format_gib(left),
                format_gib(total),
                "the system refused" if refused else "the cap is met",
            )

    def unlock(self, masters: Iterable[Master]) -> None:
        """Unlock everything; the masters may be freed afterwards."""
        for master in masters:
            master.pinned = False
        _unlock(self._ranges, self._held)
        self.locked_bytes = 0


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
    """Return ranges of whole pages, disjoint, with the masters that lie in each."""
    page = mmap.PAGESIZE
    spans = []
    for master in masters:
        start = master.flat.data_ptr()
        end = start + master.flat.nbytes
        spans.append((start // page * page, -(-end // page) * page, master))
    spans.sort(key=lambda span: span[0])
    ranges: list[tuple[int, int, list[Master]]] = []
    for start, end, master in spans:
        if ranges and start < ranges[-1][1]:
            low, high, members = ranges[-1]
            ranges[-1] = (low, max(high, end), [*members, master])
        else:
            ranges.append((start, end, [master]))
    return ranges


def _register(start: int, nbytes: int, device: torch.device) -> bool:
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        error = int(runtime.cudaHostRegister(start, nbytes, 0))
        if error:
            _forget_last_error(device)
    return error == 0


def _forget_last_error(device: torch.device) -> None:
    # CUDA remembers the refusal, and PyTorch would report it at its next launch.
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        logger.debug("page-locking was refused: %s", error)


def _unlock(ranges: list[int], held: list[torch.Tensor]) -> None:
    if ranges:
        runtime = torch.cuda.cudart()
        for start in ranges:
            runtime.cudaHostUnregister(start)
    ranges.clear()
    held.clear()


def _default_cap() -> int:
    """Return what this process may lock: what it has, and most of what is free.

    Locking memory that is in use takes nothing from anybody; it keeps the system from
    swapping it out. A control group's limit counts as the machine's memory.
    """
    has = _own_memory()
    cap = has + int(_meminfo("MemAvailable") * _LOCKED_SHARE)
    for name in _CGROUP_LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            cap = min(cap, int(int(text) * _LOCKED_SHARE))
    return cap


_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def _own_memory() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * mmap.PAGESIZE


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62  # no Linux: the system refuses what it does not want to give
    values = [int(line.split()[1]) for line in lines if line.startswith(field + ":")]
    return values[0] * 1024 if values else 2**62

"""Memory of the host and of devices: what there is, what may be locked, new pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

import torch

# Of the memory that is there: the system and other programs must be able to work, and
# locked pages can neither be swapped out nor moved.
_LOCKED_SHARE = 0.9

# What an automatic limit leaves to other programs and to the allocator's own gaps, at
# least a tenth and at least half a GiB. A CPU has activations to hold besides.
_SPARE_SHARE, _SPARE_BYTES = 10, 2**29
_HOST_SHARE = 0.75


def automatic_limit(device: torch.device) -> int:
    """Return the bytes that a limit may have on a device at this moment.

    On an accelerator that is what is free and what PyTorch's allocator holds already,
    less a tenth (half a GiB at least) for other programs. On a CPU it is three quarters
    of the memory that is available.

    Raises:
        ValueError: The device does not say what is free.
    """
    if device.type == "cpu":
        return spare_memory()
    module = torch.get_device_module(device)
    ask = getattr(module, "mem_get_info", None)
    if ask is None:
        raise ValueError(
            f'limit_gb="auto" needs to know what is free, and {device.type} does not '
            "say. Pass a number of GiB"
        )
    free, _ = ask(device)
    reach = int(free) + int(module.memory_reserved(device))
    return max(reach - max(reach // _SPARE_SHARE, _SPARE_BYTES), 1)


def spare_memory() -> int:
    """Return what this process may take of the memory that is free, in bytes."""
    available, group = available_memory(), cgroup_limit()
    if group is not None:
        available = min(available, max(group - _own_memory(), 0))
    return int(available * _HOST_SHARE)


def default_cap() -> int:
    """Return what this process may lock: what it has, and most of what is free.

    Locking memory that is in use takes nothing from anybody; it keeps the system from
    swapping it out. A control group's limit counts as the machine's memory.
    """
    cap = _own_memory() + int(available_memory() * _LOCKED_SHARE)
    group = cgroup_limit()
    return cap if group is None else min(cap, int(group * _LOCKED_SHARE))


def reclaimable_memory() -> int:
    """Return the most that the page cache can come to take, in bytes."""
    available, group = available_memory(), cgroup_limit()
    return available if group is None else min(available, group)


def cgroup_limit() -> int | None:
    """Return the memory that this process's control group may take, in bytes.

    That is the least of what it and the groups around it may.
    """
    limits = []
    for path in _cgroup_files():
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


# Of version 2 and of version 1, in the group around all others: in a container that is
# mostly the container's own. Where it is not (a batch system's job, a systemd unit),
# the process's group is a folder below.
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
_CGROUPS = "/proc/self/cgroup"


def _cgroup_files() -> Iterator[Path]:
    """Yield the files that may say what this process's control groups may take."""
    outermost = [Path(name) for name in _CGROUP_LIMITS]
    yield from outermost
    try:
        lines = Path(_CGROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, without controllers in version 2
        _, controllers, group = line.split(":", 2)
        for controller, file in zip(("", "memory"), outermost, strict=True):
            if controller in controllers.split(","):
                folder = file.parent
                for name in PurePosixPath(group.lstrip("/")).parts:
                    folder /= name
                    yield folder / file.name


def available_memory() -> int:
    """Return the bytes that can be had without swapping; very many if unknown."""
    return _meminfo("MemAvailable")


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


def empty_pages(nbytes: int) -> torch.Tensor:
    """Return memory that shares no page with other data."""
    if sys.platform == "win32":  # where nothing forks
        memory = mmap.mmap(-1, nbytes)
    else:  # private, or a forked child would write to its parent's
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    start = pages.data_ptr()
    _OWN_PAGES.add(start)
    weakref.finalize(memory, _OWN_PAGES.discard, start).atexit = False
    _prefer_huge_pages(pages)
    return pages


def is_from_empty_pages(start: int) -> bool:
    """Tell whether memory that `empty_pages` returned begins at an address.

    The system's list of maps does not say: it shows neighbours as one.
    """
    return start in _OWN_PAGES


_OWN_PAGES: set[int] = set()


def _prefer_huge_pages(pages: torch.Tensor) -> None:
    """Have pages that were not touched yet come as huge ones, where there are any.

    The first touch is a large part of the time that filling them takes. All of them are
    advised, not the huge ones alone: neighbours stay one map of the system's, which
    gives a process 65,530, and a model may have more weights.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with suppress(OSError, AttributeError):
            _libc().madvise(
                ctypes.c_void_p(pages.data_ptr()), ctypes.c_size_t(pages.nbytes), advice
            )


def trim_heap() -> None:
    """Have glibc give free pages in the middle of its heap back to the system.

    Large tensors lie there, too, where there was a gap for them.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # opening it takes longer than most calls

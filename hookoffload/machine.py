"""What this machine can do, measured in seconds: its link, its disk, what it may lock.

Every measurement is bounded in time and in bytes, and says how it came about: a file
that the page cache still holds is not read from disk.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .budget import GIB
from .cost import Rates
from .host_memory import cgroup_limit, default_cap
from .lossless import TIMED_BYTES, decode_seconds
from .placement import default_device

_LINK_BYTES = 256 * 2**20
_LINK_SECONDS = 0.5
_DISK_BYTES = 512 * 2**20
_DISK_SECONDS = 2.0
_PIECE_BYTES = 16 * 2**20  # as the copy engine reads
# Of what is free on the disk: a measurement must not be what fills it.
_DISK_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """How fast bytes come from host RAM to a device.

    Attributes:
        device: The device by name.
        locked_bytes_per_second: From page-locked memory; None where there is none.
        plain_bytes_per_second: From any other memory.
    """

    device: str
    locked_bytes_per_second: float | None
    plain_bytes_per_second: float

    @property
    def bytes_per_second(self) -> float:
        """The faster of the two that there is: how weights come."""
        return self.locked_bytes_per_second or self.plain_bytes_per_second


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """How fast bytes come from a folder's disk, one reader, in order.

    Attributes:
        folder: The folder.
        bytes_per_second: Of a file that was written, and dropped from the page cache.
        cached_bytes_per_second: Of the same file, read again.
        cold: Whether the page cache had really let go of the file; None where the
            system does not tell. If it is False, both figures are of memory.
        read_bytes: The size of the file.
    """

    folder: str
    bytes_per_second: float
    cached_bytes_per_second: float
    cold: bool | None
    read_bytes: int


@dataclass(frozen=True, kw_only=True)
class Lockable:
    """How much host memory may be page-locked, and why not more.

    Attributes:
        nbytes: What hookoffload locks at most by default; 0 where it locks nothing.
        why: What sets this figure.
        ulimit_bytes: `ulimit -l`; None is unlimited, or a system without it.
    """

    nbytes: int
    why: str
    ulimit_bytes: int | None


def measure_rates(
    device: torch.device | str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Rates:
    """Measures how fast weights come to a device of this machine, in a few seconds.

    Args:
        device: The compute device; default: the accelerator if there is one.
        folder: A folder on the disk to measure; a file of up to half a GiB is written
            there and removed. None measures no disk.

    Returns:
        The rates; how long a model computes, only a run of it tells.

    Raises:
        OSError: The folder cannot be written to, or has no room.
        RuntimeError: There is no such device.

    Example:
        >>> measure_rates("cpu").link_bytes_per_second is None
        True
    """
    compute_device = torch.device(device or default_device())
    link = measure_link(compute_device)
    disk = None if folder is None else measure_disk(Path(folder)).bytes_per_second
    decoder = None
    if compute_device.type == "cuda":
        decoder = 1 / decode_seconds(compute_device, TIMED_BYTES)
    return Rates(
        link_bytes_per_second=None if link is None else link.bytes_per_second,
        disk_bytes_per_second=disk,
        decode_bytes_per_second=decoder,
    )


def measure_link(device: torch.device) -> LinkSpeed | None:
    """Measures copies from host RAM to a device; None for the CPU, which needs none."""
    if device.type == "cpu":
        return None
    target = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    plain = torch.ones(_LINK_BYTES, dtype=torch.uint8)
    try:
        locked = _copy_rate(plain.pin_memory(), target)
    except RuntimeError:
        locked = None  # not every kind of device has it, and the system may refuse
    return LinkSpeed(
        device=str(target.device),
        locked_bytes_per_second=locked,
        plain_bytes_per_second=_copy_rate(plain, target),
    )


def _copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.accelerator.synchronize(target.device)

    copy()  # the first one maps pages and makes buffers
    return source.nbytes / _least_seconds(copy)


def _least_seconds(work: Callable[[], None]) -> float:
    seconds: list[float] = []
    while sum(seconds) < _LINK_SECONDS:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measure_disk(folder: Path) -> DiskSpeed:
    """Measures reading a file that is written into a folder, and removed again.

    Raises:
        OSError: The folder cannot be written to, or has no room.
    """
    spot = os.statvfs(folder)
    size = min(_DISK_BYTES, spot.f_bavail * spot.f_frsize // _DISK_SHARE)
    size -= size % _PIECE_BYTES
    if not size:
        room = spot.f_bavail * spot.f_frsize / GIB
        raise OSError(errno.ENOSPC, f"only {room:.3f} GiB are free there", str(folder))
    with tempfile.TemporaryFile(dir=folder, prefix="hookoffload-") as file:
        fd = file.fileno()
        size = _write(fd, size)
        cold = _drop_from_cache(fd, size)
        return DiskSpeed(
            folder=str(folder),
            bytes_per_second=_read_rate(fd, size),
            cached_bytes_per_second=_read_rate(fd, size),
            cold=cold,
            read_bytes=size,
        )


def measure_file(path: Path) -> float:
    """Returns how fast a file is read as things are, from its disk or the cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return _read_rate(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _write(fd: int, size: int) -> int:
    """Writes what no disk can compress; stops early on a slow one."""
    data = secrets.token_bytes(_PIECE_BYTES)
    written, began = 0, time.perf_counter()
    while written < size:
        written += os.write(fd, data)
        os.fsync(fd)  # what is not written yet cannot be dropped from the cache
        if time.perf_counter() - began > _DISK_SECONDS:
            break
    return written


def _drop_from_cache(fd: int, size: int) -> bool | None:
    """Asks the system to forget a file's pages; returns whether it did."""
    if not hasattr(os, "posix_fadvise"):
        return None
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return None
    page = bytearray(1)
    for position in (size // 2, 0):
        try:
            # Answers only from the cache.
            os.preadv(fd, [page], position, nowait)
        except BlockingIOError:
            continue
        except OSError:
            return None  # this file system does not know the question
        return False
    return True


def _read_rate(fd: int, size: int) -> float:
    buffer = memoryview(bytearray(min(_PIECE_BYTES, max(size, 1))))
    done, began = 0, time.perf_counter()
    spent = 0.0
    while done < size and spent < _DISK_SECONDS:
        count = os.preadv(fd, [buffer], done)
        if count == 0:
            break
        done += count
        spent = time.perf_counter() - began
    return done / max(spent, 1e-9)


def devices() -> list[dict[str, object]]:
    """Returns the accelerators of this machine: name, what they are, their memory."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "an accelerator is available"
    module = torch.get_device_module(kind)
    found: list[dict[str, object]] = []
    for index in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, index)
        entry: dict[str, object] = {"device": str(device)}
        if hasattr(module, "get_device_name"):
            entry["name"] = module.get_device_name(device)
        if hasattr(module, "mem_get_info"):
            free, total = module.mem_get_info(device)
            entry |= {"memory_bytes": total, "free_bytes": free}
        found.append(entry)
    return found


def lockable(device: torch.device) -> Lockable:
    """Returns how much host memory hookoffload would page-lock for a device."""
    ulimit = _ulimit()
    if device.type != "cuda":
        why = "page-locking is for CUDA and ROCm devices, and there is none"
        return Lockable(nbytes=0, why=why, ulimit_bytes=ulimit)
    nbytes, group = default_cap(), cgroup_limit()
    why = "nine tenths of the memory that is available, and what this process has"
    if group is not None and nbytes < group <= nbytes * 1.2:
        why = f"nine tenths of its control group's limit, {group / GIB:.1f} GiB"
    return Lockable(nbytes=nbytes, why=why, ulimit_bytes=ulimit)


def _ulimit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft

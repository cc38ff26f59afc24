"""``hookoffload doctor``: what this machine can do, and one line of advice."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .budget import GIB
from .cost import Rates
from .host_memory import available_memory
from .machine import (
    DiskSpeed,
    LinkSpeed,
    Lockable,
    devices,
    lockable,
    measure_disk,
    measure_link,
)
from .measured_rates import keep_rates
from .placement import default_device

logger = logging.getLogger(__name__)

# Below this a disk is what every pass waits for.
_SLOW_DISK = GIB
_LABEL = 13


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a look at this machine found.

    Attributes:
        versions: Of what matters, by name; None for what is not there.
        devices: The accelerators; see `machine.devices`.
        cpu_cores: How many threads PyTorch computes with.
        ram_bytes: Memory of the machine; None where it is not told.
        available_bytes: What of it can be had without swapping; None the same.
        link: The default device's; None without an accelerator.
        disk: That of the folder that was asked for.
        lockable: Memory that may be page-locked.
        advice: One line.
    """

    versions: dict[str, str | None]
    devices: list[dict[str, Any]]
    cpu_cores: int
    ram_bytes: int | None
    available_bytes: int | None
    link: LinkSpeed | None
    disk: DiskSpeed
    lockable: Lockable
    advice: str


def examine(folder: Path | None = None) -> Findings:
    """Looks at this machine, for a few seconds.

    Args:
        folder: Where the disk is measured; default: the system's temporary folder.

    Raises:
        OSError: The folder cannot be written to.
    """
    device = default_device()
    link = measure_link(device)
    disk = measure_disk(folder or Path(tempfile.gettempdir()))
    locked = lockable(device)
    ram = _ram_bytes()
    return Findings(
        versions=_versions(),
        devices=devices(),
        cpu_cores=torch.get_num_threads(),
        ram_bytes=ram,
        available_bytes=None if ram is None else min(available_memory(), ram),
        link=link,
        disk=disk,
        lockable=locked,
        advice=_advice(link, disk, locked),
    )


def keep_findings(findings: Findings) -> bool:
    """Keeps the rates for ``hookoffload plan``; returns whether they could be kept."""
    link, disk = findings.link, findings.disk
    rates = Rates(
        link_bytes_per_second=None if link is None else link.bytes_per_second,
        disk_bytes_per_second=None if disk.cold is False else disk.bytes_per_second,
    )
    device = "cpu" if link is None else link.device
    try:
        keep_rates(device=device, rates=rates, disk_folder=disk.folder)
    except OSError as error:
        logger.debug("the rates are not kept: %s", error)
        return False
    return True


def findings_record(findings: Findings) -> dict[str, Any]:
    """Returns the findings as JSON takes them; sizes in bytes."""
    return asdict(findings)


def format_findings(findings: Findings, width: int = 80) -> str:
    """Writes the findings for a reader; rates in GiB (2**30 bytes) per second."""
    lines: list[str] = []

    def row(label: str, text: str) -> None:
        lines.extend(
            textwrap.wrap(
                text,
                width,
                initial_indent=f"{label:<{_LABEL}}",
                subsequent_indent=" " * (_LABEL if width >= 60 else 2),
                break_on_hyphens=False,
            )
        )

    named = [f"{name} {at or 'none'}" for name, at in findings.versions.items()]
    row("versions", ", ".join(named))
    ram = f"{_gib(findings.ram_bytes)} RAM, {_gib(findings.available_bytes)} available"
    row("cpu", f"{findings.cpu_cores} threads, {ram}")
    for found in findings.devices:
        row(str(found["device"]), _device_line(found))
    if not findings.devices:
        row("gpu", "none that this PyTorch can use")
    row("link", _link_line(findings.link))
    row("disk", _disk_line(findings.disk))
    row("page-locking", _lock_line(findings.lockable))
    row("advice", findings.advice)
    return "\n".join(lines)


def _advice(link: LinkSpeed | None, disk: DiskSpeed, locked: Lockable) -> str:
    if link is None:
        return (
            "No GPU: models compute on the CPU, where a limit saves RAM. Keep weights "
            'on disk with OffloadPolicy(store="disk", limit_gb=...).'
        )
    rate = link.bytes_per_second
    if link.locked_bytes_per_second is None:
        return (
            "This device's driver refuses page-locked memory, so that copies run at "
            f"{_rate(rate)} only: raise limit_gb as far as "
            "memory allows."
        )
    each = f"{GIB / rate * 1000:.0f} ms"
    text = f"Each GiB that does not fit limit_gb costs {each} a pass from RAM"
    if disk.cold is not False and disk.bytes_per_second < rate:
        slow = GIB / disk.bytes_per_second * 1000
        text += f", {slow:.0f} ms from disk"
        if disk.bytes_per_second < _SLOW_DISK:
            text += ': use store="disk" only for what RAM cannot hold'
    room = _gib(locked.nbytes)
    return f"{text}. Models up to {room} stream from RAM at full speed."


def _device_line(found: dict[str, Any]) -> str:
    parts = [str(found.get("name", "")) or str(found["device"])]
    if "memory_bytes" in found:
        total, free = found["memory_bytes"], found["free_bytes"]
        parts.append(f"{_gib(total)}, {_gib(free)} free")
    return ", ".join(parts)


def _link_line(link: LinkSpeed | None) -> str:
    if link is None:
        return "none: the CPU reads RAM itself"
    plain = f"{_rate(link.plain_bytes_per_second)} from other memory"
    if link.locked_bytes_per_second is None:
        return f"{plain}; page-locked memory is refused"
    locked = _rate(link.locked_bytes_per_second)
    return f"{locked} from page-locked RAM to {link.device}, {plain}"


def _disk_line(disk: DiskSpeed) -> str:
    cached = _rate(disk.cached_bytes_per_second)
    rate = f"{_rate(disk.bytes_per_second)} in {disk.folder}"
    if disk.cold is False:
        return (
            f"not measured: the page cache would not let go of the file in "
            f"{disk.folder} (memory read: {cached}); give --disk-dir on another disk"
        )
    doubt = "" if disk.cold else " (perhaps from the page cache: nobody can tell)"
    return f"{rate}{doubt}; {cached} once the page cache has it"


def _lock_line(locked: Lockable) -> str:
    ulimit = "unlimited" if locked.ulimit_bytes is None else _gib(locked.ulimit_bytes)
    most = f"up to {_gib(locked.nbytes)}" if locked.nbytes else "none"
    text = f"{most}: {locked.why}; ulimit -l is {ulimit}"
    if locked.nbytes and locked.ulimit_bytes is not None:
        return f"{text}, which CUDA does not count"
    return text


def _gib(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes >> 20} MiB"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / GIB:.2f} GiB/s"


def _versions() -> dict[str, str | None]:
    return {
        "hookoffload": package_version("hookoffload") or "not installed",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "safetensors": package_version("safetensors"),
        "system": f"{platform.system()} {platform.release()}",
    }


def package_version(name: str) -> str | None:
    """Returns the version of an installed package; None for one that is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None

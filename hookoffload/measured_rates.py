"""Rates that ``hookoffload doctor`` measured, kept for ``hookoffload plan``.

They are used on the machine that they were measured on, for the kind of device and the
disk that they were measured of, and a plan says whose they are. Nothing else reads
them. See [Note: planning without torch].
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .aside import written_aside
from .cost import Rates

_FILE = "rates.json"
_FORMAT = 1


class MeasuredRates(NamedTuple):
    """What is known of a plan's device and disk.

    Attributes:
        rates: What was measured of them; compute is not.
        day: When, as 2026-01-31.
    """

    rates: Rates
    day: str


def default_cache_dir() -> Path:
    """Returns this library's folder in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hookoffload"


def keep_rates(*, device: str, rates: Rates, disk_folder: str) -> None:
    """Keeps what was measured on this machine, instead of what was before.

    Args:
        device: The device at the other end of the link, by name.
        rates: What was measured.
        disk_folder: A folder on the disk that was measured.

    Raises:
        OSError: The user's cache folder cannot be written.
    """
    path = default_cache_dir() / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "machine": platform.node(),
        "day": datetime.date.today().isoformat(),
        "device": device,
        "disk_folder": os.path.abspath(disk_folder),
        **asdict(rates),
    }
    with written_aside(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def kept_rates(device: str, files: Iterable[Path]) -> MeasuredRates | None:
    """Returns what is known of a device of this machine and of the disk of files.

    Args:
        device: The compute device by name.
        files: Files or folders; the disk's rate is given if all are on that disk.

    Returns:
        None if nothing of it was measured, or not here.
    """
    try:
        content: dict[str, Any] = json.loads((default_cache_dir() / _FILE).read_bytes())
        if (content["format"], content["machine"]) != (_FORMAT, platform.node()):
            return None
        same_kind = _kind(content["device"]) == _kind(device)
        link = content["link_bytes_per_second"] if same_kind else None
        disk = content["disk_bytes_per_second"]
        if disk is not None and not _on_one_disk([content["disk_folder"], *files]):
            disk = None
        if link is disk is None:
            return None
        rates = Rates(link_bytes_per_second=link, disk_bytes_per_second=disk)
        return MeasuredRates(rates, str(content["day"]))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None  # nobody has measured, or not with this version


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _on_one_disk(paths: Iterable[str | Path]) -> bool:
    with suppress(OSError):
        return len({os.stat(path).st_dev for path in paths}) == 1
    return False

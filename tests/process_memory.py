"""What memory this process has of its own, for tests that measure it."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest

from hookoffload.host_memory import trim_heap

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return what memory this process has, maps of files excluded."""
    found = None
    if _STATUS.exists():
        found = re.search(r"RssAnon:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        pytest.skip("the system does not tell how much memory is anonymous")
    return int(found[1]) * 1024


def settled_bytes() -> int:
    """Return what memory this process has once what earlier tests left is given back.

    Otherwise it would be given back, or taken first, while a test measures.
    """
    gc.collect()
    trim_heap()
    return anonymous_bytes()

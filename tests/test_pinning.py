"""What is said about page-locking; that it works, the GPU tests show."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hookoffload.host_memory import empty_pages
from hookoffload.pinning import PageLock, _page_ranges


def test_weights_that_are_not_locked_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    master: Any = SimpleNamespace(in_ram=True, count=1, pinned=False, nbytes=2**30)
    lock = PageLock(torch.device("cuda"), 0)
    for _ in range(3):  # as a model does that comes from disk each time
        lock.lock([master, master])
        lock.unlock([master])
    (told,) = caplog.messages
    assert "2.000 GiB of 2.000 GiB of weights in host RAM are not page-locked" in told
    assert "pin_limit_gb=" in told


def _master(pages: torch.Tensor) -> Any:
    return SimpleNamespace(bytes=pages, nbytes=pages.numel())


def test_neighbours_in_one_storage_are_locked_as_one_where_a_page_ends_too() -> None:
    page = mmap.PAGESIZE
    slab, other = empty_pages(4 * page), empty_pages(page)
    parts = [slab[:page], slab[page : page + 100], slab[page + 512 : 2 * page], other]
    ranges = _page_ranges([_master(part) for part in parts])
    start = slab.data_ptr()
    assert [(low, high) for low, high, _ in sorted(ranges, key=lambda r: r[0])] == (
        sorted(
            [
                (start, start + 2 * page),
                (other.data_ptr(), other.data_ptr() + page),
            ]
        )
    )


def test_pages_between_masters_are_not_locked() -> None:
    page = mmap.PAGESIZE
    slab = empty_pages(4 * page)
    ranges = _page_ranges([_master(slab[:10]), _master(slab[3 * page : 3 * page + 9])])
    assert [high - low for low, high, _ in ranges] == [page, page]

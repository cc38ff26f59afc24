"""What is said about page-locking; that it works, the GPU tests show."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hookoffload import OffloadPolicy, offloaded, pinning
from hookoffload.host_memory import empty_pages
from hookoffload.pinning import PageLock, _page_ranges
from hookoffload.state_hooks import session_of
from tests.small_models import assert_same, chain


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


@pytest.mark.parametrize("when", ["before it is locked", "while it is locked"])
def test_weight_that_moves_to_be_locked_keeps_the_data_that_it_was_given(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinning, "lock_pages", lambda *_: False)
    with offloaded(chain(24, 20, 24), OffloadPolicy(compute_device="cpu")) as model:
        session = session_of(model)
        assert session is not None
        masters = session.store.masters
        lock = PageLock(torch.device("cuda"), None)
        lock.lock(masters)
        if when == "before it is locked":
            lock.unlock(masters)
        new = torch.randn_like(model[0].weight)
        model[0].weight.data = new.clone()
        if when == "before it is locked":
            lock.lock(masters)
        else:
            lock.unlock(masters)
        assert_same(model[0].weight.detach(), new)
    assert_same(model[0].weight.detach(), new)

"""Weights are page-locked while others are still being read."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    detach,
    filling,
    load_model,
    offload_stats,
    set_limit,
    store,
)
from hookoffload import pinning as locks
from hookoffload.locking_beside import locking_beside
from hookoffload.pinning import PageLock
from tests.interrupts import deadline
from tests.small_models import assert_same, chain, run

WIDTHS = (600,) * 7  # so that each weight has more than 1 MiB
BLOCK = 600 * 600 * 4


class Locks:
    """Stands for CUDA's page-locking, and notes what happens to which addresses."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.held: dict[int, int] = {}
        self.threads: set[int] = set()
        self.events: list[str] = []
        self.began = threading.Event()
        self.waits = False
        self._read = os.preadv
        patch.setattr(locks, "lock_pages", self.lock)
        patch.setattr(locks, "unlock_pages", self.held.pop)
        patch.setattr(os, "preadv", self.read)
        # A session on a CPU that has its weights locked as one on a GPU does.
        patch.setattr("hookoffload.session.PageLock", _cuda_lock)

    def lock(self, start: int, nbytes: int, device: torch.device) -> bool:
        assert start not in self.held
        self.held[start] = nbytes
        self.threads.add(threading.get_ident())
        self.events.append("lock")
        self.began.set()
        return True

    def read(self, *arguments: Any) -> int:
        self.events.append("read")
        if self.waits and self.events.count("read") == 8:  # of 12: groups are there
            self.began.wait(20)
        return self._read(*arguments)


def _cuda_lock(device: torch.device, *arguments: Any) -> PageLock:
    return PageLock(torch.device("cuda"), *arguments)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Locks:
    monkeypatch.setattr(filling, "_GROUP_BYTES", BLOCK)
    return Locks(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(chain(*WIDTHS).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _load(path: Path, **fields: Any) -> nn.Module:
    policy = OffloadPolicy(compute_device="cpu", **fields)
    return load_model(lambda: chain(*WIDTHS), path, policy)


def test_what_was_read_is_locked_beside_the_reading_of_the_rest(
    path: Path, locked: Locks
) -> None:
    locked.waits = True
    model = _load(path)
    assert threading.get_ident() not in locked.threads, "the small ones too"
    last_read = len(locked.events) - locked.events[::-1].index("read")
    assert "lock" in locked.events[:last_read]
    for layer in model:
        start = layer.weight.data_ptr()
        assert any(low <= start < low + size for low, size in locked.held.items())
    x = torch.ones(2, 600)
    assert_same(run(model, x), run(chain(*WIDTHS), x))
    detach(model)
    assert not locked.held


def test_large_weights_are_read_to_where_they_are_locked(
    path: Path, locked: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    move = locks._move
    monkeypatch.setattr(
        locks, "_move", lambda m, pages: [moved.append(m.nbytes), move(m, pages)]
    )
    detach(_load(path))
    assert max(moved) < BLOCK, "one lay in the heap, and was copied out of it"


def test_where_the_cap_is_met_who_is_locked_is_chosen_among_all(
    path: Path, locked: Locks
) -> None:
    model = _load(path, pin_limit_gb=3.5 * BLOCK / 2**30)
    assert locked.threads == {threading.get_ident()}
    weights = [layer.weight.data_ptr() for layer in model]
    chosen = [
        index
        for index, start in enumerate(weights)
        if any(low <= start < low + size for low, size in locked.held.items())
    ]
    assert chosen[0] < 3 <= chosen[-1], "they are spread over the model"
    detach(model)


def test_a_file_that_fails_leaves_nothing_locked(
    path: Path, locked: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> int:
        if locked.events.count("read") > 3:
            raise OSError(errno.EIO, "Input/output error")
        return locked.read(*arguments)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        _load(path)
    assert not locked.held
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("hookoffload-lock") for name in names)


@pytest.mark.parametrize("interrupts", [1, 3])
def test_an_interrupt_while_the_last_are_being_locked_leaves_nothing_locked(
    path: Path, locked: Locks, monkeypatch: pytest.MonkeyPatch, interrupts: int
) -> None:
    is_read, left = threading.Event(), [interrupts]
    main = threading.get_ident()

    def lock(start: int, nbytes: int, device: torch.device) -> bool:
        is_read.wait(20)
        while left[0] > 0:  # one behind the other, while the main thread waits
            time.sleep(0.1)
            left[0] -= 1
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        return locked.lock(start, nbytes, device)

    def last_is_read(masters: Any, *arguments: Any) -> None:
        read(masters, *arguments)
        if masters:
            is_read.set()

    read = store.read_masters
    monkeypatch.setattr(locks, "lock_pages", lock)
    monkeypatch.setattr(store, "read_masters", last_is_read)
    with deadline(20), pytest.raises(KeyboardInterrupt):
        _load(path)
    assert left == [0]
    assert not locked.held
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("hookoffload-lock") for name in names)


def test_what_fails_in_the_other_thread_is_raised(locked: Locks) -> None:
    master: Any = object()  # it has nothing that could be locked
    with (
        pytest.raises(AttributeError),
        locking_beside(_cuda_lock(torch.device("cpu"), None), []) as filled,
    ):
        filled([master])


def test_what_was_read_before_a_file_fails_goes_back_to_it_and_is_not_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(filling, "_GROUP_BYTES", BLOCK)
    spill = tmp_path / "spill"
    spill.mkdir()
    model = _load(path, host_limit_gb=0, limit_gb=0, disk_dir=spill)
    x = torch.ones(2, 600)
    wanted = run(model, x)
    reads, read = [0], os.preadv

    def fail(*arguments: Any) -> int:
        reads[0] += 1
        if reads[0] == 5:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            set_limit(model, 0, host_limit_gb=1)
    assert not [file for file in spill.rglob("*") if file.is_file()]
    assert offload_stats(model).host_bytes == 0
    assert_same(run(model, x), wanted)
    detach(model)

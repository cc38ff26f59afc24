"""Caches of codes that are damaged, changed or shared: no wrong weight ever."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hookoffload as ho
from hookoffload.safetensors_file import CheckpointFile

from .coded_checkpoints import (
    kept_file,
    load,
    open_files,
    plain,
)
from .test_lossless_offload import (
    assert_same_bits,
    run,
)

pytestmark = pytest.mark.usefixtures("no_fsync")


def damaged_in_the_tables(path: Path, name: str) -> None:
    file = CheckpointFile(path)
    location = file.tensors[name]
    file.close()
    content = bytearray(path.read_bytes())
    content[location.offset + location.nbytes - 1] ^= 1
    path.write_bytes(content)


def test_patches_that_changed_are_found_when_codes_are_opened(
    checkpoint: Path,
) -> None:
    ho.detach(load(checkpoint))
    damaged_in_the_tables(kept_file(checkpoint), "blocks.3.weight")
    with pytest.raises(ho.CheckpointError) as caught:
        load(checkpoint)
    assert not open_files(checkpoint.parent.parent / "cache")
    assert "the code of 'blocks.3.weight' is damaged" in str(caught.value)
    assert str(kept_file(checkpoint)) in str(caught.value)
    shutil.rmtree(kept_file(checkpoint).parent)
    ho.detach(load(checkpoint))


def test_a_cache_that_was_cut_short_is_made_anew(
    checkpoint: Path, ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(load(checkpoint), ids)
    os.truncate(kept_file(checkpoint), kept_file(checkpoint).stat().st_size - 100)
    assert_same_bits(run(load(checkpoint), ids), expected)
    assert "is damaged and made anew" in caplog.text


def test_a_limit_that_is_too_small_leaves_no_file_open(checkpoint: Path) -> None:
    with pytest.raises(ho.BudgetExceededError):
        load(checkpoint, limit=1000)
    assert not open_files(checkpoint.parent.parent / "cache")


def touch(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, (1, 1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: shutil.rmtree(path.parent), "is gone"),
        (lambda path: os.truncate(path, 4096), "changed its size"),
        (touch, "was written to"),
    ],
    ids=["removed", "cut", "changed"],
)
def test_a_cache_that_changes_while_it_is_used_is_an_error_that_names_it(
    checkpoint: Path, ids: torch.Tensor, change: Any, says: str
) -> None:
    model = load(checkpoint)
    expected = run(model, ids)
    path = kept_file(checkpoint)
    change(path)
    with pytest.raises(ho.CheckpointError, match=says) as caught:
        run(model, ids)
    assert str(path) in str(caught.value)
    assert "It holds the code of 'blocks.0.weight' and 5 more" in str(caught.value)
    ho.detach(model)
    assert_same_bits(run(model, ids), expected)
    if says != "was written to":  # or its bytes are as they were
        assert_same_bits(run(load(checkpoint), ids), expected)


def test_a_cache_that_is_cut_in_a_forward_is_an_error_that_names_the_tensor(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    model = load(checkpoint)
    expected = run(model, ids)
    path = kept_file(checkpoint)
    model.blocks[0].register_forward_hook(lambda *_: os.truncate(path, 4096))
    with pytest.raises(ho.CheckpointError, match=r"tensor 'blocks\.\d\.weight'") as it:
        for _ in range(2):
            run(model, ids)
    assert str(path) in str(it.value)
    ho.detach(model)
    assert_same_bits(run(model, ids), expected)


def test_a_cache_that_fails_once_is_read_again(
    checkpoint: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint)
    expected = run(plain(checkpoint), ids)
    whole_read = os.preadv

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ho.CheckpointError, match="Input/output error"):
        run(model, ids)
    monkeypatch.setattr(os, "preadv", whole_read)
    assert_same_bits(run(model, ids), expected)


def test_several_processes_make_one_entry(checkpoint: Path, ids: torch.Tensor) -> None:
    expected = run(plain(checkpoint), ids)

    def load_twice() -> None:
        torch.set_num_threads(1)
        for _ in range(2):
            assert_same_bits(run(load(checkpoint), ids), expected)

    forked = multiprocessing.get_context("fork")
    workers = [forked.Process(target=load_twice) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert kept_file(checkpoint).exists(), "there is one"


def test_a_process_reads_on_while_another_makes_the_cache_anew(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    model = load(checkpoint)
    expected = run(model, ids)
    shutil.rmtree(kept_file(checkpoint).parent)
    other = load(checkpoint)
    assert_same_bits(run(other, ids), expected)
    with pytest.raises(ho.CheckpointError, match="was replaced by another file"):
        run(model, ids)
    ho.detach(model)

"""Disks that fail while a model runs, is spilled or is saved: no wrong weight ever.

What is refused when a model is attached or loaded is in `test_bad_input`, damaged files
are in `test_safetensors_file` and `test_fuzz_reader`.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    detach,
    load_model,
    offloaded,
    save_model,
)
from hookoffload.checkpoint import open_checkpoint
from tests.children import killed_at
from tests.garbage import freeze_old_objects
from tests.safetensors_samples import descriptors_kept, failing, read
from tests.small_models import (
    TinyModel,
    assert_same,
    chain,
    expected,
    nbytes,
    on_disk,
    run,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.usefixtures("no_fsync")

LONG = settings.get_current_profile_name() == "long"
KILLS = 50 if LONG else 5


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection() -> None:
    freeze_old_objects()


def _saved(folder: Path, model: nn.Module | None = None) -> Path:
    save_model(model or tiny_model(), folder, progress=False)
    return folder / "model.safetensors"


def _load(path: Path, **fields: Any) -> nn.Module:
    policy = on_disk(path.parent / "spill", **fields)
    return load_model(TinyModel, path, policy)


def _wanted() -> Any:
    return run(tiny_model(), tokens())


# --- reading ---


@pytest.mark.parametrize("limit", [0, 0.8])
def test_short_and_interrupted_reads_give_the_right_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    path = _saved(tmp_path / "model")
    whole_read, calls = os.preadv, []

    def stutter(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) % 5 == 0:
            raise InterruptedError
        size = 1 + 97 * (len(calls) % 31)
        return whole_read(fd, [buffers[0][:size]], offset)

    monkeypatch.setattr(os, "preadv", stutter)
    model = _load(path, limit_gb=limit * nbytes(tiny_model()) / 2**30)
    for _ in range(3):
        assert_same(run(model, tokens()), _wanted())
    assert len(calls) > 100
    detach(model)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENXIO])
def test_disk_that_fails_for_some_reads_never_gives_a_wrong_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = _saved(tmp_path / "model")
    model = _load(path)
    whole_read, chance = os.preadv, random.Random(code)
    failures = outputs = 0

    def flaky(fd: int, buffers: list[memoryview], offset: int) -> int:
        if chance.random() < 0.05:
            raise OSError(code, os.strerror(code))
        return whole_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", flaky)
    for _ in range(40):
        try:
            output = run(model, tokens())
        except CheckpointError as error:
            assert "model.safetensors: tensor '" in str(error)
            assert os.strerror(code) in str(error)
            failures += 1
        else:
            assert_same(output, _wanted())
            outputs += 1
    assert failures and outputs
    monkeypatch.undo()
    assert_same(run(model, tokens()), _wanted())
    detach(model)
    assert_same(run(model, tokens()), _wanted())


def _cut_in_a_forward(model: nn.Module, path: Path, size: int) -> Any:
    """Cut a file short while the first block of a model runs."""
    handle = model.blocks[0].register_forward_hook(lambda *_: os.truncate(path, size))
    try:
        return run(model, tokens())
    finally:
        handle.remove()


def test_file_that_is_cut_short_in_a_forward_is_named_with_its_tensor(
    tmp_path: Path,
) -> None:
    path = _saved(tmp_path / "model")
    content, about = path.read_bytes(), path.stat()
    model = _load(path)
    # What was copied ahead by then is right; the next forward looks at the file first.
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: (tensor '[\w.]+': the file ends|changed its size)",
    ):
        for _ in range(2):
            _cut_in_a_forward(model, path, 5000)
    with pytest.raises(CheckpointError, match="changed its size"):
        run(model, tokens())
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert_same(run(model, tokens()), _wanted())
    detach(model)


def test_shard_that_is_deleted_in_a_forward_is_read_to_the_end(tmp_path: Path) -> None:
    """It is open: the forward gets its weights, and the next one says what is wrong."""
    folder = tmp_path / "model"
    save_model(tiny_model(), folder, max_shard_size=20_000)
    model = load_model(TinyModel, folder, on_disk(tmp_path / "spill"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    handle = model.blocks[0].register_forward_hook(lambda *_: last.unlink())
    assert_same(run(model, tokens()), _wanted())
    handle.remove()
    with pytest.raises(CheckpointError, match=rf"{last.name}: is gone"):
        run(model, tokens())
    detach(model)
    assert_same(run(model, tokens()), _wanted())


def test_header_that_is_damaged_after_loading_moves_no_weight(tmp_path: Path) -> None:
    """Where the tensors lie was read once; who loads the file anew is told."""
    path = _saved(tmp_path / "model")
    model, about = _load(path), path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was written to since it was opened"):
        run(model, tokens())
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # nobody can tell now
    assert_same(run(model, tokens()), _wanted())
    detach(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _load(path)


# --- saving ---


def _old_and_new(folder: Path) -> tuple[Path, nn.Module]:
    """Return a folder with a checkpoint, and another model to save there."""
    _saved(folder / "saved")
    source = _saved(folder / "source", tiny_model(1)).parent
    return folder / "saved", load_model(TinyModel, source, on_disk(folder / "spill"))


def _assert_old(folder: Path, files: dict[str, bytes]) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


class _FailAt:
    """Stands for a function and fails at its n-th call, from 0."""

    def __init__(self, number: int, function: Callable[..., Any], code: int) -> None:
        self.left = number
        self.function = function
        self.code = code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise OSError(self.code, os.strerror(self.code))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EIO),
        ("preadv", errno.EIO),
        ("fsync", errno.EDQUOT),
        ("open", errno.EMFILE),
        ("mkdir", errno.EROFS),
        ("replace", errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("size", ["1GB", 60_000])
def test_disk_that_fails_while_saving_leaves_the_older_files(
    tmp_path: Path, function: str, code: int, size: Any
) -> None:
    """Whichever call it is: the old checkpoint, or the whole new one."""
    folder, model = _old_and_new(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    old, new = tiny_model().state_dict(), tiny_model(1).state_dict()
    original = getattr(os, function)
    many = function in ("pwrite", "preadv")
    failed = 0
    for number in (0, 1, 4, 9) if many else range(1000):
        failing_once = _FailAt(number, original, code)
        with descriptors_kept(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, function, failing_once)
            try:
                save_model(model, folder, max_shard_size=size)
            except CheckpointError as error:
                failed += 1
                assert os.strerror(code) in str(error)
        if failing_once.left >= 0:
            break
        found = open_checkpoint(folder)
        tensors = {name: read(location) for name, location in found.items()}
        assert any(
            all(value.equal(state[name]) for name, value in tensors.items())
            for state in (old, new)
        )
        for location in found.values():
            location.file.close()
        if many:
            _assert_old(folder, files)
        shutil.rmtree(folder)
        _saved(folder)
    assert failed
    save_model(model, folder, max_shard_size=size)
    again = load_model(TinyModel, folder, on_disk(tmp_path / "spill"))
    assert_same(run(again, tokens()), run(tiny_model(1), tokens()))


def test_disk_that_is_too_small_is_told_before_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = _old_and_new(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    usage = SimpleNamespace(free=2**14)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    with pytest.raises(CheckpointError, match=r"GiB free.*save into another folder"):
        save_model(model, folder, max_shard_size=2**12)
    _assert_old(folder, files)


def test_file_that_changes_while_the_model_is_saved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = _old_and_new(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    source, write = tmp_path / "source" / "model.safetensors", os.pwrite

    def rewrite(fd: int, data: memoryview, offset: int) -> int:
        os.utime(source)
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", rewrite)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was written to"):
        save_model(model, folder)
    _assert_old(folder, files)
    os.utime(source)
    with pytest.raises(CheckpointError, match="was written to"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- processes that are killed ---


def _spill_and_run(folder: Path) -> None:
    with offloaded(tiny_model(), on_disk(folder, limit_gb=0)) as model:
        run(model, tokens())


def test_process_killed_at_any_step_of_spilling_leaves_nothing_for_long(
    tmp_path: Path,
) -> None:
    """The next one that spills there sweeps it away, and computes the right thing."""
    for number in range(1000):
        if not killed_at(number, lambda: _spill_and_run(tmp_path)):
            break
        with offloaded(tiny_model(), on_disk(tmp_path)) as model:
            assert len(list(tmp_path.iterdir())) == 1
            assert_same(run(model, tokens()), _wanted())
        assert list(tmp_path.iterdir()) == []
    assert number > 10


def _spill_for_ever(folder: Path, started: Connection) -> None:
    torch.set_num_threads(1)
    started.send(0)
    while True:
        _spill_and_run(folder)


def _filled(value: float) -> nn.Module:
    model = chain(64, 64, 64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _save_for_ever(folder: Path, started: Connection) -> None:
    """Save models of ones, twos, and so on, from disk, in files of several counts."""
    torch.set_num_threads(1)
    value = 0
    while True:
        value += 1
        policy = OffloadPolicy(
            compute_device="cpu", store="disk", disk_dir=folder.parent / "spill"
        )
        with offloaded(_filled(value), policy) as model:
            size = ["1GB", 20_000, 20_000, 8_000][value % 4]
            save_model(model, folder, max_shard_size=size, progress=False)
        started.send(value)


class _Killed:
    """A process that does something for ever until it is killed."""

    def __init__(
        self, action: Callable[[Path, Connection], None], folder: Path
    ) -> None:
        # A server that has imported everything: a start takes no second.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hookoffload", __name__])
        self.received, sending = context.Pipe(duplex=False)
        self._process = context.Process(target=action, args=(folder, sending))
        self._process.start()
        sending.close()
        assert self.received.poll(60), "the process does not start"
        self.last = self.received.recv()

    def kill(self, after: float) -> int:
        """Kill it some seconds later; return the last number that it told."""
        time.sleep(after)
        self._process.kill()
        self._process.join()
        try:
            while self.received.poll():
                self.last = self.received.recv()
        except EOFError:
            pass
        self.received.close()
        return self.last


def test_process_killed_at_random_while_spilling_harms_nobody(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(KILLS):
        _Killed(_spill_for_ever, tmp_path).kill(chance.uniform(0, 0.1))
        with offloaded(tiny_model(), on_disk(tmp_path)) as model:
            assert len(list(tmp_path.iterdir())) == 1
            assert_same(run(model, tokens()), _wanted())
    assert list(tmp_path.iterdir()) == []


def test_process_killed_at_random_while_saving_leaves_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    chance, folder = random.Random(0), tmp_path / "saved"
    for _ in range(KILLS):
        told = _Killed(_save_for_ever, folder).kill(chance.uniform(0, 0.2))
        model = load_model(
            lambda: chain(64, 64, 64, 64), folder, OffloadPolicy(compute_device="cpu")
        )
        (value,) = {float(v) for p in model.parameters() for v in p.detach().unique()}
        assert value in (told, told + 1)  # it may not have told of the last one
        save_model(_filled(0.5), folder, max_shard_size=20_000)
        assert len(list(folder.iterdir())) == 4  # three files and an index
        detach(model)
    x = torch.ones(1, 64)
    again = load_model(lambda: chain(64, 64, 64, 64), folder)
    assert_same(run(again, x), expected(_filled(0.5), x))

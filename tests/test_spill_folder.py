"""Folders of spill files: locked while they are used, swept when nobody is left."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import pytest

from hookoffload import OffloadPolicy, attach_offload_hooks, detach, spill_folder
from hookoffload.spill_folder import SpillFolder
from tests.children import KILLED, in_child
from tests.safetensors_samples import descriptors_kept
from tests.small_models import expected, on_disk, run, tiny_model, tokens

STALE = "hookoffload-0123456789abcdef"


def left_by_a_killed_process(parent: Path) -> Path:
    """Have a process make a folder and die without a chance to remove it."""

    def make() -> None:
        folder = SpillFolder(parent)
        (folder.create() / "weights-0.safetensors").write_bytes(b"weights")
        os.kill(os.getpid(), signal.SIGKILL)

    before = set(parent.iterdir())
    assert in_child(make) == KILLED
    (path,) = set(parent.iterdir()) - before
    return path


def test_folder_is_only_for_its_owner_and_goes_with_what_is_in_it(
    tmp_path: Path,
) -> None:
    with descriptors_kept():
        folder = SpillFolder(tmp_path)
        path = folder.create()
        assert path.parent == tmp_path and path.stat().st_mode & 0o777 == 0o700
        assert folder.create() == path
        (path / "weights-0.safetensors").write_bytes(b"weights")
        folder.remove()
        folder.remove()
        assert list(tmp_path.iterdir()) == []


def test_folder_that_was_never_made_can_be_removed(tmp_path: Path) -> None:
    SpillFolder(tmp_path).remove()


def test_dropped_folder_is_removed(tmp_path: Path) -> None:
    with descriptors_kept():
        SpillFolder(tmp_path).create()
        gc.collect()
        assert list(tmp_path.iterdir()) == []


def test_folder_that_is_kept_outlives_its_object(tmp_path: Path) -> None:
    folder = SpillFolder(tmp_path)
    path = folder.create()
    folder.keep()
    del folder
    gc.collect()
    assert path.is_dir()


def test_folder_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path)
    left_by_a_killed_process(tmp_path)
    SpillFolder.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_in_use_is_not_swept_by_its_own_process_or_another(
    tmp_path: Path,
) -> None:
    folder = SpillFolder(tmp_path)
    path = folder.create()
    SpillFolder.sweep(tmp_path)
    assert in_child(lambda: SpillFolder.sweep(tmp_path)) == 0
    assert path.is_dir()
    folder.remove()


def test_folder_is_locked_as_long_as_a_child_of_its_maker_lives(tmp_path: Path) -> None:
    """The child may still use the files: what matters is that nobody is left."""
    read, write = os.pipe()

    def make_and_fork() -> None:
        folder = SpillFolder(tmp_path)
        folder.create()
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # until the test ends
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(make_and_fork)
    os.close(read)
    (path,) = tmp_path.iterdir()
    SpillFolder.sweep(tmp_path)
    assert path.is_dir()
    os.close(write)
    end = time.monotonic() + 20
    while path.is_dir() and time.monotonic() < end:
        SpillFolder.sweep(tmp_path)
        time.sleep(0.01)
    assert not path.is_dir()


def _make(path: Path, *names: str) -> None:
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_bytes(b"a user's")


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("hookoffload-notes", ["weights-0.safetensors"]),
        ("hookoffload-0123456789ABCDEF", ["weights-0.safetensors"]),
        (STALE + "0", ["weights-0.safetensors"]),
        ("my-" + STALE, ["weights-0.safetensors"]),
        (STALE, ["weights-0.safetensors", "notes.txt"]),
    ],
)
def test_what_the_library_did_not_make_is_never_swept(
    tmp_path: Path, name: str, holds: list[str]
) -> None:
    _make(tmp_path / name, *holds)
    SpillFolder.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path / name)) == sorted(holds)


def test_links_and_files_with_such_names_are_never_swept(tmp_path: Path) -> None:
    _make(tmp_path / "users", "weights-0.safetensors")
    _make(tmp_path / "disk_dir")
    (tmp_path / "disk_dir" / STALE).symlink_to(tmp_path / "users")
    (tmp_path / "disk_dir" / STALE.replace("0", "f")).write_bytes(b"a file")
    SpillFolder.sweep(tmp_path / "disk_dir")
    assert len(list((tmp_path / "disk_dir").iterdir())) == 2
    assert (tmp_path / "users" / "weights-0.safetensors").exists()


def test_nothing_is_swept_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(9, "Bad file descriptor")  # a network disk's answer

    monkeypatch.setattr(spill_folder.fcntl, "flock", flock)
    _make(tmp_path / STALE, "weights-0.safetensors")
    folder = SpillFolder(tmp_path)
    path = folder.create()
    SpillFolder.sweep(tmp_path)
    assert path.is_dir() and (tmp_path / STALE).is_dir()
    folder.remove()
    assert not path.exists()


def test_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, lock, steps = Path.mkdir, spill_folder.lock_folder, []

    def swept_at_once(path: Path, mode: int) -> None:
        mkdir(path, mode)
        steps.append("mkdir")
        if len(steps) == 1:
            path.rmdir()

    def swept_before_the_lock(fd: int) -> bool | None:
        steps.append("lock")
        if steps.count("lock") == 1:
            (path,) = tmp_path.iterdir()
            path.rmdir()
        return False if steps.count("lock") == 2 else lock(fd)

    monkeypatch.setattr(Path, "mkdir", swept_at_once)
    monkeypatch.setattr(spill_folder, "lock_folder", swept_before_the_lock)
    with descriptors_kept():
        folder = SpillFolder(tmp_path)
        path = folder.create()
        assert steps == ["mkdir", "mkdir", "lock", "mkdir", "lock", "mkdir", "lock"]
        assert list(tmp_path.iterdir()) == [path]
        folder.remove()


def test_attach_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    stale = left_by_a_killed_process(tmp_path)
    one, other = tiny_model(), tiny_model(1)
    wanted = expected(one, tokens()), expected(other, tokens())
    attach_offload_hooks(one, on_disk(tmp_path))
    assert not stale.exists()
    attach_offload_hooks(other, on_disk(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert run(one, tokens()).equal(wanted[0])
    assert run(other, tokens()).equal(wanted[1])
    for model in (one, other):
        detach(model)
    assert list(tmp_path.iterdir()) == []


def test_attach_without_disk_sweeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stale = left_by_a_killed_process(tmp_path)
    model = attach_offload_hooks(tiny_model(), OffloadPolicy(compute_device="cpu"))
    detach(model)
    assert stale.exists()


def test_forked_child_never_removes_its_parents_folder(tmp_path: Path) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    attach_offload_hooks(model, on_disk(tmp_path))
    (path,) = tmp_path.iterdir()

    def leave() -> None:
        detach(model)

    assert in_child(leave) == 0
    assert in_child(spill_folder.weakref.finalize._exitfunc) == 0
    assert path.is_dir()
    SpillFolder.sweep(tmp_path)  # the child did not unlock it either
    assert path.is_dir()
    assert run(model, tokens()).equal(wanted)
    detach(model)
    assert list(tmp_path.iterdir()) == []

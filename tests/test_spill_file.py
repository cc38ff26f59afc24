from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hookoffload import spill_file, tensor_bytes
from hookoffload.safetensors_file import CheckpointFile
from hookoffload.safetensors_header import CheckpointError
from hookoffload.safetensors_writer import Source, write_safetensors
from hookoffload.spill_file import write_spill_file
from tests.garbage import freeze_old_objects
from tests.safetensors_samples import (
    DTYPES,
    descriptors_kept,
    failing,
    random_tensor,
    read,
    same_bits,
)


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection():
    freeze_old_objects()


@pytest.fixture
def no_leak():
    with descriptors_kept():
        yield


def some_tensors():
    made = {str(t): random_tensor(t, (3, 5), i) for i, t in enumerate(DTYPES)}
    strided = random_tensor(torch.float32, (40, 30))
    return made | {
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "transposed": strided.t(),
        **{f"{t} transposed": random_tensor(t, (3, 4)).t() for t in DTYPES},
        "third axis": random_tensor(torch.int16, (7, 6, 5)).permute(2, 0, 1),
        "every second": strided[::2, 1::3],
        "expanded": torch.arange(3).expand(100, 3),
        "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "ünï": torch.ones(1, dtype=torch.bool),
    }


@pytest.mark.parametrize("chunk", [1, 64, 100, 2**24])
def test_spill_file_is_a_valid_safetensors_file(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tensor_bytes, "_CHUNK", max(chunk, 8))
    path, tensors, counts = tmp_path / "s.safetensors", some_tensors(), []
    file = write_spill_file(
        path, tensors, metadata={"kind": "spill"}, progress=counts.append
    )
    assert file.writable_shared and file.path == path
    assert file.metadata == {"kind": "spill"}
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors.values())
    assert 0 < min(counts) <= max(counts) <= max(chunk, 8)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys() == file.tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.detach().resolve_conj().resolve_neg()
        assert same_bits(loaded[name], expected), name
        assert same_bits(file.mapped(file.tensors[name]), expected), name
    assert os.listdir(tmp_path) == ["s.safetensors"]


@pytest.mark.parametrize("align", [1, 8, 64, 4096])
def test_spill_file_aligns_its_data_and_each_tensor(tmp_path, align):
    file = write_spill_file(tmp_path / "s.safetensors", some_tensors(), align=align)
    locations = file.tensors.values()
    assert min(location.offset for location in locations) % align == 0
    if align >= 8:
        assert not any(at.offset % at.dtype.itemsize for at in locations)


def test_spill_file_without_tensors_can_be_opened(tmp_path):
    assert write_spill_file(tmp_path / "s.safetensors", {}).tensors == {}


def test_spill_file_replaces_an_older_one(tmp_path):
    path = tmp_path / "s.safetensors"
    older = write_spill_file(path, {"x": torch.ones(2)})
    write_spill_file(path, {"x": torch.zeros(2)})
    assert read(older.tensors["x"]).equal(torch.ones(2))
    assert load_file(path)["x"].equal(torch.zeros(2))
    with pytest.raises(CheckpointError, match="replaced"):
        older.check_unchanged()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("x", torch.ones(2, dtype=torch.complex128)),
        ("x", torch.eye(3).to_sparse()),
        ("x", torch.empty(3, device="meta")),
        ("__metadata__", torch.ones(2)),
    ],
)
def test_tensor_that_the_format_cannot_hold_is_named(tmp_path, no_leak, name, tensor):
    with pytest.raises(CheckpointError, match=f"tensor '{name}' .*cannot be stored"):
        write_spill_file(tmp_path / "s.safetensors", {name: tensor})
    assert os.listdir(tmp_path) == []


def test_spill_that_nobody_could_read_leaves_the_older_file(tmp_path, no_leak):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"older")
    with pytest.raises(CheckpointError, match="safetensors refuses"):
        write_spill_file(path, {"half a surrogate \ud800": torch.ones(2)})
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert path.read_bytes() == b"older"


def test_file_that_cannot_be_written_to_its_end_is_removed(
    tmp_path, monkeypatch, no_leak
):
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    source = Source(torch.ones(3), torch.float32)
    with pytest.raises(CheckpointError, match=r"Free space there.*or go elsewhere"):
        write_safetensors(tmp_path / "s", {"x": source}, elsewhere="go elsewhere")
    assert os.listdir(tmp_path) == []


def test_alignment_below_one_byte_is_refused(tmp_path):
    with pytest.raises(ValueError, match="align"):
        write_spill_file(tmp_path / "s.safetensors", {}, align=0)


def test_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, no_leak):
    usage = SimpleNamespace(free=2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(os, "pwrite", failing(errno.EIO))
    tensor = torch.empty(1).expand(2**28)
    with pytest.raises(CheckpointError, match=r"1\.00 GiB.*0\.50 GiB free.*disk_dir="):
        write_spill_file(tmp_path / "s.safetensors", {"x": tensor})
    assert os.listdir(tmp_path) == []


def test_missing_folder_for_a_spill_file_is_named(tmp_path, no_leak):
    with pytest.raises(CheckpointError, match=r"folder .*gone: No such.*disk_dir="):
        write_spill_file(tmp_path / "gone" / "s.safetensors", {"x": torch.ones(1)})


def after_some_writes(error):
    """A disk that writes three bytes at a time, is interrupted, and then fails."""
    write, calls = os.pwrite, []

    def limited(fd, data, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise InterruptedError
        if len(calls) > 60:
            raise error
        return write(fd, data[:3], offset)

    return limited


FAILURES = {
    "disk full": ("pwrite", after_some_writes, OSError(errno.ENOSPC, "No space left")),
    "Ctrl-C": ("pwrite", after_some_writes, KeyboardInterrupt()),
    "read-only": ("open", lambda e: failing(e.errno), OSError(errno.EROFS, "")),
    "rename": ("replace", lambda e: failing(e.errno), OSError(errno.EACCES, "")),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failed_spill_leaves_nothing_behind(tmp_path, monkeypatch, no_leak, case):
    function, make, error = FAILURES[case]
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"older")
    expected = KeyboardInterrupt if case == "Ctrl-C" else CheckpointError
    with monkeypatch.context() as patch, pytest.raises(expected) as caught:
        patch.setattr(os, function, make(error))
        write_spill_file(path, {"x": torch.arange(100)})
    if expected is CheckpointError:
        assert f"in the folder {tmp_path}" in str(caught.value)
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, ""), KeyboardInterrupt()])
def test_file_that_is_not_finished_is_removed(tmp_path, monkeypatch, no_leak, error):
    tensor = torch.arange(100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", after_some_writes(error))
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            write_safetensors(
                tmp_path / "s.safetensors",
                {"x": Source(tensor, tensor.dtype)},
                elsewhere="write elsewhere",
            )
    assert os.listdir(tmp_path) == []


def test_disk_that_reports_its_failure_on_closing_leaves_nothing(
    tmp_path, monkeypatch, no_leak
):
    close = os.close

    def close_and_fail(fd):
        close(fd)
        raise OSError(errno.EDQUOT, "Quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close_and_fail)
        with pytest.raises(CheckpointError, match="Quota exceeded"):
            write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(9)})
    assert os.listdir(tmp_path) == []


def test_progress_that_raises_leaves_nothing_behind(tmp_path, no_leak):
    def stop(count):
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        write_spill_file(
            tmp_path / "s.safetensors", {"x": torch.ones(9)}, progress=stop
        )
    assert os.listdir(tmp_path) == []


def test_spill_onto_a_folder_leaves_the_folder_alone(tmp_path, no_leak):
    (tmp_path / "s.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(9)})
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_finished_spill_that_cannot_be_opened_is_removed(
    tmp_path, monkeypatch, no_leak
):
    def refuse(path, *, writable_shared=False):
        if writable_shared:
            raise KeyboardInterrupt
        return CheckpointFile(path)

    monkeypatch.setattr(spill_file, "CheckpointFile", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(9)})
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_under_an_open_spill_file_is_named(tmp_path, monkeypatch):
    file = write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(9)})
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"s\.safetensors.*No space left"):
        file.write_from(file.tensors["x"], torch.zeros(9))

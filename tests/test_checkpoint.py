from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hookoffload import checkpoint
from hookoffload.checkpoint import (
    CheckpointError,
    CheckpointFile,
    open_checkpoint,
    write_spill_file,
)

DTYPES = sorted(checkpoint._DTYPES.values(), key=str)
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
GOOD = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


def random_tensor(dtype, shape, seed=0):
    size = torch.empty(shape, dtype=dtype).nbytes
    top = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def same_bits(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bits(one).equal(bits(other))
    )


def bits(tensor):
    if tensor.itemsize == 1:
        return tensor.view(torch.uint8)
    compact = tensor.clone(memory_format=torch.contiguous_format)
    return compact.view(-1).view(torch.uint8)


def write_raw(path, header, data, pad=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def save(path, **tensors):
    save_file(tensors, path)
    return path


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def read(location):
    destination = torch.empty(location.nbytes, dtype=torch.uint8)
    location.file.read_into(location, destination)
    return destination.view(location.dtype).view(location.shape)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_leak():
    gc.collect()
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def two_shards(tmp_path):
    save(tmp_path / "a.safetensors", x=torch.arange(4.0), y=torch.ones(2))
    save(tmp_path / "b.safetensors", y=torch.zeros(3), z=torch.arange(5))
    return tmp_path


# Reading

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
contents = st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=4)


def can_be_saved(dtype, shape):
    return dtype != FLOAT4 or shape != ()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=contents, seed=st.integers(0, 2**16))
def test_both_ways_of_reading_equal_safetensors_bit_for_bit(contents, seed):
    tensors = {
        f"t{i}": random_tensor(dtype, shape, seed + i)
        for i, (dtype, shape) in enumerate(contents)
        if can_be_saved(dtype, shape)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(tensors, path, metadata={"format": "pt"})
        file = CheckpointFile(path)
        assert file.metadata == {"format": "pt"}
        expected = load_file(path)
        assert file.tensors.keys() == expected.keys()
        for name, location in file.tensors.items():
            assert same_bits(read(location), expected[name])
            assert same_bits(file.mapped(location), expected[name])
        file.close()


@pytest.mark.parametrize("pad", range(9))
def test_tensors_that_start_at_any_byte_are_read_and_mapped(tmp_path, pad):
    data = torch.tensor([1.5, -2.0, 3.25], dtype=torch.float64)
    header = {"x": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}
    raw = data.numpy().tobytes()
    file = CheckpointFile(write_raw(tmp_path / "m.safetensors", header, raw, pad))
    mapped = file.mapped(file.tensors["x"])
    assert read(file.tensors["x"]).equal(data)
    assert mapped.equal(data)
    assert mapped.mul_(2).equal(data * 2)


def test_bytes_are_read_into_a_destination_of_another_dtype(tmp_path):
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=torch.arange(6.0)))
    destination = torch.empty(2, 3, dtype=torch.int32)
    file.read_into(file.tensors["x"], destination)
    assert destination.view(torch.float32).flatten().equal(torch.arange(6.0))


def test_part_of_a_tensor_is_read_from_any_byte_of_it(tmp_path):
    data = torch.arange(10, dtype=torch.uint8)
    tensors = {"x": data, "y": data + 10}
    file = CheckpointFile(save(tmp_path / "m.safetensors", **tensors))
    part = torch.empty(4, dtype=torch.uint8)
    file.read_into(file.tensors["x"], part)
    assert part.tolist() == [0, 1, 2, 3]
    file.read_into(file.tensors["x"], part, start=6)
    assert part.tolist() == [6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"tensor 'x': .*10 bytes.* 11"):
        file.read_into(file.tensors["x"], part, start=7)
    with pytest.raises(ValueError, match=r"tensor 'x': start .* not -1"):
        file.read_into(file.tensors["x"], part, start=-1)


def test_reads_that_stop_early_or_are_interrupted_are_continued(tmp_path, monkeypatch):
    data = torch.arange(100, dtype=torch.int64)
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=data))
    whole_read, calls = os.preadv, []

    def stutter(fd, buffers, offset):
        calls.append(offset)
        if len(calls) % 3 == 0:
            raise InterruptedError
        return whole_read(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", stutter)
    assert read(file.tensors["x"]).equal(data)
    assert len(calls) > 800 / 7


def test_reads_are_cut_to_what_a_system_takes_at_once(tmp_path, monkeypatch):
    data = torch.arange(10, dtype=torch.uint8)
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=data))
    whole_read, sizes = os.preadv, []

    def note(fd, buffers, offset):
        sizes.append(len(buffers[0]))
        return whole_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    monkeypatch.setattr(checkpoint, "_MOST_READ_AT_ONCE", 4)
    assert read(file.tensors["x"]).equal(data)
    assert sizes == [4, 4, 2]


def test_reads_of_several_threads_do_not_disturb_each_other(tmp_path):
    tensors = {f"t{i}": torch.full((50_000,), i) for i in range(4)}
    file = CheckpointFile(save(tmp_path / "m.safetensors", **tensors))

    def check(name):
        location = file.tensors[name]
        return all(
            read(location).equal(tensors[name])
            and file.mapped(location).equal(tensors[name])
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, tensors))


def test_file_cut_short_after_opening_is_named_with_its_tensor(tmp_path):
    path = save(tmp_path / "m.safetensors", x=torch.arange(100))
    file = CheckpointFile(path)
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor 'x': .*790 of"):
        read(file.tensors["x"])
    with pytest.raises(CheckpointError, match="cannot be mapped"):
        file.mapped(file.tensors["x"])


def test_disk_that_fails_to_read_is_reported_with_file_and_tensor(
    tmp_path, monkeypatch
):
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=torch.ones(3)))
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor 'x': .*Input"):
        read(file.tensors["x"])


def failing(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("destination", "reason"),
    [
        (torch.empty(7), "24 bytes.* 28"),
        (torch.empty(3, 4)[:, :2], "must be a contiguous CPU tensor"),
        (torch.empty(6, device="meta"), "must be a contiguous CPU tensor"),
    ],
)
def test_destination_that_does_not_fit_is_refused(tmp_path, destination, reason):
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=torch.ones(6)))
    with pytest.raises(ValueError, match=f"tensor 'x': .*{reason}"):
        file.read_into(file.tensors["x"], destination)


def test_location_of_another_file_is_refused(two_shards):
    one, other = (CheckpointFile(two_shards / f"{n}.safetensors") for n in "ab")
    with pytest.raises(ValueError, match=r"'y' lies in .*b\.safetensors"):
        one.mapped(other.tensors["y"])


# Maps

smaps = Path("/proc/self/smaps")


@pytest.mark.skipif(not smaps.exists(), reason="needs Linux")
def test_mapping_reads_nothing_before_the_tensor_is_touched(tmp_path):
    path = save(tmp_path / "m.safetensors", x=torch.ones(2**20))
    file = CheckpointFile(path)

    def mapped_kilobytes():
        entry = smaps.read_text().split(str(path))[1]
        return int(entry.split("Rss:")[1].split()[0])

    tensor = file.mapped(file.tensors["x"])
    assert mapped_kilobytes() == 0
    assert tensor.sum() == 2**20
    assert mapped_kilobytes() >= 2**12


def test_file_larger_than_memory_is_opened_and_mapped(tmp_path):
    size = 2**40
    header = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = write_raw(tmp_path / "m.safetensors", header, b"")
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("this disk has no sparse files of this size")
    file = CheckpointFile(path)
    end = file.mapped(file.tensors["x"])[-3:]
    assert end.add_(1).tolist() == [1, 1, 1]
    path.unlink()


def test_in_place_changes_of_a_private_map_never_reach_the_file(tmp_path):
    path = save(tmp_path / "m.safetensors", x=torch.ones(4))
    file = CheckpointFile(path)
    file.mapped(file.tensors["x"]).fill_(7)
    assert read(file.tensors["x"]).equal(torch.ones(4))
    assert load_file(path)["x"].equal(torch.ones(4))
    file.check_unchanged()


def test_a_file_of_ours_shows_the_same_bytes_by_map_read_and_write(tmp_path):
    file = write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(4)})
    location = file.tensors["x"]
    mapped = file.mapped(location)
    mapped.fill_(7)
    assert read(location).equal(torch.full((4,), 7.0))
    file.write_from(location, torch.arange(8.0)[::2])
    assert mapped.equal(torch.tensor([0.0, 2.0, 4.0, 6.0]))
    assert load_file(file.path)["x"].equal(mapped)
    file.check_unchanged()


def test_mapped_tensors_outlive_their_file(tmp_path, no_leak):
    path = save(tmp_path / "m.safetensors", x=torch.arange(4.0), y=torch.ones(2))
    file = CheckpointFile(path)
    x, y = (file.mapped(file.tensors[name]) for name in "xy")
    file.close()
    file.close()
    path.unlink()
    del file
    gc.collect()
    assert x.equal(torch.arange(4.0))
    del x
    assert y.add_(1).equal(torch.full((2,), 2.0))


def test_a_closed_file_says_so(tmp_path):
    file = write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(4)})
    location = file.tensors["x"]
    file.close()
    with pytest.raises(RuntimeError, match="closed"):
        read(location)
    with pytest.raises(RuntimeError, match="closed"):
        file.mapped(location)
    with pytest.raises(RuntimeError, match="closed"):
        file.write_from(location, torch.ones(4))


def test_a_dropped_file_closes_its_descriptor(tmp_path, no_leak):
    CheckpointFile(save(tmp_path / "m.safetensors", x=torch.ones(1)))
    gc.collect()


def test_a_checkpoint_of_the_user_is_never_written(tmp_path):
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=torch.ones(4)))
    with pytest.raises(RuntimeError, match="reading only"):
        file.write_from(file.tensors["x"], torch.zeros(4))


# Changes behind our back


def replace(path):
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def grow(path):
    with path.open("ab") as stream:
        stream.write(b"x")


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (Path.unlink, "is gone"),
        (replace, "replaced"),
        (grow, "changed its size from 84 to 85"),
        (touch, "written to"),
    ],
)
def test_change_of_a_file_since_it_was_opened_is_told(tmp_path, change, what):
    header = json.dumps(GOOD).encode().ljust(72)
    path = write_raw(tmp_path / "m.safetensors", header, b"abcd")
    file = CheckpointFile(path)
    file.check_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: .*{what}"):
        file.check_unchanged()


def test_file_replaced_while_it_is_opened_is_refused(tmp_path, monkeypatch, no_leak):
    path = save(tmp_path / "m.safetensors", x=torch.ones(4))

    def replace_first(*args, **kwargs):
        replace(path)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", replace_first)
    with pytest.raises(CheckpointError, match="replaced"):
        CheckpointFile(path)


# Files that are not what they should be


def entry(**changes):
    return {"x": GOOD["x"] | changes}


BAD_HEADERS = {
    "not JSON": (b"{garbage", "header is not"),
    "not UTF-8": (b'{"\xff":1}', "header is not"),
    "a list": (b"[1, 2]", "header is not"),
    "a number": (b"3", "header is not"),
    "deep": (b'{"x":' + b"[" * 200_000, "header is not"),
    "entry is a number": ({"x": 3}, "header is not"),
    "no dtype": ({"x": {"shape": [4], "data_offsets": [0, 4]}}, "'x' has the dtype"),
    "unknown dtype": (entry(dtype="Q7"), "'x' has the dtype 'Q7'"),
    "dtype without torch": (entry(dtype="F6_E2M3"), "'x' has the dtype 'F6_E2M3'"),
    "dtype of another type": (entry(dtype=[]), r"'x' has the dtype \[\]"),
    "no shape": ({"x": {"dtype": "U8", "data_offsets": [0, 4]}}, "'x' has the shape"),
    "negative": (entry(shape=[-4]), "'x' has the shape"),
    "fraction": (entry(shape=[4.0]), "'x' has the shape"),
    "truth value": (entry(shape=[True, 4]), "'x' has the shape"),
    "three offsets": (entry(data_offsets=[0, 2, 4]), "'x' has the shape"),
    "too large": (entry(shape=[2**63, 0]), "'x' has the shape"),
    "strides too large": (
        entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]),
        "'x' has the impossible shape",
    ),
    "odd F4": (entry(dtype="F4", shape=[3, 3]), "'x' has the"),
    "shape and bytes": (entry(shape=[5]), "'x' has 4 bytes.* take 5"),
    "backwards": (entry(shape=[0], data_offsets=[4, 0]), "'x' has -4 bytes"),
    "outside": (entry(shape=[9], data_offsets=[0, 9]), "'x' ends at .*cut short"),
    "hole before": (entry(shape=[3], data_offsets=[1, 4]), "'x' starts .* hole"),
    "bytes left over": (entry(shape=[3], data_offsets=[0, 3]), "tensors end at byte"),
    "overlap": (
        GOOD | {"y": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},
        "'y' starts .* overlaps",
    ),
    "metadata of numbers": (GOOD | {"__metadata__": {"a": 1}}, "safetensors refuses"),
    "metadata is text": (GOOD | {"__metadata__": "a"}, "safetensors refuses"),
    "half a surrogate": (
        b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "safetensors refuses",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused_with_its_reason(tmp_path, no_leak, case):
    header, reason = BAD_HEADERS[case]
    path = write_raw(tmp_path / "m.safetensors", header, b"abcd")
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


BAD_STARTS = {
    "empty": (b"", "0 bytes, too few"),
    "a few bytes": (b"abc", "3 bytes, too few"),
    "cut in the header": (struct.pack("<Q", 100) + b"{}", "header of 100 bytes"),
    "endless header": (b"\xff" * 64, "no safetensors file, or cut short"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "zip of torch": (b"PK\x03\x04" + b"\0" * 60, "torch.save"),
    "a page": (b"<!DOCTYPE html><html>Not found", "no safetensors file"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_file_of_another_kind_is_refused_with_its_reason(tmp_path, no_leak, case):
    content, reason = BAD_STARTS[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path)


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt", ".pt", ".PT"])
def test_pickled_checkpoint_is_refused_with_its_conversion(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"weights_only=True.*model\.safetensors"):
        open_checkpoint(path)


def test_missing_file_is_reported_with_similar_names(two_shards):
    save(two_shards / "model.safetensors", x=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"Similar names there: model\.safe"):
        open_checkpoint(two_shards / "modle.safetensors")


def test_missing_folder_is_reported_with_the_way_to_the_hub(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nor does its folder.*snapshot_download"
    ):
        open_checkpoint(tmp_path / "organisation" / "model")


def test_link_to_a_file_that_is_gone_is_told_from_a_missing_file(tmp_path):
    (tmp_path / "m.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(CheckpointError, match=r"link to \.\./blobs/abc.*incomplete"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_file_that_may_not_be_read_is_refused(two_shards, monkeypatch, no_leak):
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*Permission denied"):
        open_checkpoint(two_shards / "a.safetensors")


def test_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", failing(errno.EACCES))
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(tmp_path)


def test_folder_or_pipe_in_place_of_a_file_is_refused(tmp_path, no_leak):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        open_checkpoint([tmp_path])
    with pytest.raises(CheckpointError, match="is a device or pipe"):
        open_checkpoint(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("checkpoint_", ["a\0b.safetensors", [], None, [3], "x" * 999])
def test_what_is_no_path_is_refused(checkpoint_):
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint_)


# Folders, lists and indexes


def test_later_file_of_a_list_wins(two_shards):
    found = open_checkpoint([two_shards / f"{name}.safetensors" for name in "ab"])
    sources = {name: at.file.path.stem for name, at in found.items()}
    assert sources == {"x": "a", "y": "b", "z": "b"}
    assert read(found["y"]).equal(torch.zeros(3))


def test_file_of_a_list_that_gives_nothing_is_closed(two_shards, no_leak):
    found = open_checkpoint([str(two_shards / "a.safetensors")] * 3)
    assert len({location.file for location in found.values()}) == 1
    found["x"].file.close()


def test_bad_file_of_a_list_closes_those_before_it(two_shards, no_leak):
    (two_shards / "c.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        open_checkpoint([two_shards / f"{name}.safetensors" for name in "abc"])


def test_only_file_of_a_folder_is_opened(tmp_path):
    save(tmp_path / "some.safetensors", x=torch.ones(2))
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).keys() == {"x"}
    assert open_checkpoint(str(tmp_path)).keys() == {"x"}


@pytest.mark.parametrize("prefix", ["model", "diffusion_pytorch_model", "own"])
def test_index_says_which_shard_has_which_tensor(two_shards, prefix):
    name = f"{prefix}.safetensors.index.json"
    write_index(two_shards, dict(x="a.safetensors", y="b.safetensors"), name)
    for path in (two_shards, two_shards / name):
        found = open_checkpoint(path)
        assert found.keys() == {"x", "y"}
        assert read(found["y"]).equal(torch.zeros(3))


def test_usual_index_is_preferred_to_others(two_shards):
    write_index(two_shards, {"x": "a.safetensors"}, "other.safetensors.index.json")
    write_index(two_shards, {"z": "b.safetensors"})
    assert open_checkpoint(two_shards).keys() == {"z"}


def test_files_linked_from_elsewhere_are_opened(two_shards, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("cache") / "snapshots" / "main"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_index(two_shards, dict(x="a.safetensors", z="b.safetensors"))
    for number, path in enumerate(sorted(two_shards.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    link = snapshot.parent / "link"
    link.symlink_to(snapshot)
    assert read(open_checkpoint(link)["x"]).equal(torch.arange(4.0))
    assert read(open_checkpoint(blobs / f"{0:064x}")["x"]).equal(torch.arange(4.0))


def test_folder_with_several_files_and_no_index_is_refused(two_shards, no_leak):
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors, b\.safe.*list of files"
    ):
        open_checkpoint(two_shards)


def test_folder_with_several_unusual_indexes_is_refused(two_shards):
    for name in "pq":
        write_index(two_shards, {}, f"{name}.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"several indexes: p\..*, q\."):
        open_checkpoint(two_shards)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "has nothing"),
        (["config.json"], r"has config\.json\. Pass the folder"),
        (["pytorch_model.bin"], r"has pytorch_model\.bin\. Convert"),
        ([f"{i:02}.txt" for i in range(20)], r"11\.txt and 8 more"),
    ],
)
def test_folder_without_safetensors_is_refused_with_what_it_has(
    tmp_path, names, reason
):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"no safetensors file.*{reason}"):
        open_checkpoint(tmp_path)


OUTSIDE = ["../a.safetensors", "/a.safetensors", "s/../../a", "..\\a", "C:\\a", "C:/a"]
BAD_INDEXES = {
    "not JSON": (b"{", "is not JSON"),
    "not text": (b"\xff\xfe\xff", "is not JSON"),
    "deep": (b"[" * 200_000, "is not JSON"),
    "list": (b"[]", "has no 'weight_map'"),
    "no map": (b'{"metadata":{}}', "has no 'weight_map'"),
    "map is a list": (b'{"weight_map":[]}', "has no 'weight_map'"),
    "number": (b'{"weight_map":{"x":3}}', "'x' is mapped to 3"),
    "empty name": (b'{"weight_map":{"x":""}}', "'x' is mapped to ''"),
    "folder": (b'{"weight_map":{"x":"."}}', "is a folder"),
    "pickle": (b'{"weight_map":{"x":"p.bin"}}', "weights_only"),
    "no such shard": (
        b'{"weight_map":{"y":"b.safetensors","x":"a.safetensor"}}',
        r"shard a\.safetensor \(tensor 'x'\).*Similar names there: a\.safetensors",
    ),
    "in another shard": (
        b'{"weight_map":{"y":"a.safetensors","z":"a.safetensors","x":"b.safetensors"}}',
        r"'z' is in a\.safetensors, .* it is in b\.safetensors",
    ),
    "in no shard": (
        b'{"weight_map":{"w":"a.safetensors"}}',
        r"'w' is in a\.safetensors, .* it is in no other",
    ),
} | {
    f"outside by {name}": (
        json.dumps({"weight_map": {"x": name}}).encode(),
        "'x' is mapped to .* outside the folder",
    )
    for name in OUTSIDE
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused_with_its_reason(two_shards, no_leak, case):
    content, reason = BAD_INDEXES[case]
    (two_shards / "p.bin").touch()
    (two_shards / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(two_shards)


def test_missing_index_is_reported_with_similar_names(two_shards):
    write_index(two_shards, {})
    with pytest.raises(CheckpointError, match=r"Similar names there: model\.safe"):
        open_checkpoint(two_shards / "models.safetensors.index.json")


# Spill files


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
    monkeypatch.setattr(checkpoint, "_CHUNK", max(chunk, 8))
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

    monkeypatch.setattr(checkpoint, "CheckpointFile", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(9)})
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up_under_an_open_spill_file_is_named(tmp_path, monkeypatch):
    file = write_spill_file(tmp_path / "s.safetensors", {"x": torch.ones(9)})
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"s\.safetensors.*No space left"):
        file.write_from(file.tensors["x"], torch.zeros(9))


# Damage at random

TOKENS = (b"0", b"-1", b"9" * 25, b'"', b"[", b"}", b",", b"x", b"null", b"F64", b"\0")


def damaged(content, header_end, rng):
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(header_end)
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            data[at : at + 1] = str(rng.randrange(10)).encode()
        else:
            other = rng.randrange(header_end)
            data[at : at + 4] = data[other : other + 4]
    if rng.random() < 0.7:  # The length fits again, so that the rest is looked at.
        length = max(0, header_end - 8 + len(data) - len(content))
        data[:8] = struct.pack("<Q", length)
    return bytes(data)


def test_damaged_file_gives_the_right_bytes_or_a_checkpoint_error(tmp_path, no_leak):
    path = tmp_path / "m.safetensors"
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(5)}
    save_file(tensors | {"c": torch.ones(3).bfloat16()}, path, metadata={"key": "text"})
    content = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        path.write_bytes(damaged(content, header_end, rng))
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        with safe_open(path, framework="pt") as reader:
            assert found.keys() == set(reader.keys())
            for name, location in found.items():
                assert same_bits(read(location), reader.get_tensor(name))
                assert same_bits(location.file.mapped(location), read(location))
        for location in found.values():
            location.file.close()
    assert 200 < refused < 300
    gc.collect()

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

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hookoffload import opened_file, safetensors_file
from hookoffload.checkpoint import open_checkpoint
from hookoffload.safetensors_file import CheckpointFile
from hookoffload.safetensors_header import CheckpointError
from hookoffload.spill_file import write_spill_file
from tests.garbage import freeze_old_objects
from tests.safetensors_samples import (
    DTYPES,
    descriptors_kept,
    failing,
    random_tensor,
    read,
    same_bits,
    save,
    write_raw,
    write_two_shards,
)

FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
GOOD = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection():
    freeze_old_objects()


@pytest.fixture
def no_leak():
    with descriptors_kept():
        yield


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
    monkeypatch.setattr(safetensors_file, "_MOST_READ_AT_ONCE", 4)
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
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor 'x': .*790 of"):
        file.mapped(file.tensors["x"])


def test_disk_that_fails_to_read_is_reported_with_file_and_tensor(
    tmp_path, monkeypatch
):
    file = CheckpointFile(save(tmp_path / "m.safetensors", x=torch.ones(3)))
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor 'x': .*Input"):
        read(file.tensors["x"])


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


def test_location_of_another_file_is_refused(tmp_path):
    write_two_shards(tmp_path)
    one, other = (CheckpointFile(tmp_path / f"{n}.safetensors") for n in "ab")
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

    monkeypatch.setattr(opened_file, "safe_open", replace_first)
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
    "gguf": (b"GGUF\x03" + b"\0" * 60, "load_model reads those"),
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

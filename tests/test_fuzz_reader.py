"""Damaged headers and indexes: the right bytes, or the library's own error.

The format's own library judges: what it reads from the same file is right.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save_file

from hookoffload import CheckpointError
from hookoffload.checkpoint import open_checkpoint
from hookoffload.torch_dtypes import CODES
from tests.safetensors_samples import random_tensor, read, same_bits, save

# With the profile "long", more than 20,000 in all.
SCALE = max(1, settings().max_examples // 220)
FUZZED = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

# A JSON object as pairs, so that a key can come twice; `Raw` is text to write as it is.
Pairs = list[tuple[Any, Any]]


class Raw(str):
    """JSON that no Python value stands for."""


DEEP = Raw("[" * 20_000 + "]" * 20_000)
ODD_VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        7,
        2**31,
        2**32,
        2**53 + 1,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        10**30,
        1.0,
        -0.0,
        1.5,
        math.nan,
        math.inf,
        Raw("1e400"),
        Raw("-0"),
        Raw("01"),
        Raw("9" * 5000),
        Raw("tru"),
        Raw('"\\ud800"'),
        Raw('"\\u0000"'),
        DEEP,
        "",
        "F32",
        "f32",
        "é",
        "x" * 3000,
        [],
        [[]],
        [1, "2"],
        {},
        {"shape": [1]},
    ]
)
ODD_NAMES = st.sampled_from(
    [
        "",
        "__metadata__",
        "a.weight",
        "b",
        "dtype",
        "é\U0001f600",
        "\0",
        "\n",
        "..",
        "x" * 3000,
        Raw('"\\ud800"'),
        Raw('"b\\u0000"'),
        Raw('"\\u0062"'),
        3,
        None,
    ]
)


def written(value: Any) -> str:
    """Return a value as JSON, or as what somebody took for it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, list) and value and all(type(v) is tuple for v in value):
        return "{" + ",".join(f"{written(k)}:{written(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(item) for item in value) + "]"
    return json.dumps(value)


# --- files ---

TENSORS = {
    "a.weight": random_tensor(torch.float32, (2, 3), 1),
    "b": random_tensor(torch.int64, (4,), 2),
    "half": random_tensor(torch.bfloat16, (3, 1), 3),
    "empty": random_tensor(torch.float32, (0, 5), 4),
    "scalar": random_tensor(torch.uint8, (), 5),
    "small": random_tensor(torch.float8_e5m2, (2, 2), 6),
}
DTYPE_NAMES = [*CODES.values(), "F6_E2M3", "BF17", "bool"]


def saved() -> tuple[Pairs, bytes]:
    """Return the header of a good file as pairs, and what is behind it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        save_file(TENSORS, path, metadata={"format": "pt"})
        content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return [(k, list(v.items())) for k, v in header.items()], content[8 + length :]


HEADER, DATA = saved()
Draw = Callable[[st.SearchStrategy[Any]], Any]


def pick(draw: Draw, items: list[Any]) -> int:
    return draw(st.integers(0, max(0, len(items) - 1)))


def change_field(draw: Draw, header: Pairs) -> None:
    at = pick(draw, header)
    name, entry = header[at]
    if not isinstance(entry, list) or not entry or type(entry[0]) is not tuple:
        return
    entry = list(entry)
    number = pick(draw, entry)
    field, value = entry[number]
    kind = draw(st.integers(0, 6))
    if kind == 0:
        entry[number] = (field, draw(ODD_VALUES))
    elif kind == 1:
        entry[number] = (draw(ODD_NAMES), value)
    elif kind == 2:
        del entry[number]
    elif kind == 3:
        entry.append((draw(st.sampled_from([field, "extra"])), draw(ODD_VALUES)))
    elif kind == 4:
        entry.append(entry[number])
    elif field == "dtype":
        entry[number] = (field, draw(st.sampled_from(DTYPE_NAMES)))
    elif isinstance(value, list):
        values = list(value)
        if values and draw(st.booleans()):
            one = pick(draw, values)
            odd = draw(ODD_VALUES)
            near = draw(st.integers(-9, 9))
            plain = isinstance(values[one], int)
            values[one] = values[one] + near if kind == 5 and plain else odd
        elif draw(st.booleans()):
            values.append(draw(st.integers(0, 3)))
        else:
            values.reverse()
        entry[number] = (field, values)
    header[at] = (name, entry)


def change_entry(draw: Draw, header: Pairs) -> None:
    at, kind = pick(draw, header), draw(st.integers(0, 5))
    other = pick(draw, header)
    if kind == 0:
        header[at] = (draw(ODD_NAMES), header[at][1])
    elif kind == 1:
        header[at] = (header[at][0], draw(ODD_VALUES))
    elif kind == 2:
        del header[at]
    elif kind == 3:
        header.append((header[at][0], header[other][1]))
    elif kind == 4:
        header[at] = (header[at][0], header[other][1])
    else:
        header.insert(at, header.pop(other))


def change_metadata(draw: Draw, header: Pairs) -> None:
    odd = draw(ODD_VALUES)
    value = odd if draw(st.booleans()) else [(draw(ODD_NAMES), odd)]
    header.append(("__metadata__", value))


def change_bytes(draw: Draw, content: bytes) -> bytes:
    """Flip, cut, insert or exchange bytes, most often near the start."""
    data = bytearray(content)
    most = draw(st.sampled_from([8, 16, len(data)]))
    at = draw(st.integers(0, max(0, min(most, len(data)) - 1)))
    kind = draw(st.integers(0, 4))
    if kind == 0 and data:
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 1:
        data[at:at] = draw(st.binary(min_size=1, max_size=4))
    elif kind == 2:
        del data[at : at + draw(st.integers(1, 12))]
    elif kind == 3:
        del data[at:]
    else:
        data += draw(st.binary(min_size=1, max_size=9))
    return bytes(data)


LIES = st.sampled_from([-(2**63), -9, -8, -1, 1, 2, 8, 100, 10**8, 2**62])
PADDING = st.sampled_from(["", " ", "        ", "\n", "\t", "\0", "x", "{}", "\ufeff"])


@st.composite
def damaged_files(draw: Draw) -> bytes:
    """Make a safetensors file that something is wrong with, most often."""
    header = list(HEADER)
    for _ in range(draw(st.integers(0, 2))):
        if not header:
            break
        way = draw(st.integers(0, 5))
        change = [change_field, change_entry, change_metadata][max(0, way - 3)]
        change(draw, header)
    text = draw(PADDING) if draw(st.integers(0, 9)) == 0 else ""
    text += written(header) if header else "{}"
    text += draw(PADDING) if draw(st.integers(0, 4)) == 0 else ""
    raw = text.encode("utf-8", "surrogatepass")
    length = len(raw)
    if draw(st.integers(0, 7)) == 0:
        length = (length + draw(LIES)) % 2**64
    content = struct.pack("<Q", length) + raw + DATA
    if draw(st.integers(0, 3)) == 0:
        content = change_bytes(draw, content)
    return content


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def assert_reads_right(path: Path) -> bool:
    """Return whether a file is taken; fail unless it is then read as it should be."""
    try:
        found = open_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    right = {name: about for name, about in deserialize(path.read_bytes())}
    assert found.keys() == right.keys()
    for name, location in found.items():
        about = right[name]
        assert CODES[location.dtype] == about["dtype"]
        shape = list(location.shape)
        if about["dtype"] == "F4":
            shape[-1] *= 2
        assert shape == list(about["shape"])
        value = read(location)
        assert bytes(value.view(-1).view(torch.uint8).tolist()) == about["data"]
        assert same_bits(location.file.mapped(location), value)
    for file in {location.file for location in found.values()}:
        with safe_open(str(path), framework="numpy") as reader:
            assert file.metadata == (reader.metadata() or {})
        file.close()
    return True


def test_undamaged_file_is_read(folder: Path) -> None:
    path = folder / "m.safetensors"
    text = written(HEADER).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + DATA)
    assert assert_reads_right(path)
    for name, location in open_checkpoint(path).items():
        assert same_bits(read(location), TENSORS[name])


@settings(FUZZED, max_examples=600 * SCALE)
@given(content=damaged_files())
def test_damaged_file_is_read_as_the_format_says_or_refused(
    folder: Path, content: bytes
) -> None:
    path = folder / "m.safetensors"
    path.write_bytes(content)
    assert_reads_right(path)


def test_a_part_of_the_damaged_files_can_still_be_read(folder: Path) -> None:
    """Otherwise the test above would not look at what is read."""
    taken = []

    @settings(FUZZED, max_examples=200, database=None, derandomize=True)
    @given(content=damaged_files())
    def look(content: bytes) -> None:
        path = folder / "m.safetensors"
        path.write_bytes(content)
        taken.append(assert_reads_right(path))

    look()
    assert 0.05 < sum(taken) / len(taken) < 0.8


# --- indexes ---

SHARDS = {
    "one.safetensors": {"x": torch.arange(4.0), "y": torch.ones(2)},
    "two.safetensors": {"y": torch.zeros(3), "z": torch.arange(5)},
}
WEIGHT_MAP: Pairs = [
    ("x", "one.safetensors"),
    ("y", "two.safetensors"),
    ("z", "two.safetensors"),
]


@pytest.fixture(scope="module")
def sharded() -> Iterator[Path]:
    """Yield a folder with shards, and others like them around it."""
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name, "model")
        (inside / "sub").mkdir(parents=True)
        for shard, tensors in SHARDS.items():
            for other in (Path(name), inside / "sub"):
                save(other / shard, **{k: v + 100 for k, v in tensors.items()})
            save(inside / shard, **tensors)
        (inside / "config.json").write_text("{}")
        shutil.copy(inside / "one.safetensors", inside / "copy.bin")
        yield inside


SHARD_NAMES = st.sampled_from(
    [
        *SHARDS,
        "./one.safetensors",
        "sub/one.safetensors",
        "sub//two.safetensors",
        "sub/../one.safetensors",
        "../one.safetensors",
        "..\\one.safetensors",
        "sub\\one.safetensors",
        "one.safetensors/",
        "one.safetensors\0",
        " one.safetensors",
        "ONE.safetensors",
        "/etc/passwd",
        "/one.safetensors",
        "C:\\one.safetensors",
        "//host/one.safetensors",
        "~/one.safetensors",
        "",
        ".",
        "..",
        "sub",
        "config.json",
        "copy.bin",
        "model.safetensors.index.json",
        "x" * 300,
        "x/" * 3000,
        Raw('"\\ud800"'),
        Raw('"one.safetensors\\u0000"'),
    ]
)


@st.composite
def damaged_indexes(draw: Draw) -> bytes:
    """Make an index that something is wrong with, most often."""
    weight_map = list(WEIGHT_MAP)
    for _ in range(draw(st.integers(0, 2))):
        at, kind = pick(draw, weight_map), draw(st.integers(0, 5))
        name, shard = weight_map[at]
        if kind == 0:
            weight_map[at] = (name, draw(SHARD_NAMES))
        elif kind == 1:
            weight_map[at] = (name, draw(ODD_VALUES))
        elif kind == 2:
            weight_map[at] = (draw(ODD_NAMES), shard)
        elif kind == 3:
            weight_map.append((name, draw(SHARD_NAMES)))
        elif kind == 4:
            weight_map[at] = (name, draw(st.sampled_from(list(SHARDS))))
        elif len(weight_map) > 1:
            del weight_map[at]
    content: Pairs = [("metadata", {"total_size": 64}), ("weight_map", weight_map)]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        content[draw(st.integers(0, 1))] = ("metadata", draw(ODD_VALUES))
    elif kind == 1:
        content.append(("weight_map", draw(ODD_VALUES)))
    elif kind == 2:
        content[1] = (draw(ODD_NAMES), weight_map)
    text = written(draw(ODD_VALUES)) if kind == 3 else written(content)
    raw = text.encode("utf-8", "surrogatepass")
    return change_bytes(draw, raw) if draw(st.integers(0, 4)) == 0 else raw


@settings(FUZZED, max_examples=340 * SCALE)
@given(content=damaged_indexes())
def test_damaged_index_leads_to_its_own_shards_or_is_refused(
    sharded: Path, content: bytes
) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content)
    try:
        found = open_checkpoint(sharded)
    except CheckpointError as error:
        assert str(sharded) in str(error)
        return
    weight_map = json.loads(content)["weight_map"]
    assert found.keys() == weight_map.keys()
    for name, location in found.items():
        path = sharded / weight_map[name]
        assert path.resolve().is_relative_to(sharded.resolve())
        with safe_open(str(path), framework="pt") as reader:
            assert same_bits(read(location), reader.get_tensor(name))
    for file in {location.file for location in found.values()}:
        file.close()

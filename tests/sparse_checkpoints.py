"""Checkpoints of any size that take no room: headers, and holes for the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

ITEMSIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}
Entry = tuple[str, tuple[int, ...]]  # dtype and shape


def write_sparse(path: Path, tensors: Mapping[str, Entry]) -> Path:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = ITEMSIZES[dtype]
        for size in shape:
            nbytes *= size
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def write_sparse_shards(folder: Path, tensors: Mapping[str, Entry], count: int) -> Path:
    """Writes so many shards and their index."""
    weight_map = {}
    items: Iterable[tuple[str, Entry]] = iter(tensors.items())
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(islice(items, -(-len(tensors) // count)))
        write_sparse(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder

"""One converted checkpoint on disk: how it is written, and how it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from .safetensors_file import CheckpointFile, TensorLocation
from .safetensors_header import CheckpointError
from .safetensors_writer import Source, write_safetensors
from .tensor_bytes import disk_errors
from .torch_dtypes import CODES, DTYPES

ELSEWHERE = "pass another with cache_dir="
_TABLE = "conversion.safetensors.index.json"
_FORMAT = 1
# What is computed stays in RAM until it fills a file.
_SHARD = 512 * 2**20


def part_of(
    location: TensorLocation, dtype: torch.dtype, shape: tuple[int, ...], start: int
) -> TensorLocation:
    """Return the location of a contiguous part of a tensor in a file.

    Args:
        location: the whole tensor's.
        dtype: what to read the bytes as.
        shape: the part's shape.
        start: the part's first byte, counted from the tensor's.

    Raises:
        CheckpointError: The part is not inside the tensor.
    """
    nbytes = prod(shape) * dtype.itemsize
    if start < 0 or start + nbytes > location.nbytes:
        raise CheckpointError(
            f"{location.file.path}: tensor {location.name!r} has {location.nbytes} "
            f"bytes, and bytes {start} to {start + nbytes} are wanted of it."
        )
    offset = location.offset + start
    return replace(location, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes)


class EntryWriter:
    """Writes a converted checkpoint into a folder.

    Args:
        folder: an empty folder.
        about: what it was made from, for people who look into the folder.

    Attributes:
        progress: Called with the number of bytes of each chunk written.
    """

    def __init__(self, folder: Path, about: object) -> None:
        self._folder = folder
        self._about = about
        self.progress: Callable[[int], object] | None = None
        self._table: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, Source] = {}
        self._waiting_bytes = 0
        self._metadata: dict[str, str] = {}
        self._shards = 0

    def keep(self, name: str, source: str, location: TensorLocation, at: int) -> None:
        """Note a tensor that stays in the checkpoint.

        Args:
            name: its name in the result.
            source: the name of the checkpoint's tensor that has its bytes.
            location: where its bytes lie.
            at: where those of the checkpoint's tensor begin in the file.
        """
        self._table[name] = {
            "file": None,
            "tensor": source,
            "dtype": CODES[location.dtype],
            "shape": list(location.shape),
            "start": location.offset - at,
        }

    def add(
        self,
        name: str,
        tensor: torch.Tensor,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Take a tensor; it is written at the latest by `finish`.

        Args:
            name: its name.
            tensor: the tensor.
            metadata: text for the header of the file that it will be in.
        """
        if self._waiting and self._waiting_bytes + tensor.nbytes > _SHARD:
            self.flush()
        self._waiting[name] = Source(tensor, tensor.dtype)
        self._waiting_bytes += tensor.nbytes
        self._metadata.update(metadata or {})

    def repeat(self, name: str, other: str) -> None:
        """Give a tensor that was added a second name; its bytes are written once."""
        self._table[name] = {"same": other}

    def finish(self) -> None:
        """Write what waits, then the table; nothing is left to the page cache."""
        self.flush()
        for entry in self._table.values():
            if "same" in entry:
                entry.update(self._table[entry.pop("same")])
        table = {"format": _FORMAT, "about": self._about, "tensors": self._table}
        path = self._folder / _TABLE
        with disk_errors(path, ELSEWHERE):
            path.write_text(json.dumps(table, indent=1), encoding="utf-8")
            for written in (path, self._folder):
                fd = os.open(written, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        self._shards += 1
        path = self._folder / f"{self._shards:05d}.safetensors"
        write_safetensors(
            path,
            self._waiting,
            elsewhere=ELSEWHERE,
            metadata=self._metadata,
            progress=self.progress,
            durable=True,
        )
        for name, source in self._waiting.items():
            self._table[name] = {
                "file": path.name,
                "tensor": name,
                "dtype": CODES[source.dtype],
                "shape": list(source.tensor.shape),
                "start": 0,
            }
        self._waiting, self._waiting_bytes, self._metadata = {}, 0, {}


def open_entry(
    folder: Path, sources: Mapping[str, TensorLocation]
) -> dict[str, TensorLocation] | None:
    """Open a converted checkpoint.

    Args:
        folder: where it was written.
        sources: the tensors of the checkpoint that it was made from.

    Returns:
        Where each tensor lies, in the order of their names in the table; None if the
        folder holds no converted checkpoint.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / _TABLE
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}")
        table = [
            (
                name,
                entry["file"],
                entry["tensor"],
                DTYPES[entry["dtype"]],
                tuple(map(int, entry["shape"])),
                int(entry["start"]),
            )
            for name, entry in content["tensors"].items()
        ]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    files: dict[str, CheckpointFile] = {}
    found = {}
    with ExitStack() as opened:
        for name, shard, tensor, dtype, shape, start in table:
            tensors: Mapping[str, TensorLocation] = sources
            if shard is not None:
                if shard not in files:
                    files[shard] = CheckpointFile(folder / shard)
                    opened.callback(files[shard].close)
                tensors = files[shard].tensors
            if tensor not in tensors:
                raise CheckpointError(f"{path}: there is no tensor {tensor!r}.")
            found[name] = part_of(tensors[tensor], dtype, shape, start)
        opened.pop_all()
    return found

"""Writes a safetensors file, a chunk at a time, from memory or from other files."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .safetensors_file import CheckpointFile, TensorLocation
from .safetensors_header import CheckpointError
from .tensor_bytes import chunk_sizes, disk_errors, pieces, write_at, write_pieces
from .torch_dtypes import CODES

_GIB = 2**30


@dataclass(frozen=True)
class Source:
    """One tensor to write: what it is, and where its bytes come from.

    Attributes:
        tensor: The tensor, on any device, with any strides.
        dtype: What to cast it to on the way; its own: nothing.
        location: The file that its bytes are read from, in pieces, so that a memory
            map of it stays untouched; None: from the tensor itself.
        start: The first of its bytes, counted from the beginning of the location.
    """

    tensor: torch.Tensor
    dtype: torch.dtype
    location: TensorLocation | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file that is written."""
        return self.tensor.numel() * self.dtype.itemsize

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yields the bytes to write; a piece is overwritten by the next one."""
        if self.location is None:
            yield from pieces(self.tensor, self.dtype)
            return
        done, buffer = self.start, torch.empty(0, dtype=torch.uint8)
        for count in chunk_sizes(self.nbytes):
            if count > buffer.numel():
                buffer = torch.empty(count, dtype=torch.uint8)
            self.location.file.read_into(self.location, buffer[:count], done)
            done += count
            yield buffer[:count]


def write_safetensors(
    path: Path,
    sources: Mapping[str, Source],
    *,
    elsewhere: str,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
    align: int = 64,
    durable: bool = False,
) -> None:
    """Writes a new safetensors file and reads its header back.

    A failure of any kind leaves no file. At most one chunk of 16 MiB is copied beyond
    the tensors.

    Args:
        path: The file to write; there must be none.
        sources: What to write, by name.
        elsewhere: For errors: how to have the file in another folder.
        metadata: Text to keep in the header.
        progress: Called with the number of bytes of each chunk written.
        align: Start of the tensors' data is a multiple of this many bytes. Each
            tensor starts at a multiple of its item size.
        durable: Wait until the bytes are on the disk, beyond a loss of power.

    Raises:
        CheckpointError: A tensor cannot be stored, or the disk is full or refuses.
    """
    header, order, data = _build_header(path, sources, metadata, align)
    check_room(path.parent, len(header) + data, elsewhere)
    with ExitStack() as undo:
        undo.callback(remove, path)
        with ExitStack() as opened:
            with disk_errors(path, elsewhere):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            opened.callback(os.close, fd)
            with disk_errors(path, elsewhere):
                write_at(fd, memoryview(header), 0)
            offset = len(header)
            for name in order:
                parts = sources[name].pieces()
                for count in write_pieces(fd, path, parts, offset, elsewhere=elsewhere):
                    offset += count
                    if progress is not None:
                        progress(count)
            opened.pop_all()
            with disk_errors(path, elsewhere):
                try:
                    if durable:
                        os.fsync(fd)
                finally:
                    os.close(fd)  # A network disk reports a full disk here.
        CheckpointFile(path).close()
        undo.pop_all()


def check_room(folder: Path, needed: int, elsewhere: str) -> None:
    """Raises `CheckpointError` if so many bytes do not fit the disk of a folder."""
    with disk_errors(folder / "files", elsewhere):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {needed / _GIB:.2f} GiB are to be written, and its disk has "
            f"{free / _GIB:.2f} GiB free. Free space there, or {elsewhere}."
        )


def check_storable(path: Path, name: str, source: Source) -> str:
    """Returns the format's code of a tensor's dtype, or says why it has none."""
    tensor = source.tensor
    code = CODES.get(source.dtype)
    storable = tensor.layout == torch.strided and not tensor.is_meta
    if code is None or not storable or name == "__metadata__":
        raise CheckpointError(
            f"{path}: tensor {name!r} ({tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}) cannot be stored in a safetensors file. Keep its "
            "layer in memory, or convert it to a plain dtype first."
        )
    return code


def _build_header(
    path: Path,
    sources: Mapping[str, Source],
    metadata: Mapping[str, str] | None,
    align: int,
) -> tuple[bytes, list[str], int]:
    """Returns the bytes before the data, the names in its order, and its length."""
    if align < 1:
        raise ValueError(f"align must be at least 1 byte, not {align}.")
    # The format allows no holes: larger items first keeps each tensor aligned.
    order = sorted(sources, key=lambda name: -sources[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        source = sources[name]
        code = check_storable(path, name, source)
        shape = list(source.tensor.shape)
        if code == "F4" and shape:
            shape[-1] *= 2
        begin, end = end, end + source.nbytes
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text, order, end


def remove(path: str | Path) -> None:
    """Removes a file behind an error, which is the one to report."""
    with suppress(OSError):
        os.unlink(path)

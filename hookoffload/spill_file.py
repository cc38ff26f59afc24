"""Spill files: tensors written to a safetensors file of the library's own."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from .safetensors_file import CheckpointFile
from .safetensors_header import CODES, CheckpointError
from .tensor_bytes import disk_errors, write_at, write_tensor

_GIB = 2**30


def write_spill_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
    align: int = 64,
) -> CheckpointFile:
    """Writes tensors to a safetensors file and opens it for shared use.

    The file appears under its name only when it is complete; a failure of any kind
    leaves nothing behind. At most one chunk of 16 MiB is copied beyond the tensors.

    Args:
        path: The file to write; an existing one is replaced.
        tensors: Tensors by name, on any device, with any strides.
        dtypes: What to cast tensors to on the way, by name; default: nothing.
        metadata: Text to keep in the header.
        progress: Called with the number of bytes of each chunk written.
        align: Start of the tensors' data is a multiple of this many bytes. Each
            tensor starts at a multiple of its item size.

    Returns:
        The file, open with `writable_shared=True`.

    Raises:
        CheckpointError: A tensor cannot be stored, or the disk is full or refuses.
    """
    dtypes = {name: t.dtype for name, t in tensors.items()} | dict(dtypes or {})
    header, order, data = _build_header(path, tensors, dtypes, metadata, align)
    needed = len(header) + data
    with disk_errors(path):
        free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f"{path}: needs {needed / _GIB:.2f} GiB on disk, the folder {path.parent} "
            f"has {free / _GIB:.2f} GiB free. Free space there, or pass a folder on a "
            "larger disk with disk_dir=."
        )
    with disk_errors(path):
        fd, unfinished = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with ExitStack() as undo:
        undo.callback(_remove, unfinished)
        with ExitStack() as opened:
            opened.callback(os.close, fd)
            with disk_errors(path):
                write_at(fd, memoryview(header), 0)
            offset = len(header)
            for name in order:
                parts = write_tensor(fd, path, tensors[name], offset, dtypes[name])
                for count in parts:
                    offset += count
                    if progress is not None:
                        progress(count)
            opened.pop_all()
            with disk_errors(path):  # A network disk reports a full disk here.
                os.close(fd)
        CheckpointFile(unfinished).close()
        with disk_errors(path):
            os.replace(unfinished, path)
        undo.callback(_remove, path)
        file = CheckpointFile(path, writable_shared=True)
        undo.pop_all()
    return file


def _build_header(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    metadata: Mapping[str, str] | None,
    align: int,
) -> tuple[bytes, list[str], int]:
    """Returns the bytes before the data, the names in its order, and its length."""
    if align < 1:
        raise ValueError(f"align must be at least 1 byte, not {align}.")
    # The format allows no holes: larger items first keeps each tensor aligned.
    order = sorted(tensors, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        code = CODES.get(dtypes[name])
        storable = tensor.layout == torch.strided and not tensor.is_meta
        if code is None or not storable or name == "__metadata__":
            raise CheckpointError(
                f"{path}: tensor {name!r} ({tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}) cannot be stored in a safetensors file. Keep its "
                "layer in memory, or convert it to a plain dtype first."
            )
        shape = list(tensor.shape)
        if code == "F4" and shape:
            shape[-1] *= 2
        begin, end = end, end + tensor.numel() * dtypes[name].itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text, order, end


def _remove(path: str | Path) -> None:
    with suppress(OSError):  # The first error is the one to report.
        os.unlink(path)

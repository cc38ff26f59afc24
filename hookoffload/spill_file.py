"""Spill files: tensors written to a safetensors file of the library's own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from .safetensors_file import CheckpointFile
from .safetensors_writer import Source, remove, write_safetensors
from .tensor_bytes import disk_errors

_ELSEWHERE = "pass another with disk_dir="


def write_spill_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
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
    dtypes = dtypes or {}
    sources = {
        name: Source(tensor, dtypes.get(name, tensor.dtype))
        for name, tensor in tensors.items()
    }
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with ExitStack() as undo:
        undo.callback(remove, unfinished)
        write_safetensors(
            unfinished,
            sources,
            metadata=metadata,
            progress=progress,
            align=align,
            elsewhere=_ELSEWHERE,
        )
        with disk_errors(path, _ELSEWHERE):
            os.replace(unfinished, path)
        undo.callback(remove, path)
        file = CheckpointFile(path, writable_shared=True)
        undo.pop_all()
    return file

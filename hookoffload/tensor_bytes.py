"""The bytes of tensors: as memory, in chunks, and written at a place in a file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .safetensors_header import CheckpointError

_CHUNK = 16 * 2**20


def memory(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor; the tensor must outlive them."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of tensors, those of tied ones once."""
    sizes = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def chunk_sizes(nbytes: int) -> Iterator[int]:
    """Yields the sizes of the chunks, in bytes, that so many bytes are moved in."""
    for done in range(0, nbytes, _CHUNK):
        yield min(_CHUNK, nbytes - done)


def pieces(
    tensor: torch.Tensor, dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """Yields a tensor's elements in their order, in host RAM, a chunk at a time.

    Args:
        tensor: On any device, with any strides.
        dtype: What to cast to, chunk by chunk; None: nothing. Such a piece is
            overwritten by the next one.
    """
    cast = torch.empty(0, dtype=dtype)
    for piece in _views(tensor.detach()):
        # A conjugate or negative view keeps its sign apart from its bytes.
        piece = piece.cpu().resolve_conj().resolve_neg().contiguous()
        if dtype is None or piece.dtype == dtype:
            yield piece
            continue
        if piece.numel() > cast.numel():
            # One buffer for all: each of its own would be spread over the heap.
            cast = torch.empty(piece.numel(), dtype=dtype)
        yield cast[: piece.numel()].copy_(piece.view(-1))


def _views(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cuts a tensor into views of at most a chunk, in the order of its elements."""
    if tensor.nbytes == 0:
        return
    if tensor.nbytes <= _CHUNK:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), _CHUNK // tensor.itemsize)
    else:
        rows = _CHUNK // tensor[0].nbytes
        for part in torch.split(tensor, max(1, rows)):
            yield from _views(part if rows else part[0])


def write_pieces(
    fd: int, path: Path, parts: Iterable[torch.Tensor], offset: int, *, elsewhere: str
) -> Iterator[int]:
    """Writes contiguous CPU tensors one behind the other; yields the bytes of each.

    Args:
        fd: The open file.
        path: Its path, for errors.
        parts: What to write; each is done with before the next is asked for.
        offset: The byte of the file to begin at.
        elsewhere: For errors: how to have the file in another folder.
    """
    for part in parts:
        with disk_errors(path, elsewhere):
            write_at(fd, memory(part), offset)
        offset += part.nbytes
        yield part.nbytes


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of the bytes at a byte of a file."""
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done : done + _CHUNK], offset + done)
        except InterruptedError:
            continue


@contextmanager
def disk_errors(path: Path, elsewhere: str) -> Iterator[None]:
    """Turns what the disk refuses into an error that names the file and its folder."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written in the folder {path.parent}: "
            f"{error.strerror or error}. Free space there, make the folder writable, "
            f"or {elsewhere}."
        ) from error

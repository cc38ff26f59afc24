"""GGUF files: the packed weights of llama.cpp, which diffusers computes with."""

from __future__ import annotations

import importlib
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .safetensors_file import CheckpointFile
from .safetensors_header import CheckpointError, TensorExtent

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_ALIGNED_TO = 32  # bytes, where the file does not say it
_DAMAGED = "The download is incomplete or damaged: fetch it again."
# Those of values beside the tensors, by their codes, in bytes.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_U32, _STRING, _ARRAY = 4, 8, 9
_DEEPEST = 8  # arrays of arrays
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 2**16  # bytes
_READ_AHEAD = 2**16
_NO_PACKING = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"}


class GgufFile(CheckpointFile):
    """One open GGUF file.

    Packed tensors are bytes here, in rows as the file has them.

    Attributes:
        packings: The names of the packings ("Q4_K") of packed tensors.
    """

    __slots__ = ("packings",)

    def _read_header(self) -> tuple[dict[str, TensorExtent], dict[str, str]]:
        reader = _HeaderReader(self.path, self._fd, self.nbytes)
        tensors = reader.tensors(_packings(self.path))
        self.packings = {
            name: tensor.packing
            for name, tensor in tensors.items()
            if tensor.packing not in _NO_PACKING
        }
        return {name: tensor.extent for name, tensor in tensors.items()}, {}


class _Packing(NamedTuple):
    """How values lie: so many bytes for a block of so many values."""

    name: str
    values: int
    nbytes: int


class _Tensor(NamedTuple):
    packing: str
    extent: TensorExtent


def _packings(path: Path) -> dict[int, _Packing]:
    """Return the packings that the package gguf knows, by their codes."""
    try:
        library: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: reading it takes the package gguf, which cannot be imported: "
            f"{error}. pip install 'hookoffload[gguf]'"
        ) from error
    return {
        int(kind): _Packing(str(kind.name), int(values), int(nbytes))
        for kind, (values, nbytes) in library.GGML_QUANT_SIZES.items()
    }


class _HeaderReader:
    """Reads a header from its beginning; every step is inside the file.

    Args:
        path: The file, for errors.
        fd: It, opened.
        size: Its size in bytes.
    """

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self._size = size
        self._position = 0
        self._data = b""
        self._data_start = 0

    def tensors(self, packings: Mapping[int, _Packing]) -> dict[str, _Tensor]:
        """Return what lies where, by name.

        Raises:
            CheckpointError: The header is not valid, or does not fit the file.
        """
        if self._take(len(_MAGIC)) != _MAGIC:
            raise self._wrong("it does not begin as a GGUF file does")
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "has the byte order of another machine" if swapped else "is unknown"
            raise CheckpointError(
                f"{self._path}: version {version:#x} of the GGUF format {what}. Fetch "
                "the file in version 2 or 3, little-endian."
            )
        count, values = self._number("Q"), self._number("Q")
        aligned_to = _ALIGNED_TO
        for _ in range(values):
            key, kind = self._text(), self._number("I")
            if key == _ALIGNMENT and kind == _U32:
                aligned_to = self._number("I")
            else:
                self._skip_value(kind)
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text()
            dimensions = self._number("I")
            if name in found or dimensions > _MOST_DIMENSIONS:
                raise self._wrong(f"tensor {name!r} is there twice, or has no shape")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            found[name] = shape, self._number("I"), self._number("Q")
        if aligned_to <= 0 or aligned_to & (aligned_to - 1):
            raise self._wrong(f"tensors are aligned to {aligned_to} bytes")
        start = -(-self._position // aligned_to) * aligned_to
        tensors = {
            name: self._tensor(name, packings.get(kind), kind, shape, start + offset)
            for name, (shape, kind, offset) in found.items()
        }
        self._check_extents(tensors, start, aligned_to)
        return tensors

    def _tensor(
        self,
        name: str,
        packing: _Packing | None,
        code: int,
        shape: tuple[int, ...],
        offset: int,
    ) -> _Tensor:
        if packing is None:
            raise CheckpointError(
                f"{self._path}: tensor {name!r} is packed in a way ({code}) that this "
                "version of the package gguf does not know: pip install -U gguf"
            )
        row = shape[-1] if shape else 1
        if row % packing.values:
            raise self._wrong(f"tensor {name!r} has rows of {row} values")
        nbytes = math.prod(shape) // packing.values * packing.nbytes
        if packing.name in _NO_PACKING:
            extent = TensorExtent(packing.name, shape, offset, nbytes)
        else:
            bytes_of_row = row // packing.values * packing.nbytes
            extent = TensorExtent("U8", (*shape[:-1], bytes_of_row), offset, nbytes)
        return _Tensor(packing.name, extent)

    def _check_extents(
        self, tensors: Mapping[str, _Tensor], start: int, aligned_to: int
    ) -> None:
        end = start
        extents = {name: tensor.extent for name, tensor in tensors.items()}
        for name, extent in sorted(extents.items(), key=lambda item: item[1].offset):
            if extent.offset < end or (extent.offset - start) % aligned_to:
                raise self._wrong(f"tensor {name!r} does not begin where one can")
            end = extent.offset + extent.nbytes
            if end > self._size:
                raise self._wrong(f"tensor {name!r} ends at byte {end}")

    def _skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._skip(_SIZES[inner] * count)
                return
            for _ in range(count):
                self._skip_value(inner, depth + 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise self._wrong(f"a value is of the unknown kind {kind}")

    def _text(self) -> str:
        length = self._number("Q")
        if length > _LONGEST_NAME:
            raise self._wrong(f"a name has {length} bytes")
        data = self._take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"a name is no text ({error})") from error

    def _number(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        number: int = struct.unpack(f"<{code}", self._take(size))[0]
        return number

    def _take(self, count: int) -> bytes:
        start = self._position
        self._skip(count)
        if start + count > self._data_start + len(self._data):
            self._data = os.pread(self._fd, max(count, _READ_AHEAD), start)
            self._data_start = start
        first = start - self._data_start
        data = self._data[first : first + count]
        if len(data) < count:
            raise self._wrong("it was cut short")
        return data

    def _skip(self, count: int) -> None:
        self._position += count
        if self._position > self._size:
            raise self._wrong(f"its header goes on behind byte {self._size}, its end")

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: is no valid GGUF file: {what}. {_DAMAGED}"
        )

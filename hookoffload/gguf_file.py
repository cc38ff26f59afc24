"""GGUF files: the packed weights of llama.cpp, which diffusers computes with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .safetensors_file import CheckpointFile
from .safetensors_header import CheckpointError, TensorExtent

GGUF_SUFFIX = ".gguf"
_NO_PACKING = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"}


class GgufFile(CheckpointFile):
    """One open GGUF file, of which the package gguf reads the header.

    Packed tensors are bytes here, in rows as the file has them.

    Attributes:
        packings: The names of the packings ("Q4_K") of packed tensors.
    """

    __slots__ = ("packings",)

    def _read_header(self) -> tuple[dict[str, TensorExtent], dict[str, str]]:
        self.packings: dict[str, str] = {}
        reader_of = _library(self.path).GGUFReader
        try:
            reader = reader_of(self.path)
            order = getattr(reader, "byte_order", "I")
            extents = {tensor.name: self._extent(tensor) for tensor in reader.tensors}
        except Exception as error:
            # Where the file ends early the package makes arrays that are too short,
            # which do not take their shapes.
            raise CheckpointError(
                f"{self.path}: gguf cannot read the file: {error!r}. The download is "
                "incomplete or damaged: fetch it again."
            ) from error
        if order != "I" or sys.byteorder != "little":
            raise CheckpointError(
                f"{self.path}: its numbers have the byte order of another machine. "
                "Fetch the file for this one."
            )
        return extents, {}

    def _extent(self, tensor: Any) -> TensorExtent:
        code = str(tensor.tensor_type.name)
        shape = tuple(int(size) for size in tensor.data.shape)
        offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
        if code not in _NO_PACKING:
            self.packings[tensor.name] = code
            code = "U8"
        elif code == "BF16":  # which NumPy does not have
            shape = (*shape[:-1], shape[-1] // 2)
        return TensorExtent(code, shape, offset, nbytes)


def _library(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: reading it takes the package gguf, which cannot be imported: "
            f"{error}. pip install 'hookoffload[gguf]'"
        ) from error

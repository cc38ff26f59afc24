"""The header of a safetensors file: how it is read and what is checked.

[Note: planning without torch]
``hookoffload plan`` answers from headers before torch would be imported. What it needs,
from here to `plan_command`, imports no torch while it runs: dtypes are the format's
codes, devices are names. A test has the command run where torch cannot be imported.
"""

from __future__ import annotations

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

_LONGEST_HEADER = 100_000_000  # The format's own limit, in bytes.
DAMAGED = "The file is damaged or was not copied completely: fetch it again."
# Bytes of an element as torch has it, by the format's code: torch keeps two numbers of
# F4 in one element.
ITEMSIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "F4": 1,
}


class CheckpointError(ValueError):
    """Says what is wrong with a checkpoint or spill file, and what to do."""


class TensorExtent(NamedTuple):
    """Says which bytes of a file are a tensor, and as what.

    Attributes:
        code: The format's word for the tensor's dtype.
        shape: The tensor's shape as torch has it.
        offset: First byte, counted from the start of the file.
        nbytes: Length in bytes.
    """

    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(
    path: Path, fd: int, size: int
) -> tuple[dict[str, TensorExtent], dict[str, str]]:
    """Reads the header of a safetensors file and checks it against the file's size.

    The format: 8 bytes with the header's length, little endian; the header, JSON;
    the tensors' bytes without holes. Offsets count from the end of the header.
    """
    start = _read_start(path, fd, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= length <= min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(f"{path}: {_explain_start(path, fd, size, length)}")
    try:
        header = json.loads(_read_start(path, fd, 8 + length)[8:].decode("utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: dict(entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not that of a safetensors file: {error}. {DAMAGED}"
        ) from error
    tensors = {}
    for name, entry in entries.items():
        where = f"{path}: tensor {name!r}"
        tensors[name] = _locate(where, entry, 8 + length, size)
    end = 8 + length
    for name, extent in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)
    ):
        if extent.offset != end:
            what = "overlaps" if extent.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {extent.offset} "
                f"and {what} the data before it, up to byte {end}. {DAMAGED}"
            )
        end += extent.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {end}, the file has {size} bytes. "
            f"{DAMAGED}"
        )
    return tensors, metadata


def _read_start(path: Path, fd: int, count: int) -> bytes:
    data = b""
    try:
        while len(data) < count:
            part = os.pread(fd, count - len(data), len(data))
            if not part:
                break
            data += part
    except OSError as error:
        raise CheckpointError(
            f"{path}: the header cannot be read: {error.strerror}. Check the disk."
        ) from error
    return data


def _explain_start(path: Path, fd: int, size: int, length: int) -> str:
    start = _read_start(path, fd, 64)
    if start.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the file itself. Run 'git lfs pull' where it "
            "was cloned."
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            "is a torch.save file under another name. Convert it with "
            "torch.load(weights_only=True) and safetensors.torch.save_file."
        )
    if start.startswith(b"GGUF"):
        return "is a GGUF file. load_model reads those, if their names end with .gguf."
    if length < 0:
        return f"has {size} bytes, too few for a safetensors file. {DAMAGED}"
    return (
        f"is to begin with a header of {length} bytes, the file has {size} bytes and a "
        f"header at most {_LONGEST_HEADER}. It is no safetensors file, or cut short: "
        "fetch it again."
    )


def _locate(
    where: str,
    entry: dict[str, Any],
    data_start: int,
    size: int,
) -> TensorExtent:
    """Turns one entry of a header into an extent, or says what is wrong with it."""
    code: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    itemsize = ITEMSIZES.get(code) if isinstance(code, str) else None
    if itemsize is None:
        raise CheckpointError(
            f"{where} has the dtype {code!r}, which is not known here. Known: "
            f"{', '.join(sorted(ITEMSIZES))}. Convert the tensor."
        )
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{where} has the shape {shape!r} and the offsets {offsets!r}; both must "
            f"be lists of whole numbers from 0 to 2**63. {DAMAGED}"
        )
    if code == "F4":  # The file counts single numbers, torch pairs of them.
        if not shape or shape[-1] % 2:
            raise CheckpointError(
                f"{where} has the dtype F4 and the shape {shape}; torch needs an even "
                "last dimension. Convert the tensor to another dtype."
            )
        shape = [*shape[:-1], shape[-1] // 2]
    begin, end = offsets
    # Zero-element shapes count too: torch computes strides of 64 bits for them.
    if prod(max(1, count) for count in shape) * itemsize >= 2**63:
        raise CheckpointError(f"{where} has the impossible shape {shape}. {DAMAGED}")
    if end - begin != prod(shape) * itemsize:
        raise CheckpointError(
            f"{where} has {end - begin} bytes; its dtype {code} and shape "
            f"{entry['shape']} take {prod(shape) * itemsize}. {DAMAGED}"
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{where} ends at byte {data_start + end}, outside the file, which has "
            f"{size} bytes: it was cut short. {DAMAGED}"
        )
    return TensorExtent(code, tuple(shape), data_start + begin, end - begin)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )

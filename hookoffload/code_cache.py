"""Codes of a checkpoint's weights on disk, so that a later start reads these instead.

[Note: kept codes]
They are an entry in the cache folder of conversions, known by the checkpoint's files as
those are, see [Note: conversion cache]. Its safetensors files have the coded bytes of
each tensor as one flat tensor of ``U8``, under the tensor's name. Their metadata says
``hookoffload.codes``: the version of [Note: the lossless code], and for each tensor, in
one text, its dtype, how many values it has, base, patches, and a checksum (CRC-32) of
that and of the bytes: where patches lie, a decoder believes.

The weights themselves stay in the checkpoint, which is what parameters read at rest.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from .conversion_cache import ConversionCache
from .conversion_entry import EntryWriter
from .host_memory import empty_pages
from .lossless import Coded
from .lossless_layout import CodeLayout
from .master_code import MasterCode
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError
from .torch_dtypes import CODES, DTYPES

_VERSION = "1"
_KIND = "hookoffload.codes"
_MAKER = f"{_KIND} {_VERSION}"
# Checksums are made of so many bytes at a time, while they are in a core's cache.
_PIECE = 2**20

Locations = Mapping[str, TensorLocation]


class KeptCode:
    """The code of one tensor, in a file.

    Args:
        layout: what its bytes mean.
        location: where they lie.
        checksum: of both.
    """

    __slots__ = ("_checksum", "_layout", "_location")

    def __init__(
        self, layout: CodeLayout, location: TensorLocation, checksum: int
    ) -> None:
        self._layout = layout
        self._location: TensorLocation | None = location
        self._checksum = checksum

    def read(self) -> Coded | None:
        """Read it; None after `close`.

        Raises:
            CheckpointError: It is damaged.
        """
        location = self._location
        if location is None:
            return None
        room = MasterCode(self._layout, 0).nbytes
        buffer = empty_pages(room)
        location.file.read_into(location, buffer[: location.nbytes])
        coded = Coded(self._layout, buffer)
        if _checksum(self._layout, coded.data) != self._checksum:
            raise _damaged(location, "its checksum is not that of its bytes")
        return coded

    def close(self) -> None:
        """Close its file."""
        if self._location is not None:
            self._location.file.close()
            self._location = None


def find_codes(
    cache: ConversionCache, locations: Locations
) -> dict[str, KeptCode] | None:
    """Look for the codes of a checkpoint.

    Args:
        cache: where they may be.
        locations: the checkpoint's tensors.

    Returns:
        The codes by the tensors' names; None if there are none for these files.

    Raises:
        CheckpointError: What there is does not belong to these tensors.
    """
    found = cache.kept(_MAKER, locations, _files(locations))
    if found is None:
        return None
    return {
        name: _kept_code(name, location, locations.get(name))
        for name, location in found.items()
    }


def keep_codes(
    cache: ConversionCache, locations: Locations, codes: Mapping[str, MasterCode]
) -> None:
    """Write codes for `find_codes`.

    Args:
        cache: where to.
        locations: the checkpoint's tensors.
        codes: the codes by the tensors' names.

    Raises:
        CheckpointError: The disk is full.
    """

    def write(writer: EntryWriter) -> None:
        for name, code in codes.items():
            layout, data = code.layout, code.data[: code.layout.nbytes]
            numbers = (layout.count, layout.base, layout.patches)
            checksum = _checksum(layout, data)
            text = " ".join(map(str, (CODES[layout.dtype], *numbers, checksum)))
            writer.add(name, data, metadata={_KIND: _VERSION, f"{_KIND}.{name}": text})

    files = _files(locations)
    made = cache.converted(
        "lossless codes", _MAKER, locations, files, write, temporary=False
    )
    for file in {location.file for location in made.values()}:
        file.close()


def _kept_code(
    name: str, location: TensorLocation, source: TensorLocation | None
) -> KeptCode:
    metadata = location.file.metadata
    if metadata.get(_KIND) != _VERSION:
        raise _damaged(location, f"its version is {metadata.get(_KIND)!r}")
    try:
        code, *numbers = metadata[f"{_KIND}.{name}"].split()
        count, base, patches, checksum = map(int, numbers)
        dtype = DTYPES[code]
    except (LookupError, ValueError) as error:
        raise _damaged(location, f"its metadata cannot be read ({error})") from error
    layout = CodeLayout(dtype=dtype, count=count, base=base, patches=patches)
    if min(numbers_ := (count, base, patches)) < 0 or base > 240 or patches > count:
        raise _damaged(location, f"its metadata says {numbers_}")
    is_source = source is not None and source.dtype == dtype
    if source is None or not is_source or source.nbytes != layout.raw_bytes:
        raise _damaged(location, "it is not that of the checkpoint's tensor")
    if location.dtype != torch.uint8 or location.nbytes != layout.nbytes:
        raise _damaged(location, f"it has not the {layout.nbytes} bytes of its code")
    return KeptCode(layout, location, checksum)


def _damaged(location: TensorLocation, what: str) -> CheckpointError:
    path = location.file.path
    return CheckpointError(
        f"{path}: the code of {location.name!r} is damaged: {what}. Delete the folder "
        f"{path.parent}: it is made anew from the checkpoint."
    )


def _checksum(layout: CodeLayout, data: torch.Tensor) -> int:
    numbers = (CODES[layout.dtype], layout.count, layout.base, layout.patches)
    result = zlib.crc32(repr(numbers).encode())
    for piece in data.split(_PIECE):
        result = zlib.crc32(piece.numpy().data, result)
    return result


def _files(locations: Locations) -> list[Path]:
    return sorted({location.file.path for location in locations.values()})

"""Codes of a checkpoint's weights on disk, so that a later start reads these instead.

[Note: kept codes]
They are an entry in the cache folder of conversions, known by the checkpoint's files as
those are, see [Note: conversion cache]. Its safetensors files have the coded bytes of
each tensor as one flat tensor of ``U8``, under the tensor's name. Their metadata says
``hookoffload.codes``: the version of [Note: the lossless code], and for each tensor, in
one text, its dtype, how many values it has, base, patches, and two checksums (CRC-32):
of the planes, and of these figures with all that lies behind the planes. Behind them is
where patches lie, which a decoder believes, so that is looked at whenever a code is
taken from the cache. Planes are looked at where a code is read into host RAM. Where it
is read in each pass, they are not, no more than weights that are read so: any bytes
there are some values.

The weights themselves stay in the checkpoint, which is what parameters read at rest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from .conversion_cache import ConversionCache
from .conversion_entry import EntryWriter
from .host_memory import empty_pages
from .lossless import Coded
from .lossless_layout import CodeLayout
from .master_code import MasterCode
from .safetensors_file import CheckpointFile, TensorLocation
from .safetensors_header import CheckpointError
from .torch_dtypes import CODES, DTYPES

_VERSION = "2"
_KIND = "hookoffload.codes"
_MAKER = f"{_KIND} {_VERSION}"
# Checksums are made of so many bytes at a time, while they are in a core's cache.
_PIECE = 2**20

Locations = Mapping[str, TensorLocation]


class _Checksums(NamedTuple):
    planes: int
    tables: int  # of the numbers and what lies behind the planes


class KeptCode:
    """The code of one tensor, in a file of the cache.

    Args:
        layout: what its bytes mean.
        location: where they lie.
        checksums: of both.
    """

    __slots__ = ("_checksums", "_location", "layout")

    def __init__(
        self, layout: CodeLayout, location: TensorLocation, checksums: _Checksums
    ) -> None:
        self.layout = layout
        self._location = location
        self._checksums = checksums

    @property
    def file(self) -> CheckpointFile:
        """The file, which may be closed."""
        return self._location.file

    def move_to(self, file: CheckpointFile) -> None:
        """Take the same file, opened another time."""
        self._location = replace(self._location, file=file)

    @property
    def ram_bytes(self) -> int:
        """What it takes in host RAM, with room for other patches."""
        return MasterCode(self.layout, 0).nbytes

    def read(self) -> Coded:
        """Read it into host RAM.

        Raises:
            CheckpointError: It is damaged.
        """
        buffer = empty_pages(self.ram_bytes)
        location = self._location
        location.file.read_into(location, buffer[: location.nbytes])
        coded = Coded(self.layout, buffer)
        if _checksums(self.layout, coded.data) != self._checksums:
            raise _damaged(location, "its checksum is not that of its bytes")
        return coded

    def checked(self) -> TensorLocation:
        """Return where it lies, if its patches are as they were written.

        Raises:
            CheckpointError: They are damaged.
        """
        layout, location = self.layout, self._location
        tables = torch.empty(layout.nbytes - layout.starts_at, dtype=torch.uint8)
        location.file.read_into(location, tables, layout.starts_at)
        if _checksum_of_tables(layout, tables) != self._checksums.tables:
            raise _damaged(location, "its checksum is not that of its patches")
        return location


def kept_codes(
    cache: ConversionCache,
    locations: Locations,
    make: Callable[[], Iterable[tuple[str, MasterCode]]],
) -> dict[str, KeptCode]:
    """Return the codes of a checkpoint: from the cache, or made now.

    Args:
        cache: where they are, or go.
        locations: the checkpoint's tensors.
        make: yields codes, in host RAM, with the names of their tensors.

    Returns:
        The codes by the tensors' names, their files closed; none where the cache cannot
        be written.

    Raises:
        CheckpointError: What there is does not belong to these tensors, or the disk is
            full.
    """

    def write(writer: EntryWriter) -> None:
        for name, code in make():
            layout, data = code.layout, code.data[: code.layout.nbytes]
            numbers = (layout.count, layout.base, layout.patches)
            checksums = _checksums(layout, data)
            text = " ".join(map(str, (CODES[layout.dtype], *numbers, *checksums)))
            writer.add(name, data, metadata={_KIND: _VERSION, f"{_KIND}.{name}": text})

    files = sorted({location.file.path for location in locations.values()})
    found = cache.converted(
        "lossless codes", _MAKER, locations, files, write, temporary=False
    )
    try:
        return {
            name: _kept_code(name, location, locations.get(name))
            for name, location in found.items()
        }
    finally:
        for file in {location.file for location in found.values()}:
            file.close()


def _kept_code(
    name: str, location: TensorLocation, source: TensorLocation | None
) -> KeptCode:
    metadata = location.file.metadata
    if metadata.get(_KIND) != _VERSION:
        raise _damaged(location, f"its version is {metadata.get(_KIND)!r}")
    try:
        code, *numbers = metadata[f"{_KIND}.{name}"].split()
        count, base, patches, *sums = map(int, numbers)
        checksums = _Checksums(*sums)
        dtype = DTYPES[code]
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(location, f"its metadata cannot be read ({error})") from error
    layout = CodeLayout(dtype=dtype, count=count, base=base, patches=patches)
    if min(numbers_ := (count, base, patches)) < 0 or base > 240 or patches > count:
        raise _damaged(location, f"its metadata says {numbers_}")
    is_source = source is not None and source.dtype == dtype
    if source is None or not is_source or source.nbytes != layout.raw_bytes:
        raise _damaged(location, "it is not that of the checkpoint's tensor")
    if location.dtype != torch.uint8 or location.nbytes != layout.nbytes:
        raise _damaged(location, f"it has not the {layout.nbytes} bytes of its code")
    return KeptCode(layout, location, checksums)


def _damaged(location: TensorLocation, what: str) -> CheckpointError:
    path = location.file.path
    return CheckpointError(
        f"{path}: the code of {location.name!r} is damaged: {what}. Delete the folder "
        f"{path.parent}: it is made anew from the checkpoint."
    )


def _checksums(layout: CodeLayout, data: torch.Tensor) -> _Checksums:
    planes = 0
    for piece in data[: layout.starts_at].split(_PIECE):
        planes = zlib.crc32(piece.numpy().data, planes)
    return _Checksums(planes, _checksum_of_tables(layout, data[layout.starts_at :]))


def _checksum_of_tables(layout: CodeLayout, tables: torch.Tensor) -> int:
    numbers = (CODES[layout.dtype], layout.count, layout.base, layout.patches)
    return zlib.crc32(tables.numpy().data, zlib.crc32(repr(numbers).encode()))

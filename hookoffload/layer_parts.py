"""What a layer is made of: its pieces, and how they look in a place of the window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

import torch

from .alignment import align
from .layer_fp8 import kept_scale_bytes
from .master import Master
from .member import Member
from .moves import Moves, joined_moves


class Piece:
    """A master's place in its layer's region and scratch.

    Attributes:
        master: the master.
        region_offset: where its bytes begin in the region; None if the compute
            device reads them where they rest.
        scratch_offset: where its cast value begins while streamed; None without cast.
        resident_scratch_offset: the same while resident.
    """

    __slots__ = (
        "master",
        "region_offset",
        "resident_scratch_offset",
        "scratch_offset",
    )

    def __init__(self, master: Master) -> None:
        self.master = master
        self.region_offset: int | None = None
        self.scratch_offset: int | None = None
        self.resident_scratch_offset: int | None = None

    def is_kept_as_copied(self, *, coded: bool) -> bool:
        """Tell whether a residence would hold its bytes as they come.

        Args:
            coded: the residence keeps codes.
        """
        if self.region_offset is None:
            return False
        codec = self.master.codec
        return codec.resident_as_copied or (coded and codec.coded)


Values = list[tuple[Member, torch.Tensor, int]]


class PlaceViews:
    """What forwards see of a layer in one place: a residence or, here, the scratch.

    Attributes:
        pieces: for each piece a flat tensor. In the scratch what its value is made in;
            elsewhere what it is made of, codes as words of 32 bits. None where it does
            not lie there.
        values: members that are read there, their values, and the addresses of these.
    """

    __slots__ = ("pieces", "values")

    def __init__(self, pieces: list[torch.Tensor | None], values: Values) -> None:
        self.pieces = pieces
        self.values = values


class RegionViews(PlaceViews):
    """A layer's bytes in one place of the window, as copies and as forwards see them.

    Attributes:
        targets: the masters that are streamed, and the bytes that each is copied to.
    """

    __slots__ = ("_moves", "_sources", "targets")

    def __init__(
        self,
        pieces: list[torch.Tensor | None],
        values: Values,
        targets: list[tuple[Master, torch.Tensor]],
    ) -> None:
        super().__init__(pieces, values)
        self.targets = targets
        self._sources: list[torch.Tensor] = []
        self._moves: Moves | None = None

    def moves(self) -> Moves | None:
        """Return the copies, neighbours as one; None if not all is page-locked."""
        same = self._moves is not None
        for (master, _), source in zip_longest(self.targets, self._sources):
            if not master.pinned:
                return None
            same = same and master.bytes is source
        if not same:
            with torch.inference_mode(False):  # they are kept like the views
                self._moves = joined_moves(self.targets)
            self._sources = [master.bytes for master, _ in self.targets]
        return self._moves


def values_in(
    piece: Piece, base: torch.Tensor, start: int
) -> Iterator[tuple[Member, torch.Tensor, int]]:
    """Yield a piece's members with their values over a flat tensor, and addresses."""
    for member in piece.master.members:
        if piece.master.mixed:
            typed = base.view(torch.uint8).view(member.dtype)
            begin = start // member.dtype.itemsize
        else:
            typed, begin = base, start
        value = member.view(typed, begin)
        yield member, value, value.data_ptr()


def resident_size(master: Master) -> int:
    """Return what a resident takes of this master."""
    values = align(master.count * resident_dtype(master).itemsize)
    return values + kept_scale_bytes(master)


def resident_dtype(master: Master) -> torch.dtype:
    """Return the dtype that a resident holds of this master."""
    return torch.uint8 if master.mixed else master.codec.resident

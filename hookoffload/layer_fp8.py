"""Where a layer keeps the scales of weights that multiply in 8 bits, and makes them.

What a layer brings to 8 bits it does in its scratch: first the room to work in, which
its weights take one after another, then for each weight its scales and its values. A
weight that rests in 8 bits has only scales there; a resident that is kept in 8 bits has
its scales behind its values, in its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .alignment import align
from .fp8 import Scaled, put_on, quantise, scale_bytes, take_off, work_bytes
from .master import Master

if TYPE_CHECKING:
    from .layer import Layer


def work_sizes(masters: Sequence[Master]) -> tuple[int, int]:
    """Return what a layer works in to bring its masters to 8 bits.

    Returns:
        Bytes for one that is streamed, and for a resident: to become one, or to be
        bound.
    """
    streamed = resident = 0
    for master in masters:
        codec = master.codec
        if codec.scaled:
            streamed = max(streamed, _work_size(master, codec.rest))
            resident = max(resident, streamed, _work_size(master, codec.resident))
    return streamed, resident


def _work_size(master: Master, source: torch.dtype) -> int:
    if source == master.codec.compute:
        return 0
    rows = _rows(master)
    return work_bytes(rows, master.count // rows)


def scratch_size(master: Master, source: torch.dtype) -> int:
    """Return what a master takes of its layer's scratch, beside the room to work in.

    Args:
        master: the master.
        source: the dtype that it is cast from.
    """
    codec = master.codec
    values = align(master.count * codec.compute.itemsize)
    if not codec.scaled:
        return values
    return scale_bytes(_rows(master)) + (0 if source == codec.compute else values)


def kept_scale_bytes(master: Master) -> int:
    """Return what a resident keeps beside a master's values."""
    codec = master.codec
    kept = codec.scaled and not codec.casts_resident
    return scale_bytes(_rows(master)) if kept else 0


def scaled_value(
    layer: Layer, index: int, source: torch.Tensor, cast_to: int
) -> tuple[torch.Tensor, int]:
    """Make a weight's scales, and its values if it is not in 8 bits.

    Args:
        layer: the layer, which has its scratch.
        index: of the piece.
        source: the weight, flat.
        cast_to: where the piece's part of the scratch begins.

    Returns:
        A flat tensor, and the element of its storage at which the values begin.
    """
    master = layer.pieces[index].master
    dtype, count = master.codec.compute, master.count
    if source.dtype == dtype:
        make_scaled(layer, index, source, source)
        return source, int(source.storage_offset())
    assert layer.scratch_block is not None and layer.scratch is not None
    target = layer.scratch_block.typed(dtype)
    first = layer.scratch.offset + cast_to + scale_bytes(_rows(master))
    first //= dtype.itemsize
    make_scaled(layer, index, source, target[first : first + count])
    return target, first


def make_scaled(
    layer: Layer, index: int, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Bring a weight's elements to 8 bits, and its scales to where they are kept."""
    master = layer.pieces[index].master
    rows = _rows(master)
    work: torch.Tensor | None = None
    size = _work_size(master, source.dtype)
    if size:
        assert layer.scratch_block is not None and layer.scratch is not None
        floats = layer.scratch_block.typed(torch.float32)
        first = layer.scratch.offset // floats.itemsize
        work = floats[first : first + size // floats.itemsize]
    scale = _scale(layer, index)
    quantise(source.view(rows, -1), target.view(rows, -1), scale, work)


def put_scales_on(layer: Layer) -> None:
    """Have the weights that multiply in 8 bits know their scales."""
    for index, piece in enumerate(layer.pieces):
        codec, member = piece.master.codec, piece.master.members[0]
        if codec.wide is not None:
            scaled = Scaled(member.name, _scale(layer, index), codec.wide)
            put_on(member.tensor, scaled)


def take_scales_off(layer: Layer) -> None:
    """Undo `put_scales_on`."""
    for piece in layer.pieces:
        if piece.master.codec.scaled:
            take_off(piece.master.members[0].tensor)


def _scale(layer: Layer, index: int) -> torch.Tensor:
    piece = layer.pieces[index]
    offset = layer.scratch_offset(piece)
    if offset is not None:
        assert layer.scratch_block is not None and layer.scratch is not None
        floats = layer.scratch_block.typed(torch.float32)
        first = layer.scratch.offset + offset
    else:
        assert layer.resident is not None
        floats = layer.resident[index].typed(torch.float32)
        first = align(piece.master.count * piece.master.codec.resident.itemsize)
    first //= floats.itemsize
    return floats[first : first + _rows(piece.master)]


def _rows(master: Master) -> int:
    return int(master.members[0].shape[0])

"""What a forward reads of a layer: its bytes as they lie there, cast or decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .device_memory import Block
from .layer_fp8 import kept_scale_bytes, make_scaled, scaled_value
from .layer_parts import Piece, resident_dtype
from .master import Master

if TYPE_CHECKING:
    from .layer import Layer


def value_of(
    layer: Layer, index: int, region_block: Block | None
) -> tuple[torch.Tensor, int]:
    """Cast or decode a piece into the scratch, if it has to be.

    Returns:
        A flat tensor, and the element at which the master's value begins.
    """
    piece = layer.pieces[index]
    master = piece.master
    block = None if layer.resident is None else layer.resident[index]
    in_scratch = layer.scratch_offset(piece)
    if in_scratch is None:
        if block is not None:
            return block.typed(resident_dtype(master)), 0
        return rest_source(layer, piece, region_block)
    if master.codec.scaled:
        if block is not None:
            source, start = block.typed(resident_dtype(master)), 0
        else:
            source, start = rest_source(layer, piece, region_block)
        return scaled_value(layer, index, source, start, in_scratch)
    assert layer.scratch_block is not None and layer.scratch is not None
    dtype = master.codec.compute
    target = layer.scratch_block.typed(dtype)
    first = (layer.scratch.offset + in_scratch) // dtype.itemsize
    value = target[first : first + master.count]
    if block is None:
        _expand(layer, piece, region_block, value)
    elif layer.keeps_code and master.code is not None:
        _decode(master, block.bytes, value)
    else:
        value.copy_(block.typed(resident_dtype(master))[: master.count])
    return target, first


def fill_residence(
    layer: Layer, blocks: list[Block], region_block: Block | None
) -> None:
    """Cast or decode a layer's streamed bytes into its resident blocks."""
    for index, (piece, block) in enumerate(zip(layer.pieces, blocks, strict=True)):
        master = piece.master
        target = block.typed(resident_dtype(master))[: master.count]
        if kept_scale_bytes(master):
            source, start = rest_source(layer, piece, region_block)
            source = source[start : start + master.count]
            make_scaled(layer, index, source, target)
        else:
            _expand(layer, piece, region_block, target)


def rest_source(
    layer: Layer, piece: Piece, region_block: Block | None
) -> tuple[torch.Tensor, int]:
    """Return a flat tensor of what was copied, and where the master begins in it."""
    master = piece.master
    if piece.region_offset is None:
        return master.flat, 0
    assert region_block is not None and layer.region is not None
    dtype = torch.uint8 if master.mixed else master.codec.rest
    start = (layer.region.offset + piece.region_offset) // dtype.itemsize
    return region_block.typed(dtype), start


def _expand(
    layer: Layer, piece: Piece, region_block: Block | None, target: torch.Tensor
) -> None:
    """Cast or decode what was copied of a master."""
    master, code = piece.master, piece.master.code
    if code is None:
        source, start = rest_source(layer, piece, region_block)
        target.copy_(source[start : start + master.count])
    elif piece.region_offset is None:
        _decode(master, code.data, target)
    else:
        assert region_block is not None and layer.region is not None
        start = layer.region.offset + piece.region_offset
        _decode(master, region_block.bytes[start : start + code.nbytes], target)


def _decode(master: Master, coded: torch.Tensor, target: torch.Tensor) -> None:
    assert master.code is not None
    if master.code.fits:
        master.code.decode_into(coded, target)
    else:
        target.copy_(master.flat)  # see [Note: coded masters]

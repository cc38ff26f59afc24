"""What a forward reads of a layer: its bytes as they lie there, cast or decoded.

Views are made once for each place, and kept by the block that the place is in: every
pass finds most layers where the one before had them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from .device_memory import Block
from .layer_fp8 import kept_scale_bytes, make_scaled, scaled_value
from .layer_parts import PlaceViews, RegionViews, Values, resident_dtype, values_in
from .master import Master

if TYPE_CHECKING:
    from .layer import Layer


P = ParamSpec("P")
ViewsT = TypeVar("ViewsT", bound=PlaceViews)

# Steady passes find a layer in the same place each time; others in a few.
_PLACES_KEPT = 4


def where_it_lies(layer: Layer, region_block: Block | None) -> PlaceViews:
    """Return views of a layer's residence, or of what was copied of it."""
    if not layer.resident:
        return as_copied(layer, region_block)
    keeper, place = layer.resident[0], layer.keeps_code
    return _kept(keeper, layer, place, _residence_views, layer, layer.resident)


def as_copied(layer: Layer, region_block: Block | None) -> PlaceViews:
    """Return views of a layer's region, if it has one."""
    if layer.region is None:
        return PlaceViews([None] * len(layer.pieces), [])  # all of it lies at rest
    assert region_block is not None, "a region is in a block"
    return views_in(layer, region_block)


def views_in(layer: Layer, block: Block) -> RegionViews:
    """Return views of a layer's region in a block, which keeps them."""
    assert layer.region is not None, "only a layer with a place has views there"
    offset = layer.region.offset
    return _kept(block, layer, offset, _region_views, layer, block, offset)


def make_values(layer: Layer, found: PlaceViews) -> Values:
    """Cast or decode what is not read where it lies into the layer's scratch.

    Runs on the stream that is current.

    Args:
        layer: the layer.
        found: where it lies.
    """
    made = _views_in_scratch(layer)
    for piece, source, target in zip(
        layer.pieces, found.pieces, made.pieces, strict=True
    ):
        if target is not None:
            _expand(piece.master, source, target)
    return made.values


def _views_in_scratch(layer: Layer) -> PlaceViews:
    block, region = layer.scratch_block, layer.scratch
    assert block is not None and region is not None, "it has its scratch"
    place = (region.offset, layer.has_values)
    return _kept(block, layer, place, _scratch_views, layer, block, region.offset)


def _kept(
    block: Block,
    layer: Layer,
    place: object,
    make: Callable[P, ViewsT],
    *args: P.args,
    **kwargs: P.kwargs,
) -> ViewsT:
    """Return what a block keeps of a layer for a place, or make it."""
    places: dict[object, ViewsT] = block.kept.setdefault(layer, {})
    found = places.get(place)
    if found is None:
        if len(places) >= _PLACES_KEPT:
            places.clear()
        with torch.inference_mode(False):  # it is kept beyond the user's context
            found = places[place] = make(*args, **kwargs)
    return found


def fill_residence(layer: Layer, blocks: list[Block], found: PlaceViews) -> None:
    """Cast or decode a layer's streamed bytes into its resident blocks."""
    for index, (piece, block) in enumerate(zip(layer.pieces, blocks, strict=True)):
        master = piece.master
        source = found.pieces[index]
        target = block.typed(resident_dtype(master))[: master.count]
        if kept_scale_bytes(master):
            make_scaled(layer, index, _at_rest(master, source), target)
        else:
            _expand(master, source, target)


def scaled_values(layer: Layer, found: PlaceViews) -> Values:
    """Return the values of a layer of which some multiply in 8 bits; makes them.

    Args:
        layer: the layer, which has its scratch.
        found: where it lies.
    """
    values: Values = []
    for index, (piece, source) in enumerate(
        zip(layer.pieces, found.pieces, strict=True)
    ):
        master, place = piece.master, layer.scratch_offset(piece)
        if place is None:
            continue
        if master.codec.scaled:
            flat, start = scaled_value(layer, index, _at_rest(master, source), place)
        else:
            assert layer.scratch_block is not None and layer.scratch is not None
            dtype = master.codec.compute
            flat = layer.scratch_block.typed(dtype)
            start = (layer.scratch.offset + place) // dtype.itemsize
            target = flat[start : start + master.count]
            _expand(master, source, target)
        values += values_in(piece, flat, start)
    return values


def _region_views(layer: Layer, block: Block, offset: int) -> RegionViews:
    """Look at a layer's region in a block."""
    targets: list[tuple[Master, torch.Tensor]] = []
    sources: list[torch.Tensor | None] = []
    values: Values = []
    for piece in layer.pieces:
        master = piece.master
        if piece.region_offset is None:
            sources.append(None)
            continue
        begin = offset + piece.region_offset
        targets.append((master, block.bytes[begin : begin + master.nbytes]))
        if master.code is not None:
            sources.append(block.typed(torch.int32)[begin // 4 :][: master.nbytes // 4])
            continue
        dtype = torch.uint8 if master.mixed else master.codec.rest
        flat, start = block.typed(dtype), begin // dtype.itemsize
        sources.append(flat[start : start + master.count])
        if piece.scratch_offset is None:
            values += values_in(piece, flat, start)
    return RegionViews(sources, values, targets)


def _residence_views(layer: Layer, blocks: list[Block]) -> PlaceViews:
    """Look at a layer's residence."""
    sources: list[torch.Tensor | None] = []
    values: Values = []
    for piece, block in zip(layer.pieces, blocks, strict=True):
        master = piece.master
        if layer.keeps_code and master.code is not None:
            sources.append(block.typed(torch.int32)[: master.nbytes // 4])
            continue
        flat = block.typed(resident_dtype(master))
        sources.append(flat[: master.count])
        if layer.scratch_offset(piece) is None:
            values += values_in(piece, flat, 0)
    return PlaceViews(sources, values)


def _scratch_views(layer: Layer, block: Block, offset: int) -> PlaceViews:
    """Look at what is made of a layer in its scratch."""
    targets: list[torch.Tensor | None] = []
    values: Values = []
    for piece in layer.pieces:
        master, place = piece.master, layer.scratch_offset(piece)
        if place is None:
            targets.append(None)
            continue
        dtype = master.codec.compute
        flat, start = block.typed(dtype), (offset + place) // dtype.itemsize
        target = flat[start : start + master.count]
        targets.append(target if master.code is None else target.view(torch.int16))
        values += values_in(piece, flat, start)
    return PlaceViews(targets, values)


def _at_rest(master: Master, source: torch.Tensor | None) -> torch.Tensor:
    """Return a master's values as they came, or where the device reads them at rest."""
    return master.flat if source is None else source


def _expand(master: Master, source: torch.Tensor | None, target: torch.Tensor) -> None:
    """Cast a master, or decode it.

    Args:
        master: the master.
        source: its values, or its code if it has one; None where the device reads it
            at rest. Values of what has a code are read where they lie.
        target: takes its values.
    """
    code = master.code
    if code is None:
        target.copy_(_at_rest(master, source))
    elif code.fits:
        code.decode_into(code.data if source is None else source, target)
    else:  # see [Note: coded masters]
        target.view(master.codec.rest).copy_(master.flat)

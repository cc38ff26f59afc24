"""Encodes a chunk in plain PyTorch, see [Note: the lossless code]: on any device.

[Note: encoded chunks]
A chunk is whole blocks of a tensor, in one piece of memory as words of 32 bits, the
last block filled up with zeros. It is encoded into memory of the same size on the same
device. That begins with the planes of a coded tensor of just these values, which has
no patches. Behind them come words of 64 bits: how many values need patches, and for
each its index in the chunk, with its upper 16 bits in the lowest 16, in any order.

There is room for as many as fill the memory, one value in 16. A tensor that needs more
would not shrink by enough; of a chunk that does, the number only says that it does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .lossless_layout import BLOCK, CodeLayout

# Encodes: what the values are, a chunk, and the memory that it is encoded into.
EncodeChunk = Callable[[CodeLayout, torch.Tensor, torch.Tensor], None]

# Masks for words of two values, one in each half.
_SIGN = 0x00800080
_MANTISSA = 0x007F007F
_EXPONENT = 0x00FF00FF
_CODE = 0x000F000F
_OUTSIDE = 0x01F001F0
_ONES = 0x00010001
_ALMOST = 0x7FFF7FFF
_TOPS = -0x7FFF8000  # 0x80008000
_LOWER = 0x0000FFFF
_UPPER = -0x10000  # 0xFFFF0000


def words_of(layout: CodeLayout) -> int:
    """Return the words that a chunk has, and what it is encoded into."""
    return layout.blocks * BLOCK * layout.dtype.itemsize // 4


def room_for_patches(layout: CodeLayout) -> int:
    """Return how many patches the memory that a chunk is encoded into has room for."""
    return (words_of(layout) - layout.starts_at // 4) // 2 - 1


def encode_in_torch(
    layout: CodeLayout, chunk: torch.Tensor, output: torch.Tensor
) -> None:
    """Encode a chunk, see [Note: encoded chunks].

    Args:
        layout: of the values alone, without patches.
        chunk: ``int32``, `words_of` them.
        output: likewise.
    """
    blocks = layout.blocks
    if layout.wide:
        pairs, lower = _divided(chunk.view(blocks, 2, BLOCK // 2))
        _part(output, layout.lower_at, lower).copy_(lower)
    else:
        pairs = chunk.view(blocks, BLOCK // 2)
    signed = _signs_and_mantissas(pairs)
    _part(output, 0, signed).copy_(signed)
    codes, escaping = _codes(pairs, layout.base)
    _part(output, layout.codes_at, codes).copy_(codes)
    if layout.count % 2 and not layout.wide:
        escaping.view(-1)[layout.count // 2] |= 0x8000  # see the note: in any case
    found = output[layout.starts_at // 4 :].view(torch.int64)
    places = escaping.view(-1).nonzero().squeeze(1)
    if len(places) > room_for_patches(layout):
        found[0] = len(places)
        return
    patches = _patches(pairs.reshape(-1), escaping.view(-1), places, layout)
    found[0] = len(patches)
    kept = patches[: room_for_patches(layout)]
    found[1 : 1 + len(kept)] = kept


def _part(output: torch.Tensor, start: int, values: torch.Tensor) -> torch.Tensor:
    return output[start // 4 : start // 4 + values.numel()].view_as(values)


def _divided(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide fp32 values, in blocks of two rows, into upper and lower halves."""
    first, second = values.unbind(1)
    upper = (first >> 16).bitwise_and_(_LOWER).bitwise_or_(second & _UPPER)
    lower = (second << 16).bitwise_or_(first & _LOWER)
    return upper, lower


def _signs_and_mantissas(pairs: torch.Tensor) -> torch.Tensor:
    signed = (pairs >> 8).bitwise_and_(_SIGN).bitwise_or_(pairs & _MANTISSA)
    quarters = signed.view(-1, 2, 2, 128)
    return (quarters[:, :, 1] << 8).bitwise_or_(quarters[:, :, 0])


def _codes(pairs: torch.Tensor, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, and words with the top bits set of halves to be patched."""
    exponents = (pairs >> 7).bitwise_and_(_EXPONENT)
    there = _not_zero(exponents)
    # With 256 added, no half is below the base, and none borrows from the other.
    exponents.add_((256 - base) * _ONES)
    codes = exponents & _CODE
    outside = exponents.bitwise_and_(_OUTSIDE).bitwise_xor_(_ONES << 8)
    inside = _not_zero(codes).bitwise_and_(_not_zero(outside).bitwise_xor_(_TOPS))
    codes.bitwise_and_((inside >> 15).bitwise_and_(_ONES).mul_(15))
    quarters = codes.view(-1, 4, 128)
    packed = (quarters[:, 1] << 4).bitwise_or_(quarters[:, 0])
    packed.bitwise_or_(quarters[:, 2] << 8).bitwise_or_(quarters[:, 3] << 12)
    return packed, there.bitwise_and_(inside.bitwise_xor_(_TOPS))


def _not_zero(halves: torch.Tensor) -> torch.Tensor:
    """Return words with the top bits set of halves that are not 0 (nor negative)."""
    return (halves + _ALMOST).bitwise_and_(_TOPS)


def _patches(
    pairs: torch.Tensor,
    escaping: torch.Tensor,
    places: torch.Tensor,
    layout: CodeLayout,
) -> torch.Tensor:
    """Return indices and upper halves of the values in some words, of set top bits."""
    if layout.wide:
        step = BLOCK // 2
        indices = places // step * BLOCK + places % step
    else:
        step = 1
        indices = places * 2
    halves, tops = pairs[places].long(), escaping[places]
    lower = (indices << 16).bitwise_or_(halves & _LOWER)
    upper = (indices + step << 16).bitwise_or_(halves >> 16 & _LOWER)
    return torch.cat([lower[(tops & 0x8000) != 0], upper[tops < 0]])

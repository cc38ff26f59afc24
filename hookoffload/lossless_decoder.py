"""Decodes tensors in plain PyTorch, see [Note: the lossless code]: on any device.

Needs no more memory than a chunk takes, whatever the size of the tensor.
"""

from __future__ import annotations

import torch

from .lossless_layout import BLOCK, CodeLayout, halves, words

# Blocks at a time, so that what is computed with stays in the cache of a CPU.
_BLOCKS = 256
_DEVICE_BLOCKS = 2**13
_PATCHES = 2**16

_SIGN = 0x00800080
_MANTISSA = 0x007F007F
_BYTES = 0x00FF00FF
_CODE = 0x000F000F
_ONES = 0x00010001
_LOWER = 0x0000FFFF
_UPPER = -0x10000  # 0xFFFF0000


def decode_in_torch(
    layout: CodeLayout, coded: torch.Tensor, output: torch.Tensor
) -> None:
    """Decode into a flat contiguous tensor of the layout's dtype and count."""
    size = _BLOCKS if coded.device.type == "cpu" else _DEVICE_BLOCKS
    for first in range(0, layout.blocks, size):
        blocks = min(size, layout.blocks - first)
        part = output[first * BLOCK : (first + blocks) * BLOCK]
        aligned = part.storage_offset() * part.element_size() % 4 == 0
        if part.numel() == blocks * BLOCK and aligned:
            _decode_blocks(layout, coded, first, blocks, part.view(torch.int32))
            continue
        filled = part.new_empty(blocks * BLOCK)
        _decode_blocks(layout, coded, first, blocks, filled.view(torch.int32))
        part.copy_(filled[: part.numel()])
    _patch(layout, coded, output)


def _decode_blocks(
    layout: CodeLayout,
    coded: torch.Tensor,
    first: int,
    blocks: int,
    output: torch.Tensor,
) -> None:
    """Decode whole blocks into words, without their patches."""
    signed = words(coded, BLOCK * first, blocks * 256).view(blocks, 2, 128)
    at = layout.codes_at + BLOCK // 2 * first
    codes = words(coded, at, blocks * 128).view(blocks, 128)
    if layout.wide:
        at = layout.lower_at + 2 * BLOCK * first
        lower = words(coded, at, blocks * 512).view(blocks, 4, 128)
        wide = output.view(blocks, 2, 4, 128)
    else:
        narrow = output.view(blocks, 4, 128)
    for quarter in range(4):
        kept = signed[:, quarter // 2]
        kept = (kept >> 8 if quarter % 2 else kept) & _BYTES
        code = (codes >> (4 * quarter)).bitwise_and_(_CODE)
        # The bit above a code is set by all of them but 0.
        there = (code + _CODE).bitwise_right_shift_(4).bitwise_and_(_ONES)
        exponent = code.add_(there, alpha=layout.base).bitwise_left_shift_(7)
        upper = (kept & _SIGN).bitwise_left_shift_(8)
        upper.bitwise_or_(kept.bitwise_and_(_MANTISSA)).bitwise_or_(exponent)
        if layout.wide:
            rest = lower[:, quarter]
            wide[:, 0, quarter] = (upper << 16).bitwise_or_(rest & _LOWER)
            wide[:, 1, quarter] = (rest >> 16).bitwise_and_(_LOWER) | (upper & _UPPER)
        else:
            narrow[:, quarter] = upper


def _patch(layout: CodeLayout, coded: torch.Tensor, output: torch.Tensor) -> None:
    target = output.view(torch.int16)
    if layout.wide:
        target = target[1::2]
    indices = words(coded, layout.indices_at, layout.patches)
    values = halves(coded, layout.values_at, layout.patches)
    for start in range(0, layout.patches, _PATCHES):
        chosen = indices[start : start + _PATCHES].long()
        target.index_copy_(0, chosen, values[start : start + _PATCHES])

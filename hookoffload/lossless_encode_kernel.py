"""Encodes a chunk on a GPU in one launch, see [Note: encoded chunks].

Imports Triton, and is therefore imported only where something is encoded on a GPU.

A program encodes some rows (blocks). The link that chunks come over is slower by far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lossless_chunk import room_for_patches
from .lossless_layout import BLOCK, CodeLayout

ROWS = 4
WARPS = 4


def encode_in_triton(
    layout: CodeLayout,
    chunk: torch.Tensor,
    output: torch.Tensor,
    *,
    rows: int = ROWS,
    warps: int = WARPS,
) -> None:
    """Encode a chunk; allocates nothing, waits for nothing. See `encode_in_torch`.

    Args:
        layout: of the values alone, without patches.
        chunk: ``int32``, `words_of` them.
        output: likewise.
        rows: blocks a program.
        warps: of a program.
    """
    found_at = layout.starts_at // 4
    output[found_at : found_at + 2].zero_()
    _encode_rows[(-(-layout.blocks // rows),)](
        chunk,
        output,
        layout.count,
        layout.base,
        room_for_patches(layout),
        rows,
        layout.wide,
        num_warps=warps,
    )


def _encode_rows_(
    chunk: tl.tensor,
    output: tl.tensor,
    count: tl.tensor,
    base: tl.tensor,
    room: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    blocks = tl.cdiv(count, 1024)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    live = (row < blocks) & (lane >= 0)
    codes_at = output + blocks * 256
    if WIDE:
        lower_at = codes_at + row * 512 + lane
        codes_at += blocks * 512
        at = chunk + row * 1024 + lane
        pair_0 = _divide(at, lower_at, live)
        pair_1 = _divide(at + 128, lower_at + 128, live)
        pair_2 = _divide(at + 256, lower_at + 256, live)
        pair_3 = _divide(at + 384, lower_at + 384, live)
    else:
        at = chunk + row * 512 + lane
        pair_0 = tl.load(at, mask=live, other=0)
        pair_1 = tl.load(at + 128, mask=live, other=0)
        pair_2 = tl.load(at + 256, mask=live, other=0)
        pair_3 = tl.load(at + 384, mask=live, other=0)

    front = _kept(pair_0) | (_kept(pair_1) << 8)
    tl.store(output + row * 256 + lane, front, mask=live)
    back = _kept(pair_2) | (_kept(pair_3) << 8)
    tl.store(output + row * 256 + 128 + lane, back, mask=live)

    code_0, escaping_0 = _code(pair_0, base)
    code_1, escaping_1 = _code(pair_1, base)
    code_2, escaping_2 = _code(pair_2, base)
    code_3, escaping_3 = _code(pair_3, base)
    codes = code_0 | (code_1 << 4) | (code_2 << 8) | (code_3 << 12)
    tl.store(codes_at + row * 128 + lane, codes, mask=live)

    found = codes_at + blocks * 128
    _patch_both(found, pair_0, escaping_0, row, lane, count, room, live, WIDE)
    _patch_both(found, pair_1, escaping_1, row, lane + 128, count, room, live, WIDE)
    _patch_both(found, pair_2, escaping_2, row, lane + 256, count, room, live, WIDE)
    _patch_both(found, pair_3, escaping_3, row, lane + 384, count, room, live, WIDE)


def _divide_(at: tl.tensor, lower_at: tl.tensor, live: tl.tensor) -> tl.tensor:
    """Put aside the lower halves of two fp32 values, and return the upper ones."""
    first = tl.load(at, mask=live, other=0)
    second = tl.load(at + 512, mask=live, other=0)
    tl.store(lower_at, (second << 16) | (first & 0x0000FFFF), mask=live)
    return ((first >> 16) & 0x0000FFFF) | (second & -65536)


def _kept_(pair: tl.tensor) -> tl.tensor:
    """Sign and mantissa, in bits 0 to 7 of each half."""
    return ((pair >> 8) & 0x00800080) | (pair & 0x007F007F)


def _code_(pair: tl.tensor, base: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Two codes, and a word with the top bits set of halves to be patched."""
    exponents = (pair >> 7) & 0x00FF00FF
    # With 256 added, no half is below the base, and none borrows from the other.
    shifted = exponents + (256 - base) * 0x00010001
    code = shifted & 0x000F000F
    outside = (shifted & 0x01F001F0) ^ 0x01000100
    # Adding this sets the top bit of halves that are not 0.
    inside = (code + 0x7FFF7FFF) & ~(outside + 0x7FFF7FFF)
    code = code & (((inside >> 15) & 0x00010001) * 15)
    return code, (exponents + 0x7FFF7FFF) & ~inside & -0x7FFF8000


def _patch_both_(
    found: tl.tensor,
    pair: tl.tensor,
    escaping: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    count: tl.tensor,
    room: tl.tensor,
    live: tl.tensor,
    WIDE: tl.constexpr,
) -> None:
    lower = (escaping & 0x8000) != 0
    if WIDE:
        first = row * 1024 + place
        second = first + 512
    else:
        first = row * 1024 + place * 2
        second = first + 1
        lower = lower | (first == count - 1)  # the last of an odd number
    _patch(found, pair, first, lower & live, room)
    _patch(found, pair >> 16, second, (escaping < 0) & live, room)


def _patch_(
    found: tl.tensor,
    value: tl.tensor,
    index: tl.tensor,
    chosen: tl.tensor,
    room: tl.tensor,
) -> None:
    # They are few: each takes its place by itself.
    one = tl.full(index.shape, 1, tl.int32)
    slot = tl.atomic_add(found + one * 0, one, mask=chosen, sem="relaxed")
    patch = (index.to(tl.int64) << 16) | (value & 0x0000FFFF).to(tl.int64)
    patches = (found + 2).to(tl.pointer_type(tl.int64))
    tl.store(patches + slot, patch, mask=chosen & (slot < room))


# Not as decorators: these have no types.
_patch = triton.jit(_patch_)
_patch_both = triton.jit(_patch_both_)
_code = triton.jit(_code_)
_kept = triton.jit(_kept_)
_divide = triton.jit(_divide_)
# One compilation serves all sizes and bases.
_encode_rows = triton.jit(_encode_rows_, do_not_specialize=["count", "base", "room"])

assert BLOCK == 1024, "the kernel is written for blocks of 1024 values"

"""Decodes tensors on a GPU in one launch, see [Note: the lossless code].

Imports Triton, and is therefore imported only where something is decoded on a GPU.

A program decodes some rows (blocks) and writes their patches over them. All of a
program's reads and writes but those of patches are words, 512 contiguous bytes for a
warp, 16 for a thread. What limits it is memory: for 2 bytes written 1.5 are read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .lossless_layout import BLOCK, SEGMENT_BLOCKS, CodeLayout

ROWS = 8
WARPS = 4

# Triton looks at all arguments before each launch, to find what it compiled for their
# kind: 17 us of which 7 are left without (one H200). It tells kinds of pointers apart
# by this alignment; on ROCm by the sizes behind them, too.
_ALIGNED = 16
_IS_CUDA = torch.version.hip is None
_compiled: dict[tuple[int | None, int, bool, int], Any] = {}


def decode_in_triton(
    layout: CodeLayout,
    coded: torch.Tensor,
    output: torch.Tensor,
    *,
    rows: int = ROWS,
    warps: int = WARPS,
) -> None:
    """Decode into a flat contiguous tensor; allocates nothing, waits for nothing.

    Args:
        layout: of the coded tensor.
        coded: flat ``uint8``, starting on a word, or its words (int32).
        output: of the layout's dtype and count, starting on a word, or its halves of
            words (int16).
        rows: blocks a program, a multiple of a segment's.
        warps: of a program.
    """
    words = coded if coded.dtype is torch.int32 else coded.view(torch.int32)
    halves = output if output.dtype is torch.int16 else output.view(torch.int16)
    arguments = (words, halves, *layout.kernel_arguments, rows, layout.wide)
    programs = (-(-layout.blocks // rows), 1, 1)
    key = None
    if _IS_CUDA and not (words.data_ptr() | halves.data_ptr()) % _ALIGNED:
        key = (output.device.index, rows, layout.wide, warps)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[programs](*arguments, SEGMENT_BLOCKS)
            return
    kernel = _decode_rows[programs](*arguments, SEGMENT_BLOCKS, num_warps=warps)
    if key is not None and key not in _compiled:
        _compiled[key] = _launchable(kernel, programs, (*arguments, SEGMENT_BLOCKS))


def _launchable(
    kernel: Any, programs: tuple[int, int, int], arguments: tuple[Any, ...]
) -> Any:
    """Return a compiled kernel if it takes arguments as its source does, else None."""
    if kernel is None:
        return None  # of the interpreter
    try:
        kernel[programs](*arguments)
    except TypeError:  # Triton before 3.3 leaves those out that are compiled in
        return None
    return kernel


def _decode_rows_(
    words: tl.tensor,
    output: tl.tensor,
    count: tl.tensor,
    base: tl.tensor,
    starts_at: tl.tensor,
    indices_at: tl.tensor,
    values_at: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    segments = tl.cdiv(count, SEGMENT * 1024)
    ahead = words + starts_at
    first = tl.load(ahead + program * (ROWS // SEGMENT))
    last = tl.load(ahead + tl.minimum((program + 1) * (ROWS // SEGMENT), segments))

    target = output.to(tl.pointer_type(tl.int32))
    # A mask would make a thread's 16 bytes four accesses: only the last has one.
    if (program + 1) * ROWS * 1024 <= count:
        _rows(words, target, program, count, base, ROWS, WIDE, False)
    else:
        _rows(words, target, program, count, base, ROWS, WIDE, True)

    # Patches of this program's rows, behind what all of its threads have written.
    tl.debug_barrier()
    values = (words + values_at).to(tl.pointer_type(tl.int16))
    while first < last:
        at = first + tl.arange(0, 128)
        live = at < last
        index = tl.load(words + indices_at + at, mask=live, other=0)
        value = tl.load(values + at, mask=live, other=0)
        if WIDE:
            tl.store(output + index.to(tl.int64) * 2 + 1, value, mask=live)
        else:
            tl.store(output + index, value, mask=live)
        first += 128


def _rows_(
    words: tl.tensor,
    target: tl.tensor,
    program: tl.tensor,
    count: tl.tensor,
    base: tl.tensor,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    blocks = tl.cdiv(count, 1024)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 128)[None, :]
    live = (row < blocks) & (lane >= 0)
    lower_at = words + blocks * 256
    codes_at = lower_at
    if WIDE:
        codes_at += blocks * 512
    # All loads come before the first store, which none of them may be moved across:
    # so a thread waits for memory once.
    codes = _load(codes_at + row * 128 + lane, live, LAST)
    front = _load(words + row * 256 + lane, live, LAST)
    back = _load(words + row * 256 + 128 + lane, live, LAST)
    if WIDE:
        rest_at = lower_at + row * 512 + lane
        rest_0 = _load(rest_at, live, LAST)
        rest_1 = _load(rest_at + 128, live, LAST)
        rest_2 = _load(rest_at + 256, live, LAST)
        rest_3 = _load(rest_at + 384, live, LAST)
        at = row * 1024 + lane
        upper = _pair(codes, front, base)
        _put_wide(target, at, upper, rest_0, count, LAST)
        upper = _pair(codes >> 4, front >> 8, base)
        _put_wide(target, at + 128, upper, rest_1, count, LAST)
        upper = _pair(codes >> 8, back, base)
        _put_wide(target, at + 256, upper, rest_2, count, LAST)
        upper = _pair(codes >> 12, back >> 8, base)
        _put_wide(target, at + 384, upper, rest_3, count, LAST)
    else:
        at = row * 512 + lane
        _put(target, at, _pair(codes, front, base), count // 2, LAST)
        upper = _pair(codes >> 4, front >> 8, base)
        _put(target, at + 128, upper, count // 2, LAST)
        _put(target, at + 256, _pair(codes >> 8, back, base), count // 2, LAST)
        upper = _pair(codes >> 12, back >> 8, base)
        _put(target, at + 384, upper, count // 2, LAST)


def _pair_(codes: tl.tensor, kept: tl.tensor, base: tl.tensor) -> tl.tensor:
    """Two values from bits 0 to 3 and 0 to 7 of each half."""
    code = codes & 0x000F000F
    # The bit above a code is set by all of them but 0.
    there = ((code + 0x000F000F) >> 4) & 0x00010001
    exponent = (code + there * base) << 7
    return (kept & 0x00800080) << 8 | (kept & 0x007F007F) | exponent


def _put_wide_(
    target: tl.tensor,
    at: tl.tensor,
    upper: tl.tensor,
    rest: tl.tensor,
    count: tl.tensor,
    LAST: tl.constexpr,
) -> None:
    _put(target, at, (upper << 16) | (rest & 0x0000FFFF), count, LAST)
    second = (upper & -65536) | ((rest >> 16) & 0x0000FFFF)
    _put(target, at + 512, second, count, LAST)


def _load_(place: tl.tensor, live: tl.tensor, LAST: tl.constexpr) -> tl.tensor:
    if LAST:  # noqa: SIM108, Triton compiles both sides of a ternary
        word = tl.load(place, mask=live, other=0)
    else:
        word = tl.load(place)
    return word


def _put_(
    target: tl.tensor,
    at: tl.tensor,
    word: tl.tensor,
    count: tl.tensor,
    LAST: tl.constexpr,
) -> None:
    if LAST:
        tl.store(target + at, word, mask=at < count)
    else:
        tl.store(target + at, word)


# Not as decorators: these have no types.
_load = triton.jit(_load_)
_put = triton.jit(_put_)
_put_wide = triton.jit(_put_wide_)
_pair = triton.jit(_pair_)
_rows = triton.jit(_rows_)
# One compilation serves all sizes and bases.
_decode_rows = triton.jit(
    _decode_rows_,
    do_not_specialize=["count", "base", "starts_at", "indices_at", "values_at"],
)

assert BLOCK == 1024, "the kernels are written for blocks of 1024 values"

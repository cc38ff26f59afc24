"""Encodes tensors, see [Note: the lossless code]: vectorised, on any device.

Works through a tensor in chunks, so that what it takes beside the coded bytes does
not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from .host_memory import empty_pages
from .lossless_layout import (
    BLOCK,
    BYTES_PER_PATCH,
    SEGMENT,
    CodeLayout,
    halves,
    words,
)

# Reads values: from the first index, to the second.
Reader = Callable[[int, int], torch.Tensor]

CODED_DTYPES = frozenset({torch.bfloat16, torch.float32})

# A tensor that shrinks by less is not worth decoding.
_LEAST_SAVING = 16  # one part in so many
_MOST_VALUES = 2**31 - 2**20  # indices are int32, also those of whole programs

# Values at a time: a core's share stays in its cache, and a GPU is kept busy.
_CHUNK_PER_CORE = 2**17
_DEVICE_CHUNK = 2**22
# What a chunk takes on a device at most, with everything that is computed from it.
DEVICE_BYTES = 2**27

_SAMPLED_SLICES = 64
_SAMPLED_SLICE = 2**14

_CODES = 15  # those that stand for an exponent above the base
_MOST_BASE = 255 - _CODES

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


def encode_values(
    read: Reader, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[CodeLayout, torch.Tensor] | None:
    """Encode values that a reader provides.

    Args:
        read: returns values by their indices, as a flat tensor, from where they lie.
            It is asked for a sample, and then for all of them in sequence.
        count: values.
        dtype: their dtype.
        device: where to encode. The coded bytes lie on the CPU, whatever it is.

    Returns:
        The layout, and memory that begins with the coded bytes and has pages of its
        own, so that it can be page-locked; None if they would not be fewer by enough.
    """
    if dtype not in CODED_DTYPES or not 0 < count <= _MOST_VALUES:
        return None
    base, escaping = _choose_base(read, count, device)
    layout = CodeLayout(dtype=dtype, count=count, base=base, patches=0)
    most = layout.raw_bytes - layout.raw_bytes // _LEAST_SAVING
    expected = int(escaping * count) * BYTES_PER_PATCH
    if layout.nbytes + expected > most:
        return None
    # Twice what the sample needs: room that is never written to takes no memory, and
    # saves a second copy.
    room = (layout.nbytes + 2 * expected + 4096) // 16 * 16
    coded = empty_pages(room)
    indices: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    patches = 0
    on_cpu = device.type == "cpu"
    size = _CHUNK_PER_CORE * torch.get_num_threads() if on_cpu else _DEVICE_CHUNK
    for start in range(0, count, size):
        chunk = read(start, min(start + size, count))
        at, upper = _encode_chunk(chunk.to(device), start, layout, coded)
        indices.append(at)
        values.append(upper)
        patches += at.numel()
        if layout.nbytes + patches * BYTES_PER_PATCH > most:
            return None
    layout = replace(layout, patches=patches)
    if layout.nbytes > most:
        return None
    if layout.nbytes > room:
        planes = coded[: layout.starts_at]
        coded = empty_pages(layout.nbytes)
        coded[: layout.starts_at].copy_(planes)
    _write_patches(coded, layout, torch.cat(indices), torch.cat(values))
    return layout, coded


def _choose_base(read: Reader, count: int, device: torch.device) -> tuple[int, float]:
    """Return the base that leaves the fewest patches, and what part they make.

    Looks at a sample of large tensors: another base would be right as well.
    """
    step = max(_SAMPLED_SLICE, count // _SAMPLED_SLICES)
    exponents = torch.cat(
        [
            _exponents(read(start, min(start + _SAMPLED_SLICE, count)).to(device))
            for start in range(0, count, step)
        ]
    )
    counts = torch.bincount(exponents, minlength=256)
    sums = F.pad(counts[1:].cumsum(0), (1, 0))  # of the exponents from 1 to i
    covered = sums[_CODES:] - sums[: _MOST_BASE + 1]
    base = int(covered.argmax())
    coded = int(covered[base]) + int(counts[0])
    return base, 1 - coded / exponents.numel()


def _exponents(values: torch.Tensor) -> torch.Tensor:
    wide = values.element_size() == 4
    bits = values.view(torch.int32 if wide else torch.int16)
    return ((bits >> (23 if wide else 7)) & 0xFF).to(torch.uint8)


def _encode_chunk(
    values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode values into the planes, from index ``start``, a block's first, on.

    Returns:
        The indices and the upper halves of those that need patches, on the CPU.
    """
    first, blocks = start // BLOCK, -(-values.numel() // BLOCK)
    pairs, lower = _pairs(values, blocks)
    if lower is not None:
        _put(coded, layout.lower_at + 2 * BLOCK * first, lower)

    signed = (pairs >> 8).bitwise_and_(_SIGN).bitwise_or_(pairs & _MANTISSA)
    signed = signed.view(blocks, 2, 2, 128)
    plane = (signed[:, :, 1] << 8).bitwise_or_(signed[:, :, 0])
    _put(coded, BLOCK * first, plane)

    exponents = (pairs >> 7).bitwise_and_(_EXPONENT)
    there = _not_zero(exponents)
    # With 256 added, no half is below the base, and none borrows from the other.
    exponents.bitwise_or_(_ONES << 8).sub_(layout.base * _ONES)
    codes = exponents & _CODE
    outside = exponents.bitwise_and_(_OUTSIDE).bitwise_xor_(_ONES << 8)
    inside = _not_zero(codes).bitwise_and_(_not_zero(outside).bitwise_xor_(_TOPS))
    # Those of exponent 0 get code 0; what is outside is patched, whatever its code.
    codes.bitwise_and_((there >> 15).bitwise_and_(_ONES).mul_(15))
    codes = codes.view(blocks, 4, 128)
    packed = (codes[:, 1] << 4).bitwise_or_(codes[:, 0])
    packed.bitwise_or_(codes[:, 2] << 8).bitwise_or_(codes[:, 3] << 12)
    _put(coded, layout.codes_at + BLOCK // 2 * first, packed)

    escaping = there.bitwise_and_(inside.bitwise_xor_(_TOPS))
    return _patches(pairs, escaping, start, layout)


def _pairs(
    values: torch.Tensor, blocks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the upper halves of whole blocks as pairs, and the lower halves."""
    aligned = values.storage_offset() * values.element_size() % 4 == 0
    if values.numel() < blocks * BLOCK or not aligned:
        filled = values.new_zeros(blocks * BLOCK)
        filled[: values.numel()].copy_(values)
        values = filled
    words_ = values.view(torch.int32)
    if values.element_size() == 2:
        return words_.view(blocks, BLOCK // 2), None
    first, second = words_.view(blocks, 2, BLOCK // 2).unbind(1)
    upper = (first >> 16).bitwise_and_(_LOWER).bitwise_or_(second & _UPPER)
    lower = (second << 16).bitwise_or_(first & _LOWER)
    return upper, lower


def _put(coded: torch.Tensor, start: int, plane: torch.Tensor) -> None:
    words(coded, start, plane.numel()).view_as(plane).copy_(plane)


def _not_zero(halves_: torch.Tensor) -> torch.Tensor:
    """Return words with the top bits set of halves that are not 0 (nor negative)."""
    return (halves_ + _ALMOST).bitwise_and_(_TOPS)


def _patches(
    pairs: torch.Tensor, escaping: torch.Tensor, start: int, layout: CodeLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices and upper halves of values whose top bits are set."""
    flat, escaping = pairs.view(-1), escaping.view(-1)
    places = escaping.nonzero().squeeze(1)
    found, tops, places = flat[places].cpu(), escaping[places].cpu(), places.cpu()
    if layout.wide:
        at = start + places // (BLOCK // 2) * BLOCK + places % (BLOCK // 2)
        step = BLOCK // 2
    else:
        at, step = start + places * 2, 1
    lower, upper = (tops & 0x8000).bool(), tops < 0
    indices = [at[lower], at[upper] + step]
    values = [found[lower].to(torch.int16), (found[upper] >> 16).to(torch.int16)]
    last = layout.count - 1
    if not layout.wide and last % 2 == 0 and start <= last < start + 2 * len(flat):
        kept = indices[0] != last
        word = flat[(last - start) // 2 : (last - start) // 2 + 1].cpu()
        indices += [indices[0][kept], torch.tensor([last])]
        values += [values[0][kept], word.to(torch.int16)]
        del indices[0], values[0]
    together, order = torch.cat(indices).sort()
    return together, torch.cat(values)[order]


def _write_patches(
    coded: torch.Tensor,
    layout: CodeLayout,
    indices: torch.Tensor,
    values: torch.Tensor,
) -> None:
    # Behind each part are up to 12 bytes that nothing else writes to.
    coded[layout.starts_at : layout.nbytes].zero_()
    bounds = torch.arange(layout.segments + 1) * SEGMENT
    starts = torch.searchsorted(indices, bounds)
    words(coded, layout.starts_at, starts.numel()).copy_(starts)
    words(coded, layout.indices_at, layout.patches).copy_(indices)
    halves(coded, layout.values_at, layout.patches).copy_(values)

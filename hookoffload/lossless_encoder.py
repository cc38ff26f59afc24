"""Encodes tensors, see [Note: the lossless code]: a chunk at a time, in any place.

What it takes beside the coded bytes does not grow with the tensor. Where chunks are
encoded is up to a `ChunkEncoder`: `HostEncoder` works in one thread on the CPU,
`DeviceEncoder` on an accelerator. They give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F

from .host_memory import empty_pages
from .lossless_layout import BYTES_PER_PATCH, SEGMENT, CodeLayout, halves, words

# Reads values: from the first index, to the second.
Reader = Callable[[int, int], torch.Tensor]

CODED_DTYPES = frozenset({torch.bfloat16, torch.float32})

# A tensor that shrinks by less is not worth decoding.
_LEAST_SAVING = 16  # one part in so many
_MOST_VALUES = 2**31 - 2**20  # indices are int32, also those of whole programs

_SAMPLED_SLICES = 64
_SAMPLED_SLICE = 2**12

_CODES = 15  # those that stand for an exponent above the base
_MOST_BASE = 255 - _CODES


class ChunkEncoder(Protocol):
    """Encodes whole blocks of a tensor, of which the last may be short.

    An encoder has memory that its chunks share: it is one thread's at a time.
    """

    @property
    def chunk_values(self) -> int:
        """How many values to give it at a time, a multiple of a block's."""

    def encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode values into the planes, from index ``start``, a block's first, on.

        Args:
            values: flat, anywhere; no more than `chunk_values`.
            start: the index of the first of them in their tensor.
            layout: of the tensor, but for its patches.
            coded: takes the planes; in host RAM.

        Returns:
            The indices, ascending, and the upper halves of those that need patches,
            in host RAM.
        """


def encode_values(
    read: Reader, count: int, dtype: torch.dtype, encoder: ChunkEncoder
) -> tuple[CodeLayout, torch.Tensor] | None:
    """Encode values that a reader provides.

    Args:
        read: returns values by their indices, as a flat tensor, from where they lie.
            It is asked for a sample, and then for all of them in sequence.
        count: values.
        dtype: their dtype.
        encoder: where to encode. The coded bytes lie in host RAM, whatever it is.

    Returns:
        The layout, and memory that begins with the coded bytes and has pages of its
        own, so that it can be page-locked; None if they would not be fewer by enough.
    """
    if dtype not in CODED_DTYPES or not 0 < count <= _MOST_VALUES:
        return None
    base, escaping = _choose_base(read, count)
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
    size = encoder.chunk_values
    for start in range(0, count, size):
        chunk = read(start, min(start + size, count))
        at, upper = encoder.encode(chunk, start, layout, coded)
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


def _choose_base(read: Reader, count: int) -> tuple[int, float]:
    """Return the base that leaves the fewest patches, and what part they make.

    Looks at a sample of large tensors: another base would be right as well.
    """
    step = max(_SAMPLED_SLICE, count // _SAMPLED_SLICES)
    exponents = torch.cat(
        [
            _exponents(read(start, min(start + _SAMPLED_SLICE, count)))
            for start in range(0, count, step)
        ]
    )
    counts = torch.bincount(exponents, minlength=256).cpu()
    sums = F.pad(counts[1:].cumsum(0), (1, 0))  # of the exponents from 1 to i
    covered = sums[_CODES:] - sums[: _MOST_BASE + 1]
    base = int(covered.argmax())
    coded = int(covered[base]) + int(counts[0])
    return base, 1 - coded / exponents.numel()


def _exponents(values: torch.Tensor) -> torch.Tensor:
    wide = values.element_size() == 4
    bits = values.view(torch.int32 if wide else torch.int16)
    return ((bits >> (23 if wide else 7)) & 0xFF).to(torch.uint8)


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

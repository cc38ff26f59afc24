"""Encodes tensors, see [Note: the lossless code]: a chunk at a time, in any place.

What it takes beside the coded bytes does not grow with the tensor. Where chunks are
encoded is up to a `ChunkEncoder`: `HostEncoder` works in one thread on the CPU,
`DeviceEncoder` on an accelerator. They give the same bytes.

[Note: threads that encode] Several tensors are encoded side by side, so what a thread
does on the CPU must stay in it: NumPy's steps do. PyTorch divides its own over all
cores, with a team of threads for each thread that asks; such teams wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .host_memory import empty_pages
from .lossless_layout import BLOCK, BYTES_PER_PATCH, SEGMENT, CodeLayout

# The indices of values, and their upper halves.
Patches = tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]

# Where values come from: a flat contiguous tensor, or what reads them, from an index
# on, into a part of one.
Reader = Callable[[int, torch.Tensor], None]
Source = torch.Tensor | Reader

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

    def chunk_values(self, dtype: torch.dtype) -> int:
        """Return how many values to give it at most, a multiple of a block's."""

    def buffer(self, layout: CodeLayout) -> torch.Tensor:
        """Return memory to read a tensor's chunks into, of its dtype.

        The next call of `encode` takes them from there without a copy in host RAM, and
        uses the memory for other things.
        """

    def encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> Patches:
        """Encode values into the planes, from index ``start``, a block's first, on.

        Args:
            values: flat, in the `buffer` or anywhere; no more than `chunk_values`.
            start: the index of the first of them in their tensor.
            layout: of the tensor, but for its patches.
            coded: takes the planes; in host RAM.

        Returns:
            The indices, ascending, and the upper halves of those that need patches.
        """


def encode_values(
    source: Source, count: int, dtype: torch.dtype, encoder: ChunkEncoder
) -> tuple[CodeLayout, torch.Tensor] | None:
    """Encode values, wherever they lie.

    Args:
        source: where they come from. A reader is asked for a sample, and then for all
            of them in sequence.
        count: values.
        dtype: their dtype.
        encoder: where to encode. The coded bytes lie in host RAM, whatever it is.

    Returns:
        The layout, and memory that begins with the coded bytes and has pages of its
        own, so that it can be page-locked; None if they would not be fewer by enough.
    """
    if dtype not in CODED_DTYPES or not 0 < count <= _MOST_VALUES:
        return None
    base, escaping = _choose_base(source, count, dtype)
    layout = CodeLayout(dtype=dtype, count=count, base=base, patches=0)
    most = layout.raw_bytes - layout.raw_bytes // _LEAST_SAVING
    expected = int(escaping * count) * BYTES_PER_PATCH
    if layout.nbytes + expected > most:
        return None
    # Twice what the sample needs: room that is never written to takes no memory, and
    # saves a second copy.
    room = (layout.nbytes + 2 * expected + 4096) // 16 * 16
    coded = empty_pages(room)
    indices: list[npt.NDArray[np.int64]] = []
    values: list[npt.NDArray[np.int16]] = []
    patches = 0
    # Equal chunks, rather than full ones and a rest that takes as many calls as they.
    chunks = -(-count // encoder.chunk_values(dtype))
    size = -(-count // (chunks * BLOCK)) * BLOCK
    for start in range(0, count, size):
        stop = min(start + size, count)
        if isinstance(source, torch.Tensor):
            chunk = source[start:stop]
        else:
            chunk = encoder.buffer(layout)[: stop - start]
            source(start, chunk)
        at, upper = encoder.encode(chunk, start, layout, coded)
        indices.append(at)
        values.append(upper)
        patches += at.size
        if layout.nbytes + patches * BYTES_PER_PATCH > most:
            return None
    layout = replace(layout, patches=patches)
    if layout.nbytes > most:
        return None
    if layout.nbytes > room:
        planes = coded[: layout.starts_at]
        coded = empty_pages(layout.nbytes)
        np.copyto(coded[: layout.starts_at].numpy(), planes.numpy())
    _write_patches(coded, layout, np.concatenate(indices), np.concatenate(values))
    return layout, coded


def patches_of(values: torch.Tensor, start: int, layout: CodeLayout) -> Patches:
    """Look for a chunk's patches on the CPU, however many they are.

    Args:
        values: flat, anywhere.
        start: the index of the first of them in their tensor.
        layout: of the tensor.
    """
    upper = _upper_halves(values)
    exponents = _exponents(upper)
    # Unsigned: what is below the base comes out above the codes.
    outside = exponents - np.uint16(layout.base + 1) >= _CODES
    outside &= exponents != 0
    if values.numel() % 2 and not layout.wide:
        outside[-1] = True  # see the note: it is a patch in any case
    places = np.flatnonzero(outside)
    return start + places, upper[places].view(np.int16)


def _choose_base(source: Source, count: int, dtype: torch.dtype) -> tuple[int, float]:
    """Return the base that leaves the fewest patches, and what part they make.

    Looks at a sample of large tensors: another base would be right as well.
    """
    counts = np.zeros(256, np.int64)
    for values in _sample(source, count, dtype):
        exponents = _exponents(_upper_halves(values))
        counts += np.bincount(exponents.reshape(-1), minlength=256)
    sums = np.concatenate([[0], counts[1:].cumsum()])  # of the exponents from 1 to i
    covered = sums[_CODES:] - sums[: _MOST_BASE + 1]
    base = int(covered.argmax())
    coded = int(covered[base]) + int(counts[0])
    return base, 1 - coded / int(counts.sum())


def _sample(source: Source, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return slices of values, spread evenly; a row each of those that are whole."""
    size, step = _SAMPLED_SLICE, max(_SAMPLED_SLICE, count // _SAMPLED_SLICES)
    starts = range(0, count, step)
    rows = len(range(0, count - size + 1, step))  # the last slice may be cut off
    rest = min(size, count - starts[-1]) if rows < len(starts) else 0
    if isinstance(source, torch.Tensor):
        shape, offset = (rows, size), source.storage_offset()
        whole = source.as_strided(shape, (step, 1), offset) if rows else source[:0]
        return [whole, source[count - rest :]]
    read = torch.empty(rows * size + rest, dtype=dtype)
    for start, part in zip(starts, read.split(size), strict=True):
        source(start, part)
    return [read]


def _upper_halves(values: torch.Tensor) -> npt.NDArray[np.uint16]:
    halves = values.cpu().view(torch.int16).numpy().view(np.uint16)
    step = values.element_size() // 2
    return halves[..., step - 1 :: step]


def _exponents(upper: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    exponents: npt.NDArray[np.uint16] = np.right_shift(upper, 7)
    exponents &= 0xFF
    return exponents


def _write_patches(
    coded: torch.Tensor,
    layout: CodeLayout,
    indices: npt.NDArray[np.int64],
    values: npt.NDArray[np.int16],
) -> None:
    # Behind each part are up to 12 bytes that nothing else writes to.
    data = coded.numpy()
    data[layout.starts_at : layout.nbytes] = 0
    starts = np.searchsorted(indices, np.arange(layout.segments + 1) * SEGMENT)
    for at, part in (
        (layout.starts_at, starts.astype(np.int32)),
        (layout.indices_at, indices.astype(np.int32)),
        (layout.values_at, values),
    ):
        data[at : at + part.nbytes] = part.view(np.uint8)

"""Encodes chunks on the CPU, see [Note: the lossless code].

In NumPy, see [Note: threads that encode]: and it writes into memory that is there
already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .lossless_encoder import Patches
from .lossless_layout import BLOCK, CodeLayout

_Halves = npt.NDArray[np.uint16]

_CHUNK_VALUES = 2**17  # what is computed with stays in a core's cache
_QUARTER = BLOCK // 4


class HostEncoder:
    """Encodes in the thread that calls it."""

    __slots__ = ("_exponents", "_filled", "_halves", "_outside", "_read", "_upper")

    def __init__(self) -> None:
        self._exponents = np.empty(_CHUNK_VALUES, np.uint16)
        self._halves = np.empty(_CHUNK_VALUES, np.uint16)
        self._outside = np.empty(_CHUNK_VALUES, np.bool_)
        self._upper = np.empty(0, np.uint16)  # only for fp32
        self._filled = np.empty(0, np.uint8)
        self._read = torch.empty(0, dtype=torch.uint8)

    def chunk_values(self, dtype: torch.dtype) -> int:
        """See `ChunkEncoder`."""
        return _CHUNK_VALUES

    def buffer(self, layout: CodeLayout) -> torch.Tensor:
        """See `ChunkEncoder`."""
        nbytes = _CHUNK_VALUES * layout.dtype.itemsize
        if self._read.numel() < nbytes:
            self._read = torch.empty(nbytes, dtype=torch.uint8)
        return self._read[:nbytes].view(layout.dtype)

    def encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> Patches:
        """See `ChunkEncoder`."""
        count = values.numel()
        first, blocks = start // BLOCK, -(-count // BLOCK)
        bits = self._bits(values, blocks)
        if layout.wide:
            lower_at = layout.lower_at + 2 * BLOCK * first
            lower = _part(coded, lower_at, blocks * BLOCK)
            upper = self._upper_halves(bits.reshape(blocks, 2, BLOCK // 2, 2), lower)
        else:
            upper = bits
        signed = _part(coded, BLOCK * first, blocks * BLOCK // 2)
        self._put_signs_and_mantissas(upper, signed)
        at = layout.codes_at + BLOCK // 2 * first
        codes = _part(coded, at, blocks * BLOCK // 4)
        places = self._put_codes(upper, layout.base, codes)
        last = count - 1
        if not layout.wide and layout.count % 2 and start + count == layout.count:
            # See the note: it is a patch in any case.
            places = np.union1d(places, [last])
        found = upper[places]
        if layout.wide:
            inside = places % BLOCK
            inside = inside // 2 + BLOCK // 2 * (inside % 2)
            places = places // BLOCK * BLOCK + inside
            order = np.argsort(places)
            places, found = places[order], found[order]
        return places + start, found.view(np.int16)

    def _bits(self, values: torch.Tensor, blocks: int) -> _Halves:
        """Return the halves of whole blocks, the last of them filled up with zeros."""
        raw: npt.NDArray[Any] = values.cpu().view(torch.uint8).numpy()
        whole = blocks * BLOCK * values.element_size()
        if raw.size < whole:
            if self._filled.size < whole:
                self._filled = np.empty(whole, np.uint8)
            filled = self._filled[:whole]
            filled[: raw.size] = raw
            filled[raw.size :] = 0
            raw = filled
        return raw.view(np.uint16)

    def _upper_halves(self, values: _Halves, lower: _Halves) -> _Halves:
        """Divide fp32 values, in blocks of two rows, into pairs of halves."""
        if not self._upper.size:
            self._upper = np.empty(_CHUNK_VALUES, np.uint16)
        upper = self._upper[: lower.size]
        pairs = upper.reshape(-1, BLOCK // 2, 2)
        rest = lower.reshape(-1, BLOCK // 2, 2)
        for row in (0, 1):
            rest[:, :, row] = values[:, row, :, 0]
            pairs[:, :, row] = values[:, row, :, 1]
        return upper

    def _put_signs_and_mantissas(self, upper: _Halves, plane: _Halves) -> None:
        kept = self._exponents[: upper.size]
        mantissas = self._halves[: upper.size]
        np.right_shift(upper, 8, out=kept)
        np.bitwise_and(kept, 0x80, out=kept)
        np.bitwise_and(upper, 0x7F, out=mantissas)
        np.bitwise_or(kept, mantissas, out=kept)
        quarters = kept.reshape(-1, 2, 2, _QUARTER)
        odd = mantissas[: plane.size].reshape(-1, 2, _QUARTER)
        np.left_shift(quarters[:, :, 1], 8, out=odd)
        np.bitwise_or(quarters[:, :, 0], odd, out=plane.reshape(odd.shape))

    def _put_codes(
        self, upper: _Halves, base: int, plane: _Halves
    ) -> npt.NDArray[np.int64]:
        """Write the codes; return the places of those that need patches."""
        codes = self._exponents[: upper.size]
        shifted = self._halves[: upper.size]
        outside = self._outside[: upper.size]
        np.right_shift(upper, 7, out=codes)
        np.bitwise_and(codes, 0xFF, out=codes)
        # Unsigned: what is below the base comes out above the codes.
        np.subtract(codes, base + 1, out=shifted)
        np.greater(shifted, 14, out=outside)
        np.add(shifted, 1, out=shifted)
        places: npt.NDArray[np.int64] = np.flatnonzero(outside)
        shifted[places] = 0
        quarters = shifted.reshape(-1, 4, _QUARTER)
        packed = plane.reshape(-1, _QUARTER)
        part = self._exponents[: plane.size].reshape(packed.shape)
        escaping: npt.NDArray[np.int64] = places[codes[places] != 0]
        np.left_shift(quarters[:, 1], 4, out=packed)
        np.bitwise_or(packed, quarters[:, 0], out=packed)
        for quarter in (2, 3):
            np.left_shift(quarters[:, quarter], 4 * quarter, out=part)
            np.bitwise_or(packed, part, out=packed)
        return escaping


def _part(coded: torch.Tensor, start: int, count: int) -> _Halves:
    part: _Halves = coded[start : start + 2 * count].numpy().view(np.uint16)
    return part

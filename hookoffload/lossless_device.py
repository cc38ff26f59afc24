"""Encodes chunks on an accelerator, see [Note: the lossless code].

In plain PyTorch: the link and the host's own copies take longer than the few dozen
launches for a chunk of megabytes. Chunks and codes pass through page-locked memory, as
pageable copies would wait for each other in the driver. While a chunk computes, the
chunks of other threads are copied.
"""

from __future__ import annotations

import numpy as np
import torch

from .lossless_encoder import Patches
from .lossless_layout import BLOCK, CodeLayout

# A chunk is a few dozen launches, which threads of one process can only do in turn:
# with 2**21 values these took most of the time that weights of 41 GB did (one H200).
CHUNK_VALUES = (2**24, 2**23, 2**22, 2**21)
# What an encoder takes on its device at most, for each value of a chunk: as fp32, with
# what is computed from it, in which everything but the values is half as large.
BYTES_PER_VALUE = 32

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


class DeviceEncoder:
    """Encodes on a CUDA device, on a stream of its own.

    Args:
        device: the CPU gives the same bytes, more slowly.
        chunk_values: how many values to take at a time; see `CHUNK_VALUES`.
    """

    __slots__ = ("_chunk", "_chunk_values", "_device", "_planes", "_stream")

    def __init__(
        self, device: torch.device, chunk_values: int = CHUNK_VALUES[-1]
    ) -> None:
        self._device = device
        self._chunk_values = chunk_values
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # The weights themselves may lie on the device, and be barely there.
            self._stream.wait_stream(torch.cuda.default_stream(device))
        self._chunk = torch.empty(0, dtype=torch.int32)
        self._planes = torch.empty(0, dtype=torch.int32)

    @property
    def chunk_values(self) -> int:
        """See `ChunkEncoder`."""
        return self._chunk_values

    def encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> Patches:
        """See `ChunkEncoder`."""
        if self._stream is None:
            return self._encode(values, start, layout, coded)
        with torch.cuda.stream(self._stream):
            return self._encode(values, start, layout, coded)

    def _encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> Patches:
        first, blocks = start // BLOCK, -(-values.numel() // BLOCK)
        words = self._on_device(values, blocks)
        planes = []
        if layout.wide:
            pairs, lower = _divided(words.view(blocks, 2, BLOCK // 2))
            planes.append((layout.lower_at + 2 * BLOCK * first, lower))
        else:
            pairs = words.view(blocks, BLOCK // 2)
        planes.append((BLOCK * first, _signs_and_mantissas(pairs)))
        codes, escaping = _codes(pairs, layout.base)
        planes.append((layout.codes_at + BLOCK // 2 * first, codes))
        waiting = self._start_down([plane for _, plane in planes])
        patches = _patches(pairs, escaping, start, layout)
        if self._stream is not None:
            self._stream.synchronize()
        for (at, _), plane in zip(planes, waiting, strict=True):
            target = coded[at : at + plane.nbytes].numpy()
            np.copyto(target, plane.view(torch.uint8).numpy())
        return patches

    def _on_device(self, values: torch.Tensor, blocks: int) -> torch.Tensor:
        """Bring whole blocks to the device as words, filled up with zeros."""
        count = blocks * BLOCK
        if self._stream is not None and values.device == self._stream.device:
            filled = values.new_zeros(count)
            filled[: values.numel()].copy_(values)
            return filled.view(torch.int32)
        size = count * values.element_size() // 4
        if self._chunk.numel() < size:
            self._chunk = self._staging(size)
        staged = self._chunk[:size]
        raw, source = staged.view(torch.uint8).numpy(), values.cpu().view(torch.uint8)
        np.copyto(raw[: source.numel()], source.numpy())
        raw[source.numel() :] = 0
        return staged.to(self._device, non_blocking=True)

    def _start_down(self, planes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Begin to copy planes to page-locked memory."""
        size = sum(plane.numel() for plane in planes)
        if self._planes.numel() < size:
            self._planes = self._staging(size)
        parts = self._planes[:size].split([plane.numel() for plane in planes])
        for part, plane in zip(parts, planes, strict=True):
            part.view_as(plane).copy_(plane, non_blocking=True)
        return list(parts)

    def _staging(self, words: int) -> torch.Tensor:
        return torch.empty(
            words, dtype=torch.int32, pin_memory=self._stream is not None
        )


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
    pairs: torch.Tensor, escaping: torch.Tensor, start: int, layout: CodeLayout
) -> Patches:
    """Return the indices and upper halves of values whose top bits are set."""
    flat, escaping = pairs.reshape(-1), escaping.reshape(-1)
    last = (layout.count - 1 - start) // 2
    if not layout.wide and layout.count % 2 and last < len(flat):
        escaping[last] |= 0x8000  # see the note: it is a patch in any case
    places = escaping.nonzero().squeeze(1)
    brought = torch.stack([places.int(), flat[places], escaping[places]]).cpu()
    places, found, tops = brought.numpy()
    places = places.astype(np.int64)
    if layout.wide:
        at = start + places // (BLOCK // 2) * BLOCK + places % (BLOCK // 2)
        step = BLOCK // 2
    else:
        at, step = start + places * 2, 1
    lower, upper = (tops & 0x8000) != 0, tops < 0
    indices = np.concatenate([at[lower], at[upper] + step])
    pairs_of_halves = found.view(np.int16).reshape(-1, 2)
    values = np.concatenate([pairs_of_halves[lower, 0], pairs_of_halves[upper, 1]])
    order = np.argsort(indices)
    return indices[order], values[order]

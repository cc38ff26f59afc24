"""Encodes chunks on an accelerator, see [Note: encoded chunks].

[Note: what encoding on a device takes]
Encoding itself is nothing beside what brings values there and codes back: two copies in
host RAM, into and out of page-locked memory, the first touch of the codes' pages, and
the link. All of them run without Python's lock; but each call of PyTorch gives that up
and takes it again, and with several threads waits for its turn. A tensor is therefore
divided into few chunks, and a chunk takes few calls: one copy there, one launch, one
copy back, which brings the first patches as well, and one wait. Meanwhile the chunks of
other threads are copied.

An encoder keeps its memory: on the device a chunk and as much for what it is encoded
into, and in host RAM one page-locked piece for both directions, which files are read
into directly. Tensors are encoded in the order of their sizes, so the first one's chunk
is as large as any.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from .locked_pages import LockedPages
from .lossless_chunk import EncodeChunk, encode_in_torch, room_for_patches, words_of
from .lossless_encoder import Patches, patches_of
from .lossless_layout import BLOCK, CodeLayout

logger = logging.getLogger(__name__)

# Sizes of chunks to choose from, as bytes of values.
CHUNK_BYTES = (2**25, 2**24, 2**23, 2**22)

# Chunk and output; and what plain PyTorch computes from them, words of two values each.
_FUSED_SHARE, _TORCH_SHARE = 2, 8

# Patches for each block that come back with its planes: normal weights have fewer.
_FIRST_PATCHES = 4


def taken_bytes(chunk_bytes: int, *, fused: bool) -> int:
    """Return what an encoder takes on its device at most.

    Args:
        chunk_bytes: of its chunks.
        fused: whether there is a `fused_encoder`.
    """
    return chunk_bytes * (_FUSED_SHARE if fused else _TORCH_SHARE)


class DeviceEncoder:
    """Encodes on a CUDA device, on a stream of its own.

    Args:
        device: the CPU gives the same bytes, more slowly.
        chunk_bytes: how much to take at a time, a multiple of a block's.
        encode_chunk: what encodes chunks; default: the fastest that works.
    """

    __slots__ = (
        "_chunk_bytes",
        "_device",
        "_encode_chunk",
        "_memory",
        "_staging",
        "_stream",
    )

    def __init__(
        self,
        device: torch.device,
        chunk_bytes: int = CHUNK_BYTES[-1],
        encode_chunk: EncodeChunk | None = None,
    ) -> None:
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._encode_chunk = encode_chunk
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # The weights themselves may lie on the device, and be barely there.
            self._stream.wait_stream(torch.cuda.default_stream(device))
        self._memory = torch.empty(0, dtype=torch.int32)
        self._staging: LockedPages | None = None

    def chunk_values(self, dtype: torch.dtype) -> int:
        """See `ChunkEncoder`."""
        return self._chunk_bytes // dtype.itemsize

    def buffer(self, layout: CodeLayout) -> torch.Tensor:
        """See `ChunkEncoder`."""
        return self._staging_for(layout).view(layout.dtype)

    def encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> Patches:
        """See `ChunkEncoder`."""
        if self._stream is None:
            return self._encode(values, start, layout, coded)
        with torch.cuda.stream(self._stream):
            try:
                return self._encode(values, start, layout, coded)
            except BaseException:
                self._stream.synchronize()  # memory that is copied must stay
                raise

    def _encode(
        self, values: torch.Tensor, start: int, layout: CodeLayout, coded: torch.Tensor
    ) -> Patches:
        staging = self._staging_for(layout)
        if self._memory.nbytes < 2 * staging.nbytes:
            self._memory = torch.empty(0, dtype=torch.int32)  # given back first
            self._memory = torch.empty(
                staging.nbytes // 2, dtype=torch.int32, device=self._device
            )
        part = CodeLayout(
            dtype=layout.dtype, count=values.numel(), base=layout.base, patches=0
        )
        words = words_of(part)
        chunk, output = self._memory[:words], self._memory[words : 2 * words]
        self._bring_in(values, chunk, staging)
        encode = self._encode_chunk or self._fastest(part.wide)
        encode(part, chunk, output)
        room, first = room_for_patches(part), _FIRST_PATCHES * part.blocks
        patches_at = part.starts_at + 8
        self._bring_back(output, staging, 0, patches_at + 8 * first)
        raw: npt.NDArray[np.uint8] = staging.numpy()
        patches = int(raw[part.starts_at : patches_at].view(np.int64)[0])
        if first < patches <= room:
            self._bring_back(
                output, staging, patches_at + 8 * first, patches_at + 8 * patches
            )
        block, blocks, target = start // BLOCK, part.blocks, coded.numpy()
        planes = [(0, 0, BLOCK), (part.codes_at, layout.codes_at, BLOCK // 2)]
        if part.wide:
            planes.append((part.lower_at, layout.lower_at, 2 * BLOCK))
        for source_at, target_at, size in planes:
            np.copyto(
                target[target_at + size * block :][: size * blocks],
                raw[source_at : source_at + size * blocks],
            )
        if patches > room:
            self._bring_back(chunk, staging, 0, chunk.nbytes)
            again = staging.view(layout.dtype)[: part.count]
            return patches_of(again, start, layout)
        # By their indices, which are the upper bits.
        packed = np.sort(raw[patches_at : patches_at + 8 * patches].view(np.int64))
        return start + (packed >> 16), packed.astype(np.uint16).view(np.int16)

    def _staging_for(self, layout: CodeLayout) -> torch.Tensor:
        """Return page-locked memory for a tensor's chunks."""
        nbytes = min(self._chunk_bytes, 4 * words_of(layout))
        if self._staging is None or self._staging.memory.numel() < nbytes:
            self._staging = LockedPages(nbytes, self._device)
        return self._staging.memory

    def _fastest(self, wide: bool) -> EncodeChunk:
        fused = None if self._stream is None else fused_encoder(self._device, wide)
        return fused or encode_in_torch

    def _bring_in(
        self, values: torch.Tensor, chunk: torch.Tensor, staging: torch.Tensor
    ) -> None:
        """Have values in a chunk, filled up with zeros."""
        if self._stream is not None and values.device == self._stream.device:
            flat = chunk.view(values.dtype)
            flat[: values.numel()].copy_(values)
            flat[values.numel() :].zero_()
            return
        raw, source = staging.numpy(), values.cpu().view(torch.uint8)
        if source.data_ptr() != staging.data_ptr():
            np.copyto(raw[: source.numel()], source.numpy())
        raw[source.numel() : chunk.nbytes] = 0
        chunk.copy_(staging[: chunk.nbytes].view(torch.int32), non_blocking=True)

    def _bring_back(
        self, output: torch.Tensor, staging: torch.Tensor, start: int, stop: int
    ) -> None:
        """Copy some bytes to the same place in page-locked memory, and wait for it."""
        target = staging[start:stop].view(torch.int32)
        target.copy_(output[start // 4 : stop // 4], non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()


@cache
def fused_encoder(device: torch.device, wide: bool) -> EncodeChunk | None:
    """Return what encodes chunks on a CUDA device by Triton, None where that fails.

    Compiles it when it is asked for the first time, which takes a second.

    Args:
        device: the device.
        wide: whether values are fp32.
    """
    dtype = torch.float32 if wide else torch.bfloat16
    layout = CodeLayout(dtype=dtype, count=BLOCK, base=1, patches=0)
    with torch.cuda.device(device), torch.inference_mode(False):
        chunk = torch.zeros(words_of(layout), dtype=torch.int32, device=device)
        try:
            from .lossless_encode_kernel import encode_in_triton

            encode_in_triton(layout, chunk, torch.empty_like(chunk))
        except Exception as error:  # not installed, no compiler, too old a GPU
            logger.warning(
                "Triton does not work here (%s: %s): weights are encoded more slowly",
                type(error).__name__,
                error,
            )
            return None
    return encode_in_triton

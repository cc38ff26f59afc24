"""A CPU whose memory is counted as CUDA's caching allocator counts a GPU's.

The limit holds for what the allocator hands out, which is more than what is asked for:
requests are rounded up, and what is left of a free block is only split off where it is
worth it. So a plan can be right in its own bytes, and the limit be exceeded. Here that
shows without a GPU: while `CountedMemory` is entered, tensors that come from operations
live in an allocator with the sizes and the choices of PyTorch's (its
``c10/cuda/CUDACachingAllocator.cpp``), in numbers only.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MIB = 2**20
_ROUNDED_TO = 512
_SMALL = MIB  # the largest request from the pool of small blocks
_SMALL_SEGMENT = 2 * MIB
_MEDIUM_SEGMENT = 20 * MIB
_LARGE_FROM = 10 * MIB  # from here on each request may get a segment of its own
_LARGE_ROUNDED_TO = 2 * MIB


@dataclass
class _Piece:
    segment: int
    start: int
    size: int
    small: bool
    free: bool = True


class CachingAllocator:
    """Segments that are cut into blocks; free neighbours grow together again.

    Attributes:
        allocated: bytes of the blocks that are handed out.
        peak: the most of them at once, since `reset_peak`.
        most: the most of them at once, whoever has reset the peak since.
        reserved: bytes of all segments.
        peak_reserved: the most of them, since `reset_peak`.
    """

    def __init__(self) -> None:
        self.allocated = self.peak = self.most = 0
        self.reserved = self.peak_reserved = 0
        self._segments: dict[int, list[_Piece]] = {}
        self._numbers = itertools.count()

    def allocate(self, nbytes: int) -> _Piece | None:
        """Hand out the smallest free block that is large enough."""
        if not nbytes:
            return None
        size = -(-nbytes // _ROUNDED_TO) * _ROUNDED_TO
        small = size <= _SMALL
        fitting = [
            piece
            for pieces in self._segments.values()
            for piece in pieces
            if piece.free and piece.small == small and piece.size >= size
        ]
        if fitting:
            piece = min(fitting, key=lambda piece: (piece.size, piece.segment))
        else:
            piece = self._segment(size, small=small)
        left = piece.size - size
        if left >= _ROUNDED_TO if small else left > _SMALL:
            pieces = self._segments[piece.segment]
            rest = _Piece(piece.segment, piece.start + size, left, small)
            pieces.insert(pieces.index(piece) + 1, rest)
            piece.size = size
        piece.free = False
        self.allocated += piece.size
        self.peak = max(self.peak, self.allocated)
        self.most = max(self.most, self.allocated)
        return piece

    def release(self, piece: _Piece | None) -> None:
        """Take a block back."""
        if piece is None:
            return
        self.allocated -= piece.size
        piece.free = True
        pieces = self._segments[piece.segment]
        at = pieces.index(piece)
        if at + 1 < len(pieces) and pieces[at + 1].free:
            piece.size += pieces.pop(at + 1).size
        if at and pieces[at - 1].free:
            pieces[at - 1].size += pieces.pop(at).size

    def reset_peak(self) -> None:
        """Start new peaks."""
        self.peak, self.peak_reserved = self.allocated, self.reserved

    def empty(self) -> None:
        """Give back the segments of which nothing is handed out."""
        for number, pieces in list(self._segments.items()):
            if len(pieces) == 1 and pieces[0].free:
                self.reserved -= self._segments.pop(number)[0].size

    def _segment(self, size: int, *, small: bool) -> _Piece:
        if small:
            whole = _SMALL_SEGMENT
        elif size < _LARGE_FROM:
            whole = _MEDIUM_SEGMENT
        else:
            whole = -(-size // _LARGE_ROUNDED_TO) * _LARGE_ROUNDED_TO
        number = next(self._numbers)
        piece = _Piece(number, 0, whole, small)
        self._segments[number] = [piece]
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return piece


class CountedMemory(TorchDispatchMode):
    """What operations allocate while it is entered, in a `CachingAllocator`.

    Attributes:
        allocator: where it is counted.
        capacity: bytes that other programs leave; None: enough.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocator = CachingAllocator()
        self.capacity: int | None = None
        self._known: dict[int, Any] = {}

    def statistics(self) -> Any:
        """Return what stands in for ``torch.cuda``."""
        allocator = self.allocator
        return SimpleNamespace(
            mem_get_info=self._free_and_total,
            memory_allocated=lambda _=None: allocator.allocated,
            max_memory_allocated=lambda _=None: allocator.peak,
            reset_peak_memory_stats=lambda _=None: allocator.reset_peak(),
            memory_reserved=lambda _=None: allocator.reserved,
            empty_cache=allocator.empty,
        )

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the library believe that this is what the compute device counts."""
        monkeypatch.setattr(
            "hookoffload.device_memory._statistics_of", lambda _: self.statistics()
        )

    def _free_and_total(self, _: Any = None) -> tuple[int, int]:
        total = 2**62 if self.capacity is None else self.capacity
        return total - self.allocator.reserved, total

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count what an operation returned that was not there before."""
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        result = function(*args, **(kwargs or {}))
        if "aten.set_" in str(function):  # memory from elsewhere
            return result
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._known:
                    piece = self.allocator.allocate(storage.nbytes())
                    self._known[key] = piece
                    weakref.finalize(storage, self._gone, key)
                    most = 2**62 if self.capacity is None else self.capacity
                    if piece is not None and self.allocator.allocated > most:
                        del storage, tensor, result
                        raise torch.OutOfMemoryError("other programs take the rest")
        return result

    def _gone(self, key: int) -> None:
        self.allocator.release(self._known.pop(key, None))

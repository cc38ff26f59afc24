"""Copies of a whole layer in one call of CUDA's driver.

A bundle of small layers is dozens of copies. Each of PyTorch's takes the host about
10 microseconds, which is as long as half a megabyte takes the link; in one list they
take 1.3 each (one H200, measured with 700 of 6 MB). PyTorch has no function for that,
the driver has, from CUDA 13 on. Where there is none, or it refuses, PyTorch copies.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch

from .moves import Moves


class _Attributes(ctypes.Structure):
    """``CUmemcpyAttributes``: when sources are read, where both lie, flags."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_kind", ctypes.c_int),
        ("source_id", ctypes.c_int),
        ("destination_kind", ctypes.c_int),
        ("destination_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    )


# Sources are read when the stream comes to it; where everything lies the addresses say.
_IN_STREAM_ORDER = _Attributes(1, 0, 0, 0, 0, 0)


class CopyList:
    """Copies as the driver wants them. Whoever keeps it keeps their tensors, too.

    Args:
        moves: sources in page-locked memory and destinations, flat ``uint8`` tensors.
    """

    __slots__ = ("_arguments",)

    def __init__(self, moves: Moves) -> None:
        count = len(moves.pairs)
        addresses, sizes = ctypes.c_void_p * count, ctypes.c_size_t * count
        self._arguments = (
            addresses(*(destination.data_ptr() for _, destination in moves.pairs)),
            addresses(*(source.data_ptr() for source, _ in moves.pairs)),
            sizes(*(source.numel() for source, _ in moves.pairs)),
            ctypes.c_size_t(count),
            ctypes.byref(_IN_STREAM_ORDER),
            (ctypes.c_size_t * 1)(0),  # from the first copy on they have these
            ctypes.c_size_t(1),
        )

    def queue(self, stream: ctypes.c_void_p) -> bool:
        """Queue the copies on a stream; False if the driver refuses."""
        copy = _driver_function()
        return copy is not None and copy(*self._arguments, stream) == 0


def driver_stream(stream: torch.Stream) -> ctypes.c_void_p | None:
    """Return a stream as the driver knows it; None where lists cannot be copied."""
    if stream.device.type != "cuda" or _driver_function() is None:
        return None
    known = torch.cuda.Stream(
        stream_id=stream.stream_id,
        device_index=stream.device_index,
        device_type=stream.device_type,
    )
    return ctypes.c_void_p(known.cuda_stream)


@cache
def _driver_function() -> Callable[..., int] | None:
    if torch.version.cuda is None:  # ROCm calls its devices "cuda", too
        return None
    try:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        function = ctypes.CDLL(name).cuMemcpyBatchAsync_v2
    except (OSError, AttributeError):  # no driver, or one before CUDA 13
        return None
    function.restype = ctypes.c_int
    return function

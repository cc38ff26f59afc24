"""Weights in fewer bytes that give every bit back; see [Note: the lossless code]."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from .lossless_decoder import decode_in_torch
from .lossless_device import DeviceEncoder
from .lossless_encoder import ChunkEncoder, Source, encode_values
from .lossless_host import HostEncoder
from .lossless_layout import SEGMENT, CodeLayout

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")

# Enough that a launch is nothing beside it, and no cache holds it.
TIMED_BYTES = 2**26

# By the device's name: with how many bytes it was measured, and seconds a byte.
_DECODE_SECONDS: dict[str, tuple[int, float]] = {}

_TIMES = 4  # that something is done to know how long it takes


@dataclass(frozen=True)
class Coded:
    """A losslessly coded tensor.

    Attributes:
        layout: What its bytes mean.
        buffer: Memory that begins with the bytes: flat, ``uint8``, in host RAM.
    """

    layout: CodeLayout
    buffer: torch.Tensor

    @property
    def data(self) -> torch.Tensor:
        """The bytes."""
        return self.buffer[: self.layout.nbytes]


def encode(values: torch.Tensor, device: torch.device = _CPU) -> Coded | None:
    """Encode a tensor, read in the order of its elements.

    Args:
        values: any tensor.
        device: where to encode; much faster on an accelerator.

    Returns:
        None if it would not shrink by enough: it is of another dtype than bf16 and
        fp32, has no values, or exponents of too many kinds.

    Example:
        >>> weights = torch.randn(65536, dtype=torch.bfloat16)
        >>> coded = encode(weights)
        >>> coded.data.nbytes / weights.nbytes < 0.76
        True
        >>> decoded = torch.empty_like(weights)
        >>> decode(coded.layout, coded.data, decoded)
        >>> torch.equal(weights, decoded)
        True
    """
    flat = values.detach().reshape(-1).contiguous()
    encoder = HostEncoder() if device.type == "cpu" else DeviceEncoder(device)
    return encode_from(flat, flat.numel(), flat.dtype, encoder)


def encode_from(
    source: Source, count: int, dtype: torch.dtype, encoder: ChunkEncoder
) -> Coded | None:
    """Encode values that lie elsewhere, a few MiB at a time.

    Args:
        source: a flat contiguous tensor, or what reads values from an index on into a
            part of one.
        count: values.
        dtype: their dtype.
        encoder: what encodes them.
    """
    found = encode_values(source, count, dtype, encoder)
    return None if found is None else Coded(*found)


def decode(layout: CodeLayout, coded: torch.Tensor, output: torch.Tensor) -> None:
    """Decode on the device of the tensors, on its current stream.

    Args:
        layout: of the coded tensor.
        coded: the coded bytes, flat, or the words of 32 bits that they make.
        output: takes the values: flat, contiguous, of the layout's dtype and count, or
            as halves of words (int16).
    """
    fused = fused_decoder(output.device) if output.is_cuda else None
    if fused is None or (coded.data_ptr() | output.data_ptr()) % 4:
        decode_in_torch(layout, coded.view(torch.uint8), output.view(layout.dtype))
    elif output.device.index == torch.cuda.current_device():  # nearly always
        fused(layout, coded, output)
    else:
        with torch.cuda.device(output.device):
            fused(layout, coded, output)


def known_decode_seconds(device: torch.device) -> float | None:
    """Return how long a decoded byte takes on a device, if that was measured."""
    found = _DECODE_SECONDS.get(str(device))
    return None if found is None else found[1]


def decode_seconds(device: torch.device, nbytes: int) -> float:
    """Return how long a decoded byte takes on a device: as measured, or measure it.

    Args:
        device: the device, on which less than twice the bytes are taken.
        nbytes: bytes to decode; what was measured with fewer is measured again.
    """
    known = _DECODE_SECONDS.get(str(device))
    if known is not None and known[0] >= nbytes:
        return known[1]
    seconds = _measure_decoder(device, nbytes)
    _DECODE_SECONDS[str(device)] = (nbytes, seconds)
    return seconds


def _measure_decoder(device: torch.device, nbytes: int) -> float:
    count = nbytes // 2
    layout = CodeLayout(dtype=torch.bfloat16, count=count, base=1, patches=0)
    with torch.inference_mode(False):
        coded = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        output = torch.empty(layout.count, dtype=layout.dtype, device=device)
    return seconds_of(lambda: decode(layout, coded, output), device) / output.nbytes


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds that work takes on a device, of a few times."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    least = float("inf")
    for _ in range(_TIMES):
        wait()
        began = time.perf_counter()
        work()
        wait()
        least = min(least, time.perf_counter() - began)
    return least


@cache
def fused_decoder(device: torch.device) -> Callable[..., Any] | None:
    """Return the decoder for CUDA devices that needs Triton, None where it fails.

    Compiles it when it is asked for the first time, which takes a second.
    """
    layout = CodeLayout(dtype=torch.bfloat16, count=2 * SEGMENT, base=1, patches=0)
    with torch.cuda.device(device), torch.inference_mode(False):
        nothing = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        output = torch.empty(layout.count, dtype=layout.dtype, device=device)
        try:
            from .lossless_kernel import decode_in_triton

            decode_in_triton(layout, nothing, output)
        except Exception as error:  # not installed, no compiler, too old a GPU
            logger.warning(
                "Triton does not work here (%s: %s): weights are decoded more slowly",
                type(error).__name__,
                error,
            )
            return None
    return decode_in_triton

"""Regions and blocks of device memory begin on the same multiples."""

from __future__ import annotations

# CUDA's allocator hands out multiples of 512 bytes, and kernels choose their variants
# by alignment: regions that start on the same multiples compute the same bits.
ALIGNMENT = 512

# Tensors of fewer bytes lie side by side, in page-locked memory as in the window, so
# that neighbours travel as one.
SMALL_TENSOR_BYTES = 2**20


def align(nbytes: int) -> int:
    """Round a number of bytes up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT

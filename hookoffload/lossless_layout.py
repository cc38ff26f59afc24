"""Where the parts of a losslessly coded tensor lie.

[Note: the lossless code]
A bf16 value is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa of
weights are noise; their exponents are not: the values of one tensor lie within a few
powers of two below its largest. So a coded tensor has one byte of sign and mantissa
and 4 bits of exponent a value, 12 bits instead of 16, and gives every bit back.

* *Codes.* A tensor has one *base*, from 0 to 240. Code 0 stands for exponent 0 (zeros
  of both signs and subnormals), code c of 1 to 15 for exponent ``base + c``.
* *Patches.* A value with another exponent is kept whole, as its index and its upper
  16 bits, and written over what its code gave. That code is 0.
* *fp32.* Its upper 16 bits are what bf16 has, and are coded like it. The lower 16,
  mantissa, stay as they are: 28 bits instead of 32.
* fp16 has 5 bits of exponent, of which codes save one. That is 6% at best and not
  worth a decoder; fp16, fp8 and integers stay raw.

Everything lies in one flat ``uint8`` tensor, little-endian, in blocks of 1024 values.
The last block is filled up with zeros. The parts, each starting on 16 bytes:

====================  ===================  ===========================================
part                  bytes                holds
====================  ===================  ===========================================
sign and mantissa     1024 a block         256 words of 32 bits a block
lower halves          2048 a block         512 words a block; only for fp32
codes                 512 a block          128 words a block
starts                4 a segment, and 4   where in the patches a segment's begin, and
                                           behind the last one their number
patch indices         4 a patch            int32, ascending
patch values          2 a patch            the upper 16 bits
====================  ===================  ===========================================

A segment is 4 blocks. The order inside a block lets a decoder work on words of 32
bits from beginning to end, two values at a time, and read and write them in sequence:

* A block's values make 512 pairs. In bf16 pair q is the values 2q and 2q + 1, which
  one word holds; in fp32 it is the values q and q + 512. The first is the pair's lower
  half. Pair q is in quarter j = q // 128, at lane k = q % 128.
* Word ``(j // 2) * 128 + k`` of sign and mantissa holds the pairs of two quarters: in
  bytes 0 and 2 the even quarter's pair, in bytes 1 and 3 the odd one's. A byte is the
  sign, then the mantissa.
* Word k of the codes holds the pairs of all four quarters: the lower value of quarter
  j in bits 4j to 4j + 3, the upper 16 bits above it.
* Word q of the lower halves holds those of pair q.

In bf16, the last of an odd number of values is always a patch: its word would reach
beyond the tensor that is decoded into.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

BLOCK = 1024
SEGMENT_BLOCKS = 4
SEGMENT = BLOCK * SEGMENT_BLOCKS
BYTES_PER_PATCH = 6

_PART_ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class CodeLayout:
    """What has to be known about a coded tensor beside its bytes.

    Attributes:
        dtype: Of the values.
        count: How many there are.
        base: The exponent that code 0 would stand for if it were not 0's.
        patches: How many values are patched.
    """

    dtype: torch.dtype
    count: int
    base: int
    patches: int

    @property
    def wide(self) -> bool:
        """Whether values have lower halves (fp32)."""
        return self.dtype.itemsize == 4

    @property
    def blocks(self) -> int:
        """Blocks, the last one filled up."""
        return -(-self.count // BLOCK)

    @property
    def segments(self) -> int:
        """Segments, the last one short."""
        return -(-self.blocks // SEGMENT_BLOCKS)

    @property
    def lower_at(self) -> int:
        """The byte at which the lower halves begin."""
        return BLOCK * self.blocks

    @property
    def codes_at(self) -> int:
        """The byte at which the codes begin."""
        return self.lower_at + 2 * BLOCK * self.blocks * self.wide

    @property
    def starts_at(self) -> int:
        """The byte at which the starts begin."""
        return self.codes_at + BLOCK // 2 * self.blocks

    @property
    def indices_at(self) -> int:
        """The byte at which the indices of patches begin."""
        return self.starts_at + _aligned(4 * (self.segments + 1))

    @property
    def values_at(self) -> int:
        """The byte at which the values of patches begin."""
        return self.indices_at + _aligned(4 * self.patches)

    @cached_property
    def kernel_arguments(self) -> tuple[int, int, int, int, int]:
        """What a kernel has to know: count, base, and the words where parts begin."""
        parts = (self.starts_at, self.indices_at, self.values_at)
        starts, indices, values = (at // 4 for at in parts)
        return self.count, self.base, starts, indices, values

    @property
    def nbytes(self) -> int:
        """Bytes of the coded tensor."""
        return self.values_at + _aligned(2 * self.patches)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the values themselves."""
        return self.count * self.dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _PART_ALIGNMENT) * _PART_ALIGNMENT


def words(coded: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return a part as ``int32`` words.

    Args:
        coded: the flat ``uint8`` tensor.
        start: the byte at which the part begins.
        count: words.
    """
    return coded[start : start + 4 * count].view(torch.int32)


def halves(coded: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return a part as ``int16`` values; see `words`."""
    return coded[start : start + 2 * count].view(torch.int16)

"""Limits as a user writes them, in GiB, and as bytes."""

from __future__ import annotations

import math
import numbers
from fractions import Fraction

from .budget import GIB


def checked_limit(field: str, value: object) -> float | None:
    """Returns a value as a number of GiB; None is unlimited."""
    if value is None:
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            limit = float(value)
        except OverflowError:
            limit = math.inf
        # In bytes it must be finite as well.
        if limit >= 0 and math.isfinite(limit * GIB):
            return limit
    raise ValueError(
        f"{field}={value!r} is not a number of GiB; use None (unlimited), 0 (as little "
        'as possible), a positive number such as 2.5, or limit_gb="auto"'
    )


def to_bytes(gib: float) -> int:
    """Returns GiB as bytes; what is above zero stays above zero."""
    return max(int(Fraction(gib) * GIB), int(gib > 0))

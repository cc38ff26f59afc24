"""The accountant: every byte taken on a device is reserved here first."""

from __future__ import annotations

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, Decimal

GIB = 2**30


class BudgetExceededError(RuntimeError):
    """A limit leaves no room for what was asked of it."""


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def format_gib(nbytes: int, like: int | None = None) -> str:
    """Writes a number of bytes for a reader.

    Figures under a hundredth of a unit go to the next smaller unit, so that three
    decimals always show at least two digits that count.

    Args:
        nbytes: Bytes.
        like: Other bytes, whose unit is taken, so that a reader can compare the two;
            a smaller amount gets as many decimals as it needs.

    Returns:
        GiB with three decimals; MiB, KiB or bytes for tiny amounts.

    Example:
        >>> format_gib(76_235_670), format_gib(5 * 2**20), format_gib(700)
        ('0.071 GiB', '5.000 MiB', '700 bytes')
        >>> format_gib(5 * 2**20, like=2**30)
        '0.00488 GiB'
    """
    if nbytes == 0 and not like:
        return "0.000 GiB"
    of_unit = abs(like or nbytes)
    if of_unit < 2**10:
        return f"{nbytes} bytes"
    unit, scale = next(
        (one for one in _UNITS if of_unit * 100 >= one[1]), ("KiB", 2**10)
    )
    amount = nbytes / scale
    decimals = 3
    if 0 < abs(amount) < 0.01:
        decimals = 2 - math.floor(math.log10(abs(amount)))
    return f"{amount:.{decimals}f} {unit}"


def format_gib_up(nbytes: int) -> str:
    """Writes bytes as a number of GiB that is never too small when typed back.

    A message that says "at least 0.071" must be right when the user types 0.071, so
    the number is rounded up. ``nbytes / 2**30`` is a binary fraction that a float holds
    exactly; reading a larger decimal as a float therefore never falls below it.

    Args:
        nbytes: Bytes, not negative.

    Returns:
        A plain decimal number of GiB, without its unit: three decimals, or as many as
        give three digits that count if it is under a hundredth.

    Example:
        >>> format_gib_up(2**30 + 1), format_gib_up(1500)
        ('1.001', '0.00000140')
    """
    gib = Decimal(nbytes) / GIB
    decimals = 2 - gib.adjusted() if 0 < gib < Decimal("0.01") else 3
    return f"{gib.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_CEILING):f}"


def format_limit(limit_bytes: int) -> str:
    """Writes a limit as the ``limit_gb`` that a user most likely gave.

    Args:
        limit_bytes: The limit in bytes, after GiB were turned into whole bytes.

    Returns:
        The shortest decimal number of GiB that is less than a byte away.

    Example:
        >>> format_limit(int(0.05 * 2**30)), format_limit(2 * 2**30)
        ('0.05', '2')
    """
    decimals = 0
    while True:
        text = f"{limit_bytes / GIB:.{decimals}f}"
        if abs(float(text) * GIB - limit_bytes) < 1:
            return text
        decimals += 1


def _by_size(reserved: dict[str, int], like: int) -> str:
    largest_first = sorted(reserved.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {format_gib(n, like)}" for kind, n in largest_first)


class MemoryBudget:
    """Counts the bytes taken on one device, by kind, and holds them to a limit.

    All methods may be called from any thread.

    Example:
        >>> budget = MemoryBudget(2 * 2**30)
        >>> budget.reserve("window", 2**29)
        >>> budget.fits(2**31), budget.by_kind()
        (False, {'window': 536870912})
    """

    __slots__ = (
        "__weakref__",
        "_at_peak",
        "_by_kind",
        "_limit_bytes",
        "_lock",
        "_parts",
        "_peak",
        "_used",
        "_watcher",
        "_within",
    )

    def __init__(
        self, limit_bytes: int | None, *, within: MemoryBudget | None = None
    ) -> None:
        """Starts with nothing reserved.

        Args:
            limit_bytes: The most bytes that may be reserved at once; None: no limit.
            within: A budget that several share: every byte is reserved with it too,
                and its limit holds for all of them together.

        Raises:
            ValueError: If the limit is negative.
        """
        self._lock = threading.Lock()
        self._limit_bytes = _checked_limit(limit_bytes)
        self._by_kind: dict[str, int] = {}
        self._used = 0
        self._peak = 0
        self._at_peak: dict[str, int] = {}
        self._watcher: Callable[[Mapping[str, int]], None] | None = None
        self._within = within
        # Those within this one.
        self._parts: weakref.WeakSet[MemoryBudget] = weakref.WeakSet()
        if within is not None:
            within._parts.add(self)

    def watch(self, watcher: Callable[[Mapping[str, int]], None]) -> None:
        """Has every change told to somebody.

        Args:
            watcher: Called with the bytes by kind, which it must copy to keep, under
                the lock: it must not ask the budget for anything that takes it.
        """
        self._watcher = watcher

    def reserve(self, kind: str, nbytes: int, what: str = "") -> None:
        """Takes bytes from the budget, or raises and takes nothing.

        Args:
            kind: What the bytes are for, in one word: "window", "resident", "cast".
            nbytes: Bytes, not negative. Nothing is always granted.
            what: The full name of the layer or tensor they are for, for the message.

        Raises:
            BudgetExceededError: If the limit leaves less than ``nbytes``.
        """
        _check_not_negative(nbytes)
        with self._lock:
            if not self._fits(nbytes):
                raise BudgetExceededError(self._refusal(kind, nbytes, what))
            if nbytes == 0:
                return
            if self._within is not None:
                self._within.reserve(kind, nbytes, what)
            self._by_kind[kind] = self._by_kind.get(kind, 0) + nbytes
            self._used += nbytes
            if self._used > self._peak:
                self._peak = self._used
                self._at_peak = dict(self._by_kind)
            if self._watcher is not None:
                self._watcher(self._by_kind)

    def release(self, kind: str, nbytes: int) -> None:
        """Gives bytes back.

        Args:
            kind: The kind they were reserved with.
            nbytes: Bytes, not negative, at most what is reserved of this kind.
        """
        _check_not_negative(nbytes)
        with self._lock:
            left = self._by_kind.get(kind, 0) - nbytes
            if left < 0:
                raise AssertionError(
                    f"{format_gib(nbytes)} of kind {kind!r} were released, but only "
                    f"{format_gib(left + nbytes)} of it are reserved."
                )
            self._used -= nbytes
            if left:
                self._by_kind[kind] = left
            else:
                self._by_kind.pop(kind, None)
            if self._within is not None:
                self._within.release(kind, nbytes)
            if self._watcher is not None:
                self._watcher(self._by_kind)

    def settle(self, taken: Mapping[str, int]) -> None:
        """Corrects what is reserved, behind an interrupt in the middle of a change.

        A budget that several share is corrected by what each of them has reserved.

        Args:
            taken: What there is, in bytes by kind.
        """
        with self._lock:
            self._by_kind = {kind: nbytes for kind, nbytes in taken.items() if nbytes}
            self._used = sum(self._by_kind.values())
            if self._watcher is not None:
                self._watcher(self._by_kind)
        if self._within is not None:
            self._within._settle_by_parts()

    def _settle_by_parts(self) -> None:
        total: Counter[str] = Counter()
        for part in list(self._parts):
            total.update(part.by_kind())
        self.settle(total)

    def fits(self, nbytes: int) -> bool:
        """Says whether that many bytes could be reserved now.

        Args:
            nbytes: Bytes, not negative.
        """
        with self._lock:
            if self._within is not None and not self._within.fits(nbytes):
                return False
            return self._fits(nbytes)

    def set_limit(self, limit_bytes: int | None) -> None:
        """Changes the limit; what is reserved stays reserved.

        A limit below what is reserved refuses every further byte until enough is
        released: the caller releases, then sees with `used` whether it was enough.

        Args:
            limit_bytes: The new limit in bytes; None: no limit.

        Raises:
            ValueError: If the limit is negative.
        """
        with self._lock:
            self._limit_bytes = _checked_limit(limit_bytes)

    @property
    def limit_bytes(self) -> int | None:
        """The most bytes that may be reserved at once; None: no limit."""
        if self._limit_bytes is None and self._within is not None:
            return self._within.limit_bytes
        return self._limit_bytes

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    @property
    def total_used(self) -> int:
        """Bytes reserved now by all that share the limit."""
        return self._used if self._within is None else self._within.total_used

    @property
    def peak(self) -> int:
        """The most bytes that were reserved at once since the last `reset_peak`."""
        return self._peak

    def by_kind(self) -> dict[str, int]:
        """Bytes reserved now, by kind; a kind with nothing reserved is left out."""
        with self._lock:
            return dict(self._by_kind)

    def peak_by_kind(self) -> dict[str, int]:
        """What was reserved, by kind, at the moment of the peak."""
        with self._lock:
            return dict(self._at_peak)

    def reset_peak(self) -> None:
        """Starts a new peak from what is reserved now."""
        with self._lock:
            self._peak = self._used
            self._at_peak = dict(self._by_kind)

    def __repr__(self) -> str:
        """Shows limit, bytes used and peak."""
        with self._lock:
            limit = "no limit"
            if self._limit_bytes is not None:
                limit = f"limit {format_gib(self._limit_bytes)}"
            return (
                f"MemoryBudget({limit}, used {format_gib(self._used)}, "
                f"peak {format_gib(self._peak)})"
            )

    def _fits(self, nbytes: int) -> bool:
        if self._limit_bytes is None or nbytes == 0:
            return True
        return self._used + nbytes <= self._limit_bytes

    def _refusal(self, kind: str, nbytes: int, what: str) -> str:
        limit = self._limit_bytes or 0
        reserved = "nothing is reserved"
        if self._used:
            held = _by_size(self._by_kind, limit)
            reserved = f"{format_gib(self._used, limit)} are reserved ({held})"
        return (
            f"limit_gb={format_limit(limit)} ({format_gib(limit)}) leaves no room for "
            f"{format_gib(nbytes, limit)} of {kind}{' for ' + what if what else ''}: "
            f"{reserved}, so "
            f"{format_gib(self._used + nbytes - limit, limit)} are missing. "
            f"Raise limit_gb to at least {format_gib_up(self._used + nbytes)}, or "
            "give memory back first."
        )


def _checked_limit(limit_bytes: int | None) -> int | None:
    if limit_bytes is not None and limit_bytes < 0:
        raise ValueError(
            f"A memory limit of {limit_bytes} bytes is negative. Give the bytes that "
            "may be taken, or None for no limit."
        )
    return limit_bytes


def _check_not_negative(nbytes: int) -> None:
    if nbytes < 0:
        raise AssertionError(f"{nbytes} bytes are negative; sizes never are.")

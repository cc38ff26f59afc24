"""What passes were seen to take of the device beside the library."""

from __future__ import annotations

from dataclasses import dataclass

# So many passes, one behind the other, with inputs of half the size or less are worth
# one that streams everything, to see how much less they take.
_PASSES_OF_SMALL = 8
_SIZES_KEPT = 4


@dataclass
class Measured:
    """What one pass took.

    Attributes:
        size: of its inputs, in elements.
        activations: bytes beside the library's at its peak.
        held: bytes of it that are there between passes, too.
        before: bytes that were there when the pass began.
    """

    size: int
    activations: int
    held: int
    before: int


class MeasuredPasses:
    """What passes took, by the module that was called and by how large inputs were.

    How large inputs were, and what a pass needed, says nothing of other modules.

    Example:
        >>> passes = MeasuredPasses()
        >>> passes.find("", 100) is None
        True
        >>> passes.note("", Measured(size=100, activations=7, held=0, before=0))
        >>> passes.find("", 60).activations
        7
    """

    __slots__ = ("_known", "_small")

    def __init__(self) -> None:
        self._known: dict[str, list[Measured]] = {}  # the smallest inputs first
        self._small: dict[str, int] = {}  # passes with inputs much smaller than known

    def find(self, entry: str, size: int, *, can_gain: bool = False) -> Measured | None:
        """Return what is known of passes with such inputs, or somewhat larger ones.

        Args:
            entry: the module that is called; empty for the root.
            size: of the inputs, in elements.
            can_gain: more memory would be of use.

        Returns:
            None if the pass should be measured.
        """
        enough = [known for known in self._known.get(entry, ()) if known.size >= size]
        if not enough:
            return None
        if 2 * size > enough[0].size or not can_gain:
            self._small[entry] = 0
            return enough[0]
        self._small[entry] = self._small.get(entry, 0) + 1
        return None if self._small[entry] > _PASSES_OF_SMALL else enough[0]

    def note(self, entry: str, measured: Measured) -> None:
        """Learn what a pass took."""
        self._small[entry] = 0
        others = [m for m in self._known.get(entry, ()) if m.size != measured.size]
        del others[: max(len(others) + 1 - _SIZES_KEPT, 0)]
        self._known[entry] = sorted([*others, measured], key=lambda m: m.size)

    @property
    def most(self) -> int:
        """The most bytes of activations of any pass."""
        known = (measured for of in self._known.values() for measured in of)
        return max((measured.activations for measured in known), default=0)

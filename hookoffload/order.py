"""The sequence of layers in a pass: predicted, recorded, and followed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from .block_order import BlockOrder


class ExecutionOrder:
    """Follows the layers of a pass along a prediction that heals itself.

    The prediction is cyclic, because passes repeat: after its last layer its first is
    expected. A visit that was not expected moves the cursor to where the prediction
    has that layer, so one surprise costs one miss and not the rest of the pass. Until
    a pass was recorded, the first block of several equal ones predicts the others.

    Example:
        >>> order = ExecutionOrder([0, 1, 2])
        >>> order.begin_pass()
        >>> [order.visit(layer) for layer in (0, 2, 1)]
        [True, False, False]
        >>> order.end_pass(complete=True)
        >>> order.sequence, list(order.upcoming(2))
        ((0, 2, 1), [0, 2])
    """

    __slots__ = (
        "_blocks",
        "_cursor",
        "_heard",
        "_in_pass",
        "_positions",
        "_recorded",
        "_sequence",
        "_settled",
        "_stale",
        "_whole",
    )

    def __init__(self, predicted: Sequence[int], names: Sequence[str] = ()) -> None:
        """Starts at the beginning of a prediction, outside of any pass.

        Args:
            predicted: The layers in the order in which they are expected; a layer may
                appear several times or not at all.
            names: The full names of the layers, to tell equal blocks by.
        """
        self._blocks: BlockOrder | None = BlockOrder(names) if names else None
        self._sequence: tuple[int, ...] = ()
        self._positions: dict[int, list[int]] = {}
        self._cursor = 0
        self._settled = 0
        self._recorded: list[int] = []
        self._in_pass = False
        self._whole: tuple[int, ...] = ()  # with the layers that are not heard of
        self._heard: set[int] | None = None
        self._stale = False
        self._predict(tuple(predicted))

    @property
    def sequence(self) -> tuple[int, ...]:
        """The current prediction."""
        return self._sequence

    @property
    def first(self) -> int | None:
        """The layer that the prediction begins with."""
        return self._sequence[0] if self._sequence else None

    @property
    def is_known(self) -> bool:
        """Whether a complete pass has been recorded."""
        return self._blocks is None

    @property
    def whole(self) -> tuple[int, ...]:
        """The current prediction, with the layers whose visits are not heard of."""
        return self._whole

    @property
    def recorded(self) -> tuple[int, ...]:
        """The visits of the current pass, or of the last one when none is running."""
        return tuple(self._recorded)

    def begin_pass(self) -> None:
        """Starts recording a pass at the beginning of the prediction."""
        if self._stale:
            self._predict(self._whole)
        self._rewind()
        self._recorded = []
        self._in_pass = True

    def hear_only(self, layers: Collection[int]) -> None:
        """Goes on without the visits of all other layers, which need no copies."""
        self._heard = set(layers)
        self._predict(self._whole)

    def hear(self, layer: int) -> None:
        """Expects visits of one more layer, from the next pass on."""
        if self._heard is not None:
            self._heard.add(layer)
            self._stale = True

    def hear_all(self) -> None:
        """Expects visits of all layers again, where they were before."""
        if self._heard is not None:
            self._heard = None
            self._predict(self._whole)

    def visit(self, layer: int) -> bool:
        """Follows one layer, and records it if a pass is running.

        After an unexpected layer the cursor goes on behind the nearest later occurrence
        of it, else behind its first one; a layer that the prediction does not
        have leaves the cursor where it is.

        Args:
            layer: The layer that runs now.

        Returns:
            Whether it was the expected one.
        """
        if self._in_pass:
            self._recorded.append(layer)
        sequence = self._sequence
        cursor = self._cursor
        hit = bool(sequence) and sequence[cursor] == layer
        if not hit:
            self._settled = 0
            positions = self._positions.get(layer)
            if positions is None:
                return False
            later = bisect_right(positions, cursor)
            cursor = positions[later if later < len(positions) else 0]
        self._cursor = (cursor + 1) % len(sequence)
        self._settled = max(self._settled - 1, 0)
        if self._blocks is not None and self._in_pass and self._blocks.visit(layer):
            self._learn(self._blocks)
        return hit

    def unsettled(self) -> Iterator[int]:
        """Yields what `upcoming` does, without the first ones that were settled.

        As long as the order is a guess, those that ran are not expected again in the
        same pass: the cursor jumps back and forth over them, and what is copied again
        too early is in the way of everything behind it.
        """
        count = len(self._sequence) - self._settled
        lap = _lap(self._sequence, self._cursor + self._settled, count)
        if self._guesses:
            ran = set(self._recorded)
            return (layer for layer in lap if layer not in ran)
        return lap

    @property
    def _guesses(self) -> bool:
        return self._blocks is not None and self._in_pass

    def settle(self, layer: int) -> bool:
        """Notes that the next unsettled layer needs nothing before its visit.

        So a prefetch need not look through all copies that are on their way already.

        Args:
            layer: The layer.

        Returns:
            False if that cannot be noted: one that runs several times in a pass is
            used up by each visit, and a guess may be wrong.
        """
        if self._guesses or len(self._positions[layer]) > 1:
            return False
        self._settled += 1
        return True

    def unsettle(self) -> None:
        """Forgets what was settled, because copies were given up."""
        self._settled = 0

    def upcoming(self, count_limit: int | None = None) -> Iterator[int]:
        """Yields the layers expected next, going on into the next pass.

        What it yields is fixed by the moment of the call; later visits do not move it.

        Args:
            count_limit: Stop after so many; None: after one lap, which is also the
                most that is ever yielded.
        """
        count = len(self._sequence)
        if count_limit is not None:
            count = min(count, count_limit)
        return _lap(self._sequence, self._cursor, count)

    def end_pass(self, complete: bool) -> None:
        """Ends the pass; does nothing when none is running.

        Args:
            complete: Whether the pass ran to its end. Its recording is then the new
                prediction. A pass cut short by an exception keeps the old one, and so
                does a pass without visits, which says nothing about an order.
        """
        if not self._in_pass:
            return
        self._in_pass = False
        self._rewind()
        if complete and self._recorded:
            self._blocks = None  # no guess is as good as this
            recorded = tuple(self._recorded)
            if recorded != self._sequence:
                self._predict(self._with_unheard(recorded))

    def _learn(self, blocks: BlockOrder) -> None:
        """Predict the rest of the first pass from the block that has just ended."""
        visited = list(dict.fromkeys(self._recorded))
        seen = set(visited)
        coming = [layer for layer in self._sequence if layer not in seen]
        rest = blocks.rearranged(coming, visited)
        self._predict((*visited, *rest))
        self._cursor = len(visited) % len(self._sequence)

    def _rewind(self) -> None:
        if self._cursor:  # a whole pass ends where it begins
            self._cursor = 0
            self._settled = 0

    def _with_unheard(self, recorded: tuple[int, ...]) -> tuple[int, ...]:
        """Puts layers that were not heard of behind those that they followed."""
        if self._heard is None:
            return recorded
        known = self._heard.union(recorded)
        first: list[int] = []
        followers: dict[int, list[list[int]]] = {}
        run = first
        for layer in self._whole:
            if layer in known:
                run = []
                followers.setdefault(layer, []).append(run)
            else:
                run.append(layer)
        whole = list(first)
        for layer in recorded:
            whole.append(layer)
            if runs := followers.get(layer):
                whole += runs.pop(0)
        for runs in followers.values():
            whole += chain.from_iterable(runs)  # of layers that did not run this time
        return tuple(whole)

    def _predict(self, sequence: tuple[int, ...]) -> None:
        self._stale = False
        self._whole = sequence
        if self._heard is not None:
            sequence = tuple(layer for layer in sequence if layer in self._heard)
        self._sequence = sequence
        self._cursor = 0
        self._settled = 0
        self._positions = {}
        for position, layer in enumerate(sequence):
            self._positions.setdefault(layer, []).append(position)


def _lap(sequence: tuple[int, ...], start: int, count: int) -> Iterator[int]:
    length = len(sequence)
    for position in range(start, start + count):
        yield sequence[position % length]

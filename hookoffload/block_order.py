"""What the first of several equal blocks tells about the order in the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# (where the block is among modules, its number), and the layer's name inside it
_Place = tuple[tuple[str, int], str]


class BlockOrder:
    """Learns the order inside a repeated block while the first of them runs.

    Layers are predicted in the order of registration, and few forwards follow it. But
    what the first of sixty blocks did is what the others will do.

    Args:
        names: the full names of the layers, by index. Blocks are told by the first
            number in a name: ``blocks.7.attn.to_q`` is in block 7 of ``blocks``.

    Example:
        >>> order = BlockOrder(["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"])
        >>> [order.visit(layer) for layer in (1, 0, 3)]
        [False, False, True]
        >>> order.rearranged([2, 3], visited=[1, 0])
        [3, 2]
    """

    __slots__ = ("_current", "_known", "_places")

    def __init__(self, names: Sequence[str]) -> None:
        self._places = [_place(name) for name in names]
        self._current: tuple[str, int] | None = None
        self._known: set[str] = set()

    def visit(self, layer: int) -> bool:
        """Follow one layer; tell whether a first block has just ended."""
        place = self._places[layer] if layer < len(self._places) else None
        if place is None:
            return False
        before, self._current = self._current, place[0]
        if before is None or before == place[0] or before[0] != place[0][0]:
            return False
        new = before[0] not in self._known
        self._known.add(before[0])
        return new

    def rearranged(self, coming: Sequence[int], visited: Iterable[int]) -> list[int]:
        """Put layers that are still to come into the order of the blocks before.

        Args:
            coming: layers, as predicted.
            visited: layers that ran, in their order.

        Returns:
            The same layers, from the block on that runs now. Those of a block keep the
            places that they have together; those that the block before did not run go
            to the end of these.
        """
        current = (i for i, layer in enumerate(coming) if self._is_current(layer))
        begin = next(current, 0)
        coming = [*coming[begin:], *coming[:begin]]
        rank: dict[tuple[str, str], int] = {}
        for layer in visited:
            place = self._places[layer] if layer < len(self._places) else None
            if place is not None:
                rank.setdefault((place[0][0], place[1]), len(rank))
        slots: dict[tuple[str, int], list[int]] = {}
        for position, layer in enumerate(coming):
            place = self._places[layer]
            if place is not None:
                slots.setdefault(place[0], []).append(position)
        result = list(coming)
        for (container, _), positions in slots.items():
            members = [coming[position] for position in positions]
            members.sort(key=lambda layer: rank.get(self._key(layer), len(rank)))
            if container in self._known:
                for position, layer in zip(positions, members, strict=True):
                    result[position] = layer
        return result

    def _is_current(self, layer: int) -> bool:
        place = self._places[layer]
        return place is not None and place[0] == self._current

    def _key(self, layer: int) -> tuple[str, str]:
        place = self._places[layer]
        assert place is not None, "only layers of blocks are sorted"
        return place[0][0], place[1]


def block_of(name: str) -> tuple[str, int] | None:
    """Return the list and the number of the block that a layer is in, if any.

    Example:
        >>> block_of("blocks.7.attn.to_q")
        ('blocks', 7)
    """
    place = _place(name)
    return None if place is None else place[0]


def _place(name: str) -> _Place | None:
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            block = (".".join(parts[:index]), int(part))
            return block, ".".join(parts[index + 1 :])
    return None

"""Which layers stay before which: one list, whatever the limit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from .block_order import block_of
from .plan import LayerSpec
from .window_size import ring_wanted

# Norms, biases and tables: too small for a copy of their own to be worth its launch.
SMALL_LAYER_BYTES = 2**20


def priorities(
    layers: tuple[LayerSpec, ...], order: Sequence[int]
) -> tuple[list[int], int]:
    """Lists the layers that may stay, the most wanted first; counts the small ones."""
    giants = giants_of(layers)
    visited = set(order)
    groups: list[list[int]] = [[], [], [], [], []]
    for index, layer in enumerate(layers):
        if not layer.can_stay:
            continue
        if index in giants:
            rank = 2
        elif index not in visited:
            rank = 4
        elif layer.stream_bytes <= SMALL_LAYER_BYTES:
            rank = 0
        else:
            rank = 1 if layer.held else 3
        groups[rank].append(index)
    small, held, giant, rest, absent = groups
    spread = [*_spread(small, layers, order), *_spread(held, layers, order), *giant]
    return [*spread, *_spread(rest, layers, order), *absent], len(small)


def giants_of(layers: tuple[LayerSpec, ...]) -> frozenset[int]:
    """Finds the few layers that alone make the window large.

    A vocabulary's output layer among layers a tenth of its size: streamed, it
    wants a window of three times its own bytes; resident, it takes them once, and the
    window is sized by the others. So it stays before all but the small and the held.
    """
    passing = [i for i, layer in enumerate(layers) if not layer.held]
    passing.sort(key=lambda index: -layers[index].stream_bytes)
    sizes = [layers[index].stream_bytes for index in passing]
    total = sum(sizes)
    streamed = ring_wanted(sizes[0], total) if sizes else 0
    most_saved, giants, taken = 0, 0, 0
    for count, index in enumerate(passing[:-1], start=1):
        layer = layers[index]
        taken += layer.resident_bytes
        if taken >= streamed or not layer.can_stay or sizes[count] == 0:
            break
        if layer.stream_bytes <= SMALL_LAYER_BYTES:
            break
        total -= layer.stream_bytes
        saved = streamed - taken - ring_wanted(sizes[count], total)
        if saved > most_saved:
            most_saved, giants = saved, count
    return frozenset(passing[:giants])


def _spread(
    group: list[int], layers: tuple[LayerSpec, ...], order: Sequence[int]
) -> list[int]:
    """Lists a group so that every beginning of the list is spread over the order.

    The points of the van der Corput sequence (0, 1/2, 1/4, 3/4, 1/8, ...) fill the
    order, measured in bytes, evenly at any count; each takes the nearest layer left, or
    a smaller one of the same block: what streams then are few large layers, for which
    the host has less to do.
    """
    members = set(group)
    middles: list[float] = []
    owners: list[int] = []
    slots: dict[int, list[int]] = {index: [] for index in group}
    block_at = {index: block_of(layers[index].name) or index for index in group}
    blocks: dict[object, list[int]] = {}
    end = 0
    for index in order:
        start, end = end, end + layers[index].stream_bytes
        if index in members:
            if not slots[index]:
                blocks.setdefault(block_at[index], []).append(index)
            slots[index].append(len(owners))
            middles.append((start + end) / 2)
            owners.append(index)
    for block in blocks.values():
        block.sort(key=lambda index: -layers[index].stream_bytes)
    # Slot i is at i + 1 in both, with a guard before the first and behind the last.
    left = list(range(len(owners) + 2))
    right = list(range(len(owners) + 2))
    spread: list[int] = []
    gone: set[int] = set()
    while len(spread) < len(group):
        point = _radical_inverse(len(spread)) * end
        at = bisect_left(middles, point)
        before, behind = _free(left, at) - 1, _free(right, at + 1) - 1
        nearer = behind
        if behind == len(owners) or (
            before >= 0 and point - middles[before] < middles[behind] - point
        ):
            nearer = before
        taken = owners[nearer]
        rest = blocks[block_at[taken]]
        while rest[-1] in gone:
            rest.pop()
        if layers[rest[-1]].stream_bytes < layers[taken].stream_bytes:
            taken = rest[-1]
        gone.add(taken)
        spread.append(taken)
        for slot in slots[taken]:
            left[slot + 1] = slot
            right[slot + 1] = slot + 2
    return spread


def _radical_inverse(number: int) -> float:
    """Mirrors the binary digits of a number at the point: 6 = 110b becomes 0.011b."""
    digits = f"{number:b}"
    return int(digits[::-1], 2) / (1 << len(digits))


def _free(links: list[int], slot: int) -> int:
    """Follows links of taken slots to a free one, and shortens the way for the next."""
    while links[slot] != slot:
        links[slot] = links[links[slot]]
        slot = links[slot]
    return slot

"""Layers and a limit become a plan: pure arithmetic that moves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .block_order import block_of
from .budget import BudgetExceededError, format_gib_up, format_limit
from .coded_residents import codable_residents
from .plan import LayerSpec, Plan
from .priorities import priorities
from .window_size import WINDOW_ROOM_SHARE, ring_wanted

# Small layers stay even where the window has to shrink for them, as long as they take
# at most this part of what the limit leaves for residents and window.
SMALL_LAYERS_SHARE = 8


def make_plan(
    layers: Sequence[LayerSpec],
    *,
    order: Sequence[int],
    chains: Sequence[tuple[int, ...]],
    limit_bytes: int | None,
    always_bytes: int = 0,
    activation_bytes: int = 0,
    keep_residents: bool = True,
    code_share: float = 1.0,
    ranked: tuple[list[int], int] | None = None,
) -> Plan:
    """Chooses the residents and the size of the window.

    One list of priorities, which does not depend on the limit, is cut off where the
    memory ends. So the residents of a smaller limit are a subset of those of a larger
    one, and more memory never means more bytes over the link.

    Residents are kept coded, as far as that is possible, where not all fit decoded:
    see [Note: residents that are kept coded].

    Args:
        layers: Every layer of the model.
        order: The layers of a pass, as indices, in sequence.
        chains: Layers that are bound at the same time at some moment, outermost first,
            at most one of them not held. A layer in no chain is bound alone.
        limit_bytes: The most the plan may take, in bytes; None: no limit; 0: as little
            as possible, nothing resident.
        always_bytes: Bytes that are on the device whatever is planned.
        activation_bytes: Bytes to leave for activations. They shrink what is left for
            residents and window, but never make a limit impossible.
        keep_residents: False streams everything, as a first, measuring pass does.
        code_share: The share of what could be kept coded that may be; the rest is
            decoded once, when it becomes resident.
        ranked: What `priorities` says of these layers in this order, for those who
            make several plans: of tens of thousands of layers that is most of the work.

    Returns:
        The plan. It keeps the limit, activations included, unless these leave less
        than the least window; then it is the smallest plan there is.

    Raises:
        BudgetExceededError: If the limit is below the least this model needs.

    Example:
        >>> specs = [
        ...     LayerSpec(name=f"blocks.{i}", stream_bytes=2**30, copy_bytes=2**30,
        ...               resident_bytes=2**30)
        ...     for i in range(8)
        ... ]
        >>> plan = make_plan(specs, order=range(8), chains=[], limit_bytes=5 * 2**30)
        >>> sorted(plan.resident), plan.ring_bytes == 3 * 2**30
        ([0, 4], True)
    """
    layers = tuple(layers)
    priority, small_count = ranked or priorities(layers, order)
    codable = codable_residents(layers, order, code_share)
    needs = _Needs(layers, chains, frozenset(priority), codable)
    least = _Least.of(layers, needs.chains, always_bytes)
    if limit_bytes is not None and 0 < limit_bytes < least.total:
        raise BudgetExceededError(least.explain(limit_bytes))
    if limit_bytes == 0:
        limit_bytes, keep_residents = least.total, False

    room: int | None = None
    small_stay = True
    if limit_bytes is not None:
        room = limit_bytes - always_bytes - activation_bytes
        small = sum(layers[index].resident_bytes for index in priority[:small_count])
        beside_least = room - least.stack - least.scratch - least.ring
        small_stay = small * SMALL_LAYERS_SHARE <= beside_least

    def fits() -> bool:
        return room is None or needs.total(needs.ring_wanted(room)) <= room

    # From the end of the list: the first count that fits is the largest that does.
    count, decoded = len(priority), len(codable)
    while decoded and not fits():
        decoded -= 1
        needs.keep_coded(decoded)
    while count:
        if keep_residents and (fits() or (count == small_count and small_stay)):
            break
        count -= 1
        needs.stream(priority[count])
    needs.settle()

    ring = needs.ring_wanted(room)
    if room is not None:
        ring = max(needs.ring_least, min(ring, room - needs.total(ring=0)))
    return Plan(
        layers=layers,
        resident=frozenset(priority[:count]),
        order=tuple(order),
        limit_bytes=limit_bytes,
        least_bytes=least.total,
        ring_bytes=ring,
        stack_bytes=needs.stack,
        scratch_bytes=needs.scratch,
        always_bytes=always_bytes,
        activation_bytes=activation_bytes,
        chains=tuple(chains),
        kept_coded=frozenset(codable[decoded:]).intersection(priority[:count]),
        code_share=code_share,
    )


class _Needs:
    """What a plan takes, while its residents become streamed one after another."""

    def __init__(
        self,
        layers: tuple[LayerSpec, ...],
        chains: Sequence[tuple[int, ...]],
        resident: frozenset[int],
        codable: Sequence[int],
    ) -> None:
        alone = set(range(len(layers))).difference(*chains)
        self.chains = [tuple(dict.fromkeys(chain)) for chain in chains]
        self.chains += [(index,) for index in sorted(alone)]
        self.scratch = 0
        self._layers = layers
        self._resident_bytes = 0
        self._ring_total = 0
        self._block_of = [block_of(layer.name) for layer in layers]
        self._in_block: dict[tuple[str, int], int] = {}
        self._largest_block = 0
        self._largest = 0
        # Even where nothing streams, layers that are cast on their way to becoming
        # resident pass through: those that are never kept coded, and then the first of
        # the others.
        stay = [layer for layer in layers if layer.can_stay]
        self.stack = max((s.transit_bytes for s in stay if s.held), default=0)
        self._codable = codable
        self._kept_coded: set[int] = set()
        others = [layers[i] for i in set(range(len(layers))).difference(codable)]
        passing = [s.transit_bytes for s in others if s.can_stay and not s.held]
        self._transits = [max(passing, default=0)]
        for index in codable:
            self._transits.append(max(self._transits[-1], layers[index].transit_bytes))
        self._transit = self._transits[-1]
        self._held_in = [0] * len(self.chains)
        self._casts_in = [0] * len(self.chains)
        self._chains_of: list[list[int]] = [[] for _ in layers]
        for number, chain in enumerate(self.chains):
            for index in chain:
                self._chains_of[index].append(number)
                self._casts_in[number] += layers[index].resident_cast_bytes
        for index, layer in enumerate(layers):
            self._resident_bytes += layer.resident_bytes
            if index not in resident:
                self.stream(index)
        self.settle()

    @property
    def ring_least(self) -> int:
        """Bytes of the smallest ring through which everything passes."""
        return max(self._transit, self._largest)

    def ring_wanted(self, room: int | None) -> int:
        """Bytes of a ring that lets copies go on, in so much room for everything."""
        block = self._largest_block
        if room is not None:
            block = min(block, room // WINDOW_ROOM_SHARE)
        wanted = ring_wanted(self._largest, self._ring_total, block)
        return max(wanted, self.ring_least)

    def total(self, ring: int) -> int:
        """Bytes taken with such a ring, without what is there always."""
        return self._resident_bytes + ring + self.stack + self.scratch

    def keep_coded(self, place: int) -> None:
        """Codes a resident, the last but those that are coded already."""
        index = self._codable[place]
        layer = self._layers[index]
        self._kept_coded.add(index)
        self._resident_bytes -= layer.resident_bytes - layer.coded_bytes
        self._transit = self._transits[place]
        self._cast(index)

    def stream(self, index: int) -> None:
        """Takes a layer out of the residents."""
        layer = self._layers[index]
        coded = index in self._kept_coded
        self._resident_bytes -= layer.coded_bytes if coded else layer.resident_bytes
        if not layer.held:
            self._ring_total += layer.stream_bytes
            if (block := self._block_of[index]) is not None:
                taken = self._in_block.get(block, 0) + layer.stream_bytes
                self._in_block[block] = taken
                self._largest_block = max(self._largest_block, taken)
            self._largest = max(self._largest, layer.stream_bytes)
        if not coded:
            self._cast(index)
        if layer.held:
            for number in self._chains_of[index]:
                self._held_in[number] += layer.stream_bytes
                self.stack = max(self.stack, self._held_in[number])

    def _cast(self, index: int) -> None:
        """Has a layer that stayed decoded take what casts take of those that do not."""
        layer = self._layers[index]
        for number in self._chains_of[index]:
            self._casts_in[number] += layer.cast_bytes - layer.resident_cast_bytes
            # Where streaming a layer makes casts smaller, the scratch keeps its size
            # for now: too large, because a new maximum would have to be searched.
            self.scratch = max(self.scratch, self._casts_in[number])

    def settle(self) -> None:
        """Makes the scratch exact for the residents that are left."""
        self.scratch = max(self._casts_in, default=0)


@dataclass(frozen=True, kw_only=True)
class _Least:
    """The smallest plan there is, whatever is resident, and why it is no smaller."""

    ring: int
    stack: int
    scratch: int
    always: int
    largest: str
    held: tuple[str, ...]

    @classmethod
    def of(
        cls, layers: tuple[LayerSpec, ...], chains: list[tuple[int, ...]], always: int
    ) -> _Least:
        passing = [layer for layer in layers if not layer.held]
        largest = max(passing, key=lambda layer: layer.stream_bytes, default=None)
        stack, scratch = 0, 0
        held: tuple[str, ...] = ()
        for chain in chains:
            members = [layers[index] for index in chain]
            outer = [layer for layer in members if layer.held]
            if len(members) - len(outer) > 1:
                names = ", ".join(layer.name for layer in members if not layer.held)
                raise AssertionError(
                    f"{names} are bound at the same time, but only one of them is "
                    "allowed to be a layer that is not held."
                )
            taken = sum(layer.stream_bytes for layer in outer)
            if taken > stack:
                stack, held = taken, tuple(layer.name for layer in outer)
            scratch = max(scratch, sum(map(_most_cast_bytes, members)))
        return cls(
            ring=largest.stream_bytes if largest else 0,
            stack=stack,
            scratch=scratch,
            always=always,
            largest=largest.name if largest else "",
            held=held,
        )

    @property
    def total(self) -> int:
        return self.always + self.ring + self.stack + self.scratch

    def explain(self, limit_bytes: int) -> str:
        needed = format_gib_up(self.total)
        held = " and ".join(self.held)
        parts = [
            (self.ring, f"{self.largest} takes"),
            (self.always, "always-resident tensors"),
            (self.stack, f"{held} (bound while other layers run)"),
            (self.scratch, "casts to the computation dtype"),
        ]
        why = ", ".join(f"{what} {format_gib_up(n)}" for n, what in parts if n)
        return (
            f"limit_gb={format_limit(limit_bytes)} is below the least this model "
            f"needs, {needed} GiB: {why}. Set limit_gb={needed} or more, or 0 for as "
            "little as possible."
        )


def _most_cast_bytes(layer: LayerSpec) -> int:
    if not layer.can_stay:
        return layer.cast_bytes
    return max(layer.cast_bytes, layer.resident_cast_bytes)

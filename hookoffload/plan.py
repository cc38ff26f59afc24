"""A plan: pure data, and the table that a reader sees."""

from __future__ import annotations

from dataclasses import dataclass

from .budget import format_gib, format_gib_up


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a plan has to know about a layer.

    Attributes:
        name: The full name of its module.
        stream_bytes: Bytes of its region in the window while streamed, aligned.
        copy_bytes: Bytes that cross the link each time it is brought in.
        cast_bytes: Bytes of scratch while bound, when streamed.
        resident_bytes: Bytes it keeps on the device when resident.
        resident_cast_bytes: Bytes of scratch while bound, when resident.
        transit_bytes: Bytes of the region that it passes through on its way to
            becoming resident, if it is cast there.
        held: Whether other layers can run while it is bound. Its region is then in the
            window's stack and not in its first-in-first-out part.
        can_stay: Whether it may be resident at all.
    """

    name: str
    stream_bytes: int
    copy_bytes: int
    cast_bytes: int = 0
    resident_bytes: int = 0
    resident_cast_bytes: int = 0
    transit_bytes: int = 0
    held: bool = False
    can_stay: bool = True


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """Which layers are resident, how large the window is, and what it costs.

    ``str(plan)`` is a table for readers, in GiB.

    Attributes:
        layers: Every layer of the model; all indices point into it.
        resident: The layers that stay on the compute device between passes.
        order: The layers of a pass, in sequence; one that runs twice is in it twice.
        limit_bytes: The limit the plan keeps, in bytes; None: no limit. A limit of 0
            was replaced by `least_bytes`.
        least_bytes: The smallest limit that this model runs with, in bytes.
        ring_bytes: The first-in-first-out part of the window, in bytes.
        stack_bytes: The part of the window for layers that other layers run inside of.
        scratch_bytes: The most that casts take at once, in bytes.
        always_bytes: Bytes that are on the device whatever is planned: buffers.
        activation_bytes: Bytes left free for what the model itself computes.
    """

    layers: tuple[LayerSpec, ...]
    resident: frozenset[int]
    order: tuple[int, ...]
    limit_bytes: int | None
    least_bytes: int
    ring_bytes: int
    stack_bytes: int
    scratch_bytes: int
    always_bytes: int
    activation_bytes: int

    @property
    def window_bytes(self) -> int:
        """Bytes of the block that streamed layers pass through."""
        return self.ring_bytes + self.stack_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident layers."""
        return sum(self.layers[index].resident_bytes for index in self.resident)

    @property
    def streamed(self) -> tuple[int, ...]:
        """The layers that are not resident, by index."""
        return tuple(i for i in range(len(self.layers)) if i not in self.resident)

    @property
    def total_bytes(self) -> int:
        """Bytes taken on the device at the peak, without activations."""
        taken = self.always_bytes + self.window_bytes + self.scratch_bytes
        return taken + self.resident_bytes

    @property
    def pass_bytes(self) -> int:
        """Bytes that cross the link in one pass."""
        return sum(
            self.layers[index].copy_bytes
            for index in self.order
            if index not in self.resident
        )

    def __repr__(self) -> str:
        """Counts residents and streamed layers, because all fields fill pages."""
        return f"Plan({self._summary()})"

    def __str__(self) -> str:
        """Shows what the plan takes and costs, and its layers with repeats folded."""
        limit = "none"
        if self.limit_bytes is not None:
            limit = format_gib(self.limit_bytes)
        residents = f"{len(self.resident)} layers"
        ring, stack = format_gib(self.ring_bytes), format_gib(self.stack_bytes)
        rows = [
            ("limit", limit, f"least {format_gib_up(self.least_bytes)} GiB"),
            ("residents", format_gib(self.resident_bytes), residents),
            (
                "window",
                format_gib(self.window_bytes),
                f"{ring} first in first out, {stack} held",
            ),
            ("casts", format_gib(self.scratch_bytes), ""),
            ("always there", format_gib(self.always_bytes), ""),
            ("activations", format_gib(self.activation_bytes), ""),
            ("together", format_gib(self.total_bytes + self.activation_bytes), ""),
            ("copied per pass", format_gib(self.pass_bytes), ""),
        ]
        lines = [f"Plan: {self._summary()}"]
        lines += [f"  {a:<15} {b:>11}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([*lines, *self._table()])

    def _summary(self) -> str:
        resident, layers = len(self.resident), len(self.layers)
        return f"{resident} of {layers} layers resident, {layers - resident} streamed"

    def _table(self) -> list[str]:
        groups = _folded(self.layers)
        names = [name if len(name) <= 44 else f"...{name[-41:]}" for name, _ in groups]
        width = max(map(len, names), default=0)
        lines = []
        for name, (_, members) in zip(names, groups, strict=True):
            resident = sum(index in self.resident for index in members)
            size = _short_size(self.layers[members[0]].stream_bytes)
            lines.append(
                f"  {name:<{width}}  {len(members):>4} x {size:>10}"
                f"  {resident:>4} resident"
            )
        return lines


def _folded(layers: tuple[LayerSpec, ...]) -> list[tuple[str, list[int]]]:
    """Groups layers whose names differ by runs of numbers: blocks.0-59.attn.to_q.

    Args:
        layers: Layers; only those of one size come into one group.

    Returns:
        The name of each group and the indices of its layers.
    """
    rows = [(layer.name.split("."), [index]) for index, layer in enumerate(layers)]
    depth = max((len(parts) for parts, _ in rows), default=0)
    for level in range(depth):
        merged: list[tuple[list[str], list[int]]] = []
        # What surrounds the number at this level -> where its run began, the last
        # number of the run, and the run's place in merged.
        runs: dict[tuple[object, ...], tuple[int, int, int]] = {}
        for parts, members in rows:
            if level < len(parts) and parts[level].isdecimal():
                number = int(parts[level])
                around = (*parts[:level], "*", *parts[level + 1 :])
                key = (*around, layers[members[0]].stream_bytes)
                first, last, place = runs.get(key, (number, number, -1))
                if place >= 0 and number == last + 1:
                    runs[key] = (first, number, place)
                    merged[place][0][level] = f"{first}-{number}"
                    merged[place][1].extend(members)
                    continue
                runs[key] = (number, number, len(merged))
            merged.append((parts, members))
        rows = merged
    return [(".".join(parts), members) for parts, members in rows]


def _short_size(nbytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"

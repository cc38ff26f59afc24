"""A plan as its reader sees it: a table that fits the terminal, or JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .budget import format_gib, format_gib_up
from .cost import CurvePoint, Prediction

if TYPE_CHECKING:
    from .plan import LayerSpec, Plan

WIDTH = 80
# Below this a row of the table is two lines, and notes go under what they explain.
_NARROW = 64
_SHORTEST_NAME = 16
_LABEL = 15
_FIGURE = 11


class LayerGroup(NamedTuple):
    """Layers of one size whose names differ by a run of numbers.

    Attributes:
        name: Their name, with the run folded: "blocks.0-59.attn.to_q".
        members: Their indices.
        nbytes: What each of them takes while it is streamed.
        dtype: As in `LayerSpec`.
        resident: How many of them stay.
        in_place: Whether they are read where they rest.
        from_disk: How many of those that are brought in come from disk.
    """

    name: str
    members: tuple[int, ...]
    nbytes: int
    dtype: str
    resident: int
    in_place: bool
    from_disk: int

    @property
    def streamed(self) -> int:
        """How many are brought in for each forward."""
        return 0 if self.in_place else len(self.members) - self.resident


def groups_of(plan: Plan) -> list[LayerGroup]:
    """Folds the layers of a plan: blocks.0-59.attn.to_q."""
    groups = []
    for name, members in _folded(plan.layers):
        first = plan.layers[members[0]]
        resident = sum(index in plan.resident for index in members)
        nbytes = first.stream_bytes or first.copy_bytes
        read = sum(
            i not in plan.resident and plan.layers[i].disk_bytes > 0 for i in members
        )
        group = LayerGroup(
            name=name,
            members=tuple(members),
            nbytes=nbytes,
            dtype=first.dtype,
            resident=resident,
            in_place=first.in_place and not resident,
            from_disk=read,
        )
        groups.append(group)
    return groups


def format_plan(
    plan: Plan, width: int = WIDTH, *, disk_option: str = 'store="disk"'
) -> str:
    """Writes what a plan takes and costs, and its layers with repeats folded.

    Args:
        plan: Any plan.
        width: The most columns; at very few, long names are cut to fit.
        disk_option: How the reader has weights wait in files.
    """
    together = plan.total_bytes + plan.activation_bytes
    size = partial(
        format_gib, like=max(together, plan.limit_bytes or 0, plan.pass_bytes)
    )
    limit = "none" if plan.limit_bytes is None else size(plan.limit_bytes)
    coded = any(layer.decoded_bytes for layer in plan.layers)
    rows = [
        ("limit", limit, f"least {format_gib_up(plan.least_bytes)} GiB"),
        ("residents", size(plan.resident_bytes), _residents(plan, size)),
        (
            "window",
            size(plan.window_bytes),
            f"{size(plan.ring_bytes)} first in first out, "
            f"{size(plan.stack_bytes)} held",
        ),
        (
            "casts",
            size(plan.scratch_bytes),
            f"and decoding, {size(plan.decoded_bytes)} a pass" if coded else "",
        ),
        ("always there", size(plan.always_bytes), ""),
        ("activations", size(plan.activation_bytes), ""),
        ("together", size(together), ""),
        (
            "copied per pass",
            size(plan.pass_bytes),
            f"coded, {plan.coded_share:.1%} of the weights"
            if coded and plan.pass_bytes
            else "",
        ),
    ]
    if plan.divided:
        waiting = sum(layer.host_bytes > 0 for layer in plan.layers)
        rows.append(("in host RAM", size(plan.host_bytes), f"{waiting} layers"))
    if plan.disk_bytes:
        rows.append(("read from disk", size(plan.disk_bytes), "per pass"))
    prediction = plan.predict()
    if prediction is not None:
        rows.append(("predicted", _seconds(prediction), _parts(prediction)))
    lines = textwrap.wrap(f"Plan: {plan.summary}", width)
    if plan.device.startswith("cpu") and all(one.in_place for one in plan.layers):
        note = "The CPU computes where weights rest, so nothing moves."
        lines += textwrap.wrap(f"{note} Less RAM: {disk_option}.", width)
    for row in rows:
        lines += _summary_row(*row, width)
    return "\n".join([*lines, *_table(groups_of(plan), width, plan.divided)])


def format_curve(
    points: Sequence[CurvePoint], width: int = WIDTH, *, at_least: bool = False
) -> str:
    """Writes the points of a curve, one a line, with a bar for the seconds.

    Args:
        points: Of `Plan.curve`.
        width: The most columns.
        at_least: The seconds are a lower bound, because not every rate is known.
    """
    timed = [point.seconds for point in points if point.seconds is not None]
    longest = max(timed, default=0.0)
    header = f"{'limit':>12} {'resident':>12}"
    if timed:
        header += f" {'>= s a pass' if at_least else 's a pass':>10}"
    lines = [header[:width]]
    for limit, seconds, resident in points:
        # Rounded up: the least, and where everything stays, must be so as typed back.
        name = "none" if limit is None else f"{format_gib_up(limit)} GiB"
        line = f"{name:>12} {format_gib(resident):>12}"
        if seconds is not None:
            room = max(width - len(line) - 12, 0)
            bar = "#" * round(room * seconds / longest) if longest else ""
            line = f"{line} {seconds:>10.3f} {bar}".rstrip()
        lines.append(line)
    return "\n".join(lines)


def plan_record(plan: Plan) -> dict[str, Any]:
    """Returns a plan as JSON takes it; all sizes in bytes."""
    prediction = plan.predict()
    predicted = None
    if prediction is not None:
        predicted = {
            **asdict(prediction),
            "seconds": prediction.seconds,
            "complete": prediction.complete,
        }
    groups = [
        {
            "name": group.name,
            "layers": len(group.members),
            "resident": group.resident,
            "streamed": group.streamed,
            "from_disk": group.from_disk,
            "bytes_each": group.nbytes,
            "dtype": group.dtype,
        }
        for group in groups_of(plan)
    ]
    return {
        "device": plan.device,
        "limit_bytes": plan.limit_bytes,
        "least_bytes": plan.least_bytes,
        "layers": len(plan.layers),
        "resident_layers": len(plan.resident),
        "resident_bytes": plan.resident_bytes,
        "coded_resident_layers": len(plan.kept_coded),
        "coded_resident_bytes": plan.kept_coded_bytes,
        "window_bytes": plan.window_bytes,
        "cast_bytes": plan.scratch_bytes,
        "always_bytes": plan.always_bytes,
        "activation_bytes": plan.activation_bytes,
        "together_bytes": plan.total_bytes + plan.activation_bytes,
        "pass_bytes": plan.pass_bytes,
        "coded_share": plan.coded_share,
        "decoded_bytes": plan.decoded_bytes,
        "link_bytes": plan.link_bytes,
        "disk_bytes": plan.disk_bytes,
        "host_bytes": plan.host_bytes,
        "predicted": predicted,
        "groups": groups,
    }


def _residents(plan: Plan, size: Callable[[int], str]) -> str:
    layers = f"{len(plan.resident)} layers"
    if not plan.kept_coded:
        return layers
    nbytes = size(plan.kept_coded_bytes)
    return f"{layers}, {len(plan.kept_coded)} of them coded, {nbytes}"


def _seconds(prediction: Prediction) -> str:
    bound = "" if prediction.complete else ">= "
    return f"{bound}{prediction.seconds:.3f} s"


def _parts(prediction: Prediction) -> str:
    shown = [
        f"{name} {'not known' if seconds is None else f'{seconds:.3f}'}"
        for name, seconds in prediction.parts.items()
    ]
    return f"a pass: {', '.join(shown)}"


def _summary_row(label: str, figure: str, note: str, width: int) -> list[str]:
    line = f"  {label:<{_LABEL}} {figure:>{_FIGURE}}"
    if len(line) + 2 + len(note) <= width:
        return [f"{line}  {note}".rstrip()]
    wrapped = textwrap.wrap(
        note, width, initial_indent=" " * 4, subsequent_indent=" " * 4
    )
    return [line[:width], *wrapped]


def _table(groups: list[LayerGroup], width: int, divided: bool) -> list[str]:
    if not groups:
        return []
    sizes = ["in place" if g.in_place else short_size(g.nbytes) for g in groups]
    dtypes = max(len(group.dtype) for group in groups)
    dtypes = max(dtypes, len("dtype")) if dtypes else 0
    figures = 2 + 2 + 10 + 2 * bool(dtypes) + dtypes + (3 if divided else 2) * (2 + 8)
    if width < max(_NARROW, figures + _SHORTEST_NAME):
        return _narrow_table(groups, sizes, width, divided)
    longest = max(*(len(group.name) for group in groups), len("layers"))
    names = min(longest, width - figures)

    def row(name: str, size: str, dtype: str, *tiers: object) -> str:
        kind = f"  {dtype:<{dtypes}}" if dtypes else ""
        counts = "".join(f"  {tier:>8}" for tier in tiers)
        return f"  {cut_name(name, names):<{names}}  {size:>10}{kind}{counts}"

    heads = ("resident", "streamed", "on disk") if divided else ("resident", "streamed")
    lines = [row("layers", "each", "dtype", *heads)]
    for group, size in zip(groups, sizes, strict=True):
        tiers = (group.resident, group.streamed, group.from_disk)
        lines.append(row(group.name, size, group.dtype, *tiers[: len(heads)]))
    return lines


def _narrow_table(
    groups: list[LayerGroup], sizes: list[str], width: int, divided: bool
) -> list[str]:
    lines = []
    for group, size in zip(groups, sizes, strict=True):
        tiers = f"{group.resident} resident, {group.streamed} streamed"
        if divided:
            tiers += f", {group.from_disk} of them from disk"
        line = " ".join(part for part in (size, group.dtype) if part)
        lines.append("  " + cut_name(group.name, max(width - 2, _SHORTEST_NAME)))
        lines += textwrap.wrap(
            f"{line}, {tiers}", width, initial_indent="    ", subsequent_indent="    "
        )
    return lines


def cut_name(name: str, width: int) -> str:
    """Shortens a name from the left: its end is what tells layers apart.

    What is left begins where a component does, unless that costs half of it.

    Example:
        >>> cut_name("language_model.layers.0-125.mlp.up_proj", 24)
        '...0-125.mlp.up_proj'
    """
    if len(name) <= width:
        return name
    room = width - 3
    whole = name[-room - 1 :].partition(".")[2]
    return "..." + (whole if 2 * len(whole) >= room else name[-room:])


def _folded(layers: tuple[LayerSpec, ...]) -> list[tuple[str, list[int]]]:
    """Groups layers whose names differ by runs of numbers: blocks.0-59.attn.to_q.

    Args:
        layers: Layers; only those of one size and dtype come into one group.

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
                layer = layers[members[0]]
                key = (*around, layer.stream_bytes, layer.copy_bytes, layer.dtype)
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


def short_size(nbytes: int) -> str:
    """Writes bytes with one decimal, in the unit that fits."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"

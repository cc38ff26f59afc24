"""A report as a picture, with matplotlib."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .aside import written_aside
from .budget import format_gib, format_limit
from .timeline import MemoryPoint

if TYPE_CHECKING:
    from .run_report import Report

# From below; what the plan decides first, what the model adds on top.
KINDS = ("always", "residents", "window", "casts", "activations", "other")

_COLOURS = {
    "always": "#64748b",
    "residents": "#0d9488",
    "window": "#3b82f6",
    "casts": "#f59e0b",
    "activations": "#a855f7",
    "other": "#a8a29e",
}
_LANES = (
    ("compute", "#0d9488"),
    ("stalls", "#dc2626"),
    ("copies", "#3b82f6"),
    ("disk reads", "#f59e0b"),
)


_TITLE_COLUMNS = 108  # of letters as wide as most, in the width of the picture


def save_picture(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw a report; see `Report.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "report.plot draws with matplotlib, which is not installed: "
            "pip install 'hookoffload[plot]'. report.save(...) needs nothing"
        ) from error
    suffix = picture_format(path)
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    kinds = kinds_of(report.timeline.memory)
    memory, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    title = f"{report.model} on {report.device}: {report.verdict()}"
    figure.suptitle(textwrap.fill(title, _TITLE_COLUMNS), fontsize=11)
    _draw_memory(memory, report, kinds)
    _draw_lanes(lanes, report)
    with written_aside(path) as file:
        figure.savefig(file, format=suffix)


def picture_format(path: str | os.PathLike[str]) -> str:
    """Returns the format that the ending of a picture's path names.

    Raises:
        ValueError: It names none that matplotlib draws.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = Path(path).suffix[1:].lower()
    if suffix not in FigureCanvasBase.get_supported_filetypes():
        known = ", ".join(f".{ending}" for ending in ("png", "svg", "pdf"))
        raise ValueError(
            f"{os.fspath(path)!r} does not end in a picture's format; use one of "
            f"{known}"
        )
    return suffix


def kinds_of(memory: Sequence[MemoryPoint]) -> list[str]:
    """Return the kinds of memory that there are, from below."""
    seen = {kind for point in memory for kind in point.by_kind}
    return [kind for kind in KINDS if kind in seen] + sorted(seen - set(KINDS))


def _draw_memory(axes: Any, report: Report, kinds: Sequence[str]) -> None:
    points = report.timeline.memory
    largest = max((sum(p.by_kind.values()) for p in points), default=0)
    limit = report.stats.limit_bytes or 0
    unit, scale = _unit(max(largest, limit))
    times = [point.at for point in points] + [report.timeline.end]
    rows = [
        [point.by_kind.get(kind, 0) / scale for point in [*points, *points[-1:]]]
        for kind in kinds
    ]
    if points:
        axes.stackplot(
            times,
            rows,
            step="post",
            labels=kinds,
            colors=[_COLOURS.get(kind, "#78716c") for kind in kinds],
            linewidth=0,
        )
    if limit:
        label = f"limit {format_limit(limit)} GiB"
        axes.axhline(limit / scale, color="#dc2626", ls="--", lw=1, label=label)
    peak = report.stats.peak_bytes
    axes.set_title(f"peak {format_gib(peak)}", fontsize=9, loc="left")
    axes.set_ylabel(unit)
    axes.set_ylim(0, max(largest, limit, 1) / scale * 1.08)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=8,
        frameon=False,
    )


def _draw_lanes(axes: Any, report: Report) -> None:
    timeline = report.timeline
    spans = (timeline.computes, timeline.stalls, timeline.copies, timeline.reads)
    for number, ((_, colour), lane) in enumerate(zip(_LANES, spans, strict=True)):
        depths = max((span.depth for span in lane), default=0) + 1
        for depth in range(depths):
            bars = [(one.start, one.seconds) for one in lane if one.depth == depth]
            # Layers inside of others lie below them.
            low = -number + 0.35 - 0.7 * (depth + 1) / depths
            axes.broken_barh(bars, (low, 0.7 / depths), color=colour, linewidth=0.2)
    axes.set_yticks([-n for n in range(len(_LANES))], [name for name, _ in _LANES])
    axes.set_ylim(-len(_LANES) + 0.5, 0.9)
    word = "pass " if len(timeline.passes) <= 8 else ""
    for one in timeline.passes:
        axes.axvline(one.start, color="#94a3b8", lw=0.6)
        axes.annotate(
            f"{word}{one.number}",
            (one.start, 0.86),
            fontsize=7,
            va="top",
            xytext=(2, 0),
            textcoords="offset points",
            annotation_clip=True,
        )
    axes.set_xlim(0, max(timeline.end, 1e-6))
    axes.set_xlabel("seconds")


def _unit(nbytes: int) -> tuple[str, int]:
    """Return the unit of the axis: that of `format_gib`, as peak and limit are in."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes * 100 >= scale:
            return unit, scale
    return "bytes", 1

"""A report as one HTML page that asks nothing of the network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import resources
from typing import TYPE_CHECKING, Any

from .aside import written_aside
from .report_plot import kinds_of
from .timeline import Span

if TYPE_CHECKING:
    from .run_report import Report

# Everything that could end a script element or begin another: in JSON these characters
# occur in strings only, where escapes mean the same.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def save_page(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as a page."""
    template = resources.files(__package__).joinpath("report_page.html")
    page = template.read_text(encoding="utf-8")
    data = json.dumps(_page_data(report), separators=(",", ":")).translate(_ESCAPES)
    # Split, not replaced one after the other: names may look like the other mark.
    head, _, rest = page.partition("@@TEXT@@")
    middle, _, tail = rest.partition("@@DATA@@")
    with written_aside(path) as file:
        text = html.escape(str(report))
        file.write("".join([head, text, middle, data, tail]).encode(errors="replace"))


def _page_data(report: Report) -> dict[str, Any]:
    """Return what the page draws; times in microseconds, names by number."""
    timeline = report.timeline
    names: dict[str, int] = {}
    kinds = kinds_of(timeline.memory)

    def spans(lane: Iterable[Span]) -> list[list[int]]:
        return [
            [
                names.setdefault(span.name, len(names)),
                *_times(span.start, span.end),
                span.depth,
                span.nbytes,
                -1 if span.queued is None else round(span.queued * 1e6),
            ]
            for span in lane
        ]

    lanes = {
        "compute": spans(timeline.computes),
        "stalls": spans(timeline.stalls),
        "copies": spans(timeline.copies),
        "reads": spans(timeline.reads),
    }
    return {
        "model": report.model,
        "device": report.device,
        "verdict": report.verdict(),
        "stats": asdict(report.stats),
        "figures": report.figures(),
        "names": list(names),
        "lanes": lanes,
        "kinds": kinds,
        "memory": [
            [round(point.at * 1e6), *_amounts(point.by_kind, kinds)]
            for point in timeline.memory
        ],
        "passes": [
            [
                one.number,
                *_times(one.start, one.end),
                one.complete,
                one.bytes_moved,
                one.stall_seconds,
            ]
            for one in timeline.passes
        ],
        "layers": [list(asdict(layer).values()) for layer in report.layers],
        "end": round(timeline.end * 1e6),
        "leftOut": timeline.left_out,
    }


def _times(start: float, end: float) -> tuple[int, int]:
    return round(start * 1e6), round(end * 1e6)


def _amounts(by_kind: dict[str, int], kinds: Sequence[str]) -> list[int]:
    return [by_kind.get(kind, 0) for kind in kinds]

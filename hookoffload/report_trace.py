"""A report as a trace in the Trace Event Format, for Perfetto and chrome://tracing.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .aside import written_aside
from .timeline import Span

if TYPE_CHECKING:
    from .run_report import Report

_PROCESS = 1


def save_trace(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report's timeline as JSON."""
    trace = {
        "traceEvents": _Events(report).events,
        "displayTimeUnit": "ms",
        "otherData": {
            "model": report.model,
            "device": report.device,
            "stats": asdict(report.stats),
        },
    }
    with written_aside(path) as file:
        file.write(json.dumps(trace).encode())


class _Events:
    """The events of a trace: lanes are threads of one process.

    Args:
        report: what to draw.
    """

    def __init__(self, report: Report) -> None:
        timeline = report.timeline
        self.events: list[dict[str, Any]] = []
        self._threads = 0
        self._name("process_name", 0, f"hookoffload {report.model} ({report.device})")
        self._lane("passes", timeline.passes)
        self._lane("compute", timeline.computes)
        self._lane("stalls", timeline.stalls)
        self._lane("copies", timeline.copies)
        self._lane("disk reads", timeline.reads)
        for point in timeline.memory:
            self.events.append(
                {
                    "ph": "C",
                    "name": "memory (bytes)",
                    "pid": _PROCESS,
                    "ts": _microseconds(point.at),
                    "args": point.by_kind,
                }
            )

    def _name(self, what: str, thread: int, name: str) -> None:
        self.events.append(
            {
                "ph": "M",
                "name": what,
                "pid": _PROCESS,
                "tid": thread,
                "args": {"name": name},
            }
        )

    def _lane(self, name: str, spans: Iterable[Any]) -> None:
        rows = _rows(spans)
        for number, row in enumerate(rows):
            self._threads += 1
            label = name if len(rows) == 1 else f"{name} {number + 1}"
            self._name("thread_name", self._threads, label)
            self.events.append(
                {
                    "ph": "M",
                    "name": "thread_sort_index",
                    "pid": _PROCESS,
                    "tid": self._threads,
                    "args": {"sort_index": self._threads},
                }
            )
            for span in row:
                self.events.append(self._span(name, self._threads, span))

    @staticmethod
    def _span(lane: str, thread: int, span: Any) -> dict[str, Any]:
        args: dict[str, Any] = {}
        if isinstance(span, Span):
            name = span.name
            if span.nbytes:
                args["bytes"] = span.nbytes
            if span.queued is not None:
                args["waited_us"] = _microseconds(max(span.start - span.queued, 0.0))
        else:
            name = f"pass {span.number}"
            args = {"complete": span.complete, "bytes_moved": span.bytes_moved}
        return {
            "ph": "X",
            "name": name,
            "cat": lane,
            "pid": _PROCESS,
            "tid": thread,
            "ts": _microseconds(span.start),
            "dur": _microseconds(span.end) - _microseconds(span.start),
            "args": args,
        }


def _rows(spans: Iterable[Any]) -> list[list[Any]]:
    """Divide spans into rows in which they nest or follow each other.

    Viewers draw a thread's spans by nesting; ones that overlap otherwise get lost.
    """
    rows: list[tuple[list[Any], list[int]]] = []
    for span in spans:  # by their starts, the longer first
        start, end = _microseconds(span.start), _microseconds(span.end)
        for row, open_until in rows:
            while open_until and open_until[-1] <= start:
                open_until.pop()
            if not open_until or end <= open_until[-1]:
                row.append(span)
                open_until.append(end)
                break
        else:
            rows.append(([span], [end]))
    return [row for row, _ in rows] or [[]]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)

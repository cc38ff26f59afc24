"""What a run did: figures of each layer, the bound, and how close the run came."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .budget import format_gib
from .plan_table import cut_name
from .recorder import PASSES_KEPT, Recorder
from .stats import OffloadStats
from .timeline import PassFigures, Timeline, make_timeline

_LAYERS_SHOWN = 20
_LONGEST_NAME = 44


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer since attach.

    Attributes:
        name: Full name of its module.
        bytes_moved: Bytes copied to the compute device.
        copies: Copies that a forward has used.
        stall_seconds: Seconds for which compute waited for its copies.
        hits: Forwards that found its copy begun.
        misses: Forwards that had to begin it.
    """

    name: str
    bytes_moved: int
    copies: int
    stall_seconds: float
    hits: int
    misses: int


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a pass cannot be faster than, against what it took; means of passes.

    The passes are those kept that were complete, without the first since attach if
    there are others: it streams everything and gets things ready.

    Attributes:
        passes: How many passes these are means of.
        seconds: What a pass took.
        compute_seconds: What it took without waiting for copies.
        link_seconds: For how long bytes were crossing the link to the compute device.
        disk_seconds: For how long bytes were read from disk.
        link_bytes_per_second: The rate of copies that were not read from disk
            directly; 0 if there were none.
    """

    passes: int
    seconds: float
    compute_seconds: float
    link_seconds: float
    disk_seconds: float
    link_bytes_per_second: float

    @property
    def bound_seconds(self) -> float:
        """The largest of compute, link and disk."""
        return max(self.compute_seconds, self.link_seconds, self.disk_seconds)

    @property
    def limited_by(self) -> str:
        """Which of them is the largest: "compute", "link" or "disk"."""
        if self.bound_seconds == self.compute_seconds:
            return "compute"
        return "link" if self.bound_seconds == self.link_seconds else "disk"

    @property
    def reached(self) -> float:
        """The bound over what a pass took: 1 is as fast as it can be."""
        return min(self.bound_seconds / self.seconds, 1.0) if self.seconds else 1.0


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """What an attached model did, as `report` found it; it changes no more.

    ``str(report)`` is a table. Times of single events are kept for the last 16 passes.

    Attributes:
        model: The class of the model.
        device: The compute device.
        stats: The totals, as `offload_stats` gave them.
        layers: Every layer that was in use, in the order of its first use.
        peak_by_kind: Bytes at the peak by kind, with "activations" and "other" (what
            else this process held) on a device whose allocator counts them.
        bound: What a pass could take at least; None before the first complete pass.
        timeline: The passes and events that are kept.
    """

    model: str
    device: str
    stats: OffloadStats
    layers: tuple[LayerReport, ...]
    peak_by_kind: dict[str, int]
    bound: Bound | None
    timeline: Timeline

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page that needs no network.

        The page shows memory over time against the limit, lanes for compute, copies,
        disk reads and stalls, and the figures of each layer.

        Args:
            path: the file, best with the ending ``.html``; it is replaced as a whole.

        Raises:
            ValueError: The folder does not exist, or the path is one.
        """
        from .report_html import save_page

        save_page(self, path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw memory over time and the lanes with matplotlib.

        Args:
            path: the file; its ending is the format: ``.png``, ``.svg``, ``.pdf``.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: The folder does not exist, or the format is not known.
        """
        from .report_plot import save_picture

        save_picture(self, path)

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline for https://ui.perfetto.dev and ``chrome://tracing``.

        Args:
            path: the file, best with the ending ``.json``.

        Raises:
            ValueError: The folder does not exist, or the path is one.
        """
        from .report_trace import save_trace

        save_trace(self, path)

    def __repr__(self) -> str:
        """Counts passes and layers, because all fields fill pages."""
        passes = len(self.timeline.passes)
        return (
            f"Report({self.model} on {self.device}, {self.stats.forwards} forwards, "
            f"{passes} of them in detail, {len(self.layers)} layers)"
        )

    def __str__(self) -> str:
        """Shows totals, peak, bound and the layers that cost most."""
        rows = [(label, text) for label, text, _ in self.figures()]
        width = max(len(label) for label, _ in rows)
        lines = [f"Report: {self.model} on {self.device}", f"  {self.verdict()}"]
        lines += [f"  {label:<{width}}  {text}".rstrip() for label, text in rows]
        return "\n".join([*lines, *self._passes_table(), *self._layers_table()])

    def figures(self) -> list[tuple[str, str, float | None]]:
        """Return the totals: what each is, how a reader sees it, the exact number."""
        stats, bound = self.stats, self.bound
        size = partial(format_gib, like=max(stats.peak_bytes, stats.limit_bytes or 0))
        limit = "none" if stats.limit_bytes is None else size(stats.limit_bytes)
        written = stats.bytes_written_back
        rows: list[tuple[str, str, float | None]] = [
            ("forwards", f"{stats.forwards}", stats.forwards),
            ("peak", size(stats.peak_bytes), stats.peak_bytes),
            ("limit", limit, stats.limit_bytes),
            ("copied", format_gib(stats.bytes_moved), stats.bytes_moved),
            ("written back", format_gib(written), written),
            ("stalled", format_seconds(stats.stall_seconds), stats.stall_seconds),
            *self._decoding(),
            ("hits", f"{stats.hits}", stats.hits),
            ("misses", f"{stats.misses}", stats.misses),
        ]
        if bound is not None:
            mean = f", mean of {bound.passes}" if bound.passes > 1 else ""
            rows += [
                (f"a pass{mean}", format_seconds(bound.seconds), None),
                ("of it compute", format_seconds(bound.compute_seconds), None),
                ("link busy", _with_rate(bound), None),
                ("disk busy", format_seconds(bound.disk_seconds), None),
            ]
        held = ", ".join(f"{kind} {size(n)}" for kind, n in self.peak_by_kind.items())
        return [*rows, ("at the peak", held or "nothing of the library", None)]

    def _decoding(self) -> list[tuple[str, str, float | None]]:
        stats = self.stats
        if not stats.decoded_bytes:
            return []
        share = stats.coded_bytes / stats.decoded_bytes
        rows: list[tuple[str, str, float | None]] = [
            ("coded in", f"{share:.1%}", share)
        ]
        if resident := stats.coded_resident_bytes:
            rows.append(("residents coded", format_gib(resident), float(resident)))
        seconds = stats.decode_seconds
        if seconds is not None:
            rows.append(("decoding a pass", format_seconds(seconds), seconds))
        return rows

    def verdict(self) -> str:
        """Return how close the run came to its bound, in one line."""
        bound = self.bound
        if bound is None:
            return "no complete pass was recorded"
        return (
            f"a pass took {format_seconds(bound.seconds)}; {bound.limited_by} alone "
            f"takes {format_seconds(bound.bound_seconds)}: {bound.reached:.0%} of the "
            "speed that is possible"
        )

    def _passes_table(self) -> list[str]:
        kept = self.timeline.passes
        if not kept:
            return []
        lines = [f"  the last {len(kept)} passes (at most {PASSES_KEPT} are kept)"]
        copied = _column("copied", [one.bytes_moved for one in kept])
        lines.append(f"    {'pass':>6} {'seconds':>9} {'stalled':>9} {copied[0]}")
        for one, moved in zip(kept, copied[1:], strict=True):
            lines.append(
                f"    {one.number:>6} {one.seconds:>9.4f} {one.stall_seconds:>9.4f}"
                f" {moved}{'' if one.complete else '  interrupted'}"
            )
        if self.timeline.left_out:
            lines.append(f"    {self.timeline.left_out} events had no room")
        return lines

    def _layers_table(self) -> list[str]:
        if not self.layers:
            return []
        costly = sorted(
            self.layers, key=lambda one: (-one.stall_seconds, -one.bytes_moved)
        )
        shown = costly[:_LAYERS_SHOWN]
        names = [cut_name(layer.name, _LONGEST_NAME) for layer in shown]
        width = max(map(len, names))
        copied = _column("copied", [layer.bytes_moved for layer in shown])
        lines = [
            f"  {'layer':<{width}} {'stalled':>10} {copied[0]} {'copies':>6}"
            f" {'hits':>6} {'misses':>6}"
        ]
        for name, layer, moved in zip(names, shown, copied[1:], strict=True):
            lines.append(
                f"  {name:<{width}} {format_seconds(layer.stall_seconds):>10}"
                f" {moved} {layer.copies:>6} {layer.hits:>6} {layer.misses:>6}"
            )
        if len(costly) > len(shown):
            lines.append(f"  and {len(costly) - len(shown)} layers that stalled less")
        return lines


def make_report(
    model: str, device: torch.device, stats: OffloadStats, recorder: Recorder
) -> Report:
    """Make the report of a model that is not running, with no copy under way.

    Args:
        model: the class of the model, which stands for the name of the root.
        device: the compute device.
        stats: the totals.
        recorder: what was noted.
    """
    layers = tuple(
        LayerReport(
            name=name or model,
            bytes_moved=figures.bytes_moved,
            copies=figures.copies,
            stall_seconds=figures.stall_seconds(),
            hits=figures.hits,
            misses=figures.misses,
        )
        for name, figures in recorder.figures.items()
    )
    timeline = make_timeline(recorder, device, root_name=model)
    return Report(
        model=model,
        device=str(device),
        stats=stats,
        layers=layers,
        peak_by_kind=_peak_by_kind(stats, timeline, device),
        bound=_bound(timeline.passes),
        timeline=timeline,
    )


def _peak_by_kind(
    stats: OffloadStats, timeline: Timeline, device: torch.device
) -> dict[str, int]:
    """Return the library's bytes at their peak, and what was beside them."""
    by_kind = dict(stats.peak_by_kind)
    if device.type == "cpu":
        return by_kind
    beside = max(stats.peak_bytes - sum(by_kind.values()), 0)
    others = max(
        (point.by_kind.get("other", 0) for point in timeline.memory), default=0
    )
    by_kind["activations"] = max(beside - others, 0)
    by_kind["other"] = beside - by_kind["activations"]
    return by_kind


def _bound(passes: Sequence[PassFigures]) -> Bound | None:
    complete = [one for one in passes if one.complete]
    steady = [one for one in complete if one.number > 1] or complete
    if not steady:
        return None
    count = len(steady)
    link = sum(one.link_seconds for one in steady)
    link_bytes = sum(one.link_bytes for one in steady)
    seconds = sum(one.seconds for one in steady)
    stalled = sum(one.stall_seconds for one in steady)
    return Bound(
        passes=count,
        seconds=seconds / count,
        compute_seconds=max(seconds - stalled, 0.0) / count,
        link_seconds=link / count,
        disk_seconds=sum(one.disk_seconds for one in steady) / count,
        link_bytes_per_second=link_bytes / link if link else 0.0,
    )


def _with_rate(bound: Bound) -> str:
    text = format_seconds(bound.link_seconds)
    if not bound.link_bytes_per_second:
        return text
    return f"{text} at {bound.link_bytes_per_second / 1e9:.2f} GB/s"


def _column(head: str, sizes: Sequence[int]) -> list[str]:
    """Write a column of bytes in one unit, under its head."""
    cells = [head, *(format_gib(nbytes, like=max(sizes)) for nbytes in sizes)]
    width = max(11, *map(len, cells))
    return [f"{cell:>{width}}" for cell in cells]


def format_seconds(seconds: float) -> str:
    """Write seconds for a reader.

    Example:
        >>> format_seconds(1.5), format_seconds(0.0123), format_seconds(0.0000123)
        ('1.500 s', '12.300 ms', '0.012 ms')
    """
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"

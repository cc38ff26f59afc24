"""What a recorder noted, with every time in seconds: plain data for reports."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from .entries import CopyEntry, Mark, PassRecord
from .recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that took time.

    Attributes:
        name: Full name of the layer.
        start: Seconds from the beginning of the timeline.
        end: The same.
        nbytes: Bytes that were copied or read; 0 for what moves none.
        depth: How many other layers were in use around it.
        queued: When a copy was asked for; other spans begin when they are.
    """

    name: str
    start: float
    end: float
    nbytes: int = 0
    depth: int = 0
    queued: float | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class PassFigures:
    """One pass of those that are kept.

    Attributes:
        number: Which pass since attach, from 1.
        start: Seconds from the beginning of the timeline.
        end: The same.
        complete: Whether it ended without an exception.
        bytes_moved: Bytes that its forwards used of what was copied.
        stall_seconds: Seconds for which compute waited for copies.
        link_seconds: Seconds within it in which bytes crossed the link.
        disk_seconds: Seconds within it in which bytes were read from disk.
        link_bytes: Bytes that crossed the link within it.
    """

    number: int
    start: float
    end: float
    complete: bool
    bytes_moved: int
    stall_seconds: float
    link_seconds: float
    disk_seconds: float
    link_bytes: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class MemoryPoint:
    """Bytes on the compute device from a moment on.

    Attributes:
        at: Seconds from the beginning of the timeline.
        by_kind: Bytes by kind, the largest of the library's first where it is drawn;
            "activations" and "other" (of the rest of the process) only where PyTorch's
            allocator counts them.
    """

    at: float
    by_kind: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Passes, lanes and memory, each in the order of time.

    Attributes:
        passes: The passes that are kept.
        computes: Layers in use.
        copies: Copies to the compute device.
        reads: Reads from disk.
        stalls: Compute waiting for copies.
        memory: The memory of the compute device.
        left_out: Entries there was no room for.
    """

    passes: tuple[PassFigures, ...]
    computes: tuple[Span, ...]
    copies: tuple[Span, ...]
    reads: tuple[Span, ...]
    stalls: tuple[Span, ...]
    memory: tuple[MemoryPoint, ...]
    left_out: int

    @property
    def end(self) -> float:
        """Seconds at which the last thing ended."""
        lanes = (self.passes, self.computes, self.copies, self.reads, self.stalls)
        ends = [span.end for lane in lanes for span in lane]
        return max([*ends, *(point.at for point in self.memory)], default=0.0)


def make_timeline(
    recorder: Recorder, device: torch.device, *, root_name: str
) -> Timeline:
    """Turn marks into seconds; waits for the device once.

    Args:
        recorder: what was noted; no pass may be under way, and no copy.
        device: the compute device.
        root_name: what to call the root, whose full name is empty.
    """
    return _Maker(recorder, device, root_name).timeline()


class _Maker:
    """Resolves marks, record by record.

    Elapsed times of a device are 32-bit floats of milliseconds: precise only between
    near events. So entries are placed from the beginning of their record, and that
    from now.
    """

    def __init__(
        self, recorder: Recorder, device: torch.device, root_name: str
    ) -> None:
        self._records = list(recorder.records)
        self._now = recorder.clock.mark()
        if isinstance(self._now, torch.Event):
            self._now.synchronize()
        self._now_seconds = time.perf_counter()
        self._device = device
        self._root_name = root_name
        began = [self._from_now(record.began) for record in self._records]
        self._began = began
        self._zero = min(began, default=0.0)
        self._copies: list[Span] = []
        self._moves: list[Span] = []  # the parts of copies in which the link was busy
        self._reads: list[Span] = []
        self._stalls: list[Span] = []

    def timeline(self) -> Timeline:
        computes: list[Span] = []
        memory: list[MemoryPoint] = []
        for record, base in zip(self._records, self._began, strict=True):
            for entry in record.computes:
                if entry.ended is not None:  # else an exception came between
                    start = self._seconds(entry.began, record, base)
                    end = self._seconds(entry.ended, record, base)
                    name = entry.name or self._root_name
                    computes.append(
                        Span(name=name, start=start, end=end, depth=entry.depth)
                    )
            for copy in record.copies:
                self._add_copy(copy, record, base)
            memory += self._memory(record, base)
        for lane in (computes, self._copies, self._moves, self._reads, self._stalls):
            lane.sort(key=lambda span: (span.start, -span.end))
        memory.sort(key=lambda point: point.at)
        return Timeline(
            passes=tuple(self._passes()),
            computes=tuple(computes),
            copies=tuple(self._copies),
            reads=tuple(self._reads),
            stalls=tuple(self._stalls),
            memory=tuple(memory),
            left_out=sum(record.left_out for record in self._records),
        )

    def _from_now(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark
        assert isinstance(self._now, torch.Event), "marks of one kind"
        return self._now_seconds - mark.elapsed_time(self._now) / 1e3

    def _seconds(self, mark: Mark, record: PassRecord, base: float) -> float:
        if not isinstance(mark, float):
            assert isinstance(record.began, torch.Event), "marks of one kind"
            mark = base + record.began.elapsed_time(mark) / 1e3
        return max(mark - self._zero, 0.0)

    def _add_copy(self, copy: CopyEntry, record: PassRecord, base: float) -> None:
        if copy.began is None or copy.ended is None:
            return  # it failed
        name = copy.name or self._root_name

        def span(began: Mark, ended: Mark, nbytes: int = 0) -> Span:
            start = self._seconds(began, record, base)
            end = self._seconds(ended, record, base)
            return Span(name=name, start=start, end=end, nbytes=nbytes)

        whole = span(copy.began, copy.ended, copy.nbytes)
        queued = self._seconds(copy.queued, record, base)
        self._copies.append(replace(whole, queued=queued))
        self._reads += [span(*read) for read in copy.reads]
        waits = (span(*stall) for stall in copy.stalls)
        self._stalls += [wait for wait in waits if wait.end > wait.start]
        self._moves += [span(*move) for move in copy.moves]
        if not copy.moves and not copy.reads:
            self._moves.append(whole)

    def _memory(self, record: PassRecord, base: float) -> list[MemoryPoint]:
        points = []
        beside = 0  # what the allocator last had beside the library
        for entry in record.memory:
            by_kind = dict(entry.by_kind)
            if entry.allocated is not None:
                beside = max(entry.allocated - sum(by_kind.values()), 0)
            if self._device.type != "cpu":
                by_kind["other"] = min(beside, record.others)
                by_kind["activations"] = beside - by_kind["other"]
            at = self._seconds(entry.at, record, base)
            points.append(MemoryPoint(at=at, by_kind=by_kind))
        return points

    def _passes(self) -> list[PassFigures]:
        figures = []
        for record, base in zip(self._records, self._began, strict=True):
            if record.number is None or record.ended is None:
                continue
            start = base - self._zero
            end = self._seconds(record.ended, record, base)
            figures.append(
                PassFigures(
                    number=record.number,
                    start=start,
                    end=end,
                    complete=record.complete,
                    bytes_moved=record.bytes_moved,
                    stall_seconds=_busy(self._stalls, start, end),
                    link_seconds=_busy(self._moves, start, end),
                    disk_seconds=_busy(self._reads, start, end),
                    link_bytes=_bytes_within(self._moves, start, end),
                )
            )
        return figures


def _busy(spans: Iterable[Span], start: float, end: float) -> float:
    """Return the seconds between two times in which any of the spans was under way."""
    busy, reached = 0.0, start
    for span in spans:  # by their starts
        first, last = max(span.start, reached), min(span.end, end)
        if last > first:
            busy += last - first
            reached = last
    return busy


def _bytes_within(spans: Iterable[Span], start: float, end: float) -> float:
    """Return the bytes that moved between two times, each span's at an even rate."""
    total = 0.0
    for span in spans:
        inside = min(span.end, end) - max(span.start, start)
        if inside > 0 and span.seconds > 0:
            total += span.nbytes * inside / span.seconds
    return total

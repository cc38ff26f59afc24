"""The entries of a recording, and the marks that say when they were.

[Note: marks]
On a CPU a mark is the host's clock. On an accelerator the host runs ahead of the
device, so a mark is an event with timing, recorded where the work is queued; nobody
waits for it. `timeline` turns marks into seconds when a report is asked for, between
passes, when everything they stand for has happened.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping

import torch

Mark = float | torch.Event


class Clock:
    """Makes marks: the host's time, or events on a stream of an accelerator.

    Args:
        device: the compute device.
    """

    __slots__ = ("_device",)

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type == "cpu" else device

    def mark(self, stream: torch.Stream | None = None) -> Mark:
        """Return a mark behind what a stream has so far; default: the current one."""
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(stream or torch.accelerator.current_stream(self._device))
        return event


def seconds_between(began: Mark, ended: Mark) -> float:
    """Return the seconds between two marks of one kind that have happened."""
    if isinstance(began, float) or isinstance(ended, float):
        assert isinstance(began, float) and isinstance(ended, float), "of one kind"
        return ended - began
    return float(began.elapsed_time(ended)) / 1e3


def stalled_seconds(came: Mark, ready: Mark) -> float:
    """Return for how long compute waited for a copy.

    On a device no event is needed behind the wait, which compute would have to pass.

    Args:
        came: when compute came to the wait.
        ready: when the copy was ready, maybe before.
    """
    try:
        return max(seconds_between(came, ready), 0.0)
    except RuntimeError:
        return 0.0  # MPS refuses to say by how much it was ready before


def have_happened(events: Iterable[torch.Event]) -> bool:
    """Tell whether all of some events have happened."""
    return all(event.query() for event in events)


class LayerFigures:
    """One layer's figures since attach.

    Attributes:
        bytes_moved: Bytes copied to the compute device.
        copies: Copies that a forward has used.
        hits: Forwards that found the copy begun.
        misses: Forwards that had to begin it.
    """

    __slots__ = ("_pending", "_stalled", "bytes_moved", "copies", "hits", "misses")

    def __init__(self) -> None:
        self.bytes_moved = 0
        self.copies = 0
        self.hits = 0
        self.misses = 0
        self._stalled = 0.0
        # Stalls whose length is not known yet; the device has few of them ahead of it.
        self._pending: deque[tuple[torch.Event, torch.Event]] = deque()

    def add_stall(self, began: Mark, ended: Mark) -> None:
        """Note that compute waited for this layer."""
        if isinstance(began, float):
            self._stalled += seconds_between(began, ended)
            return
        assert isinstance(ended, torch.Event), "marks of one kind"
        self._pending.append((began, ended))
        while len(self._pending) > 1 and have_happened(self._pending[0]):
            self._stalled += stalled_seconds(*self._pending.popleft())

    def stall_seconds(self) -> float:
        """Return for how long compute waited; waits for the device."""
        while self._pending:
            for event in self._pending[0]:
                event.synchronize()
            self._stalled += stalled_seconds(*self._pending.popleft())
        return self._stalled


class ComputeEntry:
    """A layer in use: from bound to released."""

    __slots__ = ("began", "depth", "ended", "name")

    def __init__(self, name: str, depth: int, began: Mark) -> None:
        self.name = name
        self.depth = depth
        self.began = began
        self.ended: Mark | None = None


class CopyEntry:
    """A copy: queued by the host, performed by the copy stream or its thread.

    Attributes:
        queued: The host's time when it was asked for.
        moves: When bytes crossed the link, and how many; empty: all of them from
            ``began`` to ``ended``, unless they were read to where they are used.
        reads: When bytes were read from disk for it, in the host's time, and how many.
        stalls: When compute waited for it.
    """

    __slots__ = (
        "_clock",
        "_figures",
        "_move_began",
        "began",
        "ended",
        "moves",
        "name",
        "nbytes",
        "queued",
        "reads",
        "stalls",
    )

    def __init__(
        self, name: str, nbytes: int, clock: Clock, figures: LayerFigures
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.queued = time.perf_counter()
        self.began: Mark | None = None
        self.ended: Mark | None = None
        self.moves: list[tuple[Mark, Mark, int]] = []
        self.reads: list[tuple[float, float, int]] = []
        self.stalls: list[tuple[Mark, Mark]] = []
        self._clock = clock
        self._figures = figures
        self._move_began: Mark | None = None

    def begin(self, stream: torch.Stream | None = None) -> None:
        """Note that the copy begins now: what it had to wait for has happened."""
        self.began = self._clock.mark(stream)

    def end(self, stream: torch.Stream | None = None) -> None:
        """Note that the last byte has moved."""
        self.ended = self._clock.mark(stream)

    def begin_move(self, stream: torch.Stream) -> None:
        """Note that bytes that were read into a staging buffer cross the link now."""
        self._move_began = self._clock.mark(stream)

    def end_move(self, stream: torch.Stream, nbytes: int) -> None:
        """Note that they have."""
        assert self._move_began is not None, "a move begins before it ends"
        self.moves.append((self._move_began, self._clock.mark(stream), nbytes))

    def read(self, began: float, ended: float, nbytes: int) -> None:
        """Note bytes that were read from disk."""
        self.reads.append((began, ended, nbytes))

    def stall(self, began: Mark, ended: Mark) -> None:
        """Note that compute waited for this copy."""
        self.stalls.append((began, ended))
        self._figures.add_stall(began, ended)


class MemoryEntry:
    """The library's bytes by kind, and the allocator's total where it was asked."""

    __slots__ = ("allocated", "at", "by_kind")

    def __init__(
        self, at: Mark, by_kind: Mapping[str, int], allocated: int | None
    ) -> None:
        self.at = at
        self.by_kind = by_kind
        self.allocated = allocated

    @property
    def total(self) -> int:
        """Bytes at this moment, as far as they are known."""
        return max(self.allocated or 0, sum(self.by_kind.values()))


class PassRecord:
    """The entries of one pass, or of what happened between two.

    Attributes:
        number: Which pass since attach, from 1; None: outside of any, for example
            parts of the model that are called by themselves.
        bytes_moved: Bytes that the pass's forwards have used, counted at its end.
        others: Bytes that other code held on the device when it began.
        left_out: Entries there was no room for.
    """

    __slots__ = (
        "began",
        "bytes_moved",
        "complete",
        "computes",
        "copies",
        "ended",
        "left_out",
        "memory",
        "number",
        "others",
    )

    def __init__(self, number: int | None, began: Mark, others: int) -> None:
        self.number = number
        self.began = began
        self.ended: Mark | None = None
        self.complete = False
        self.bytes_moved = 0
        self.others = others
        self.computes: list[ComputeEntry] = []
        self.copies: list[CopyEntry] = []
        self.memory: list[MemoryEntry] = []
        self.left_out = 0

    @property
    def entries(self) -> int:
        """How many entries it has."""
        return len(self.computes) + len(self.copies) + len(self.memory)

"""What happens in a run, noted while it runs: layers, copies, reads, stalls, memory.

[Note: recording]
Without ``OffloadPolicy(record=True)`` there is no recorder, and every place that would
note something only sees None.

What is kept is bounded: figures of each layer since attach, and the times of the last
`PASSES_KEPT` passes, fewer if these have more than `ENTRIES_KEPT` entries together.

The hooks let one thread at a time in, so that one thread writes here. The copies' own
thread writes only to the `CopyEntry` of the copy that it performs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from .device_memory import DeviceMemory
from .entries import (
    Clock,
    ComputeEntry,
    CopyEntry,
    LayerFigures,
    Mark,
    MemoryEntry,
    PassRecord,
)

PASSES_KEPT = 16
ENTRIES_KEPT = 100_000  # about 30 MB at most

# PyTorch's allocator takes a while to say what it holds (50 microseconds and more): it
# is asked as often as keeps that to this part of the time.
_SAMPLING_SHARE = 0.004


class Recorder:
    """Notes what happens to one attached model.

    Args:
        memory: the compute device's memory, whose budget is watched.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.clock = Clock(memory.device)
        self.figures: dict[str, LayerFigures] = {}
        self.records: deque[PassRecord] = deque()
        self._memory = memory
        self._passes = 0
        self._moved = 0
        self._open: dict[str, ComputeEntry] = {}
        self._in_pass = False
        self._next_sample = 0.0
        memory.budget.watch(self._memory_changed)

    # -- passes ---------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Note that a forward of the root begins."""
        self.end_pass(complete=False)  # of one that was interrupted
        self._passes += 1
        self._begin_record(self._passes)
        self._in_pass = True
        self._moved = 0

    def end_pass(self, *, complete: bool) -> None:
        """Note that a forward of the root has ended, or was interrupted."""
        self._open.clear()
        if not self._in_pass:
            return
        self._in_pass = False
        record = self.records[-1]
        record.complete = complete
        record.bytes_moved = self._moved
        record.ended = self.clock.mark()
        self._sample(record.ended)

    def _begin_record(
        self, number: int | None, held: Mapping[str, int] | None = None
    ) -> PassRecord:
        began = self.clock.mark()
        allocated = self._ask_allocator()
        by_kind = self._memory.budget.by_kind() if held is None else held
        others = max((allocated or 0) - sum(by_kind.values()), 0)
        record = PassRecord(number, began, others)
        record.memory.append(MemoryEntry(began, by_kind, allocated))
        self.records.append(record)
        self._forget_oldest()
        return record

    def _forget_oldest(self) -> None:
        records = self.records
        entries = sum(record.entries for record in records)
        passes = sum(record.number is not None for record in records)
        while len(records) > 1 and (
            passes > PASSES_KEPT
            or entries > ENTRIES_KEPT
            or len(records) > 2 * PASSES_KEPT
        ):
            oldest = records.popleft()
            passes -= oldest.number is not None
            entries -= oldest.entries

    def _current(self, held: Mapping[str, int] | None = None) -> PassRecord:
        """Return the record of the pass under way, or one for what is outside.

        Args:
            held: bytes by kind, for those who cannot ask the budget.
        """
        records = self.records
        if self._in_pass:
            return records[-1]
        if not records or records[-1].number is not None or _is_full(records[-1]):
            return self._begin_record(None, held)
        return records[-1]

    # -- layers ---------------------------------------------------------------------

    def bound(self, name: str) -> None:
        """Note that a layer's forward begins, its weights there."""
        record = self._current()
        if _is_full(record):
            record.left_out += 1
            return
        entry = ComputeEntry(name, len(self._open), self.clock.mark())
        record.computes.append(entry)
        self._open[name] = entry

    def released(self, name: str) -> None:
        """Note that a layer's forward has ended."""
        entry = self._open.pop(name, None)
        if entry is None:
            return
        entry.ended = self.clock.mark()
        if time.perf_counter() >= self._next_sample:
            self._sample(entry.ended)

    # -- copies ---------------------------------------------------------------------

    def copy_queued(self, name: str, nbytes: int) -> CopyEntry:
        """Return the entry of a copy that is asked for now."""
        entry = CopyEntry(name, nbytes, self.clock, self._figures(name))
        record = self._current()
        if _is_full(record):
            record.left_out += 1
        else:
            record.copies.append(entry)
        return entry

    def looked_for(self, name: str, *, hit: bool) -> None:
        """Note whether a forward found the copy of its layer begun."""
        figures = self._figures(name)
        figures.hits += hit
        figures.misses += not hit

    def copied(self, name: str, nbytes: int) -> None:
        """Note that a forward used a copy."""
        figures = self._figures(name)
        figures.copies += 1
        figures.bytes_moved += nbytes
        self._moved += nbytes

    def looked_up(self, name: str, nbytes: int) -> None:
        """Note rows that crossed the link without a copy of their table."""
        self._figures(name).bytes_moved += nbytes
        self._moved += nbytes

    def _figures(self, name: str) -> LayerFigures:
        figures = self.figures.get(name)
        if figures is None:
            figures = self.figures[name] = LayerFigures()
        return figures

    # -- memory ---------------------------------------------------------------------

    def _memory_changed(self, by_kind: Mapping[str, int]) -> None:
        """Note what the library holds; the budget calls this under its lock."""
        self._note_memory(MemoryEntry(self.clock.mark(), dict(by_kind), None))

    def _sample(self, at: Mark) -> None:
        """Ask the allocator, where there is one that counts activations as well."""
        allocated = self._ask_allocator()
        if allocated is not None:
            by_kind = self._memory.budget.by_kind()
            self._note_memory(MemoryEntry(at, by_kind, allocated))

    def _ask_allocator(self) -> int | None:
        began = time.perf_counter()
        allocated = self._memory.allocated_bytes()
        ended = time.perf_counter()
        self._next_sample = ended + (ended - began) / _SAMPLING_SHARE
        return allocated

    def _note_memory(self, entry: MemoryEntry) -> None:
        record = self._current(entry.by_kind)
        record.memory.append(entry)
        if len(record.memory) >= ENTRIES_KEPT // 8:
            # Of two neighbours the larger stays: no peak is lost.
            pairs = zip(record.memory[::2], record.memory[1::2], strict=False)
            record.memory = [max(pair, key=lambda one: one.total) for pair in pairs]


def _is_full(record: PassRecord) -> bool:
    """Tell whether further entries are left out, so that memory stays bounded."""
    return record.entries >= ENTRIES_KEPT // 2

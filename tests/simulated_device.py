"""An accelerator that only keeps account: who waited for what, and who read and wrote.

Every stream has a clock of what must have happened before the next thing that it does:
a number for each stream (a vector clock). Recording an event takes the clock of a
stream along, waiting for an event adds the event's clock. A read and a write of the
same bytes are in order if the later one's clock knows of the earlier one; otherwise
they race, whatever happened to come first in this run.
"""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

Clock = dict[str, int]

CPU = torch.device("cpu")


class Stream:
    """Stands in for ``torch.Stream``."""

    _numbers = itertools.count()
    _all: ClassVar[list[Stream]] = []

    def __init__(self, device: torch.device, name: str = "copies") -> None:
        self.device = device
        self.device_index = 0
        self.stream_id = 0 if name == "compute" else 1 + len(self._all)
        self.name = f"{name} {next(self._numbers)}"
        self.clock: Clock = {self.name: 0}
        self._all.append(self)

    def tick(self) -> int:
        """Do one thing, and return its number."""
        self.clock[self.name] += 1
        return self.clock[self.name]

    def learn(self, clock: Clock) -> None:
        """Come after everything that a clock knows of."""
        for name, number in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), number)

    def synchronize(self) -> None:
        """Let the host wait: what it queues anywhere from now on comes after."""
        for stream in self._all:
            stream.learn(self.clock)


class Simulation:
    """Stands in for ``torch`` in the copy engine.

    Attributes:
        log: What was done, in words and objects, in the order of the host.
        finished: Whether events say that they have happened when they are asked.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.finished = False
        self._current = threading.local()
        self.compute = Stream(CPU, "compute")
        self.accelerator = SimpleNamespace(
            current_stream=self.current_stream, set_stream=self.set_stream
        )
        simulation = self

        class Event:
            """Stands in for ``torch.Event``."""

            def __init__(self, device: Any = None, enable_timing: bool = False) -> None:
                self.clock: Clock | None = None
                self.timing = enable_timing

            def record(self, stream: Stream) -> None:
                stream.tick()
                self.clock = dict(stream.clock)
                simulation.log.append(("record", self, stream))

            def wait(self, stream: Stream) -> None:
                assert self.clock is not None, "nobody has recorded this event"
                stream.learn(self.clock)
                simulation.log.append(("wait", self, stream))

            def query(self) -> bool:
                return simulation.finished

            def synchronize(self) -> None:
                simulation.log.append(("synchronize", self))

            def elapsed_time(self, other: Event) -> float:
                return 0.0

        self.Event = Event
        self.Stream = Stream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def current_stream(self, device: Any = None) -> Stream:
        """Return the current stream of the thread."""
        stream = getattr(self._current, "stream", self.compute)
        assert isinstance(stream, Stream)
        return stream

    def set_stream(self, stream: Stream) -> None:
        """Make a stream the thread's current one."""
        self._current.stream = stream

    def empty(self, *size: Any, pin_memory: bool = False, **options: Any) -> Any:
        """Make an empty tensor; there is nothing to lock pages for."""
        return torch.empty(*size, **options)

    def _foreach_copy_(
        self, targets: list[Any], sources: list[Any], non_blocking: bool = False
    ) -> None:
        """Copy each, as one that stands in for a tensor may do by itself."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=non_blocking)

    def words(self) -> list[str]:
        """Return the first words of the log."""
        return [entry[0] for entry in self.log]


class RaceDetector:
    """Remembers who touched which bytes, and finds those that are not in order."""

    def __init__(self) -> None:
        self._reads: list[tuple[range, Stream, int, str]] = []
        self._writes: list[tuple[range, Stream, int, str]] = []
        self.races: list[str] = []
        self.counted = 0

    def read(self, tensor: torch.Tensor, stream: Stream, what: str) -> None:
        """Note that what a stream does next reads a tensor."""
        span = _span(tensor)
        self._compare(self._writes, span, stream.clock, f"{what} reads")
        self._reads.append((span, stream, stream.tick(), what))

    def write(
        self, tensor: torch.Tensor, stream: Stream, clock: Clock, what: str
    ) -> None:
        """Note that something written to a tensor knew of no more than a clock."""
        span = _span(tensor)
        self._compare(self._reads, span, clock, f"{what} is written")
        self._compare(self._writes, span, clock, f"{what} is written")
        self._writes = [w for w in self._writes if not _covers(span, w[0])]
        self._reads = [r for r in self._reads if not _covers(span, r[0])]
        self._writes.append((span, stream, clock[stream.name], what))

    def _compare(
        self,
        earlier: list[tuple[range, Stream, int, str]],
        span: range,
        clock: Clock,
        now: str,
    ) -> None:
        for other, stream, number, what in earlier:
            if other.start < span.stop and span.start < other.stop:
                self.counted += 1
                if clock.get(stream.name, 0) < number:
                    self.races.append(f"{now} while {what} may still be under way")


def _span(tensor: torch.Tensor) -> range:
    start = tensor.data_ptr()
    return range(start, start + tensor.numel() * tensor.element_size())


def _covers(outer: range, inner: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop

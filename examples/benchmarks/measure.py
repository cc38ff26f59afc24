"""Tools for measuring a model in this process: time, memory, output, link."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from subject import Subject
from torch import Tensor, nn

LINK_BYTES = 256 * 2**20
LINK_COPIES = 8
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Figures of one forward; memory in bytes, None where nobody counts it."""

    seconds: float
    allocated: int | None
    reserved: int | None
    checksum: str
    mean: float


class Runner:
    """Runs a model and looks at what it takes."""

    def __init__(
        self, model: nn.Module, subject: Subject, device: torch.device
    ) -> None:
        self.model = model
        self.device = device
        self._subject = subject
        self._inputs: dict[int, dict[str, Any]] = {}

    def inputs(self, resolution: int) -> dict[str, Any]:
        """Returns the arguments of a forward; they are made once."""
        if resolution not in self._inputs:
            self._inputs[resolution] = self._subject.inputs(resolution, self.device)
        return self._inputs[resolution]

    def forward(self, resolution: int) -> Forward:
        """Runs the model once and measures it."""
        inputs = self.inputs(resolution)
        cuda = self.device.type == "cuda"
        synchronize(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        with torch.no_grad():
            output = self.model(**inputs)[0]
        synchronize(self.device)
        seconds = time.perf_counter() - began
        allocated = torch.cuda.max_memory_allocated(self.device) if cuda else None
        reserved = torch.cuda.max_memory_reserved(self.device) if cuda else None
        output = output.cpu()
        return Forward(
            seconds=seconds,
            allocated=allocated,
            reserved=reserved,
            checksum=_checksum(output),
            mean=output.float().abs().mean().item(),
        )

    def loop_seconds(self, resolution: int, count: int) -> float:
        """Runs the model so many times in a row, and returns what each one took.

        Nobody waits in between, as in a loop that samples: what is copied ahead at the
        end of a forward is not waited for there.
        """
        inputs = self.inputs(resolution)
        synchronize(self.device)
        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                self.model(**inputs)
        synchronize(self.device)
        return (time.perf_counter() - began) / count


class HostWatch:
    """The most RAM that this process takes: what is its own, files left out.

    The kernel keeps no peak of it, so a thread samples it.
    """

    def __init__(self) -> None:
        """Begins to watch."""
        self._peak = host_bytes() or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def finish(self) -> int | None:
        """Ends the watch; returns the peak in bytes, None where nobody counts it."""
        self._stop.set()
        self._thread.join()
        return self._peak or None

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(SAMPLE_SECONDS)
            self._peak = max(self._peak, host_bytes() or 0)


def host_bytes() -> int | None:
    """Returns this process's anonymous and shared memory; None where it is not told."""
    try:
        with open("/proc/self/status") as status:
            lines = [
                line for line in status if line.startswith(("RssAnon", "RssShmem"))
            ]
    except OSError:
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines) or None


def synchronize(device: torch.device) -> None:
    """Waits for everything that the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def link_speed(device: torch.device) -> float | None:
    """Returns the bytes per second from page-locked RAM to the device."""
    if device.type != "cuda":
        return None
    try:
        host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError:  # no memory is left; other rows measure it too
        return None
    seconds: list[float] = []
    for _ in range(LINK_COPIES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        there.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return LINK_BYTES / min(seconds)


def _checksum(output: Tensor) -> str:
    values = output.contiguous().view(torch.uint8).numpy()
    return hashlib.sha1(values.data).hexdigest()

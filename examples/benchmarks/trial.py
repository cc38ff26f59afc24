"""One measured run of one method, in a process that holds nothing else."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import HostWatch, Runner, host_bytes, link_speed, synchronize
from methods import METHODS, way_of
from stress import stress
from subject import THREADS, Subject, build, own_pages, warm_kernels, weight_bytes
from torch import nn

from hookoffload import detach, offload_plan, offload_stats

Row = dict[str, Any]

# A method this slow needs half of the warm-ups, and has no time for all.
SLOW_SECONDS = 2.0

# They page-lock the weights where these lie.
_LOCKS_WEIGHTS = frozenset({"hookoffload", "hookoffload_auto"})


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one process measures.

    Attributes:
        kind: "device" (what machine this is), "time" (a row of the table), "reference"
            (the plain model's output at each resolution) or "stress".
        method: A key of `METHODS`.
        limit_gb: Memory that the method may take, in GiB.
        storage: Name of the dtype of weights at rest; None keeps theirs.
        profile: File for a trace of one forward.
        expected: Checksum of the right output at each resolution, for "stress".
    """

    kind: str
    method: str = "resident"
    limit_gb: float | None = None
    storage: str | None = None
    profile: str | None = None
    expected: dict[str, str] = field(default_factory=dict)

    def row(self) -> Row:
        """Returns what every row begins with."""
        return {
            "kind": self.kind,
            "method": self.method,
            "limit_gb": self.limit_gb,
            "storage": self.storage,
        }


def answer(
    trial: Trial,
    subject: Subject | None,
    options: argparse.Namespace,
    built: nn.Module | None,
) -> Row:
    """Runs a trial; an error becomes part of the answer.

    Args:
        trial: What to measure.
        subject: The model to be; "device" needs none.
        options: Of the command line.
        built: The model, if it was built before this process was forked.
    """
    notes = _Notes()
    logging.getLogger("hookoffload").addHandler(notes)
    logging.getLogger("hookoffload.coding").setLevel(logging.INFO)
    row = trial.row()
    began = time.perf_counter()
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(options.row_timeout - 5, 1))
    try:
        device = torch.device(options.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if trial.kind == "device":
            row |= _machine(device)
        else:
            assert subject is not None
            row |= _measured(trial, subject, options, built)
    except BaseException as error:  # whatever happened, the other rows go on
        text = " ".join(str(error).split())
        row |= {"error": f"{type(error).__name__}: {text}"}
        row["traceback"] = traceback.format_exc()[-4000:]
    faulthandler.cancel_dump_traceback_later()
    row["notes"] = notes.lines
    row["row_seconds"] = time.perf_counter() - began
    return row


def _measured(
    trial: Trial,
    subject: Subject,
    options: argparse.Namespace,
    built: nn.Module | None,
) -> Row:
    device = torch.device(options.device)
    torch.set_num_threads(1)  # building has threads of its own
    model = build(subject) if built is None else built
    if built is not None and trial.method in _LOCKS_WEIGHTS:
        own_pages(model)
    torch.set_num_threads(THREADS)
    warm_kernels(subject, device)
    runner = Runner(model, subject, device)
    if trial.kind == "stress":
        return stress(runner, subject, options, trial.storage, trial.expected)
    if trial.kind == "reference":
        METHODS["resident"].attach(model, way_of(options, None, trial.storage))
        sizes = subject.resolutions()
        return {
            "expected": {str(size): runner.forward(size).checksum for size in sizes}
        }
    return _timed(trial, subject, options, runner)


def _timed(
    trial: Trial, subject: Subject, options: argparse.Namespace, runner: Runner
) -> Row:
    device, model = runner.device, runner.model
    row: Row = {"weight_bytes": weight_bytes(model), "rss_start": host_bytes()}
    watch = HostWatch()
    began = time.perf_counter()
    way = way_of(options, trial.limit_gb, trial.storage)
    kept = METHODS[trial.method].attach(model, way)
    synchronize(device)
    row["attach_seconds"] = time.perf_counter() - began

    first = runner.forward(subject.resolution)
    count = METHODS[trial.method].warm_ups
    if first.seconds > SLOW_SECONDS:
        count //= 2
    warm = [runner.forward(subject.resolution) for _ in range(count)]
    rss = [watch.finish()]
    gc.collect()
    steady = []
    for _ in range(options.repeats):
        steady.append(runner.forward(subject.resolution))
        rss.append(host_bytes())
    forwards = [first, *warm, *steady]
    row["loop_seconds"] = runner.loop_seconds(subject.resolution, options.repeats)
    row |= {
        "first_seconds": first.seconds,
        "warm_seconds": [each.seconds for each in warm],
        "steady_seconds": [each.seconds for each in steady],
        "seconds": statistics.median(each.seconds for each in steady),
        "allocated_peak": _most(each.allocated for each in forwards),
        "allocated_steady": _most(each.allocated for each in steady),
        "reserved_peak": _most(each.reserved for each in forwards),
        "reserved_steady": _most(each.reserved for each in steady),
        "rss_peak": _most(rss),
        "checksum": first.checksum,
        "one_checksum": len({each.checksum for each in forwards}) == 1,
        "mean": first.mean,
    }
    if trial.method.startswith("hookoffload"):
        plan = offload_plan(model)
        row["pass_bytes"] = plan.pass_bytes
        row["all_bytes"] = sum(layer.copy_bytes for layer in plan.layers)
        row["plan"] = str(plan).splitlines()[:8]
        row["stats"] = str(offload_stats(model))
    if trial.profile:
        try:
            row["profile"] = _profile(runner, subject, trial.profile)
        except (OSError, RuntimeError) as error:  # the row's figures stand
            row["profile"] = {"file": trial.profile, "error": str(error)}
    if trial.method.startswith("hookoffload"):
        began = time.perf_counter()
        detach(model)
        row["detach_seconds"] = time.perf_counter() - began
    del kept
    row["link"] = link_speed(device)
    return row


class _Notes(logging.Handler):
    """Keeps the library's warnings, and how long encoding took."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _machine(device: torch.device) -> Row:
    row: Row = {"device": str(device), "torch": torch.__version__, "total": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row["device"] = properties.name
        row["total"] = properties.total_memory
    row["python"] = sys.version.split()[0]
    # Hangs, and so tells the parent in time, if threads do not survive a fork.
    torch.set_num_threads(THREADS)
    torch.ones(2**22).add_(1)
    row["link"] = link_speed(device)
    return row


def _profile(runner: Runner, subject: Subject, path: str) -> Row:
    """Writes a trace of one steady forward; returns counts of what should not occur."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if runner.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    inputs = runner.inputs(subject.resolution)
    with profile(activities=activities) as trace, torch.no_grad():
        runner.model(**inputs)
    trace.export_chrome_trace(path)
    calls: Counter[str] = Counter()
    for event in trace.key_averages():
        if event.key.startswith("cuda"):
            calls[event.key] += event.count
    return {"file": path, "calls": dict(calls)}


def _most(values: Any) -> Any:
    return max((value for value in values if value is not None), default=None)

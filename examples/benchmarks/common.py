"""What the benchmarks share: options, one process for each row, the table.

The parent builds the model in RAM and never touches the GPU. Each row is a process
that is forked from it, and so has the weights at once. A row of hookoffload, which
page-locks weights where they lie, first takes a copy of its own: shared pages would be
copied one by one while it attaches. With ``--fresh`` (and where there is no fork) each
row is a new interpreter that builds the model for itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

# Asking CUDA whether it is there would keep forked processes from using it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from methods import METHODS
from report import print_machine, print_stress, print_table, short
from subject import Subject, build, weight_bytes
from torch import nn
from trial import Row, Trial, answer

OWN = "own"
# Starting CUDA takes seconds; what takes this long never ends.
DEVICE_TIMEOUT = 90.0


def main(kind: type[Subject], description: str | None) -> int:
    """Runs a benchmark from the command line; returns 1 if a row failed."""
    if sys.argv[1:2] == ["--child"]:
        _child(kind, json.loads(sys.argv[2]))
    options = _parse(kind, description)
    # A pool of threads that this process started would hang those forked from it.
    torch.set_num_threads(1)
    subject = kind(options)
    skeleton = subject.skeleton()
    options.limits = _in_gib(options.limits, weight_bytes(skeleton))
    options.peer_limits = (
        options.limits
        if options.peer_limits is None
        else _in_gib(options.peer_limits, weight_bytes(skeleton))
    )
    bench = Benchmark(subject, options)
    machine = bench.run(Trial(kind="device"))
    if "error" in machine and not options.fresh and options.device != "cpu":
        bench.say(f"cannot use the device in a forked process: {machine['error']}")
        bench.say("each row builds the model for itself, as with --fresh")
        options.fresh = True
        machine = bench.run(Trial(kind="device"))
    if "error" in machine:
        sys.exit(
            f"no device {options.device!r}: {machine['error']}\nTo try the benchmark "
            "without one, make the model small and add --device cpu"
        )
    if not options.fresh:
        bench.build()
    print_machine(machine, subject, weight_bytes(skeleton), bench.build_seconds)
    if options.stress:
        return _stress(bench)
    for trial in _trials(options):
        bench.run(trial)
    print_table(bench.rows, machine)
    return 1 if any("error" in row for row in bench.rows) else 0


def _stress(bench: Benchmark) -> int:
    storage = _storages(bench.options)[0]
    reference = bench.run(Trial(kind="reference", storage=storage))
    row = bench.run(
        Trial(
            kind="stress",
            method="hookoffload",
            storage=storage,
            expected=reference.get("expected", {}),
        )
    )
    print_stress(row)
    return 1 if "error" in row or row["wrong"] else 0


def _trials(options: argparse.Namespace) -> list[Trial]:
    """Returns the rows of the table, the plain model first."""
    trials = []
    for method in METHODS:
        if method not in options.methods:
            continue
        ours = method.startswith("hookoffload")
        limits = options.limits if ours else options.peer_limits
        for storage in _storages(options) if ours or method == "resident" else [None]:
            for limit in limits if METHODS[method].limited else [None]:
                trials.append(
                    Trial(kind="time", method=method, limit_gb=limit, storage=storage)
                )
    if options.profile:
        for index, trial in enumerate(trials):
            if trial.method == "hookoffload":
                trials[index] = Trial(**asdict(trial) | {"profile": options.profile})
                break
    return trials


def _storages(options: argparse.Namespace) -> list[str | None]:
    return [None if name == OWN else name for name in options.storage_dtype]


class Benchmark:
    """One run: its processes, its rows.

    Attributes:
        options: Of the command line.
        rows: What was measured so far.
        build_seconds: What building the model took; None if each row builds it.
    """

    def __init__(self, subject: Subject, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.build_seconds: float | None = None
        self._subject = subject
        self._began = time.perf_counter()
        self._built: nn.Module | None = None
        self._machine: Row = {}

    def build(self) -> None:
        """Builds the model that forked processes will find in RAM."""
        began = time.perf_counter()
        self._built = build(self._subject)
        self.build_seconds = time.perf_counter() - began

    def run(self, trial: Trial) -> Row:
        """Measures a trial in a process of its own; the row is kept."""
        deadline = self.options.deadline or float("inf")
        left = deadline - (time.perf_counter() - self._began)
        if left <= 0:
            row = {**trial.row(), "error": f"not run: {deadline:g} s are over"}
        else:
            most = (
                DEVICE_TIMEOUT if trial.kind == "device" else self.options.row_timeout
            )
            row = self._in_process(trial, min(left, most))
        if trial.kind == "device":
            self._machine = row
        else:
            self.rows.append(row)
            self.say(short(row))
        if self.options.json:
            written = {
                "options": vars(self.options),
                "machine": self._machine,
                "build_seconds": self.build_seconds,
                "rows": self.rows,
            }
            Path(self.options.json).write_text(json.dumps(written, indent=1) + "\n")
        return row

    def say(self, line: str) -> None:
        """Tells how the run goes on, apart from its result."""
        spent = time.perf_counter() - self._began
        print(f"[{spent:5.0f} s] {line}", file=sys.stderr, flush=True)

    def _in_process(self, trial: Trial, timeout: float) -> Row:
        start = self._fresh if self.options.fresh else self._forked
        with tempfile.TemporaryDirectory() as folder:
            answer_path, log = Path(folder, "answer.json"), Path(folder, "log")
            ended = start(trial, answer_path, log, timeout)
            said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            if answer_path.exists():
                row: Row = json.loads(answer_path.read_text())
            else:
                last = (said.strip().splitlines() or ["it said nothing"])[-1]
                row = {**trial.row(), "error": f"{ended}: {last}"}
        row["log"] = said
        return row

    def _forked(self, trial: Trial, path: Path, log: Path, timeout: float) -> str:
        context = multiprocessing.get_context("fork")
        process = context.Process(
            target=_in_fork,
            args=(trial, self._subject, self.options, self._built, path, log),
        )
        with warnings.catch_warnings():
            # Threads were started by what was imported, and they hold no locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return f"took longer than {timeout:.0f} s"
        return f"ended with {process.exitcode}"

    def _fresh(self, trial: Trial, path: Path, log: Path, timeout: float) -> str:
        job = {
            "options": vars(self.options),
            "trial": asdict(trial),
            "answer": str(path),
        }
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, sys.argv[0], "--child", json.dumps(job)],
                stdout=out,
                stderr=out,
            )
            try:
                return f"ended with {process.wait(timeout)}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return f"took longer than {timeout:.0f} s"


def _in_fork(
    trial: Trial,
    subject: Subject,
    options: argparse.Namespace,
    built: nn.Module | None,
    path: Path,
    log: Path,
) -> NoReturn:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _write(path, answer(trial, subject, options, built))
    # Neither the parent's end is for this process to come to, nor a slow one.
    os._exit(0)


def _child(kind: type[Subject], job: dict[str, Any]) -> NoReturn:
    options = argparse.Namespace(**job["options"])
    trial = Trial(**job["trial"])
    subject = None if trial.kind == "device" else kind(options)
    _write(Path(job["answer"]), answer(trial, subject, options, None))
    os._exit(0)


def _write(path: Path, row: Row) -> None:
    # Written whole or not at all: the parent may give up on this process meanwhile.
    path.with_suffix(".part").write_text(json.dumps(row))
    path.with_suffix(".part").rename(path)


def _in_gib(limits: list[str], weights: int) -> list[float]:
    return [
        float(limit[:-1]) * weights / 2**30 if limit.endswith("x") else float(limit)
        for limit in limits
    ]


def _parse(kind: type[Subject], description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = parser.add_argument
    add("--resolution", type=int, default=1024, help="pixels (default: 1024)")
    add("--batch", type=int, default=1, help="images in a forward (default: 1)")
    kind.add_arguments(parser)
    add(
        "--limits",
        nargs="+",
        default=list(kind.default_limits),
        metavar="GIB",
        help='memory to take, in GiB, or "0.25x" for a share of the weights '
        f"(default: {' '.join(kind.default_limits)})",
    )
    add(
        "--peer-limits",
        nargs="+",
        metavar="GIB",
        help="the same for the other methods (default: as --limits)",
    )
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"any of {', '.join(METHODS)} (default: all)",
    )
    add(
        "--storage-dtype",
        nargs="+",
        default=[OWN],
        metavar="DTYPE",
        help="of hookoffload's weights at rest, such as float8_e4m3fn; several make "
        f"more rows; {OWN}: bfloat16 (default)",
    )
    add("--store", choices=["cpu", "disk"], help="where hookoffload keeps weights")
    add("--device", default="cuda", help="where to compute (default: cuda)")
    add("--repeats", type=int, default=3, help="timed forwards (default: 3)")
    add("--fresh", action="store_true", help="a new interpreter for each row")
    add(
        "--stress",
        type=int,
        default=0,
        metavar="N",
        help="no table: N forwards with random limits (between the first and the last "
        "of --limits) and resolutions, and an exception now and then",
    )
    add("--profile", metavar="FILE", help="trace of the first hookoffload row (.json)")
    add("--json", metavar="FILE", help="all figures, written after each row")
    add("--row-timeout", type=float, default=300, metavar="S", help="(default: 300)")
    add(
        "--deadline",
        type=float,
        metavar="S",
        help="start no row and let none run after so many seconds",
    )
    options = parser.parse_args()
    for name in options.storage_dtype:
        if name != OWN and not isinstance(getattr(torch, name, None), torch.dtype):
            parser.error(f"--storage-dtype: torch has no dtype {name!r}")
    if options.device == "cuda":
        options.device = "cuda:0"  # torch takes the two for different devices
    if options.store is None:
        options.store = "disk" if options.device == "cpu" else "cpu"
    if not hasattr(os, "fork"):
        options.fresh = True
    return options

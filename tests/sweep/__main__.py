"""Command line of the sweep."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from .classes import LIBRARIES, class_names
from .pool import Task, run_tasks
from .trial import Place, Result

_ABOUT = """Attach to every model class of transformers and diffusers that can be
built small from its config, with a limit of 30% of its size (or the least that it
needs, marked "least"), and compare outputs, peak and what detach leaves with the plain
model. The exit status is 1 if one failed."""
_ON_A_GPU = """On a GPU, in less than four minutes: python -m tests.sweep --device cuda
--dtype bfloat16 --sample 150 --jobs 14 --seconds 210 --timeout 60 --compact"""


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep and print its table.

    Args:
        arguments: of the command line; default: this process's.

    Returns:
        The exit status: 1 if a class failed.
    """
    options = _parser().parse_args(arguments)
    tasks = _tasks(options)
    results: list[tuple[str, Result]] = []
    try:
        for task, result in run_tasks(
            tasks, jobs=options.jobs, timeout=options.timeout, most=options.seconds
        ):
            results.append((task.library, result))
            if options.verbose or result.outcome in ("failed", "refused"):
                _say(_line(result))
    except KeyboardInterrupt:
        _say("interrupted: what follows is what was done")
    results.sort(key=lambda entry: (entry[0], entry[1].name))
    if options.json:
        rows = [{"library": lib, **result.as_dict()} for lib, result in results]
        Path(options.json).write_text(json.dumps(rows, indent=1))
    if options.compact:
        _say(compact_table(results))
    elif not options.quiet:
        _say(_table(results))
    _say(_counts(results))
    if len(results) < len(tasks):
        _say(f"not tried, for lack of time: {len(tasks) - len(results)}")
    return int(any(result.outcome == "failed" for _, result in results))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sweep", description=_ABOUT, epilog=_ON_A_GPU
    )
    add = parser.add_argument
    add("--library", choices=LIBRARIES, help="only this one (default: both)")
    add("--only", metavar="REGEX", help="only classes whose name it is found in")
    add("--every-head", action="store_true", help="all classes of an architecture")
    add("--sample", type=int, metavar="N", help="so many of them, chosen by --seed")
    add("--seed", type=int, default=0, help="of the choice (default: 0)")
    add("--jobs", type=int, default=1, help="worker processes (default: 1)")
    add("--timeout", type=float, default=120, help="seconds a class (default: 120)")
    add("--seconds", type=float, metavar="S", help="stop after this time")
    add("--device", default="cpu", help="cpu, from disk; or cuda, from RAM")
    add("--store", choices=("cpu", "disk"), help="where weights rest instead")
    add("--dtype", help="of the weights, for example bfloat16")
    add("--json", metavar="FILE", help="write all results")
    add("--verbose", action="store_true", help="print each class when it is done")
    add("--quiet", action="store_true", help="print no table")
    add("--compact", action="store_true", help="print a short table")
    return parser


def _tasks(options: argparse.Namespace) -> list[Task]:
    dtype = getattr(torch, options.dtype) if options.dtype else None
    place = Place(device=options.device, dtype=dtype, rests=options.store)
    tasks = [
        Task(library=library, name=name, place=place)
        for library in ([options.library] if options.library else LIBRARIES)
        if importlib.util.find_spec(library) is not None
        for name in class_names(library, every=options.every_head)
        if not options.only or re.search(options.only, name)
    ]
    if options.sample is not None and options.sample < len(tasks):
        tasks = random.Random(options.seed).sample(tasks, options.sample)
    return tasks


def _line(result: Result) -> str:
    share = (result.limit - result.beside) / result.size if result.size else 0
    least = "least" if result.least else ""
    figures = (
        f"{result.size / 2**20:8.2f} {share:6.0%} {least:5} "
        f"{result.peak / 2**20:8.2f} {result.moved / 2**20:9.2f} {result.seconds:6.1f}"
    )
    detail = result.reason or ", ".join(result.inputs)
    return f"{result.outcome:8} {result.name:48} {figures}  {detail[:300]}"


def _table(results: list[tuple[str, Result]]) -> str:
    lines = []
    for library in LIBRARIES:
        some = [result for lib, result in results if lib == library]
        if some:
            lines += [
                f"\n{library}",
                f"{'outcome':8} {'class':48} {'MiB':>8} {'limit':>6} {'':5} "
                f"{'peak MiB':>8} {'moved MiB':>9} {'s':>6}  inputs, or reason",
                *map(_line, some),
            ]
    return "\n".join(lines)


def compact_table(results: list[tuple[str, Result]]) -> str:
    """Return what a page has room for: figures of what ran, names of what did not.

    Args:
        results: libraries and results, in the order of the table.

    Returns:
        A table in Markdown; its limit is the part of the weights that may be on the
        device at a time, without what an accelerator holds beside them.
    """
    lines = [
        "| class | KiB | limit | peak KiB | moved KiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    others: dict[str, list[str]] = {}
    for _, result in results:
        if result.outcome != "equal":
            others.setdefault(result.outcome, []).append(result.name)
            continue
        share = (result.limit - result.beside) / result.size
        lines.append(
            f"| {result.name} | {result.size / 2**10:.0f} | {share:.0%} "
            f"| {max(0, result.peak - result.beside) / 2**10:.0f} "
            f"| {result.moved / 2**10:.0f} |"
        )
    lines += [f"\n{what}: {', '.join(names)}" for what, names in others.items()]
    return "\n".join(lines)


def _counts(results: list[tuple[str, Result]]) -> str:
    lines = [""]
    for library in LIBRARIES:
        counts = Counter(result.outcome for lib, result in results if lib == library)
        if counts:
            told = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
            lines.append(f"{library}: {told} of {sum(counts.values())}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Many forwards under changing circumstances: what grows, and what comes out wrong."""

from __future__ import annotations

import argparse
import gc
import math
import random
import time
from typing import Any

import torch
from measure import Runner, host_bytes
from methods import METHODS, way_of
from subject import SEED, Subject
from torch import nn

import hookoffload

CHANGE_LIMIT, BREAK_OFF = 0.2, 0.1
# Of the changes of the limit, those that detach and attach anew.
ATTACH_ANEW = 0.25
# Of the time of a row, after which the run ends early instead of being ended.
TIME_SHARE = 0.8


class Deliberate(Exception):
    """Raised in the middle of a forward."""


def stress(
    runner: Runner,
    subject: Subject,
    options: argparse.Namespace,
    storage: str | None,
    known: dict[str, str],
) -> dict[str, Any]:
    """Runs forwards with random limits and resolutions and an exception now and then.

    Memory is compared with no hooks attached: after every resolution has run once, and
    at the end.

    Args:
        runner: Runs the model, which has no hooks yet.
        subject: What the model is.
        options: Of the command line.
        storage: Name of the dtype of weights at rest; None keeps theirs.
        known: Checksum of the right output at each resolution. Where it is missing, the
            first output counts as right.
    """
    model, device = runner.model, runner.device
    draw = random.Random(SEED)
    sizes = subject.resolutions()
    limits = sorted(options.limits)
    owners = [m for m in model.modules() if next(m.parameters(False), None) is not None]
    set_limit = getattr(hookoffload, "set_limit", None)
    expected = dict(known)
    count: dict[str, Any] = dict.fromkeys(
        ("forwards", "wrong", "over_limit", "broken_off", "set_limit", "attached"), 0
    )
    worst_over = 0
    wrong: list[str] = []

    def attach(limit_gb: float) -> None:
        way = way_of(options, limit_gb, storage)
        METHODS["hookoffload"].attach(model, way)
        count["attached"] += 1

    def run(size: int, limit_gb: float) -> None:
        nonlocal worst_over
        forward = runner.forward(size)
        count["forwards"] += 1
        if expected.setdefault(str(size), forward.checksum) != forward.checksum:
            count["wrong"] += 1
            wrong.append(f"forward {count['forwards']}: {size} at {limit_gb:.3g} GiB")
        over = (forward.allocated or 0) - int(limit_gb * 2**30)
        if over > 0:
            count["over_limit"] += 1
            worst_over = max(worst_over, over)

    course: list[int | None] = []
    limit = limits[-1]
    attach(limit)
    for size in sizes:
        run(size, limit)
    hookoffload.detach(model)
    before, began = _memory(device), time.perf_counter()
    attach(limit)
    for _ in range(options.stress):
        if time.perf_counter() - began > options.row_timeout * TIME_SHARE:
            break
        if draw.random() < CHANGE_LIMIT:
            limit = math.exp(draw.uniform(math.log(limits[0]), math.log(limits[-1])))
            if set_limit is None or draw.random() < ATTACH_ANEW:
                hookoffload.detach(model)
                course.append(_memory(device)["rss"])
                attach(limit)
            else:
                set_limit(model, limit)
                count["set_limit"] += 1
        size = draw.choice(sizes)
        if draw.random() < BREAK_OFF:
            count["broken_off"] += _broken_off(runner, size, draw.choice(owners))
        run(size, limit)
    seconds = time.perf_counter() - began
    hookoffload.detach(model)
    after = _memory(device)
    return {
        **count,
        "wrong_ones": wrong[:5],
        "worst_over_bytes": worst_over,
        "against": "the plain model" if known else "its own first outputs",
        "seconds": seconds,
        "before": before,
        "after": after,
        "rss_course": course,
    }


def _broken_off(runner: Runner, size: int, module: nn.Module) -> bool:
    """Runs a forward that ends inside a module; returns whether it was reached."""

    def end(*_: Any) -> None:
        raise Deliberate

    handle = module.register_forward_pre_hook(end)
    try:
        runner.forward(size)
    except Deliberate:
        return True
    finally:
        handle.remove()
    return False


def _memory(device: torch.device) -> dict[str, int | None]:
    gc.collect()
    allocated = reserved = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        allocated = torch.cuda.memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device)
    return {"allocated": allocated, "reserved": reserved, "rss": host_bytes()}

"""``hookoffload plan``: what a checkpoint would do under a limit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .budget import GIB, format_gib
from .command_options import (
    Commands,
    add_json,
    add_store,
    not_negative,
    positive,
    say,
    terminal_width,
    usual_store,
)
from .cost import Rates
from .demo import emit
from .placement import CPU, default_device
from .plan import Plan
from .plan_table import format_curve, format_plan, plan_record
from .policy import OffloadPolicy
from .preview import plan_of_checkpoint


def add_plan(commands: Commands) -> None:
    """Adds the command."""
    plan = commands.add_parser(
        "plan",
        help="say what a checkpoint would do under a limit; loads nothing",
        description=(
            "Plans for a safetensors checkpoint from the headers of its files: what "
            "stays on the device, what streams, and what a pass costs. Each tensor "
            "counts as read by every pass. Seconds are predicted from the rates that "
            "you give (hookoffload doctor measures this machine's), and never guessed."
        ),
    )
    plan.add_argument("path", type=Path, nargs="+", help="a file, an index or a folder")
    plan.add_argument(
        "--limit-gb",
        type=float,
        metavar="N",
        help="limit in GiB; 0: as little as possible (default: none)",
    )
    plan.add_argument(
        "--device",
        metavar="NAME",
        help=(
            "where it would compute; it need not be there (default: this machine's "
            "accelerator, else cuda)"
        ),
    )
    add_store(plan)
    plan.add_argument(
        "--activations-gb",
        type=not_negative,
        default=0.0,
        metavar="N",
        help="GiB to leave for what the model computes (default: 0)",
    )
    for option, what in (
        ("--link-gb-s", "GiB/s from host RAM to the device"),
        ("--disk-gb-s", "GiB/s from disk"),
        ("--compute-s", "seconds of compute in a pass"),
    ):
        plan.add_argument(option, type=positive, metavar="N", help=what)
    plan.add_argument(
        "--curve", action="store_true", help="also show what other limits would give"
    )
    add_json(plan)
    plan.set_defaults(run=_run_plan)


def _run_plan(options: argparse.Namespace) -> int:
    here = default_device()
    device = options.device or ("cuda" if here == CPU else str(here))
    policy = OffloadPolicy(
        limit_gb=options.limit_gb,
        compute_device=device,
        store=options.store or usual_store(device),
    )
    plan = plan_of_checkpoint(
        options.path[0] if len(options.path) == 1 else options.path,
        policy,
        _rates_of(options),
        activation_bytes=int(options.activations_gb * GIB),
    )
    curve = plan.curve() if options.curve else None
    if options.json:
        record = plan_record(plan)
        if curve is not None:
            record["curve"] = [point._asdict() for point in curve]
        emit(json.dumps(record))
        return 0
    width = terminal_width()
    whole = sum(layer.resident_bytes for layer in plan.layers)
    absent = "" if options.device or here != CPU else " (there is none here)"
    place = "on disk" if policy.store == "disk" else "in RAM"
    say(
        f"{' '.join(map(str, options.path))}: {format_gib(whole)} {place}, to compute "
        f"on {plan.device}{absent}",
        width,
    )
    emit(format_plan(plan, width))
    if curve is not None:
        known = plan.rates is not None and plan.rates.compute_seconds is not None
        emit()
        emit(format_curve(curve, width, at_least=not known))
    say(_hint(plan), width)
    return 0


def _rates_of(options: argparse.Namespace) -> Rates | None:
    link, disk = options.link_gb_s, options.disk_gb_s
    if link is disk is options.compute_s is None:
        return None
    return Rates(
        link_bytes_per_second=None if link is None else link * GIB,
        disk_bytes_per_second=None if disk is None else disk * GIB,
        compute_seconds=options.compute_s,
    )


def _hint(plan: Plan) -> str:
    hints = []
    if plan.rates is None:
        hints.append("--link-gb-s N (hookoffload doctor measures it) adds seconds.")
    if not plan.activation_bytes:
        hints.append("Activations are not counted: --activations-gb N leaves room.")
    return " ".join(hints)

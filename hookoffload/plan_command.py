"""``hookoffload plan``: what a checkpoint would do under a limit."""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, replace
from pathlib import Path

from .budget import GIB, format_gib
from .checkpoint_plan import Tiers, plan_of_headers
from .command_options import (
    Commands,
    add_json,
    add_store,
    device,
    emit,
    not_negative,
    positive,
    say,
    terminal_width,
)
from .cost import Rates
from .limits import checked_limit, to_bytes
from .measured_rates import MeasuredRates, kept_rates
from .plan import Plan
from .plan_table import format_curve, format_plan, plan_record


def add_plan(commands: Commands) -> None:
    """Adds the command."""
    plan = commands.add_parser(
        "plan",
        help="say what a checkpoint would do under a limit; loads nothing",
        description=(
            "Plans for a checkpoint, safetensors or GGUF, from the headers of its "
            "files: what stays on the device, what streams, and what a pass costs. "
            "Each tensor counts as read by every pass. Seconds are predicted from the "
            "rates that you give, else from those that hookoffload doctor measured on "
            "this machine, and never guessed."
        ),
    )
    plan.add_argument("path", type=Path, nargs="+", help="a file, an index or a folder")
    plan.add_argument(
        "--limit-gb",
        type=not_negative,
        metavar="N",
        help="limit in GiB; 0: as little as possible (default: none)",
    )
    plan.add_argument(
        "--host-limit-gb",
        type=not_negative,
        metavar="N",
        help=(
            "host RAM in GiB for layers that wait, the others wait on disk "
            "(default: as --store says)"
        ),
    )
    plan.add_argument(
        "--device",
        type=device,
        default="cuda",
        metavar="NAME",
        help="where it would compute; it need not be there (default: cuda)",
    )
    add_store(plan, "RAM, as with OffloadPolicy")
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
    plan.set_defaults(run=_run_uncollected)


def _run_uncollected(options: argparse.Namespace) -> int:
    """Plans while nothing is collected.

    What is made of the headers is in use to the end. Of a checkpoint with 47,000
    tensors, looking through it for garbage again and again was a fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _run_plan(options)
    finally:
        if enabled:
            gc.enable()


def _run_plan(options: argparse.Namespace) -> int:
    host_limit = checked_limit("host_limit_gb", options.host_limit_gb)
    if host_limit is not None and options.store == "cpu":
        raise ValueError(
            f"--host-limit-gb {host_limit:g} keeps in files what is beyond it, which "
            "contradicts --store cpu: leave one of them out"
        )
    limit = checked_limit("limit_gb", options.limit_gb)
    measured = kept_rates(options.device, options.path)
    plan = plan_of_headers(
        options.path[0] if len(options.path) == 1 else options.path,
        Tiers(
            device=options.device,
            on_disk=options.store == "disk",
            host_limit_bytes=None if host_limit is None else to_bytes(host_limit),
        ),
        limit_bytes=None if limit is None else to_bytes(limit),
        activation_bytes=int(options.activations_gb * GIB),
        rates=_rates_of(options, measured),
    )
    plan = _named_seconds(plan)
    curve = plan.curve() if options.curve else None
    if options.json:
        record = plan_record(plan)
        record["rates"] = None if plan.rates is None else asdict(plan.rates)
        record["rates_measured"] = None if measured is None else measured.day
        if curve is not None:
            record["curve"] = [point._asdict() for point in curve]
        emit(json.dumps(record))
        return 0
    width = terminal_width()
    whole = sum(layer.resident_bytes for layer in plan.layers)
    place = "in RAM and on disk" if plan.divided else "in RAM"
    if plan.host_bytes == 0:
        place = "on disk"
    say(
        f"{' '.join(map(str, options.path))}: {format_gib(whole)} {place}, to compute "
        f"on {plan.device}",
        width,
    )
    emit(format_plan(plan, width, disk_option="--store disk"))
    if curve is not None:
        known = plan.rates is not None and plan.rates.compute_seconds is not None
        emit()
        emit(format_curve(curve, width, at_least=not known))
    say(_hint(plan, options, measured), width)
    return 0


def _rates_of(
    options: argparse.Namespace, measured: MeasuredRates | None
) -> Rates | None:
    """Returns the rates that are given, and of the others those that were measured."""
    known = Rates() if measured is None else measured.rates
    link, disk = options.link_gb_s, options.disk_gb_s
    if link is not None:
        known = replace(known, link_bytes_per_second=link * GIB)
    if disk is not None:
        known = replace(known, disk_bytes_per_second=disk * GIB)
    known = replace(known, compute_seconds=options.compute_s)
    return None if known == Rates() else known


def _named_seconds(plan: Plan) -> Plan:
    """Drops rates that tell nothing: a disk's, where all that is slow is the link."""
    told = plan.predict()
    if (
        told is None
        or told.seconds
        or None not in (told.link_seconds, told.disk_seconds)
    ):
        return plan
    return replace(plan, rates=None)


def _hint(
    plan: Plan, options: argparse.Namespace, measured: MeasuredRates | None
) -> str:
    if all(layer.in_place for layer in plan.layers):
        return ""  # the table says why, and what to do
    hints = []
    if measured is not None:
        link = measured.rates.link_bytes_per_second
        disk = measured.rates.disk_bytes_per_second
        used = [
            f"{name} {rate / GIB:.2f} GiB/s"
            for name, rate, given, nbytes in (
                ("link", link, options.link_gb_s, plan.link_bytes),
                ("disk", disk, options.disk_gb_s, plan.disk_bytes),
            )
            if rate is not None and given is None and nbytes
        ]
        if used:
            rates = ", ".join(used)
            hints.append(f"{rates}: measured by hookoffload doctor, {measured.day}.")
    if plan.rates is None:
        option = "--link-gb-s" if plan.link_bytes else "--disk-gb-s"
        hints.append(
            f"For seconds, give {option} N, or run hookoffload doctor on the machine "
            "that is to compute."
        )
    if not plan.activation_bytes:
        hints.append("Activations are not counted: --activations-gb N leaves room.")
    return " ".join(hints)

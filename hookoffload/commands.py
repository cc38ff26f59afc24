"""The commands: demo, plan, doctor, bench, convert."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import format_gib
from .command_options import (
    DIFFERENT,
    Commands,
    add_json,
    add_store,
    count,
    device,
    emit,
    not_negative,
    say,
    terminal_width,
)
from .plan_command import add_plan
from .user_errors import EXPECTED_ERRORS

if TYPE_CHECKING:
    import torch

    from .converting import Converter

# What runs is imported when it does: most of it needs torch, which takes a second.


def _add_demo(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="run a transformer plain and under a limit, and compare",
        description=(
            "Makes a transformer with random weights, runs it plain and under a memory "
            "limit, each in a fresh process, and compares memory, time and output. "
            "Sizes are in GiB (2**30 bytes)."
        ),
    )
    demo.add_argument(
        "--size-gb",
        type=float,
        default=1.0,
        metavar="N",
        help="size of the model in GiB (default: 1)",
    )
    demo.add_argument(
        "--limit-gb",
        type=not_negative,
        metavar="N",
        help="limit in GiB (default: an eighth of the model)",
    )
    demo.add_argument(
        "--device",
        type=device,
        metavar="NAME",
        help="where to compute: cpu, cuda or xpu (default: a GPU if there is one)",
    )
    demo.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help=(
            "where the checkpoint is kept (default: $XDG_CACHE_HOME/hookoffload, or "
            "~/.cache/hookoffload)"
        ),
    )
    add_json(demo)
    demo.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    from .demo import format_demo, run_demo

    width = terminal_width()
    run = run_demo(
        size_gb=options.size_gb,
        limit_gb=options.limit_gb,
        cache_dir=options.cache_dir,
        device=options.device,
        say=(lambda line: None) if options.json else (lambda line: say(line, width)),
    )
    if options.json:
        emit(json.dumps(asdict(run)))
    else:
        emit()
        emit(format_demo(run, width))
    return 0 if run.identical else DIFFERENT


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine can do",
        description=(
            "Measures the link to the GPU and the disk, in a few seconds, and says how "
            "much memory can be page-locked. Rates are in GiB (2**30 bytes) a second; "
            "they are kept in the user's cache folder for hookoffload plan."
        ),
    )
    doctor.add_argument(
        "--disk-dir",
        type=Path,
        metavar="DIR",
        help=(
            "where to measure the disk: up to half a GiB is written there and removed "
            "(default: the system's temporary folder)"
        ),
    )
    add_json(doctor)
    doctor.set_defaults(run=_run_doctor)


def _run_doctor(options: argparse.Namespace) -> int:
    from .doctor import examine, findings_record, format_findings, keep_findings

    findings = examine(options.disk_dir)
    kept = keep_findings(findings)
    if options.json:
        emit(json.dumps(findings_record(findings)))
    else:
        width = terminal_width()
        emit(format_findings(findings, width))
        if kept:
            say("hookoffload plan predicts seconds from these rates now.", width)
    return 0


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time a checkpoint at several limits, measured against predicted",
        description=(
            "Loads a model of transformers or diffusers from its folder (config.json "
            "and safetensors files), or one of your own with --class, and times its "
            "forward at several limits."
        ),
    )
    bench.add_argument("folder", type=Path, help="config.json and safetensors files")
    bench.add_argument(
        "--limit-gb",
        type=not_negative,
        nargs="+",
        required=True,
        metavar="N",
        help="limits in GiB; 0: as little as possible",
    )
    bench.add_argument(
        "--class",
        dest="class_name",
        metavar="MODULE:CLASS",
        help=(
            "the model's class; without from_config it is called with what config.json "
            "holds (default: the class that config.json names)"
        ),
    )
    bench.add_argument(
        "--input",
        metavar="MODULE:FUNCTION",
        help=(
            "called with the model, returns a tensor, a tuple of arguments or a "
            "mapping of keyword arguments (default: 128 token ids, for text models of "
            "transformers)"
        ),
    )
    bench.add_argument(
        "--device",
        type=device,
        metavar="NAME",
        help="where to compute (default: a GPU, else cpu)",
    )
    add_store(bench, "RAM for a GPU, disk where the CPU computes")
    bench.add_argument(
        "--passes",
        type=count,
        default=3,
        metavar="N",
        help="forwards to time at each limit (default: 3)",
    )
    bench.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw it (needs matplotlib)"
    )
    add_json(bench)
    bench.set_defaults(run=_run_bench)


def _run_bench(options: argparse.Namespace) -> int:
    from .bench import bench_record, describe_bench, format_bench, run_bench
    from .bench_plot import check_picture, plot_bench

    if options.plot is not None:
        check_picture(options.plot)
    width = terminal_width()
    bench = run_bench(
        options.folder,
        options.limit_gb,
        class_name=options.class_name,
        input_name=options.input,
        device=options.device,
        store=options.store,
        passes=options.passes,
        say=(lambda line: None) if options.json else (lambda line: say(line, width)),
    )
    if options.json:
        emit(json.dumps(bench_record(bench)))
    else:
        emit()
        emit(format_bench(bench, width))
        say(describe_bench(bench), width)
    if options.plot is not None:
        plot_bench(bench, options.plot)
    return 0


def _add_convert(commands: Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint as a folder of safetensors files",
        description=(
            "Writes a checkpoint, safetensors or binary (.bin, .pt, .pth, .ckpt), as "
            "safetensors files with an index, piece by piece: RAM need not hold it. A "
            "checkpoint named model in the folder is replaced as a whole."
        ),
    )
    convert.add_argument(
        "source", metavar="SRC", help="a file, an index, a folder or a quoted pattern"
    )
    convert.add_argument(
        "folder", metavar="DST", type=Path, help="the folder to write to"
    )
    convert.add_argument(
        "--converter",
        metavar="MODULE:FUNCTION",
        help=(
            "called with the tensors by name, returns those to write: what "
            "load_model takes as state_dict_converter"
        ),
    )
    convert.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help='the most in a file, such as 500MB or 2GiB (default: "5GB")',
    )
    add_json(convert)
    convert.set_defaults(run=_run_convert)


def _run_convert(options: argparse.Namespace) -> int:
    from .rewriting import rewrite_checkpoint

    name = options.converter
    done = rewrite_checkpoint(
        options.source,
        options.folder,
        converter=None if name is None else _converter(name),
        max_shard_size=options.max_shard_size,
    )
    if options.json:
        emit(json.dumps(asdict(done)))
        return 0
    files = done.files[0]
    if len(done.files) > 1:
        files = f"{len(done.files)} files and their index"
    size = format_gib(done.nbytes)
    text = f"Wrote {done.tensors} tensors, {size}, into {done.folder}: {files}."
    say(text, terminal_width())
    return 0


def _converter(name: str) -> Converter:
    from .importing import explained, imported

    function = imported(name)

    def converter(tensors: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        try:
            converted: Mapping[str, torch.Tensor] = function(tensors)
        except EXPECTED_ERRORS:
            raise
        except Exception as error:
            raise ValueError(
                f"--converter {name} failed: {explained(error)}"
            ) from error
        return converted

    return converter


COMMANDS = (_add_demo, add_plan, _add_doctor, _add_bench, _add_convert)

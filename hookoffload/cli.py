"""The command line: ``hookoffload`` and ``python -m hookoffload``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from .commands import COMMANDS
from .demo import emit, run_demo
from .demo_trial import EXPECTED_ERRORS, one_line

DIFFERENT = 1
FAILED = 2
INTERRUPTED = 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit status: 0; 1 if the demo's outputs differ; 2 after an error, which is
        one line on the standard error; 130 after Ctrl-C.
    """
    parser = _make_parser()
    try:
        options = parser.parse_args(argv)
        if options.command is None:
            emit(parser.format_help().rstrip())
            return 0
        status: int = options.run(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone: nothing more to say, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except EXPECTED_ERRORS as error:
        sys.stderr.write(f"{parser.prog}: {one_line(error)}\n")
        return FAILED
    return status


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="hookoffload",
        description="Runs PyTorch models in less memory than their weights take.",
        epilog=(
            "Sizes are in GiB (2**30 bytes). Exit status: 0; 1 if the demo's outputs "
            "differ; 2 after an error, which is one line on the standard error."
        ),
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
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
        type=float,
        metavar="N",
        help="limit in GiB (default: an eighth of the model)",
    )
    demo.add_argument(
        "--device",
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
    demo.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    same = run_demo(
        size_gb=options.size_gb,
        limit_gb=options.limit_gb,
        cache_dir=options.cache_dir,
        device=options.device,
    )
    return 0 if same else DIFFERENT


def _version() -> str:
    try:
        return f"hookoffload {version('hookoffload')}"
    except PackageNotFoundError:
        return "hookoffload, run from its source without being installed"

"""The command line: ``hookoffload`` and ``python -m hookoffload``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from .command_options import FAILED, emit
from .commands import COMMANDS
from .user_errors import EXPECTED_ERRORS, one_line

INTERRUPTED = 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{self.prog}: {message} (see {self.prog} --help)")
        self.exit(FAILED)


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
        if sys.stdout is None:
            # Before any work, whose files would be given the number of the output.
            raise ValueError(
                "the standard output is closed, and the answer would go there. Send "
                "it to a file, or to /dev/null"
            )
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
        _complain(f"{parser.prog}: {one_line(error)}")
        return FAILED
    return status


def _complain(line: str) -> None:
    if sys.stderr is not None:  # a shell can close it
        sys.stderr.write(f"{line}\n")


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
    for add_command in COMMANDS:
        add_command(commands)
    return parser


def _version() -> str:
    try:
        return f"hookoffload {version('hookoffload')}"
    except PackageNotFoundError:
        return "hookoffload, run from its source without being installed"

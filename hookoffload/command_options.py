"""What several commands of the command line share: options, numbers, lines."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import textwrap
from typing import Any

from .device_kinds import DEVICE_KINDS, LISTED

# Exit statuses, beside 0.
DIFFERENT = 1
FAILED = 2

Commands = Any  # what add_subparsers returns; argparse keeps its name private


def add_store(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --store.

    Args:
        parser: Of the command.
        default: Says where weights rest without it.
    """
    parser.add_argument(
        "--store",
        choices=("cpu", "disk"),
        help=f"where weights rest (default: {default})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, sizes in bytes"
    )


def terminal_width() -> int:
    """Returns the columns of the terminal; 80 for a pipe."""
    return max(shutil.get_terminal_size().columns, 20)


def emit(text: str = "") -> None:
    """Writes one line to the standard output at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say(text: str, width: int) -> None:
    """Writes a paragraph, wrapped."""
    for line in textwrap.wrap(text, width, break_on_hyphens=False):
        emit(line)


def positive(text: str) -> float:
    """Reads a number above 0, as argparse wants it done."""
    number = not_negative(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text} should be more than 0")
    return number


def not_negative(text: str) -> float:
    """Reads a number from 0 on."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number >= 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, 0 or more")
    return number


def device(text: str) -> str:
    """Reads a device's name, without torch to ask whether it is there."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICE_KINDS or (colon and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no device (known: {LISTED})")
    return text


def count(text: str) -> int:
    """Reads a whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number from 1 on")
    return int(text)

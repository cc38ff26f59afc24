"""Files written aside and renamed: whoever looks finds the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes its name when the ``with`` block ends without an error.

    Args:
        path: the file; one that is there is replaced.

    Raises:
        ValueError: The folder does not exist, or the path is one.
    """
    target = checked_target(path)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(aside, "xb") as file:
            yield file
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def checked_target(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file that can be written.

    Raises:
        ValueError: The folder does not exist, or the path is one.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{str(target)!r} is a folder; give the path of a file in it")
    if not target.parent.is_dir():
        raise ValueError(
            f"{str(target)!r} cannot be written: the folder {str(target.parent)!r} "
            "does not exist; make it first"
        )
    return target

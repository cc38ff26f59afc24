"""Folders of the library's own, and what becomes of them when a process dies.

[Note: who may remove a folder]
The process that made a folder holds a lock (``flock``) on it as long as it lives, and
removes it at the end. The system drops the lock with the process, however that ends:
a folder that can be locked is nobody's any more, and whoever makes the next one beside
it sweeps it away. Where the file system knows no such locks, nothing is swept.

A forked child has the parent's lock and the parent's finalizers as well. It is not the
maker, so it removes nothing and unlocks nothing.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Without flock nothing is locked, and nothing swept.
    fcntl = None  # type: ignore[assignment]

SPILL_PREFIX = "hookoffload"
_NAME_BYTES = 8


class SpillFolder:
    """A folder for files that last no longer than what uses them.

    Args:
        parent: The folder to make it in.
        prefix: How its name begins; the rest is random.
    """

    __slots__ = ("__weakref__", "_fd", "_maker", "_remove", "parent", "path", "prefix")

    def __init__(self, parent: Path, prefix: str = SPILL_PREFIX) -> None:
        self.parent = parent
        self.prefix = prefix
        self.path: Path | None = None
        self._fd = -1
        self._maker = os.getpid()
        self._remove: weakref.finalize[..., SpillFolder] | None = None

    def create(self) -> Path:
        """Make the folder and lock it, if that is not done; `remove` undoes it.

        Returns:
            Its path.

        Raises:
            OSError: It cannot be made.
        """
        while self._remove is None:
            self.remove()  # what an interrupt left half made
            self._maker = os.getpid()
            name = f"{self.prefix}-{secrets.token_hex(_NAME_BYTES)}"
            # Named first: an interrupt behind mkdir finds what it has to remove.
            self.path = self.parent / name
            self.path.mkdir(mode=0o700)
            with suppress(FileNotFoundError):
                self._fd = _open_folder(self.path)
            taken = self._fd >= 0 and lock_folder(self._fd) is not False
            if not taken or not self.path.is_dir():
                continue  # The sweep of another process was faster.
            # What drops the object without `remove` leaves no files behind either.
            self._remove = weakref.finalize(
                self, _remove_dropped, self.path, self._maker, self._fd
            )
        assert self.path is not None
        return self.path

    def remove(self) -> None:
        """Remove the folder and what is in it, unless another process made it."""
        if self._remove is not None:
            self._remove.detach()
            self._remove = None
        fd, self._fd = self._fd, -1
        try:
            if self.path is not None:
                _remove_tree(self.path, self._maker)
                self.path = None
        finally:
            if fd >= 0:
                os.close(fd)

    def keep(self) -> None:
        """Unlock the folder and let it stay when the object goes, until `remove`."""
        if self._remove is not None:
            self._remove.detach()
            self._remove = None
            os.close(self._fd)
            self._fd = -1

    @staticmethod
    def sweep(
        parent: Path, prefix: str = SPILL_PREFIX, *, keep: Collection[str] = ()
    ) -> None:
        """Remove the folders that processes left behind when they were killed.

        Folders that a living process has locked stay, and so does what has files in it
        that are not of the library's making. What cannot be removed is left.

        Args:
            parent: The folder that holds them.
            prefix: How their names begin.
            keep: Names of folders to leave.
        """
        ours = re.compile(rf"{re.escape(prefix)}-[0-9a-f]{{{2 * _NAME_BYTES}}}")
        try:
            names = os.listdir(parent)
        except OSError:
            return
        for name in names:
            if ours.fullmatch(name) and name not in keep:
                with suppress(OSError):
                    _sweep_one(parent / name)


def lock_folder(fd: int) -> bool | None:
    """Take the lock of an open folder, without waiting.

    Returns:
        Whether it was free; None where folders cannot be locked.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _sweep_one(path: Path) -> None:
    fd = _open_folder(path)
    try:
        if lock_folder(fd) and all(".safetensors" in name for name in os.listdir(path)):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)


def _remove_tree(path: Path, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(path, ignore_errors=True)


def _remove_dropped(path: Path, maker: int, fd: int) -> None:
    try:
        _remove_tree(path, maker)
    finally:
        os.close(fd)

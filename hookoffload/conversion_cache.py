"""A folder of converted checkpoints, shared by processes.

[Note: conversion cache]
An entry is a folder with safetensors files and `conversion.json`, which says for each
tensor of the result where it lies: in one of these files, or still in the checkpoint.
It is written beside its place under another name, flushed to the disk, and renamed: it
is there as a whole or not at all, whenever a process is killed. Its name is a digest of
all that it was made from, so a hit needs no second look.

A lock file keeps two processes from doing the same work. The system takes the lock off
when its holder dies; where files cannot be locked both do the work, and the first
rename wins. What a dead process left is swept away by the next one (see [Note: who may
remove a folder]).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .conversion_entry import ELSEWHERE, EntryWriter, open_entry
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError
from .spill_folder import SpillFolder
from .tensor_bytes import disk_errors

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# A home that is read-only, or is not there.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)

Locations = Mapping[str, TensorLocation]


class ConversionCache:
    """Converts checkpoints once and keeps the results.

    Nothing is ever removed but what is damaged or unfinished; the folder can be deleted
    at any time when no model uses it.

    Args:
        folder: where; None: ``hookoffload/converted`` in the user's cache directory.
            If it cannot be written, each conversion gets a temporary folder.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        default = Path(base) / "hookoffload" / "converted"
        self.folder = Path(default if folder is None else folder).expanduser()
        self.used_temporary_folder = False

    def converted(
        self,
        what: str,
        maker: str | None,
        sources: Locations,
        files: Sequence[Path],
        write: Callable[[EntryWriter], object],
        *,
        temporary: bool = True,
    ) -> dict[str, TensorLocation]:
        """Return a converted checkpoint: from the cache, or made now.

        Args:
            what: the conversion's name, for people.
            maker: the digest of what converts; None: it cannot be told from others,
                and the result is not kept.
            sources: the checkpoint's tensors that results may lie in.
            files: the checkpoint's files.
            write: makes the result.
            temporary: where it cannot be kept, make it in a temporary folder; or do
                nothing.

        Raises:
            CheckpointError: The disk is full, or a file changed meanwhile.
        """
        about = {"what": what, "made from": [str(path) for path in files]}
        before = _states(files)

        def make(folder: Path) -> None:
            writer = EntryWriter(folder, about)
            write(writer)
            for file in {location.file for location in sources.values()}:
                file.check_unchanged()
            if _states(files) != before:
                raise CheckpointError(
                    f"{', '.join(map(str, files))}: changed while it was converted. "
                    "Load the model again when it is complete."
                )
            writer.finish()

        if maker is None:
            logger.info("%s cannot be recognised: what it computes is not kept", what)
            self.used_temporary_folder = True
            return _in_temporary_folder(make, sources)
        key = _key(maker, sources, before)
        entry = self.folder / key
        found = _open(entry, sources)
        if found is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = SpillFolder(self.folder, key)
            unfinished.create()
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise CheckpointError(
                    f"{self.folder}: cannot be written: {error.strerror}. Free space "
                    f"there, or {ELSEWHERE}."
                ) from error
            _warn_of_folder(self.folder, str(error.strerror))
            if not temporary:
                return {}
            self.used_temporary_folder = True
            return _in_temporary_folder(make, sources)
        try:
            return self._made_by_one(entry, unfinished, sources, make)
        finally:
            unfinished.remove()

    def _made_by_one(
        self,
        entry: Path,
        unfinished: SpillFolder,
        sources: Locations,
        make: Callable[[Path], None],
    ) -> dict[str, TensorLocation]:
        with _locked(entry.with_name(f"{entry.name}.lock")):
            found = _open(entry, sources)
            if found is not None:
                return found
            SpillFolder.sweep(self.folder, entry.name)
            logger.info("converting into %s", entry)
            folder = unfinished.create()
            make(folder)
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            with disk_errors(entry, ELSEWHERE):
                try:
                    os.rename(folder, entry)
                except OSError:
                    # Without locks another may have been first.
                    if not entry.is_dir():
                        raise
            found = _open(entry, sources)
        if found is None:
            raise CheckpointError(
                f"{entry}: was removed while it was written. Load the model again, and "
                f"leave the folder alone meanwhile, or {ELSEWHERE}."
            )
        return found


def _states(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what tells a file from others, and from what it was before."""
    states = []
    for path in files:
        try:
            real = path.resolve()  # a Hugging Face cache is made of links
            state = real.stat()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be looked at: {error.strerror}. Put the file back."
            ) from error
        states.append((str(real), state.st_size, state.st_mtime_ns))
    return states


def _key(maker: str, sources: Locations, states: list[tuple[str, int, int]]) -> str:
    tensors = [
        (name, str(at.file.path.resolve()), at.offset, str(at.dtype), at.shape)
        for name, at in sources.items()
    ]
    text = json.dumps([maker, states, tensors])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _open(entry: Path, sources: Locations) -> dict[str, TensorLocation] | None:
    try:
        found = open_entry(entry, sources)
    except CheckpointError as error:
        logger.warning("%s: is damaged and made anew: %s", entry, error)
        return None
    if found is not None:
        logger.info("what was converted is in %s", entry)
    return found


def _in_temporary_folder(
    make: Callable[[Path], None], sources: Locations
) -> dict[str, TensorLocation]:
    """Convert into a folder that goes with the last of its files."""
    folder = SpillFolder(Path(tempfile.gettempdir()))
    try:
        with disk_errors(folder.parent / "files", "set TMPDIR to another"):
            path = folder.create()
        make(path)
        found = open_entry(path, sources)
        assert found is not None, "an entry was written and is not there"
    except BaseException:
        folder.remove()
        raise
    for file in {location.file for location in found.values()}:
        # What is registered to run when the file goes keeps the folder until then.
        weakref.finalize(file, _forget, folder)
    return found


def _forget(folder: SpillFolder) -> None:
    pass


@functools.cache
def _warn_of_folder(folder: Path, reason: str) -> None:
    logger.warning(
        "%s: cannot be written (%s). What is converted goes to a temporary folder and "
        "is converted again the next time. Pass a folder that can be written with "
        "cache_dir=",
        folder,
        reason,
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process; none where files cannot be locked."""
    if fcntl is None:
        yield
        return
    with disk_errors(path, ELSEWHERE):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process converts the same checkpoint: waiting for it")
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("%s: cannot be locked: %s", path, error)
        yield
    finally:
        with suppress(OSError):
            os.close(fd)

"""One open safetensors file: its header, checked, and whether it is still the same."""

from __future__ import annotations

import difflib
import os
import shlex
import stat
import weakref
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .safetensors_header import DAMAGED, CheckpointError, TensorExtent, read_header

GGUF = ".gguf"
PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth"})


class OpenedFile:
    """An open safetensors file whose header has been checked.

    Attributes:
        path: The file's path as given.
        extents: Which bytes each tensor is, by name.
        metadata: The text that the header carries beside the tensors.
        writable_shared: Whether the file is the library's own.
    """

    __slots__ = (
        "__weakref__",
        "_close",
        "_fd",
        "_opened",
        "extents",
        "metadata",
        "path",
        "writable_shared",
    )

    def __init__(
        self, path: str | os.PathLike[str], *, writable_shared: bool = False
    ) -> None:
        """Opens a file and checks its header against its size.

        Args:
            path: The file.
            writable_shared: Whether the file is the library's own: it can be written
                to, and in-place changes of mapped tensors reach it.

        Raises:
            CheckpointError: The file cannot be opened or is not valid.
        """
        self.path = Path(path)
        self.writable_shared = writable_shared
        self._fd = _open_descriptor(self.path, writable_shared)
        self._close = weakref.finalize(self, os.close, self._fd)
        self._close.atexit = False
        try:
            self._opened = os.fstat(self._fd)
            if not stat.S_ISREG(self._opened.st_mode):
                folder = stat.S_ISDIR(self._opened.st_mode)
                raise CheckpointError(
                    f"{self.path}: is {'a folder' if folder else 'a device or pipe'}, "
                    "not a file. Pass the path of a .safetensors file."
                )
            self.extents, self.metadata = self._read_header()
            # The second reader opened the path again: it must be the same file.
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[dict[str, TensorExtent], dict[str, str]]:
        """Returns which bytes each tensor is, and the text beside them."""
        extents, metadata = read_header(self.path, self._fd, self.nbytes)
        _confirm_with_safetensors(self.path, extents, metadata)
        return extents, metadata

    def __repr__(self) -> str:
        """Names the file without listing its tensors."""
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.extents)} tensors)"

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes when it was opened."""
        return self._opened.st_size

    def check_unchanged(self) -> None:
        """Checks that the path still holds the file that was opened.

        The time of the last change is not compared for a `writable_shared` file,
        which the library itself writes.

        Raises:
            CheckpointError: It was removed, replaced, resized or rewritten.
        """
        then = self._opened
        try:
            now = os.stat(self.path)
        except OSError as error:
            what = f"is gone ({error.strerror})"
        else:
            if (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino):
                what = "was replaced by another file"
            elif now.st_size != then.st_size:
                what = f"changed its size from {then.st_size} to {now.st_size} bytes"
            elif now.st_mtime_ns != then.st_mtime_ns and not self.writable_shared:
                what = "was written to"
            else:
                return
        raise CheckpointError(
            f"{self.path}: {what} since it was opened. Put the original file back, or "
            "load the model again; do not change a checkpoint while it is in use."
        )

    def close(self) -> None:
        """Closes the descriptor."""
        self._close()
        self._fd = -1


def read_extents(path: Path) -> dict[str, TensorExtent]:
    """Returns which bytes of a file each of its tensors is, and closes it again.

    Raises:
        CheckpointError: The file cannot be opened or is not valid.
    """
    file = OpenedFile(path)
    file.close()
    return file.extents


class NotConvertedError(CheckpointError):
    """A binary file is to be read piece by piece.

    Args:
        path: The file.
        checkpoint: What it is a part of, and has to be converted with.
    """

    def __init__(self, path: Path, checkpoint: str | os.PathLike[str]) -> None:
        whole = shlex.quote(os.fspath(checkpoint))
        super().__init__(
            f"{path}: only safetensors files can be read from disk piece by piece. "
            f"Convert it once: hookoffload convert {whole} FOLDER"
        )
        self.path = path


def _open_descriptor(path: Path, writable: bool) -> int:
    if path.suffix.lower() in PICKLED:
        raise NotConvertedError(path, path)
    # O_NONBLOCK: opening a pipe by mistake must fail below, not wait for a writer.
    flags = os.O_RDWR if writable else os.O_RDONLY
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {explain_missing(path)}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}. Check the path, its "
            "permissions and the limit on open files (ulimit -n)."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{str(path)!r}: is not a legal file name: {error}. Pass the path of a "
            ".safetensors file."
        ) from error


def explain_missing(path: Path) -> str:
    """Says why a path has no file, for the end of an error that names the path."""
    if os.path.islink(path):  # Path.is_symlink raises for names that are too long.
        return (
            f"is a symbolic link to {os.readlink(path)}, which does not exist. The "
            "download is incomplete: fetch it again."
        )
    if not os.path.isdir(path.parent):
        return (
            f"does not exist, nor does its folder {path.parent}. Pass the path of a "
            "folder or .safetensors file; download a model of the Hugging Face Hub "
            "first with huggingface_hub.snapshot_download."
        )
    near = difflib.get_close_matches(path.name, names_in(path.parent), cutoff=0.5)
    named = f" Similar names there: {', '.join(near)}." if near else ""
    return f"does not exist in its folder.{named} Check the path or fetch the file."


def names_in(folder: Path) -> list[str]:
    """Returns the sorted names in a folder, or says why it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be listed: {error.strerror}. Make the folder readable."
        ) from error


def _confirm_with_safetensors(
    path: Path, extents: dict[str, TensorExtent], metadata: dict[str, str]
) -> None:
    """Lets the format's own reader judge the file, so that both always agree."""
    try:
        # Not "pt": it maps the file writable, refused for files larger than RAM.
        with safe_open(str(path), framework="numpy") as reader:
            names = set(reader.keys())
            known = dict(reader.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: safetensors refuses the file: {error}. {DAMAGED}"
        ) from error
    if names != set(extents) or known != metadata:
        raise CheckpointError(f"{path}: the header can be read in two ways. {DAMAGED}")

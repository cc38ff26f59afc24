"""One open safetensors file: positioned reads and writes, and maps of its tensors."""

from __future__ import annotations

import difflib
import mmap
import os
import platform
import stat
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .safetensors_header import DAMAGED, CheckpointError, read_header
from .tensor_bytes import memory, pieces, write_pieces

_GIB = 2**30
_MOST_READ_AT_ONCE = _GIB  # macOS refuses reads of more than 2**31 - 1 bytes.
PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth"})


def _no_reserve() -> int:
    """Returns the flag for a private map that asks for no swap up front.

    Without it Linux refuses a writable private map of a file larger than RAM.
    Python names the flag from 3.13 on; the figure holds for these machines.
    """
    known = platform.machine() in {"x86_64", "aarch64"}
    figure = 0x4000 if platform.system() == "Linux" and known else 0
    return int(getattr(mmap, "MAP_NORESERVE", figure))


_NO_RESERVE = _no_reserve()


@dataclass(frozen=True)
class TensorLocation:
    """Says where one tensor's bytes lie.

    Attributes:
        name: The tensor's name in the file.
        file: The open file.
        dtype: The tensor's dtype.
        shape: The tensor's shape as torch has it.
        offset: First byte, counted from the start of the file.
        nbytes: Length in bytes.
    """

    name: str
    file: CheckpointFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class CheckpointFile:
    """One open safetensors file.

    Reads and writes are positioned, so threads may share it.

    Attributes:
        path: The file's path as given.
        tensors: Where each tensor lies, by name.
        metadata: The text that the header carries beside the tensors.
        writable_shared: Whether the file is the library's own.
    """

    __slots__ = (
        "__weakref__",
        "_close",
        "_fd",
        "_lock",
        "_map",
        "_opened",
        "metadata",
        "path",
        "tensors",
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
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
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
            extents, self.metadata = read_header(self.path, self._fd, self.nbytes)
            self.tensors = {
                name: TensorLocation(name, self, *extent)
                for name, extent in extents.items()
            }
            _confirm_with_safetensors(self)
            # The second reader opened the path again: it must be the same file.
            self.check_unchanged()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        """Names the file without listing its tensors."""
        return f"CheckpointFile({str(self.path)!r}, {len(self.tensors)} tensors)"

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

    def read_into(
        self, location: TensorLocation, destination: torch.Tensor, start: int = 0
    ) -> None:
        """Fills a tensor's memory with bytes of one tensor of the file.

        The interpreter lock is free while the kernel reads.

        Args:
            location: One of this file's tensors.
            destination: Contiguous CPU tensor of any dtype, filled entirely.
            start: The first byte to read, counted from the tensor's beginning.

        Raises:
            CheckpointError: The file ends early or cannot be read.
            ValueError: The location or the destination does not fit.
            RuntimeError: The file is closed.
        """
        self._check_ours(location, start + destination.nbytes, part=True)
        if start < 0:
            raise ValueError(
                f"{self._where(location)}: start must be 0 or more bytes, not {start}."
            )
        if destination.device.type != "cpu" or not destination.is_contiguous():
            raise ValueError(
                f"{self._where(location)}: the destination must be a contiguous CPU "
                f"tensor, not one on {destination.device} with strides "
                f"{destination.stride()}. Pass torch.empty(..., device='cpu')."
            )
        data, done = memory(destination), 0
        while done < destination.nbytes:
            part = data[done : done + _MOST_READ_AT_ONCE]
            try:
                count = os.preadv(self._fd, [part], location.offset + start + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise CheckpointError(
                    f"{self._where(location)}: cannot be read: {error.strerror}. Check "
                    "the disk, and fetch the file again if it is damaged."
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self._where(location)}: the file ends after {start + done} of "
                    f"the tensor's {location.nbytes} bytes; it was cut short since "
                    "it was opened. Put the original file back, or load the model "
                    "again."
                )
            done += count

    def mapped(self, location: TensorLocation) -> torch.Tensor:
        """Returns a tensor that is a memory map of its bytes in the file.

        Nothing is read before it is touched. In-place changes stay in memory, except
        for a `writable_shared` file, which they reach. The tensor outlives `close`.
        The process is killed by the system if another program cuts the file short and
        the lost part is touched: see `check_unchanged`.

        Args:
            location: One of this file's tensors.

        Raises:
            CheckpointError: The system refuses the map.
            RuntimeError: The file is closed.
        """
        self._check_ours(location, location.nbytes)
        if location.nbytes == 0:
            return torch.empty(location.shape, dtype=location.dtype)
        flat = torch.frombuffer(
            self._mapping(),
            dtype=torch.uint8,
            count=location.nbytes,
            offset=location.offset,
        )
        return flat.view(location.dtype).view(location.shape)

    def write_from(self, location: TensorLocation, source: torch.Tensor) -> None:
        """Overwrites one tensor's bytes in a `writable_shared` file.

        Args:
            location: One of this file's tensors.
            source: Tensor of `location.nbytes` bytes on any device; its elements are
                written in their logical order.

        Raises:
            CheckpointError: The disk refuses the write.
            ValueError: The location or the source does not fit.
            RuntimeError: The file is closed or not `writable_shared`.
        """
        if not self.writable_shared:
            raise RuntimeError(
                f"{self._where(location)}: the file is open for reading only. Open it "
                "with writable_shared=True to write to it."
            )
        self._check_ours(location, source.nbytes)
        elsewhere = "attach again with another disk_dir="
        for _ in write_pieces(
            self._fd, self.path, pieces(source), location.offset, elsewhere=elsewhere
        ):
            pass

    def close(self) -> None:
        """Closes the descriptor; tensors from `mapped` stay valid."""
        self._close()
        self._fd = -1
        self._map = None

    def _mapping(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                sharing = (
                    mmap.MAP_SHARED
                    if self.writable_shared
                    else mmap.MAP_PRIVATE | _NO_RESERVE
                )
                try:
                    self._map = mmap.mmap(self._fd, self.nbytes, flags=sharing)
                except (OSError, ValueError) as error:
                    raise CheckpointError(
                        f"{self.path}: cannot be mapped into memory "
                        f"({self.nbytes / _GIB:.2f} GiB): {error}. Check that the file "
                        "was not cut short, and the limits on address space (ulimit "
                        "-v)."
                    ) from error
            return self._map

    def _check_ours(
        self, location: TensorLocation, nbytes: int, *, part: bool = False
    ) -> None:
        if location.file is not self:
            raise ValueError(
                f"{self.path}: the tensor {location.name!r} lies in "
                f"{location.file.path}. Ask that file for it."
            )
        if self._fd < 0:
            raise RuntimeError(f"{self._where(location)}: the file is closed.")
        if nbytes > location.nbytes or (nbytes < location.nbytes and not part):
            raise ValueError(
                f"{self._where(location)}: takes {location.nbytes} bytes, the given "
                f"tensor has {nbytes}. Pass a tensor of the same size."
            )

    def _where(self, location: TensorLocation) -> str:
        return f"{self.path}: tensor {location.name!r}"


def _open_descriptor(path: Path, writable: bool) -> int:
    if path.suffix.lower() in PICKLED:
        converted = path.with_suffix(".safetensors").name
        raise CheckpointError(
            f"{path}: only safetensors files can be read from disk piece by piece. "
            "Convert it once: safetensors.torch.save_file(torch.load("
            f"{path.name!r}, weights_only=True), {converted!r})."
        )
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


def _confirm_with_safetensors(file: CheckpointFile) -> None:
    """Lets the format's own reader judge the file, so that both always agree."""
    try:
        # Not "pt": it maps the file writable, refused for files larger than RAM.
        with safe_open(str(file.path), framework="numpy") as reader:
            names = set(reader.keys())
            metadata = dict(reader.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: safetensors refuses the file: {error}. {DAMAGED}"
        ) from error
    if names != set(file.tensors) or metadata != file.metadata:
        raise CheckpointError(
            f"{file.path}: the header can be read in two ways. {DAMAGED}"
        )

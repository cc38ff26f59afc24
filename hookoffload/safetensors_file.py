"""The tensors of a safetensors file: positioned reads and writes, and maps."""

from __future__ import annotations

import mmap
import os
import platform
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .direct_reads import DirectReader, direct_pays
from .opened_file import OpenedFile
from .safetensors_header import CheckpointError, TensorExtent
from .tensor_bytes import memory, pieces, write_pieces
from .torch_dtypes import dtype_of

if TYPE_CHECKING:
    from .code_cache import KeptCode

_GIB = 2**30
_MOST_READ_AT_ONCE = _GIB  # macOS refuses reads of more than 2**31 - 1 bytes.


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
        kept: The tensor's lossless code, if one is kept; see [Note: kept codes].
    """

    name: str
    file: CheckpointFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    kept: KeptCode | None = field(default=None, compare=False, repr=False)


class CheckpointFile(OpenedFile):
    """One open safetensors file.

    Reads and writes are positioned, so threads may share it.

    Attributes:
        tensors: Where each tensor lies, by name.
    """

    __slots__ = ("_close_direct", "_direct", "_lock", "_map", "tensors")

    def __init__(
        self, path: str | os.PathLike[str], *, writable_shared: bool = False
    ) -> None:
        """See `OpenedFile`.

        Raises:
            CheckpointError: The file cannot be opened or is not valid, or torch has
                no such dtype.
        """
        # First: `close` behind an error looks at them.
        self._direct: DirectReader | None = None
        self._close_direct: weakref.finalize[..., CheckpointFile] | None = None
        super().__init__(path, writable_shared=writable_shared)
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        try:
            self.tensors = {
                name: self._location(name, extent)
                for name, extent in self.extents.items()
            }
        except BaseException:
            self.close()
            raise

    def _location(self, name: str, extent: TensorExtent) -> TensorLocation:
        code, shape, offset, nbytes = extent
        dtype = dtype_of(code, f"{self.path}: tensor {name!r}")
        return TensorLocation(name, self, dtype, shape, offset, nbytes)

    def opened_again(self) -> CheckpointFile:
        """Returns the same file, opened once more.

        Raises:
            CheckpointError: It cannot be opened, or is another one by now.
        """
        again = type(self)(self.path)
        try:
            self.check_unchanged()
        except BaseException:
            again.close()
            raise
        # A temporary folder is removed with the object that opened it first.
        weakref.finalize(again, _forget, self).atexit = False
        return again

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
        data = memory(destination)
        for done in range(0, destination.nbytes, _MOST_READ_AT_ONCE):
            part = data[done : done + _MOST_READ_AT_ONCE]
            self.read_parts([(location, start + done, part)])

    def read_parts(
        self, parts: Sequence[tuple[TensorLocation, int, memoryview]]
    ) -> None:
        """Fills memory with parts of tensors that lie one behind the other.

        They are one read, as far as the system gives them at once.

        Args:
            parts: For each the tensor, its first byte counted from the tensor's
                beginning, and what to fill; it ends where the next one begins.

        Raises:
            CheckpointError: The file ends early or cannot be read.
            RuntimeError: The file is closed.
        """
        first, start, _ = parts[0]
        self._check_ours(first, 0, part=True)
        position = first.offset + start
        waiting = [memory for *_, memory in parts]
        while waiting:
            direct = self._direct
            try:
                if direct is not None:
                    count = direct.read(waiting, position)
                else:
                    count = os.preadv(self._fd, waiting, position)
            except InterruptedError:
                continue
            except OSError as error:
                if direct is not None:
                    self._direct = None  # the usual way says what is wrong, if it is
                    continue
                raise CheckpointError(
                    f"{self._where(_at(position, parts))}: cannot be read: "
                    f"{error.strerror}. Check the disk, and fetch the file again if it "
                    "is damaged."
                ) from error
            if count == 0:
                raise self._cut_short(_at(position, parts), position)
            position += count
            while waiting and count >= len(waiting[0]):
                count -= len(waiting.pop(0))
            if count:
                waiting[0] = waiting[0][count:]

    def read_past_cache(self) -> bool:
        """Leaves the page cache alone from now on, if that pays.

        Returns:
            Whether it does.
        """
        if self._direct is None:
            try:
                direct = DirectReader(self.path, self._opened)
            except OSError:
                return False
            self._close_direct = weakref.finalize(self, direct.close)
            self._close_direct.atexit = False
            if direct_pays(self._fd, direct, self.nbytes):
                self._direct = direct
            else:
                self._close_direct()
        return self._direct is not None

    def mapped(self, location: TensorLocation) -> torch.Tensor:
        """Returns a tensor that is a memory map of its bytes in the file.

        Nothing is read before it is touched. In-place changes stay in memory, except
        for a `writable_shared` file, which they reach. The tensor outlives `close`.
        The process is killed by the system if another program cuts the file short later
        and the lost part is touched: see `check_unchanged`.

        Args:
            location: One of this file's tensors.

        Raises:
            CheckpointError: The file was cut short, or the system refuses the map.
            RuntimeError: The file is closed.
        """
        self._check_ours(location, location.nbytes)
        if location.nbytes == 0:
            return torch.empty(location.shape, dtype=location.dtype)
        size = os.fstat(self._fd).st_size
        if size < location.offset + location.nbytes:
            raise self._cut_short(location, size)
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

    def reopened(self) -> CheckpointFile | None:
        """Returns the file open, if it is still what it was when it was opened first.

        Returns:
            This object, or another one if it was closed; None for a file that is gone,
            was changed or replaced.
        """
        file = self
        try:
            if self._fd < 0:
                file = type(self)(self.path, writable_shared=self.writable_shared)
            self.check_unchanged()
        except CheckpointError:
            return None
        return file

    def close(self) -> None:
        """Closes the descriptor; tensors from `mapped` stay valid."""
        super().close()
        self._direct = None
        if self._close_direct is not None:
            self._close_direct()
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

    def _cut_short(self, location: TensorLocation, end: int) -> CheckpointError:
        held = max(end - location.offset, 0)
        return CheckpointError(
            f"{self._where(location)}: the file ends after {held} of the tensor's "
            f"{location.nbytes} bytes; it was cut short since it was opened. Put the "
            "original file back, or load the model again."
        )

    def _where(self, location: TensorLocation) -> str:
        return f"{self.path}: tensor {location.name!r}"


def _forget(file: CheckpointFile) -> None:
    pass


def _at(
    position: int, parts: Sequence[tuple[TensorLocation, int, memoryview]]
) -> TensorLocation:
    """Finds the tensor that a byte of the file belongs to."""
    return next(
        location
        for location, *_ in parts
        if position < location.offset + location.nbytes
    )

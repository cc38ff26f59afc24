"""Safetensors files on disk: headers, indexes, positioned reads, maps, spill files.

Nothing here reads a tensor's bytes before somebody asks for them: opening a
checkpoint reads headers only.
"""

from __future__ import annotations

import ctypes
import difflib
import json
import mmap
import os
import platform
import re
import shutil
import stat
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_GIB = 2**30
_CHUNK = 16 * 2**20
_MOST_READ_AT_ONCE = _GIB  # macOS refuses reads of more than 2**31 - 1 bytes.
_LONGEST_HEADER = 100_000_000  # The format's own limit, in bytes.
_PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth"})
_INDEX_SUFFIX = ".safetensors.index.json"
_PREFERRED_INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)
_DAMAGED = "The file is damaged or was not copied completely: fetch it again."
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in _TORCH_NAMES.items()
    if isinstance(getattr(torch, name, None), torch.dtype)
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def _no_reserve() -> int:
    """Returns the flag for a private map that asks for no swap up front.

    Without it Linux refuses a writable private map of a file larger than RAM.
    Python names the flag from 3.13 on; the figure holds for these machines.
    """
    known = platform.machine() in {"x86_64", "aarch64"}
    figure = 0x4000 if platform.system() == "Linux" and known else 0
    return int(getattr(mmap, "MAP_NORESERVE", figure))


_NO_RESERVE = _no_reserve()


class CheckpointError(ValueError):
    """Says what is wrong with a checkpoint or spill file, and what to do."""


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
            self.tensors, self.metadata = _read_header(self, self._fd, self.nbytes)
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
        data, done = _memory(destination), 0
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
        for _ in _write_tensor(self._fd, self.path, source, location.offset):
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


def open_checkpoint(
    checkpoint: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> dict[str, TensorLocation]:
    """Opens a safetensors checkpoint and says where each of its tensors lies.

    Args:
        checkpoint: One safetensors file; a list of them, where a later file wins on a
            name that several have; an index (`*.safetensors.index.json`); or a folder
            with an index or with exactly one safetensors file.

    Returns:
        The location of each tensor by name. The files stay open as long as the
        locations are used.

    Raises:
        CheckpointError: Anything about the files is not as it must be.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = folder.name + "/model.safetensors"
        >>> safetensors.torch.save_file({"weight": torch.ones(2, 3)}, path)
        >>> location = open_checkpoint(path)["weight"]
        >>> location.shape, location.dtype, location.nbytes
        ((2, 3), torch.float32, 24)
        >>> location.file.close()
        >>> folder.cleanup()
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        path = Path(checkpoint)
        index = _index_in(path) if os.path.isdir(path) else path
        if index.name.endswith(_INDEX_SUFFIX):
            return _open_indexed(index)
        paths = [index]
    else:
        try:
            paths = [Path(path) for path in checkpoint]
        except TypeError as error:
            raise CheckpointError(
                f"checkpoint: takes a path or a list of paths: {error}."
            ) from error
        if not paths:
            raise CheckpointError(
                "checkpoint: the list of files is empty. Pass at least one path."
            )
    with ExitStack() as opened:
        found: dict[str, TensorLocation] = {}
        files = [_open_in(opened, path) for path in paths]
        for file in files:
            found.update(file.tensors)
        needed = {location.file for location in found.values()}
        for file in files:
            if file not in needed:
                file.close()
        opened.pop_all()
    return found


def write_spill_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
    align: int = 64,
) -> CheckpointFile:
    """Writes tensors to a safetensors file and opens it for shared use.

    The file appears under its name only when it is complete; a failure of any kind
    leaves nothing behind. At most one chunk of 16 MiB is copied beyond the tensors.

    Args:
        path: The file to write; an existing one is replaced.
        tensors: Tensors by name, on any device, with any strides.
        metadata: Text to keep in the header.
        progress: Called with the number of bytes of each chunk written.
        align: Start of the tensors' data is a multiple of this many bytes. Each
            tensor starts at a multiple of its item size.

    Returns:
        The file, open with `writable_shared=True`.

    Raises:
        CheckpointError: A tensor cannot be stored, or the disk is full or refuses.
    """
    header, order = _build_header(path, tensors, metadata, align)
    needed = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with _disk_errors(path):
        free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f"{path}: needs {needed / _GIB:.2f} GiB on disk, the folder {path.parent} "
            f"has {free / _GIB:.2f} GiB free. Free space there, or pass a folder on a "
            "larger disk with disk_dir=."
        )
    with _disk_errors(path):
        fd, unfinished = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with ExitStack() as undo:
        undo.callback(_remove, unfinished)
        with ExitStack() as opened:
            opened.callback(os.close, fd)
            with _disk_errors(path):
                _write_at(fd, memoryview(header), 0)
            offset = len(header)
            for name in order:
                for count in _write_tensor(fd, path, tensors[name], offset):
                    offset += count
                    if progress is not None:
                        progress(count)
            opened.pop_all()
            with _disk_errors(path):  # A network disk reports a full disk here.
                os.close(fd)
        CheckpointFile(unfinished).close()
        with _disk_errors(path):
            os.replace(unfinished, path)
        undo.callback(_remove, path)
        file = CheckpointFile(path, writable_shared=True)
        undo.pop_all()
    return file


def _open_descriptor(path: Path, writable: bool) -> int:
    if path.suffix.lower() in _PICKLED:
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
        raise CheckpointError(f"{path}: {_explain_missing(path)}") from error
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


def _explain_missing(path: Path) -> str:
    if path.is_symlink():
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
    near = difflib.get_close_matches(path.name, _names_in(path.parent), cutoff=0.5)
    named = f" Similar names there: {', '.join(near)}." if near else ""
    return f"does not exist in its folder.{named} Check the path or fetch the file."


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be listed: {error.strerror}. Make the folder readable."
        ) from error


def _read_header(
    file: CheckpointFile, fd: int, size: int
) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """Reads the header of a safetensors file and checks it against the file's size.

    The format: 8 bytes with the header's length, little endian; the header, JSON;
    the tensors' bytes without holes. Offsets count from the end of the header.
    """
    path = file.path
    start = _read_start(path, fd, 8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= length <= min(size - 8, _LONGEST_HEADER):
        raise CheckpointError(f"{path}: {_explain_start(path, fd, size, length)}")
    try:
        header = json.loads(_read_start(path, fd, 8 + length)[8:].decode("utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: dict(entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not that of a safetensors file: {error}. {_DAMAGED}"
        ) from error
    tensors = {}
    for name, entry in entries.items():
        where = f"{path}: tensor {name!r}"
        tensors[name] = _locate(file, where, name, entry, 8 + length, size)
    end = 8 + length
    for location in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if location.offset != end:
            what = "overlaps" if location.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {location.name!r} starts at byte {location.offset} "
                f"and {what} the data before it, up to byte {end}. {_DAMAGED}"
            )
        end += location.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {end}, the file has {size} bytes. "
            f"{_DAMAGED}"
        )
    return tensors, metadata


def _read_start(path: Path, fd: int, count: int) -> bytes:
    data = b""
    try:
        while len(data) < count:
            part = os.pread(fd, count - len(data), len(data))
            if not part:
                break
            data += part
    except OSError as error:
        raise CheckpointError(
            f"{path}: the header cannot be read: {error.strerror}. Check the disk."
        ) from error
    return data


def _explain_start(path: Path, fd: int, size: int, length: int) -> str:
    start = _read_start(path, fd, 64)
    if start.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the file itself. Run 'git lfs pull' where it "
            "was cloned."
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            "is a torch.save file under another name. Convert it with "
            "torch.load(weights_only=True) and safetensors.torch.save_file."
        )
    if length < 0:
        return f"has {size} bytes, too few for a safetensors file. {_DAMAGED}"
    return (
        f"is to begin with a header of {length} bytes, the file has {size} bytes and a "
        f"header at most {_LONGEST_HEADER}. It is no safetensors file, or cut short: "
        "fetch it again."
    )


def _locate(
    file: CheckpointFile,
    where: str,
    name: str,
    entry: dict[str, Any],
    data_start: int,
    size: int,
) -> TensorLocation:
    """Turns one entry of a header into a location, or says what is wrong with it."""
    code: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where} has the dtype {code!r}, which torch {torch.__version__} cannot "
            f"hold. Known: {', '.join(sorted(_DTYPES))}. Convert the tensor, or update "
            "torch."
        )
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{where} has the shape {shape!r} and the offsets {offsets!r}; both must "
            f"be lists of whole numbers from 0 to 2**63. {_DAMAGED}"
        )
    if code == "F4":  # The file counts single numbers, torch pairs of them.
        if not shape or shape[-1] % 2:
            raise CheckpointError(
                f"{where} has the dtype F4 and the shape {shape}; torch needs an even "
                "last dimension. Convert the tensor to another dtype."
            )
        shape = [*shape[:-1], shape[-1] // 2]
    begin, end = offsets
    # Zero-element shapes count too: torch computes strides of 64 bits for them.
    if prod(max(1, count) for count in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{where} has the impossible shape {shape}. {_DAMAGED}")
    if end - begin != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{where} has {end - begin} bytes; its dtype {code} and shape "
            f"{entry['shape']} take {prod(shape) * dtype.itemsize}. {_DAMAGED}"
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{where} ends at byte {data_start + end}, outside the file, which has "
            f"{size} bytes: it was cut short. {_DAMAGED}"
        )
    return TensorLocation(
        name, file, dtype, tuple(shape), data_start + begin, end - begin
    )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _confirm_with_safetensors(file: CheckpointFile) -> None:
    """Lets the format's own reader judge the file, so that both always agree."""
    try:
        # Not "pt": it maps the file writable, refused for files larger than RAM.
        with safe_open(str(file.path), framework="numpy") as reader:
            names = set(reader.keys())
            metadata = dict(reader.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: safetensors refuses the file: {error}. {_DAMAGED}"
        ) from error
    if names != set(file.tensors) or metadata != file.metadata:
        raise CheckpointError(
            f"{file.path}: the header can be read in two ways. {_DAMAGED}"
        )


def _open_in(opened: ExitStack, path: Path) -> CheckpointFile:
    file = CheckpointFile(path)
    opened.callback(file.close)
    return file


def _index_in(folder: Path) -> Path:
    """Returns the index of a folder, or its only safetensors file."""
    names = _names_in(folder)
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    for preferred in _PREFERRED_INDEXES:
        if preferred in indexes:
            return folder / preferred
    if len(indexes) == 1:
        return folder / indexes[0]
    if indexes:
        raise CheckpointError(
            f"{folder}: holds several indexes: {', '.join(indexes)}. Pass the path of "
            "the one to load."
        )
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise CheckpointError(
            f"{folder}: holds {len(files)} safetensors files and no index: "
            f"{_shortened(files)}. Pass the file to load, or a list of files, where a "
            "later one wins on names that several have."
        )
    held = _shortened(names) if names else "nothing"
    pickled = any(Path(name).suffix.lower() in _PICKLED for name in names)
    advice = (
        "Convert the others with torch.load(weights_only=True) and "
        "safetensors.torch.save_file."
        if pickled
        else "Pass the folder that has the .safetensors files."
    )
    raise CheckpointError(
        f"{folder}: holds no safetensors file. It has {held}. {advice}"
    )


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _open_indexed(index: Path) -> dict[str, TensorLocation]:
    weight_map = _read_weight_map(index)
    with ExitStack() as opened:
        shards: dict[str, CheckpointFile] = {}
        for name, shard in weight_map.items():
            if shard in shards:
                continue
            path = index.parent / shard
            if not os.path.lexists(path):
                raise CheckpointError(
                    f"{index}: names the shard {shard} (tensor {name!r}), which "
                    f"{_explain_missing(path)}"
                )
            shards[shard] = _open_in(opened, path)
        found = {}
        for name, shard in weight_map.items():
            if name not in shards[shard].tensors:
                others = [other for other in shards if name in shards[other].tensors]
                raise CheckpointError(
                    f"{index}: says that tensor {name!r} is in {shard}, which does not "
                    f"have it; it is in {' and '.join(others) or 'no other shard'}. "
                    "Index and shards are of different versions: fetch them again."
                )
            found[name] = shards[shard].tensors[name]
        opened.pop_all()
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{index}: {_explain_missing(index)}") from error
    except OSError as error:
        raise CheckpointError(
            f"{index}: cannot be read: {error.strerror}. Make it readable."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: is not JSON: {error}. {_DAMAGED}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: has no 'weight_map' from tensor names to files. {_DAMAGED}"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {shard!r}, not to a file name. "
                f"{_DAMAGED}"
            )
        # Both kinds of slashes, on every system: an index is made elsewhere.
        if PureWindowsPath(shard).anchor or ".." in re.split(r"[\\/]", shard):
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {shard!r}, outside the folder. "
                "Put the shards beside the index and correct it."
            )
    return weight_map


def _build_header(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None,
    align: int,
) -> tuple[bytes, list[str]]:
    """Returns the bytes before the data, and the names in the order of the data."""
    if align < 1:
        raise ValueError(f"align must be at least 1 byte, not {align}.")
    # The format allows no holes: larger items first keeps each tensor aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        code = _CODES.get(tensor.dtype)
        storable = tensor.layout == torch.strided and not tensor.is_meta
        if code is None or not storable or name == "__metadata__":
            raise CheckpointError(
                f"{path}: tensor {name!r} ({tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}) cannot be stored in a safetensors file. Keep its "
                "layer in memory, or convert it to a plain dtype first."
            )
        shape = list(tensor.shape)
        if code == "F4" and shape:
            shape[-1] *= 2
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text, order


def _memory(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU tensor; the tensor must outlive them."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cuts a tensor into views of at most a chunk, in the order of its elements."""
    if tensor.nbytes == 0:
        return
    if tensor.nbytes <= _CHUNK:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), _CHUNK // tensor.itemsize)
    else:
        rows = _CHUNK // tensor[0].nbytes
        for part in torch.split(tensor, max(1, rows)):
            yield from _pieces(part if rows else part[0])


def _write_tensor(
    fd: int, path: Path, tensor: torch.Tensor, offset: int
) -> Iterator[int]:
    """Writes a tensor at a byte of a file; yields the length of each chunk written."""
    for piece in _pieces(tensor.detach()):
        # A conjugate or negative view keeps its sign apart from its bytes.
        piece = piece.cpu().resolve_conj().resolve_neg().contiguous()
        with _disk_errors(path):
            _write_at(fd, _memory(piece), offset)
        offset += piece.nbytes
        yield piece.nbytes


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done : done + _CHUNK], offset + done)
        except InterruptedError:
            continue


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written in the folder {path.parent}: "
            f"{error.strerror or error}. Free space there, make the folder writable, "
            "or pass another with disk_dir=."
        ) from error


def _remove(path: str | Path) -> None:
    with suppress(OSError):  # The first error is the one to report.
        os.unlink(path)

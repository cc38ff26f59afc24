"""Checkpoints of one or more files: files, folders, lists, patterns and indexes.

Nothing here reads a tensor's bytes before somebody asks for them: opening a safetensors
checkpoint reads headers only. A binary one has to be converted first.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath

from .binary_checkpoint import open_binary
from .conversion_cache import ConversionCache
from .safetensors_file import (
    PICKLED,
    CheckpointFile,
    TensorLocation,
    explain_missing,
    names_in,
)
from .safetensors_header import DAMAGED, CheckpointError

_INDEX_SUFFIX = ".safetensors.index.json"
_BINARY_INDEX_SUFFIX = ".bin.index.json"
_PREFERRED_INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)
# Other binary files of a folder are optimizers, schedulers and training arguments.
_PREFERRED_BINARIES = (
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)


def open_checkpoint(
    checkpoint: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    cache: ConversionCache | None = None,
) -> dict[str, TensorLocation]:
    """Opens a checkpoint and says where each of its tensors lies.

    Args:
        checkpoint: One file; a list of them, where a later file wins on a name that
            several have; a pattern such as `folder/*.safetensors`, which stands for
            the sorted list of the files that it fits; an index
            (`*.safetensors.index.json`); or a folder with an index or with exactly one
            safetensors file, or else with binary ones.
        cache: Where binary files are converted to; None refuses them.

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
        paths = _fitting(os.fspath(checkpoint))
        if not paths:
            index = _index_in(path) if os.path.isdir(path) else path
            if index.name.endswith((_INDEX_SUFFIX, _BINARY_INDEX_SUFFIX)):
                return _open_indexed(index, cache)
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
        files: set[CheckpointFile] = set()
        for path in paths:
            tensors = _open_in(opened, path, cache)
            files |= {location.file for location in tensors.values()}
            found.update(tensors)
        for file in files - {location.file for location in found.values()}:
            file.close()
        opened.pop_all()
    return found


def _fitting(pattern: str) -> list[Path]:
    """Returns the files that a pattern fits; none if it is the path of something."""
    if not glob.has_magic(pattern) or os.path.lexists(pattern):
        return []
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise CheckpointError(
            f"{pattern}: no file fits this pattern. Check the folder and the pattern."
        )
    return paths


def _open_in(
    opened: ExitStack, path: Path, cache: ConversionCache | None
) -> Mapping[str, TensorLocation]:
    """Opens one file; what it holds is closed again if a later one fails."""
    if cache is not None and path.suffix.lower() in PICKLED:
        tensors = open_binary(path, cache)
        for file in {location.file for location in tensors.values()}:
            opened.callback(file.close)
        return tensors
    file = CheckpointFile(path)
    opened.callback(file.close)
    if not file.tensors:
        file.close()
    return file.tensors


def _index_in(folder: Path) -> Path:
    """Returns the index of a folder, or its only file, safetensors before binary."""
    names = names_in(folder)
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
    for preferred in _PREFERRED_BINARIES:
        if preferred in names:
            return folder / preferred
    binaries = [name for name in names if Path(name).suffix.lower() in PICKLED]
    if len(binaries) == 1:
        return folder / binaries[0]
    held = _shortened(names) if names else "nothing"
    advice = (
        "Pass the one to load."
        if binaries
        else "Pass the folder that has the .safetensors files."
    )
    raise CheckpointError(
        f"{folder}: holds no safetensors file. It has {held}. {advice}"
    )


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _open_indexed(
    index: Path, cache: ConversionCache | None
) -> dict[str, TensorLocation]:
    weight_map = _read_weight_map(index)
    with ExitStack() as opened:
        shards: dict[str, Mapping[str, TensorLocation]] = {}
        for name, shard in weight_map.items():
            if shard in shards:
                continue
            path = index.parent / shard
            if not os.path.lexists(path):
                raise CheckpointError(
                    f"{index}: names the shard {shard} (tensor {name!r}), which "
                    f"{explain_missing(path)}"
                )
            shards[shard] = _open_in(opened, path, cache)
        found = {}
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                others = [other for other in shards if name in shards[other]]
                raise CheckpointError(
                    f"{index}: says that tensor {name!r} is in {shard}, which does not "
                    f"have it; it is in {' and '.join(others) or 'no other shard'}. "
                    "Index and shards are of different versions: fetch them again."
                )
            found[name] = shards[shard][name]
        needed = {location.file for location in found.values()}
        for tensors in shards.values():
            for file in {location.file for location in tensors.values()} - needed:
                file.close()
        opened.pop_all()
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{index}: {explain_missing(index)}") from error
    except OSError as error:
        raise CheckpointError(
            f"{index}: cannot be read: {error.strerror}. Make it readable."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: is not JSON: {error}. {DAMAGED}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: has no 'weight_map' from tensor names to files. {DAMAGED}"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {shard!r}, not to a file name. "
                f"{DAMAGED}"
            )
        # Both kinds of slashes, on every system: an index is made elsewhere.
        if PureWindowsPath(shard).anchor or ".." in re.split(r"[\\/]", shard):
            raise CheckpointError(
                f"{index}: tensor {name!r} is mapped to {shard!r}, outside the folder. "
                "Put the shards beside the index and correct it."
            )
    return weight_map

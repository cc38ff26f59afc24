"""What a checkpoint is made of: files, folders, lists, patterns and indexes."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import TypeVar

from .opened_file import GGUF, PICKLED, NotConvertedError, explain_missing, names_in
from .safetensors_header import DAMAGED, CheckpointError

CheckpointPaths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

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

_TensorT = TypeVar("_TensorT")
_OpenFile = Callable[[Path], Mapping[str, _TensorT]]


def find_tensors(
    checkpoint: CheckpointPaths, open_file: _OpenFile[_TensorT]
) -> dict[str, _TensorT]:
    """Finds the tensors of a checkpoint; no file but an index is read here.

    Args:
        checkpoint: As for `open_checkpoint`.
        open_file: Called once with each file, returns what it says of its tensors, by
            name.

    Returns:
        What the files say of the checkpoint's tensors, by name.

    Raises:
        CheckpointError: Anything about the files is not as it must be.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        try:
            return _find_at(checkpoint, open_file)
        except NotConvertedError as error:
            # One of the shards is no checkpoint: all of them are to be converted.
            raise NotConvertedError(error.path, checkpoint) from error
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
    return _find_in(paths, open_file)


def _find_at(
    checkpoint: str | os.PathLike[str], open_file: _OpenFile[_TensorT]
) -> dict[str, _TensorT]:
    path = Path(checkpoint)
    paths = _fitting(os.fspath(checkpoint))
    if not paths:
        index = _index_in(path) if os.path.isdir(path) else path
        if index.name.endswith((_INDEX_SUFFIX, _BINARY_INDEX_SUFFIX)):
            return _find_indexed(index, open_file)
        paths = [index]
    return _find_in(paths, open_file)


def _find_in(
    paths: Iterable[Path], open_file: _OpenFile[_TensorT]
) -> dict[str, _TensorT]:
    found: dict[str, _TensorT] = {}
    for path in paths:
        found.update(open_file(path))
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
    binaries = binaries or [name for name in names if name.lower().endswith(GGUF)]
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


def _find_indexed(index: Path, open_file: _OpenFile[_TensorT]) -> dict[str, _TensorT]:
    weight_map = _read_weight_map(index)
    shards: dict[str, Mapping[str, _TensorT]] = {}
    for name, shard in weight_map.items():
        if shard in shards:
            continue
        path = index.parent / shard
        if not os.path.lexists(path):
            raise CheckpointError(
                f"{index}: names the shard {shard} (tensor {name!r}), which "
                f"{explain_missing(path)}"
            )
        shards[shard] = open_file(path)
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
    seen: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and shard in seen:
            continue
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
        seen.add(shard)
    return weight_map

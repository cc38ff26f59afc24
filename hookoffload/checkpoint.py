"""Checkpoints of one or more safetensors files: files, folders, lists and indexes.

Nothing here reads a tensor's bytes before somebody asks for them: opening a
checkpoint reads headers only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath

from .safetensors_file import (
    PICKLED,
    CheckpointFile,
    TensorLocation,
    explain_missing,
    names_in,
)
from .safetensors_header import DAMAGED, CheckpointError

_INDEX_SUFFIX = ".safetensors.index.json"
_PREFERRED_INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)


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


def _open_in(opened: ExitStack, path: Path) -> CheckpointFile:
    file = CheckpointFile(path)
    opened.callback(file.close)
    return file


def _index_in(folder: Path) -> Path:
    """Returns the index of a folder, or its only safetensors file."""
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
    held = _shortened(names) if names else "nothing"
    pickled = any(Path(name).suffix.lower() in PICKLED for name in names)
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
                    f"{explain_missing(path)}"
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

"""Checkpoints made by `torch.save`: converted once, then read like any other.

They are unpickled with ``weights_only=True``, which runs no code of the file's, and
mapped into memory where their format allows it, so that converting one takes little
RAM.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .conversion_cache import ConversionCache
from .conversion_entry import EntryWriter
from .conversion_trace import is_plain
from .converting import add_once
from .opened_file import explain_missing
from .packed import is_wrapper, parts_of
from .progress import progress_bar
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError
from .saved_torchao import torchao_form

# Part of the cache's key: to be counted up when other tensors come out of a file.
_MAKER = "binary checkpoint, version 1"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
# How PyTorch says that a pickle asks for more than tensors.
_UNSAFE = re.compile(r"(?i)\bglobal\b|unrecognized function|new object|only build")
_BY_HAND = (
    "load it with torch.load, and save the state dict that you want with "
    "safetensors.torch.save_file"
)


def open_binary(path: Path, cache: ConversionCache) -> dict[str, TensorLocation]:
    """Convert a `torch.save` file to safetensors, and say where its tensors lie.

    Args:
        path: the file.
        cache: where to keep what is converted.

    Raises:
        CheckpointError: The file is missing or damaged, needs code to be run, or holds
            no state dict; or the cache cannot be written.
    """
    if not path.is_file():
        what = explain_missing(path)
        if path.exists():
            what = f"is {'a folder' if path.is_dir() else 'a device or pipe'}, no file."
        raise CheckpointError(f"{path}: {what}")
    return cache.converted(path.name, _MAKER, {}, [path], partial(_write, path))


def _write(path: Path, writer: EntryWriter) -> None:
    state = _state_dict(path, _load(path))
    total = sum(tensor.nbytes for tensor in state.values())
    with progress_bar("converting a binary checkpoint", total) as bar:
        writer.progress = bar.update
        add_once(writer, {n: t for n, t in state.items() if not is_wrapper(t)})
        for name, tensor in state.items():
            if is_wrapper(tensor):
                _add_packed(path, writer, name, tensor)
        writer.flush()


def _add_packed(
    path: Path, writer: EntryWriter, name: str, tensor: torch.Tensor
) -> None:
    """Have the parts of a quantised tensor written, as `load_model` reads them."""
    form = torchao_form(name, tensor)
    if form is None:
        found = parts_of(tensor)
        if found is None:
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}, and it is not known "
                f"where its bytes lie. Dequantise it: {_BY_HAND}."
            )
        pairs = zip(found.paths, found.tensors, strict=True)
        form = {name + path: part for path, part in pairs}, {}
    parts, metadata = form
    for part, value in parts.items():
        writer.add(part, value, metadata)


def _load(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # the format before torch 1.6 is not
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).split("\n")]
        reason = next((line for line in lines if _UNSAFE.search(line)), "")
        if not reason:
            raise _damaged(path, lines[-1]) from error
        raise CheckpointError(
            f"{path}: holds more than tensors, and loading it would run code that the "
            f"file names: {reason} Fetch the checkpoint as safetensors. If you trust "
            "whoever made the file, load it once with torch.load(weights_only=False), "
            "and save its state dict with safetensors.torch.save_file."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).partition("\n")[0]
        if "TorchScript" in reason:
            raise CheckpointError(
                f"{path}: is a TorchScript program, not a checkpoint. Save the state "
                "dict of torch.jit.load(...) with safetensors.torch.save_file."
            ) from error
        raise _damaged(path, f"{type(error).__name__}: {reason}") from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: torch.load cannot read it: {reason}. It is damaged, was not copied "
        "completely, or is no torch.save file: fetch it again."
    )


def _state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    """Return the one state dict that a file holds, wrapped or not."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a state dict: {_BY_HAND}."
        )
    found = content
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        wrapped = [key for key in _WRAPPERS if _is_state_dict(content.get(key))]
        if len(wrapped) != 1:
            has = ", ".join(repr(key) for key in list(content)[:12]) or "nothing"
            many = f"several state dicts ({', '.join(wrapped)})" if wrapped else "none"
            raise CheckpointError(
                f"{path}: has no tensors at its top, which has {has}; of the names "
                f"that state dicts usually have there, {many}: {_BY_HAND}."
            )
        found = content[wrapped[0]]
    if not _is_state_dict(found):
        other = next(
            (key, value)
            for key, value in found.items()
            if not isinstance(key, str) or not isinstance(value, torch.Tensor)
        )
        raise CheckpointError(
            f"{path}: has tensors and other things side by side: {other[0]!r} is a "
            f"{type(other[1]).__name__}: {_BY_HAND}."
        )
    for name, tensor in found.items():
        if not is_plain(tensor):
            raise CheckpointError(
                f"{path}: tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be "
                f"stored in a safetensors file. Convert it to a plain one: {_BY_HAND}."
            )
    return dict(found)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor)
        for key, tensor in value.items()
    )

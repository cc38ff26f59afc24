"""Attached model -> safetensors files: from wherever its layers are, piece by piece."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch
from torch import nn

from .checkpoint_folder import ELSEWHERE, CheckpointReplacement, shard_name
from .codec import is_movable
from .master import Master
from .member import Member
from .packed import is_wrapper, parts_of
from .progress import progress_bar
from .safetensors_file import CheckpointFile
from .safetensors_header import CheckpointError
from .safetensors_writer import Source, check_room, check_storable, write_safetensors
from .session import Session
from .state_hooks import session_of

_METADATA = {"format": "pt"}  # Without it transformers refuses the file.
_NO_BAR: AbstractContextManager[None] = nullcontext()
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> None:
    """Write a model as safetensors files, wherever its weights are at the moment.

    What rests on disk is read and written piece by piece, 16 MiB at a time: a model
    that does not fit RAM is saved without bringing it there. The folder can be given
    to `load_model`, and to Hugging Face libraries.

    The files hold what ``model.state_dict()`` returns, with its names and dtypes (under
    a ``storage_dtype`` that is the narrower one). A tensor that is registered under
    several names is stored once, under the first: loading fills the others where the
    model ties them when it is made.

    The folder's checkpoint named ``model`` is replaced as a whole: `model.safetensors`,
    or `model.safetensors.index.json` with the shards that it names. Other files stay
    as they are. Saving that fails, or whose process is killed, leaves the old
    checkpoint or the new one, never a part; what it wrote aside is removed by itself or
    by the next save. Until the end, both need room on the disk.

    Args:
        model: a model with offload hooks, a part of one, or any other module.
        folder: the folder to write to; it is made if there is none.
        max_shard_size: the most bytes of tensors in a file, as a number or a text such
            as "500MB" (10**6 bytes each) or "2GiB" (2**30 bytes each). A larger tensor
            has a file of its own.
        progress: show a progress bar when it takes longer than a second.

    Raises:
        CheckpointError: A tensor cannot be stored in a safetensors file, the model
            reads its weights from a file that would be replaced, a file of it changed,
            or the disk is full or refuses.
        ValueError: `max_shard_size` is no size.
        RuntimeError: The model is running.

    Example:
        >>> import torch
        >>> from hookoffload import OffloadPolicy, attach_offload_hooks, load_model
        >>> folder = getfixture("tmp_path") / "saved"
        >>> model = torch.nn.Linear(4, 4)
        >>> model = attach_offload_hooks(model, OffloadPolicy(store="disk"))
        >>> save_model(model, folder)
        >>> again = load_model(lambda: torch.nn.Linear(4, 4), folder)
        >>> torch.equal(again.weight, model.weight)
        True
    """
    largest = _size_in_bytes(max_shard_size)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    state = model.state_dict()
    sessions = _sessions_of(model)
    with ExitStack() as held:
        for session in sessions:
            # Until all is written, forwards of other threads wait.
            held.enter_context(session.ownership.by_hand("save_model"))
            session.store.check_unchanged()
            # Everything rests behind `state_dict`; what it returned has them already.
            session.store.note_private_writes()
        sources = _sources(model, state, sessions, Path(folder))
        shards = _divided(sources, largest)
        replacement = CheckpointReplacement(Path(folder), list(shards))
        with replacement:
            _refuse_files_in_use(sessions, replacement)
            total = sum(source.nbytes for source in sources.values())
            check_room(replacement.folder, total, ELSEWHERE)
            with progress_bar("saving weights", total) if progress else _NO_BAR as bar:
                for name, tensors in shards.items():
                    write_safetensors(
                        replacement.staging / name,
                        tensors,
                        elsewhere=ELSEWHERE,
                        metadata=_METADATA,
                        progress=None if bar is None else bar.update,
                        durable=True,
                    )
            for session in sessions:
                session.store.check_unchanged()
            files = {name: file for file, part in shards.items() for name in part}
            replacement.commit(files, total)


def _size_in_bytes(size: int | str) -> int:
    """Returns a size in bytes, or says what is wrong with it."""
    value = 0.0
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", size)
        if found is not None:
            value = float(found[1]) * _UNITS.get(found[2].upper(), 0)
    elif isinstance(size, int) and not isinstance(size, bool):
        value = size
    if not 1 <= value < 2**63:
        raise ValueError(
            f"max_shard_size={size!r} is no size of a file; use a number of bytes, or "
            'a text such as "500MB", "5GB" or "2GiB"'
        )
    return int(value)


def _sessions_of(model: nn.Module) -> list[Session]:
    """Returns the sessions of a model, of its parts, or of what it is a part of."""
    found = {session_of(module) for module in model.modules()}
    # Always in one order: two threads that save must not wait for each other.
    return sorted((session for session in found if session is not None), key=id)


def _sources(
    model: nn.Module,
    state: Mapping[str, object],
    sessions: Sequence[Session],
    folder: Path,
) -> dict[str, Source]:
    """Says where the bytes of each tensor are to be taken from."""
    at_rest = {
        _place(member.rest): (master, member)
        for session in sessions
        for master in (*session.store.masters, *session.always.masters)
        for member in master.members
        if member.rest.numel()
    }
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    sources: dict[str, Source] = {}
    stored: set[object] = set()
    for name, value in _entries(state):
        if not isinstance(value, torch.Tensor) or not is_movable(value):
            raise CheckpointError(
                f"{folder}: {name!r} is a {type(value).__name__}, which a safetensors "
                "file cannot hold: it takes plain tensors. Save model.state_dict() "
                "with torch.save, or make it a plain tensor or buffer first."
            )
        found = at_rest.get(_place(value)) if value.numel() else None
        source = Source(value, value.dtype) if found is None else _at_rest(*found)
        check_storable(folder, name, source)
        same = (name in buffers, *_place(value)) if value.numel() else name
        if same not in stored:
            sources[name] = source
            stored.add(same)
    return sources


def _entries(state: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yields the entries, with the parts of quantised ones as `load_model` has them."""
    for name, value in state.items():
        parts = None
        if isinstance(value, torch.Tensor) and is_wrapper(value):
            parts = parts_of(value)
        if parts is None:
            yield name, value
            continue
        for path, tensor in zip(parts.paths, parts.tensors, strict=True):
            yield name + path, tensor


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Returns what two tensors that are the same elements of one memory share."""
    signs = (tensor.is_conj(), tensor.is_neg())
    layout = (tensor.shape, tensor.stride(), tensor.dtype)
    return (tensor.device, tensor.data_ptr(), *layout, *signs)


def _at_rest(master: Master, member: Member) -> Source:
    """Reads from the master's file where its bytes are the tensor's, in order."""
    rest = member.rest
    plain = rest.is_contiguous() and not rest.is_conj() and not rest.is_neg()
    if master.location is None or not plain:
        return Source(rest, rest.dtype)
    start = rest.data_ptr() - master.flat.data_ptr() if rest.numel() else 0
    return Source(rest, rest.dtype, master.location, start)


def _divided(
    sources: Mapping[str, Source], largest: int
) -> dict[str, dict[str, Source]]:
    """Fills files in the order of the tensors, each up to the largest size."""
    parts: list[dict[str, Source]] = [{}]
    room = largest
    for name, source in sources.items():
        if source.nbytes > room and parts[-1]:
            parts.append({})
            room = largest
        parts[-1][name] = source
        room -= source.nbytes
    return {shard_name(i, len(parts)): part for i, part in enumerate(parts, start=1)}


def _refuse_files_in_use(
    sessions: Sequence[Session], replacement: CheckpointReplacement
) -> None:
    replaced = {_located(path) for path in replacement.replaced()}
    for session in sessions:
        for file in sorted(session.store.files, key=lambda file: file.path):
            if not replaced.isdisjoint(_paths_of(file)):
                raise CheckpointError(
                    f"{file.path}: the model reads its weights from this file, which "
                    "would be replaced. Save into another folder, or call "
                    "detach(model) first."
                )


def _paths_of(file: CheckpointFile) -> set[Path]:
    return {_located(file.path), file.path.resolve()}


def _located(path: Path) -> Path:
    """Returns a path without links in its folder; a link itself can be replaced."""
    return path.parent.resolve() / path.name

"""``hookoffload convert``: any checkpoint that can be read -> a safetensors folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import open_checkpoint
from .checkpoint_folder import ELSEWHERE, CheckpointReplacement
from .conversion_cache import ConversionCache
from .converting import Converter, convert
from .progress import progress_bar
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError
from .safetensors_writer import Source, check_room, write_safetensors
from .saved_gguf import packing_of
from .saving import _METADATA, _divided, _size_in_bytes


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What was written.

    Attributes:
        folder: Where.
        files: The names of the files.
        tensors: How many tensors they hold.
        nbytes: The bytes of these.
    """

    folder: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int


def rewrite_checkpoint(
    source: str | os.PathLike[str],
    folder: Path,
    *,
    converter: Converter | None = None,
    max_shard_size: int | str = "5GB",
) -> Rewritten:
    """Writes a checkpoint as safetensors files, 16 MiB at a time.

    The folder's checkpoint named ``model`` is replaced as a whole, as `save_model`
    does. What a binary checkpoint or a converter makes is first kept inside the
    folder: both need room there until the end.

    Args:
        source: As for `load_model`: safetensors or binary.
        folder: The folder to write to; it is made if there is none.
        converter: From the checkpoint's names and tensors to those to write.
        max_shard_size: The most bytes of tensors in a file; see `save_model`.

    Raises:
        CheckpointError: A file is missing or damaged, or the disk is full or refuses.
        ValueError: `max_shard_size` is no size, or the converter returned no tensors.
    """
    largest = _size_in_bytes(max_shard_size)
    with ExitStack() as held:
        cache = held.enter_context(_scratch_of(folder))
        locations = open_checkpoint(source, cache)
        if converter is not None:
            locations = convert(locations, converter, cache)
        held.callback(_close, locations)
        _check_can_be_told(locations)
        sources = {
            name: Source(location.file.mapped(location), location.dtype, location)
            for name, location in locations.items()
        }
        shards = _divided(sources, largest)
        total = sum(source.nbytes for source in sources.values())
        with CheckpointReplacement(folder, list(shards)) as replacement:
            check_room(folder, total, ELSEWHERE)
            with progress_bar("writing weights", total) as bar:
                for name, tensors in shards.items():
                    write_safetensors(
                        replacement.staging / name,
                        tensors,
                        elsewhere=ELSEWHERE,
                        metadata=_METADATA,
                        progress=bar.update,
                        durable=True,
                    )
            files = {name: file for file, part in shards.items() for name in part}
            replacement.commit(files, total)
    return Rewritten(
        folder=str(folder), files=tuple(shards), tensors=len(sources), nbytes=total
    )


@contextmanager
def _scratch_of(folder: Path) -> Iterator[ConversionCache]:
    """Keeps what is converted inside the folder for the length of a block."""
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="converting-") as scratch:
            yield ConversionCache(scratch)
    finally:
        if fresh:
            with suppress(OSError):
                folder.rmdir()  # only if nothing was written


def _check_can_be_told(locations: dict[str, TensorLocation]) -> None:
    """Refuses bytes that a safetensors file would hold without saying what they are."""
    for name, location in locations.items():
        if (packing := packing_of(location)) is not None:
            raise CheckpointError(
                f"{location.file.path}: {name!r} is packed as {packing}, which a "
                "safetensors file cannot say. load_model takes the GGUF file as it is; "
                "a converter can unpack it."
            )


def _close(locations: dict[str, TensorLocation]) -> None:
    for file in {location.file for location in locations.values()}:
        file.close()

"""Checkpoints of one or more files, open to be read.

Nothing here reads a tensor's bytes before somebody asks for them: opening a safetensors
checkpoint reads headers only. A binary one has to be converted first.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from .binary_checkpoint import open_binary
from .checkpoint_index import CheckpointPaths, find_tensors
from .conversion_cache import ConversionCache
from .gguf_file import GgufFile
from .opened_file import GGUF, PICKLED
from .safetensors_file import CheckpointFile, TensorLocation


def open_checkpoint(
    checkpoint: CheckpointPaths, cache: ConversionCache | None = None
) -> dict[str, TensorLocation]:
    """Opens a checkpoint and says where each of its tensors lies.

    Args:
        checkpoint: One file; a list of them, where a later file wins on a name that
            several have; a pattern such as `folder/*.safetensors`, which stands for
            the sorted list of the files that it fits; an index
            (`*.safetensors.index.json`); or a folder with an index or with exactly one
            safetensors file, or else with binary ones. A file may be a GGUF file.
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
    with ExitStack() as opened:
        files: set[CheckpointFile] = set()

        def open_file(path: Path) -> Mapping[str, TensorLocation]:
            tensors: Mapping[str, TensorLocation]
            if cache is not None and path.suffix.lower() in PICKLED:
                tensors = open_binary(path, cache)
                found_in = {location.file for location in tensors.values()}
            else:
                is_gguf = path.suffix.lower() == GGUF
                file = (GgufFile if is_gguf else CheckpointFile)(path)
                tensors, found_in = file.tensors, {file}
            for file in found_in:
                opened.callback(file.close)
            files.update(found_in)
            return tensors

        found = find_tensors(checkpoint, open_file)
        for file in files - {location.file for location in found.values()}:
            file.close()
        opened.pop_all()
    return found

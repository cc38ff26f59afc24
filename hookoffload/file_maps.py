"""Maps of a checkpoint's tensors that share no bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from .safetensors_file import CheckpointFile, TensorLocation


class OwnMaps:
    """Gives each tensor bytes of its own, where a converter gave the same to several.

    What is written to a map is seen through every map of the same open file; another
    tensor with the same bytes lies in a map of the file opened again.
    """

    def __init__(self) -> None:
        self._taken: dict[object, list[TensorLocation]] = defaultdict(list)
        self._again: dict[tuple[CheckpointFile, int], CheckpointFile] = {}

    def own(self, location: TensorLocation) -> TensorLocation:
        """Return where the same bytes lie in a file that has no map of them yet."""
        turn, file = 0, location.file
        while any(
            other.offset < location.offset + location.nbytes
            and location.offset < other.offset + other.nbytes
            for other in self._taken[file, location.name, turn]
        ):
            turn += 1
        self._taken[file, location.name, turn].append(location)
        if turn == 0:
            return location
        if (file, turn) not in self._again:
            self._again[file, turn] = file.opened_again()
        return replace(location, file=self._again[file, turn])

"""A sharded checkpoint put in the place of another one, at every moment a whole one.

[Note: replacing a checkpoint]
One rename replaces one file. A checkpoint of several files has no such step, and shards
of one save must never be read with shards of another. So the index is the switch:

1. The new shards are written into a folder beside the old ones (*staging*).
2. The index is replaced by one that points into staging: from here the new checkpoint
   is the one that is read.
3. Old shards that are no longer needed are removed; they are noted in that index, so
   that the next save finds those that a killed process left.
4. Each new shard gets its own name beside its name in staging (a hard link).
5. The index is replaced by one with these names, and staging is removed.

One file that replaces one file needs step 1 and a rename. A single file has no index in
the end. On file systems without hard links the index is removed in step 2: a process
killed before step 5 leaves a folder that is refused, with the new shards in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .safetensors_header import CheckpointError
from .safetensors_writer import remove
from .spill_folder import SpillFolder, lock_folder
from .tensor_bytes import disk_errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ELSEWHERE = "save into another folder"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_STAGING = "model-saving"
_is_staging = re.compile(rf"{_STAGING}-[0-9a-f]+").fullmatch
_LINK = ".link"
_REPLACES = "replaces"


def shard_name(number: int, count: int) -> str:
    """Returns the name of a shard, counted from 1, as Hugging Face libraries do."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


class CheckpointReplacement:
    """Replaces the checkpoint of a folder; used in a `with` block.

    In the block the shards are written into `staging`; `commit` puts them in place.
    Without it everything stays as it was.

    Args:
        folder: The folder, which is made if there is none.
        shards: The names of the new checkpoint's files.
    """

    __slots__ = (
        "_fd",
        "_named_by_index",
        "_obsolete",
        "_staging",
        "folder",
        "shards",
    )

    def __init__(self, folder: Path, shards: Collection[str]) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._fd = -1
        self._staging = SpillFolder(folder, _STAGING)
        self._named_by_index = False
        self._obsolete: set[str] = set()

    @property
    def staging(self) -> Path:
        """The folder to write the new shards into."""
        assert self._staging.path is not None
        return self._staging.path

    def replaced(self) -> set[Path]:
        """Returns the paths of the files that a commit replaces or removes."""
        return {self.folder / name for name in (*self.shards, *self._obsolete)}

    def __enter__(self) -> CheckpointReplacement:
        """Locks the folder and looks at what it holds.

        Raises:
            CheckpointError: The folder cannot be written, or another process saves
                into it.
        """
        try:
            with disk_errors(self.folder / SINGLE, ELSEWHERE):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                if lock_folder(self._fd) is False:
                    raise CheckpointError(
                        f"{self.folder}: a model is being saved into this folder "
                        "already. Wait until that is done, or save into another folder."
                    )
                SpillFolder.sweep(self.folder, _STAGING, keep=self._look_around())
                self._staging.create()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes what was not committed and unlocks the folder."""
        # An interrupted commit may have left the new checkpoint there; the next one
        # finds it.
        try:
            if not self._named_by_index:
                self._staging.remove()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def commit(self, weight_map: Mapping[str, str], total_bytes: int) -> None:
        """Puts the shards in the place of what is there.

        Args:
            weight_map: The file of each tensor, by name.
            total_bytes: Bytes of all tensors.

        Raises:
            CheckpointError: The disk refuses. The folder holds the old checkpoint or
                the new one.
        """
        with disk_errors(self.folder / SINGLE, ELSEWHERE):
            index = self.folder / INDEX
            if self.shards == [SINGLE] and not os.path.lexists(index):
                os.replace(self.staging / SINGLE, self.folder / SINGLE)
                os.fsync(self._fd)
                return
            linked = self._link_shards()
            about: dict[str, object] = {"total_size": total_bytes}
            if linked:
                inside = self.staging.name
                staged = {name: f"{inside}/{file}" for name, file in weight_map.items()}
                self._named_by_index = True
                self._staging.keep()
                self._put_index({**about, _REPLACES: sorted(self._obsolete)}, staged)
            else:
                remove(index)
            for name in sorted(self._obsolete):
                with suppress(FileNotFoundError):
                    os.unlink(self.folder / name)
            for shard in self.shards:
                mine = f"{shard}{_LINK}" if linked else shard
                os.replace(self.staging / mine, self.folder / shard)
            os.fsync(self._fd)
            if self.shards == [SINGLE]:
                with suppress(FileNotFoundError):
                    os.unlink(index)
            else:
                self._put_index(about, weight_map)
            os.fsync(self._fd)
            self._named_by_index = False
            self._staging.remove()
            # And what the older index named, if a process was killed.
            SpillFolder.sweep(self.folder, _STAGING)

    def _link_shards(self) -> bool:
        """Gives each new shard a second name, which can be moved to its place.

        Returns:
            Whether the file system has such names.
        """
        try:
            for shard in self.shards:
                os.link(self.staging / shard, self.staging / f"{shard}{_LINK}")
        except OSError:
            return False
        return True

    def _put_index(
        self, about: Mapping[str, object], weight_map: Mapping[str, str]
    ) -> None:
        text = json.dumps(
            {"metadata": about, "weight_map": weight_map}, indent=2, sort_keys=True
        )
        unfinished = self.staging / INDEX
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / INDEX)
        os.fsync(self._fd)

    def _look_around(self) -> set[str]:
        """Notes what a commit makes obsolete; returns the folders in use by the index.

        What cannot be understood is not ours, and is only replaced.
        """
        try:
            index = json.loads((self.folder / INDEX).read_bytes())
            named = {*index["weight_map"].values()}
            noted = {*index["metadata"].get(_REPLACES, ())}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            named, noted = set(), set()
        in_use, obsolete = set(), {SINGLE}
        for name in map(str, named | noted):
            inside, _, shard = name.rpartition("/")
            in_use.add(inside)
            # A process that was killed may have put some in place already.
            if _SHARD.fullmatch(shard) and (not inside or _is_staging(inside)):
                obsolete.add(shard)
        self._obsolete = obsolete - set(self.shards)
        return in_use

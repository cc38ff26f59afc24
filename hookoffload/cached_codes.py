"""Codes that a cache on disk keeps, for the masters whose values they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from .code_cache import KeptCode, Locations, kept_codes
from .conversion_cache import ConversionCache
from .master import Master
from .master_code import MasterCode
from .progress import progress_bar
from .safetensors_file import CheckpointFile, TensorLocation

# So many bytes of weights are encoded before their codes are written: as many as fill
# a file of the cache, work for several threads, and no model that waits on disk.
_BATCH_BYTES = 2**29

MakeCodes = Callable[[list[Master]], list[tuple[Master, MasterCode]]]


class CodeCache:
    """Where the codes of a checkpoint are kept.

    Args:
        cache: the folder.
        locations: the checkpoint's tensors.
    """

    def __init__(self, cache: ConversionCache, locations: Locations) -> None:
        self._cache = cache
        self._locations = locations
        self._kept: dict[str, KeptCode] = {}

    def complete(
        self,
        places: dict[str, TensorLocation],
        codable: Callable[[], Iterable[Master]],
        make: MakeCodes,
    ) -> None:
        """Have tensors know their codes, which are made if there are none.

        Args:
            places: where a model's tensors lie; replaced by places that know a code.
            codable: returns what can be coded.
            make: encodes masters.

        Raises:
            CheckpointError: The cache's entry is damaged, or the disk is full.
        """
        names: dict[object, str] = {}
        for name, location in self._locations.items():
            names.setdefault(_place(location), name)

        def codes() -> Iterator[tuple[str, MasterCode]]:
            # Two tensors may have the same bytes, and one code.
            masters = {names.get(_place(m.location)): m for m in codable()}
            masters.pop(None, None)
            owners = {id(master): name for name, master in masters.items() if name}
            total = sum(master.plain_bytes for master in masters.values())
            with progress_bar("keeping codes", total) as bar:
                for batch in _batches(masters.values()):
                    for master, code in make(batch):
                        yield owners[id(master)], code
                    bar.update(sum(master.plain_bytes for master in batch))

        self._kept = kept_codes(self._cache, self._locations, codes)
        for name, location in places.items():
            code = self._kept.get(names.get(_place(location), ""))
            places[name] = replace(location, kept=code)

    def close(self) -> None:
        """Close the files that codes are read from."""
        for file in {code.file for code in self._kept.values()}:
            file.close()


def _place(location: TensorLocation | None) -> object:
    if location is None:
        return None
    return location.file.path, location.offset, location.nbytes, location.dtype


def _batches(masters: Iterable[Master]) -> Iterator[list[Master]]:
    batch: list[Master] = []
    nbytes = 0
    for master in masters:
        batch.append(master)
        nbytes += master.plain_bytes
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


@contextmanager
def codes_open(masters: list[Master]) -> Iterator[None]:
    """Open the files of kept codes; those that masters read from then stay open.

    What is not in the cache any more, or is another file by now, is not kept.

    Args:
        masters: those that may take codes.
    """
    files: dict[CheckpointFile, CheckpointFile | None] = {}
    for master in masters:
        kept = None if master.location is None else master.location.kept
        if master.location is None or kept is None or master.code is not None:
            continue
        if kept.file not in files:
            files[kept.file] = kept.file.reopened()
        file = files[kept.file]
        if file is None:
            master.location = replace(master.location, kept=None)
        else:
            kept.move_to(file)
    opened = [file for before, file in files.items() if file and file is not before]
    used: set[CheckpointFile] = set()
    try:
        yield
        used = {m.source.file for m in masters if m.source is not None}
    finally:
        for file in opened:
            if file not in used:
                file.close()

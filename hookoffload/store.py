"""Where the masters of a model live: in RAM or in files, and how they get there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from .filling import Filled, read_masters
from .host_memory import reclaimable_memory, trim_heap
from .master import Master
from .origins import Origins
from .placement import Placement
from .private_pages import written_privately
from .progress import progress_bar
from .safetensors_file import CheckpointFile, TensorLocation
from .safetensors_header import CheckpointError
from .safetensors_writer import remove
from .spill_file import write_spill_file
from .spill_folder import SpillFolder

logger = logging.getLogger(__name__)


class Rests(Protocol):
    """Where a master rests."""

    def __call__(self, *, on_disk: bool) -> Placement:
        """Return it for the masters that wait on disk, or for those in RAM."""


_CPU = torch.device("cpu")


class Store:
    """Where the masters of one attached model live, and how they get there and back."""

    def __init__(self, masters: Sequence[Master], disk_dir: Path | None) -> None:
        self.masters = list(masters)
        self._disk_dir = disk_dir
        self._folder: SpillFolder | None = None
        self._written = 0  # files, for their names
        self._files = {m.location.file for m in masters if m.location is not None}
        self._code_files: set[CheckpointFile] = set()
        self._note_code_files()
        self._mapped: dict[int, tuple[torch.Tensor, TensorLocation]] = {}
        self._origins = Origins()

    def replace_masters(self, masters: Sequence[Master], rests: Rests) -> None:
        """Take over the masters of parameters that replaced others.

        Args:
            masters: all that there are now.
            rests: where one rests, by whether it waits on disk.
        """
        kept = set(self.masters)
        self.masters = list(masters)
        current = {id(master) for master in kept.intersection(masters)}
        self._mapped = {k: v for k, v in self._mapped.items() if k in current}
        self._origins.keep_only(masters)
        before = set(self._files)
        for on_disk in (True, False):
            others = [m for m in masters if m not in kept and m.on_disk == on_disk]
            self.adopt(others, rests(on_disk=on_disk))
        self._remove_unused(before | self._files)

    def _remove_unused(self, files: set[CheckpointFile]) -> None:
        """Remove own files that nothing rests in, or they pile up on the disk."""
        used = {m.location.file for m in self.masters if m.location is not None}
        used.update(location.file for _, location in self._mapped.values())
        used.update(self._origins.files)
        for file in files - used:
            if file.writable_shared:
                self._files.discard(file)
                file.close()
                remove(file.path)

    def adopt(
        self,
        masters: Sequence[Master],
        placement: Placement,
        filled: Filled | None = None,
    ) -> None:
        """Bring masters to the placement where they rest while not needed.

        A CPU tensor that stays in RAM and needs no cast stays exactly where it lies.
        What lies in a file and is to rest in RAM is read, and cast on the way; if it
        is coded, its code is what rests in RAM.

        Args:
            masters: what to bring.
            placement: where to.
            filled: called with masters that were read, while others are still to come.

        Raises:
            CheckpointError: The folder cannot be written, or has too little room.
        """
        self._note_code_files()
        for master in masters:
            master.reconcile(lenient=True)  # it may have been given other data
        if placement.on_disk:
            self._origins.take_back(masters)
            self._spill(masters, placement.dtype)
            return
        waiting = _uncoded_in_files(masters)
        origins = [(m, m.location) for m in waiting if m.location is not None]
        self._origins.note(origins)  # first: a file that fails leaves some of them read
        read_masters(waiting, placement.dtype, filled)
        self._files = {m.location.file for m in self.masters if m.location is not None}
        self._cast(masters, placement.dtype)

    def _note_code_files(self) -> None:
        """Know the files whose codes are read, and close those that no master reads."""
        codes = [m.code for m in self.masters if m.code is not None]
        used = {code.location.file for code in codes if code.location is not None}
        places = [m.location for m in self.masters if m.location is not None]
        kept = {place.kept.file for place in places if place.kept is not None}
        for file in (self._code_files | kept) - used:
            file.close()
        self._code_files = used

    @staticmethod
    def _cast(masters: Sequence[Master], dtype: torch.dtype | None) -> None:
        """Have masters in host RAM, in ``dtype`` if they may be cast."""
        casts = []
        for master in masters:
            flat = master.flat
            wanted = dtype if dtype is not None and master.castable else flat.dtype
            if flat.device != _CPU or flat.dtype != wanted:
                casts.append((master, wanted))
        if not casts:
            return
        total = sum(master.nbytes for master, _ in casts)
        with progress_bar("bringing weights to RAM", total) as bar:
            for master, wanted in casts:
                nbytes = master.nbytes
                master.become(master.flat.to(_CPU, wanted), None)
                bar.update(nbytes)

    def _spill(self, masters: Sequence[Master], dtype: torch.dtype | None) -> None:
        """Write masters that have no file yet to a file of their own, free the RAM."""
        spilled = [m for m in masters if m.location is None and m.count]
        if not spilled:
            return
        folder = self._make_folder()
        tensors = {f"{i:06d}.{m.name}": m.flat for i, m in enumerate(spilled)}
        dtypes = {
            name: dtype
            for name, master in zip(tensors, spilled, strict=True)
            if dtype is not None and master.castable
        }
        total = sum(
            t.numel() * dtypes.get(name, t.dtype).itemsize
            for name, t in tensors.items()
        )
        with progress_bar("writing weights to disk", total) as bar:
            path = folder / f"weights-{self._written}.safetensors"
            self._written += 1
            file = write_spill_file(
                path, tensors, dtypes=dtypes, progress=lambda n: _advance(bar, n)
            )
        self._files.add(file)
        names = list(tensors)
        del tensors
        for name, master in zip(names, spilled, strict=True):
            location = file.tensors[name]
            master.become(file.mapped(location), location)
        trim_heap()  # or the RAM would be this process's for good

    def _make_folder(self) -> Path:
        where = self._disk_dir or Path(tempfile.gettempdir())
        try:
            where.mkdir(parents=True, exist_ok=True)
            if self._folder is None:
                SpillFolder.sweep(where)
                self._folder = SpillFolder(where)
            return self._folder.create()
        except OSError as error:
            raise CheckpointError(
                f"cannot write to disk_dir={str(where)!r}: {error.strerror}. Pass "
                "disk_dir=, a folder that can be written, on a disk with room"
            ) from error

    def onload(self, masters: Sequence[Master], placement: Placement) -> None:
        """Bring masters to where they wait, from files if they rest there."""
        if placement.on_disk:
            return
        for master in masters:
            master.reconcile()
        waiting = _uncoded_in_files(masters)
        for master in waiting:
            assert master.location is not None, f"{master.name} is in RAM already"
            self._mapped[id(master)] = (master.flat, master.location)
        read_masters(waiting, placement.dtype)
        self._cast(masters, placement.dtype)

    def offload(self, masters: Sequence[Master], placement: Placement) -> None:
        """Bring masters back to where they rest.

        A master that was written to in the meantime goes into its file when the file
        is the library's own, and stays in RAM when it is the user's.
        """
        for master in masters:
            master.reconcile(lenient=True)
            master.drop_code()
            known = self._mapped.pop(id(master), None)
            if known is None:
                if not placement.on_disk:
                    self._cast([master], placement.dtype)
                continue
            flat, location = known
            if master.dirty:
                if not location.file.writable_shared:
                    continue
                location.file.write_from(location, master.flat.to(flat.dtype))
            master.become(flat, location)

    def masters_in_files(self) -> list[Master]:
        """Return the masters that lie in files of the user."""
        return [
            master
            for master in self.masters
            if master.location is not None and not master.location.file.writable_shared
        ]

    def leave_open(self, files: Iterable[CheckpointFile]) -> None:
        """Have `close` leave these files open: somebody else reads from them."""
        self._files.difference_update(files)

    @property
    def files(self) -> frozenset[CheckpointFile]:
        """The open files, the user's and the library's own, with those of codes."""
        return frozenset(self._files | self._code_files)

    @property
    def host_bytes(self) -> int:
        """Bytes of the masters in host RAM, and of their codes."""
        return sum(master.host_bytes for master in self.masters)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the masters in files."""
        return sum(master.nbytes for master in self.masters if not master.in_ram)

    def note_private_writes(self) -> None:
        """Notice writes to the private maps of the user's files that moved no version.

        ``tensor.data.zero_()`` and writes through NumPy count nowhere, and forwards
        read the file. To be called while nothing has been copied ahead.
        """
        mapped = self.masters_in_files()
        written = written_privately([master.flat for master in mapped])
        for master, changed in zip(mapped, written, strict=True):
            if changed:
                master.note_change()

    def choose_reads(self) -> None:
        """Read the user's files past the page cache where it cannot hold them."""
        files = {m.source.file for m in self.masters if m.source is not None}
        files = {file for file in files if not file.writable_shared}
        if sum(file.nbytes for file in files) <= reclaimable_memory():
            return
        pays = [file.read_past_cache() for file in files]
        if any(pays):
            logger.info("files are read past the page cache, which cannot hold them")

    def doubt_codes(self) -> None:
        """Have masters in RAM, or in own files, encoded again before they are copied.

        While a model is offloaded, writes that move no version are allowed. Those to
        maps of the user's files `note_private_writes` sees.
        """
        users = set(self.masters_in_files())
        for master in self.masters:
            if master.code is not None and master not in users:
                master.code.revision = -1

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file changed since it was opened."""
        for file in self.files:
            try:
                file.check_unchanged()
            except CheckpointError as error:
                raise CheckpointError(f"{error}{self._held_by(file)}") from error

    def _held_by(self, file: CheckpointFile) -> str:
        """Say for an error which weights a file holds."""
        places = [p for m in self.masters for p in (m.location, m.source) if p]
        names = sorted({place.name for place in places if place.file is file})
        if not names:
            return ""
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        codes = "the code of " if file in self._code_files else ""
        return f" It holds {codes}{names[0]!r}{more}."

    def restore(self) -> None:
        """Give every member its original device and dtype back, the value at rest.

        Masters in a user's checkpoint stay memory maps of it: their members never
        lay anywhere else.
        """
        self.restore_masters()
        self.close()

    def restore_masters(self) -> None:
        """Give every member back, keep the files."""
        for master in self.masters:
            self._restore(master)

    def _restore(self, master: Master) -> None:
        if not master.members:
            return  # its only one was split off
        master.reconcile(lenient=True)
        master.forget_code()
        if master.location is not None and master.location.file.writable_shared:
            flat = torch.empty(master.count, dtype=master.flat.dtype)
            master.read_into(flat.view(torch.uint8))
            master.become(flat, None)
        first = master.members[0]
        dtype = torch.uint8 if master.mixed else first.dtype
        if master.flat.dtype != dtype or master.flat.device != first.device:
            master.become(master.flat.to(first.device, dtype), master.location)
        else:
            master.put_to_rest()

    def close(self) -> None:
        """Close the files, and remove those that this store wrote."""
        for file in self.files:
            file.close()
        self._files.clear()
        self._code_files.clear()
        self._mapped.clear()
        self._origins.forget()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


def _uncoded_in_files(masters: Sequence[Master]) -> list[Master]:
    return [m for m in masters if m.location is not None and m.code is None]


def _advance(bar: tqdm[Any], nbytes: int) -> None:
    bar.update(nbytes)

"""One master: the one true copy of a tensor group's bytes."""

from __future__ import annotations

from dataclasses import replace

import torch

from .codec import Codec
from .fp8 import Fp8Weight, take_off
from .lossless import encode_from
from .lossless_encoder import ChunkEncoder, Source
from .lossless_host import HostEncoder
from .master_code import MasterCode
from .member import Member, rest_members, version_of
from .registered import ManagedTensor, TensorGroup, span
from .safetensors_file import TensorLocation

CPU = torch.device("cpu")


class Master:
    """The bytes of one tensor group at rest, and the members that share them."""

    __slots__ = (
        "bytes",
        "castable",
        "code",
        "codec",
        "count",
        "dirty",
        "flat",
        "location",
        "members",
        "mixed",
        "name",
        "on_disk",
        "pinned",
        "revision",
    )

    def __init__(
        self,
        group: TensorGroup,
        codec: Codec,
        location: TensorLocation | None = None,
        *,
        on_disk: bool = False,
    ) -> None:
        dtypes = {m.tensor.dtype for m in group.members}
        self.mixed = len(dtypes) > 1
        # Members of several dtypes move as bytes, aligned for the widest of them.
        low = group.low - group.low % 16 if self.mixed else group.low
        self.name = group.name
        self.codec = codec
        self.members = [Member(managed, low) for managed in group.members]
        first = group.members[0].tensor
        self.flat = _flat(first, low, group.high, self.mixed)
        # What is copied, if it lies in host RAM.
        self.bytes = self.flat.view(torch.uint8)
        self.count = self.flat.numel()
        self.castable = not self.mixed and all(
            managed.castable for managed in group.members
        )
        self.location = location
        self.on_disk = on_disk  # its tier: whether it waits in a file, or in host RAM
        self.dirty = False
        self.code: MasterCode | None = None
        self.pinned = False  # what is copied is page-locked, see pinning.py
        self.revision = 0  # counts changes of the bytes at rest

    @property
    def nbytes(self) -> int:
        """Bytes that are copied to the compute device: those at rest, or their code."""
        return self.plain_bytes if self.code is None else self.code.nbytes

    @property
    def plain_bytes(self) -> int:
        """Bytes at rest."""
        # What moves as bytes has the codec of its first member only.
        return self.count * (1 if self.mixed else self.codec.rest.itemsize)

    @property
    def host_bytes(self) -> int:
        """Bytes in host RAM: of those at rest, if they lie there, and of a code."""
        at_rest = self.plain_bytes if self.location is None else 0
        return at_rest + (0 if self.code is None else self.code.data.numel())

    def is_of(self, group: TensorGroup) -> bool:
        """Tell whether the members are the tensor objects of a group."""
        mine = {id(member.tensor) for member in self.members}
        return mine == {id(managed.tensor) for managed in group.members}

    def rename(self, group: TensorGroup) -> None:
        """Take the names that a group's tensors have by now: modules may be wrapped."""
        managed = {id(one.tensor): one for one in group.members}
        self.name = group.name
        for member in self.members:
            now = managed[id(member.tensor)]
            member.name, member.merges = now.name, now.merges

    @property
    def source(self) -> TensorLocation | None:
        """Where in a file what is copied lies; None if it lies in host RAM."""
        return self.location if self.code is None else self.code.location

    @property
    def in_ram(self) -> bool:
        """Whether what is copied lies in host RAM (and not in a file)."""
        return self.source is None

    def read_into(self, destination: torch.Tensor, start: int = 0) -> None:
        """Copy what is copied, from byte ``start`` on, into a ``uint8`` CPU tensor.

        Fills the whole destination, which may be shorter than the master.
        """
        source = self.source
        if source is not None:
            source.file.read_into(source, destination, start)
        else:
            destination.copy_(self.bytes[start : start + destination.numel()])

    @property
    def copied_revision(self) -> int:
        """The revision of which the bytes that are copied are."""
        return self.revision if self.code is None else self.code.revision

    def encode(self, encoder: ChunkEncoder) -> None:
        """Have a code of the bytes as they are now, if they would shrink by it.

        Args:
            encoder: what encodes them.
        """
        if self.code is not None:
            self.renew_code(encoder)
            return
        code = self.make_code(encoder)
        if code is not None:
            self.code_as(code)

    def make_code(self, encoder: ChunkEncoder) -> MasterCode | None:
        """Return a code of the bytes as they are now; None if they would not shrink.

        Where a cache has it, it is read from there, or stays there if this waits on
        disk.

        Args:
            encoder: what encodes them.

        Raises:
            CheckpointError: What the cache has is damaged.
        """
        kept = None if self.location is None else self.location.kept
        if kept is not None and self.on_disk:
            return MasterCode.in_file(kept.layout, kept.checked(), self.revision)
        if kept is not None:
            return MasterCode.of(kept.read(), self.revision)
        coded = encode_from(self._source(), self.count, self.flat.dtype, encoder)
        return None if coded is None else MasterCode.of(coded, self.revision)

    @property
    def has_old_code(self) -> bool:
        """Whether there is a code, of other bytes than those at rest."""
        return self.code is not None and self.code.revision != self.revision

    def code_as(self, code: MasterCode) -> None:
        """Take a code, whose bytes are copied from now on."""
        self.codec = replace(self.codec, coded=True)
        self.code, self.bytes = code, code.data

    def renew_code(self, encoder: ChunkEncoder | None = None) -> None:
        """Encode again what was written to since.

        Args:
            encoder: what encodes it; default: this thread.
        """
        if self.code is not None and self.has_old_code:
            self.code.renew(self._source(), self.revision, encoder or HostEncoder())
            self.bytes = self.code.data

    def drop_code(self) -> None:
        """Give the memory of the code back until `renew_code`."""
        if self.code is not None:
            self.code.drop()
            self.bytes = self.code.data

    def forget_code(self) -> None:
        """Have no code from now on."""
        self.codec = replace(self.codec, coded=False)
        self.code, self.bytes = None, self.flat.view(torch.uint8)

    def _source(self) -> Source:
        location, flat = self.location, self.flat
        if location is None:
            return flat

        def read(start: int, part: torch.Tensor) -> None:
            # Not through the map: what it has read once stays counted as this
            # process's memory.
            location.file.read_into(location, part, start * part.itemsize)

        return read

    def become(self, flat: torch.Tensor, location: TensorLocation | None) -> None:
        """Take ``flat`` as the bytes at rest from now on, and put members on it."""
        # In this order an interrupt leaves the old bytes, or all of the new ones.
        views = [self.member_view(member, flat) for member in self.members]
        for member, view in zip(self.members, views, strict=True):
            member.set_rest(view)
        self.flat = flat
        self.bytes = flat.view(torch.uint8) if self.code is None else self.code.data
        self.location = location
        self.dirty = self.pinned = False
        self.put_to_rest()
        for member in self.members:
            member.former_pointer = 0

    def member_view(self, member: Member, flat: torch.Tensor) -> torch.Tensor:
        """Return a member's view of a flat tensor that holds this master."""
        base = flat.view(member.dtype) if self.mixed else flat
        return member.view(base, int(base.storage_offset()))

    def split_off(self, member: Member) -> Master:
        """Give a member that was given other data a master of its own.

        The others keep the bytes that they shared with it; without others, this
        master has no members from now on.
        """
        self.members.remove(member)
        low, high = span(member.tensor)
        managed = ManagedTensor(member.name, member.tensor, is_buffer=False)
        managed.holders, managed.wrappers = list(member.holders), member.wrappers
        managed.castable, managed.stays = member.castable, member.stays
        dtype = member.tensor.dtype
        codec = Codec(dtype, dtype, dtype)
        if not self.mixed:
            codec = self.codec.unscaled()
        group = TensorGroup([managed], low, high)
        alone = Master(group, codec, on_disk=self.on_disk)
        alone.members[0].device = member.device
        alone.members[0].dtype = member.dtype
        return alone

    def put_to_rest(self) -> None:
        """Swap every member back to the master."""
        if self.codec.scaled:
            for member in self.members:
                take_off(member.tensor)
        rest_members(self.members)

    def take_bound(self, member: Member) -> bool:
        """Copy a bound member's value here if it was written to since it was bound.

        Returns:
            Whether it was: its version moved, or it was given other data.
        """
        tensor = member.tensor
        if type(tensor) is Fp8Weight:
            return False  # it refuses writes, see [Note: fp8 compute]
        pointer = tensor.data_ptr()
        if pointer == member.rest_pointer:
            return False  # an interrupt came before it was bound, or behind its rest
        moved = pointer != member.bound_pointer
        if not moved and version_of(tensor) == member.version:
            return False
        # Of the latter where an interrupt came between its rest and the note of that.
        dtypes = (member.dtype if self.mixed else self.codec.compute, member.rest.dtype)
        if tensor.shape != member.shape or tensor.dtype not in dtypes or tensor.is_meta:
            return False  # moved or cast behind the back: the next forward says so
        if not member.stays and self._is_own_value(member):
            return False
        member.rest.copy_(tensor.data)
        self.note_change()
        return True

    @property
    def lies_in_private_map(self) -> bool:
        """Whether it rests in a file of the user, mapped so that writes stay here."""
        return self.location is not None and not self.location.file.writable_shared

    def _is_own_value(self, member: Member) -> bool:
        """Tell whether a forward gave a member its own value in another dtype."""
        value, computed = member.tensor.data, self.codec.compute
        if value.dtype == computed:
            return False
        own = member.rest.to(value.device).to(computed).to(value.dtype)
        return torch.equal(value, own)

    def note_change(self) -> None:
        """Note that the bytes at rest are not those that were copied before."""
        self.dirty = True
        self.revision += 1
        if self.lies_in_private_map:
            # The private map of a user's file holds the new values; the file does not.
            self.location = None

    def reconcile(self, *, lenient: bool = False) -> bool:
        """Notice what the user did to the members while they were at rest.

        Args:
            lenient: take a member that was moved or cast back, instead of raising.

        Returns:
            Whether the bytes may differ from those that were copied before.

        Raises:
            RuntimeError: A member was moved or cast, for example by ``model.to``.
        """
        changed = False
        for member in self.members:
            tensor = member.tensor
            if tensor.data_ptr() != member.rest_pointer:
                self._adopt_new_data(member, lenient=lenient)
                changed = True
            version = version_of(tensor)
            if version != member.version:
                member.version = version
                changed = True
        if changed:
            self.note_change()
        return changed

    def _adopt_new_data(self, member: Member, *, lenient: bool) -> None:
        tensor = member.tensor
        same = (
            tensor.device == member.rest.device
            and tensor.dtype == member.rest.dtype
            and tensor.shape == member.rest.shape
        )
        if not same and lenient:
            member.set_data(member.rest)
            return
        if not same:
            member.refuse_move()
        # The object now holds other memory: its value goes to where the others'
        # views of this master look.
        member.rest.copy_(tensor.data)
        member.set_data(member.rest)


def _flat(tensor: torch.Tensor, low: int, high: int, mixed: bool) -> torch.Tensor:
    dtype = torch.uint8 if mixed else tensor.dtype
    flat = torch.empty(0, dtype=dtype, device=tensor.device)
    size = (high - low) // dtype.itemsize
    storage = tensor.data.untyped_storage()
    return flat.set_(storage, low // dtype.itemsize, (size,), (1,))

"""One layer: its masters, what it needs on the compute device, and its bindings."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch

from .alignment import SMALL_TENSOR_BYTES, align
from .copies import Copy
from .device_memory import Block
from .layer_parts import Piece, RegionViews, resident_dtype, values_in
from .master import Master, Member, version_of
from .ring import Region, RegionRing, RegionStack

# Steady passes find a layer in the same place each time; others in a few.
_PLACES_KEPT = 4


class LayerState(enum.Enum):
    """Where a layer's value lies now; the seed system's four states.

    OFFLOAD: The model is not needed; every layer is at the offload placement.
    ONLOAD: Waiting at rest, or on its way into the window, for its next forward.
    PREPARING: Kept on the compute device between passes.
    COMPUTATION: Bound: from its pre hook to its post hook.
    """

    OFFLOAD = enum.auto()
    ONLOAD = enum.auto()
    PREPARING = enum.auto()
    COMPUTATION = enum.auto()


class Layer:
    """The unit that moves: a module's name and the masters that it brings along.

    Geometry (`measure`) depends on where the masters lie and on the compute device;
    everything else is the state of this moment.
    """

    __slots__ = (
        "_device",
        "_members",
        "away",
        "bound",
        "can_stay",
        "cast_bytes",
        "copied_revision",
        "copy",
        "copy_bytes",
        "disk_bytes",
        "held",
        "home",
        "index",
        "keep",
        "masters",
        "name",
        "pieces",
        "region",
        "resident",
        "resident_bytes",
        "resident_cast_bytes",
        "scratch",
        "scratch_block",
        "stands_in",
        "stays_bound",
        "stream_bytes",
    )

    def __init__(self, index: int, name: str, masters: Sequence[Master]) -> None:
        self.index = index
        self.name = name
        self.masters = list(masters)
        self.pieces: list[Piece] = []
        self._members: list[Member] = []  # of the pieces
        self._device = torch.device("cpu")
        self.stream_bytes = 0
        self.copy_bytes = 0
        self.disk_bytes = 0  # those of them that come from files
        self.cast_bytes = 0
        self.resident_bytes = 0
        self.resident_cast_bytes = 0
        self.can_stay = False
        # How many running forwards need it: bound at 0 -> 1, released at 1 -> 0.
        self.bound = 0
        self.away = False  # members may point elsewhere than at their masters
        self.held = False  # other layers can run while it is bound
        self.keep = False  # the plan wants it resident
        self.resident: list[Block] | None = None
        self.stays_bound = False  # resident without a cast: bound between passes too
        self.stands_in = False  # an embedding's weight is a stand-in for its table
        self.copy: Copy | None = None
        self.copied_revision = -1  # of the bytes in the region or the residence
        self.region: Region | None = None
        self.home: RegionRing | RegionStack | Block | None = None
        self.scratch: Region | None = None
        self.scratch_block: Block | None = None

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, {self.state.name})"

    @property
    def state(self) -> LayerState:
        """The state of this moment, as far as the layer itself knows."""
        if self.bound:
            return LayerState.COMPUTATION
        return LayerState.ONLOAD if self.resident is None else LayerState.PREPARING

    @property
    def in_place(self) -> bool:
        """Whether the compute device reads every byte where it rests, uncast."""
        return not self.pieces

    def measure(self, device: torch.device, *, may_stay: bool) -> None:
        """Compute what the layer needs on ``device``.

        Args:
            device: the compute device.
            may_stay: the policy has a preparing placement.
        """
        self.pieces = []
        self._device = device
        scratch = resident_scratch = 0
        self.copy_bytes = self.resident_bytes = self.disk_bytes = 0
        self.can_stay = may_stay
        for master in self.masters:
            codec = master.codec
            readable = device.type == "cpu" and not master.on_disk
            if readable and not codec.casts_streamed:
                continue
            piece = Piece(master)
            self.pieces.append(piece)
            self.copy_bytes += master.nbytes
            self.disk_bytes += master.nbytes if master.on_disk else 0
            if not readable:
                piece.region_offset = 0  # until all are known
            elif codec.resident_as_copied:
                self.can_stay = False  # a second copy beside the master gains nothing
            if codec.casts_streamed:
                piece.scratch_offset = scratch
                scratch += align(master.count * codec.compute.itemsize)
            if codec.casts_resident:
                piece.resident_scratch_offset = resident_scratch
                resident_scratch += align(master.count * codec.compute.itemsize)
            resident = resident_dtype(master)
            self.resident_bytes += align(master.count * resident.itemsize)
        self._members = [m for piece in self.pieces for m in piece.master.members]
        self.stream_bytes = self._place_pieces()
        self.cast_bytes = scratch
        self.resident_cast_bytes = resident_scratch

    def _place_pieces(self) -> int:
        """Give pieces their places in the region, the small ones side by side.

        Returns:
            The size of the region.
        """
        passing = [piece for piece in self.pieces if piece.region_offset is not None]
        end = 0
        for piece in sorted(
            passing, key=lambda piece: piece.master.nbytes < SMALL_TENSOR_BYTES
        ):
            piece.region_offset = end
            end += align(piece.master.nbytes)
        return end

    @property
    def is_usable(self) -> bool:
        """Whether a forward that begins now finds it bound."""
        return self.stays_bound or self.bound > 0

    @property
    def host_bytes(self) -> int:
        """Bytes of it that wait in host RAM."""
        return sum(master.nbytes for master in self.masters if not master.on_disk)

    @property
    def is_filled(self) -> bool:
        """Whether the residence holds bytes already, or the copy that fills it runs."""
        return self.copied_revision >= 0

    @property
    def decoded_bytes(self) -> int:
        """What `copy_bytes` are once they are decoded; 0 if nothing is coded."""
        if all(piece.master.code is None for piece in self.pieces):
            return 0
        return sum(piece.master.plain_bytes for piece in self.pieces)

    @property
    def readable_at_rest(self) -> bool:
        """Whether forwards could use the masters where they lie, only more slowly."""
        return all(
            piece.scratch_offset is None
            and piece.master.members[0].rest.device == self._device
            for piece in self.pieces
        )

    @property
    def copies_into_residence(self) -> bool:
        """Whether a resident holds the bytes at rest as they are."""
        return all(
            piece.region_offset is not None and piece.master.codec.resident_as_copied
            for piece in self.pieces
        )

    def bind(self, region_block: Block | None) -> None:
        """Point every member at its value on the compute device.

        Casts and decoders run on the stream that is current, from the region or the
        resident block into the scratch.
        """
        values = None
        if self.resident is None and self.region is not None:
            assert region_block is not None, "a region is in a block"
            values = self.views_in(region_block).values
        if values is None:
            values = [
                valued
                for index, piece in enumerate(self.pieces)
                for valued in values_in(piece, *self._value(index, piece, region_block))
            ]
        for member, value, pointer in values:
            member.set_data(value)
            member.bound_pointer = pointer
            member.version = version_of(member.tensor)

    def views_in(self, block: Block) -> RegionViews:
        """Return views of the layer's region, made anew only where it was not before.

        The block keeps them: they go when it goes.
        """
        assert self.region is not None, "only a layer with a place has views there"
        offset = self.region.offset
        places = block.kept.setdefault(self, {})
        found: RegionViews | None = places.get(offset)
        if found is None:
            if len(places) >= _PLACES_KEPT:
                places.clear()
            with torch.inference_mode(False):  # they are kept beyond the user's context
                found = places[offset] = self._make_views(block, offset)
        return found

    def _make_views(self, block: Block, offset: int) -> RegionViews:
        targets: list[tuple[Master, torch.Tensor]] = []
        values: list[tuple[Member, torch.Tensor, int]] | None = []
        for piece in self.pieces:
            if piece.region_offset is not None:
                begin = offset + piece.region_offset
                target = block.bytes[begin : begin + piece.master.nbytes]
                targets.append((piece.master, target))
            if piece.scratch_offset is not None or values is None:
                values = None
            else:
                values += values_in(piece, *self._rest_source(piece, block))
        return RegionViews(targets, values)

    def _value(
        self,
        index: int,
        piece: Piece,
        region_block: Block | None,
    ) -> tuple[torch.Tensor, int]:
        """Return a flat tensor and the element at which the master's value begins."""
        master = piece.master
        dtype = master.codec.compute
        count = master.count
        resident: torch.Tensor | None = None
        cast_to = piece.scratch_offset
        if self.resident is not None:
            resident = self.resident[index].typed(resident_dtype(master))
            cast_to = piece.resident_scratch_offset
        if cast_to is None:
            if resident is not None:
                return resident, 0
            return self._rest_source(piece, region_block)
        assert self.scratch_block is not None and self.scratch is not None
        target = self.scratch_block.typed(dtype)
        first = (self.scratch.offset + cast_to) // dtype.itemsize
        value = target[first : first + count]
        if resident is not None:
            value.copy_(resident[:count])
        else:
            self._expand(piece, region_block, value)
        return target, first

    def fill_residence(self, blocks: list[Block], region_block: Block | None) -> None:
        """Cast or decode the layer's streamed bytes into its resident blocks."""
        for index, piece in enumerate(self.pieces):
            target = blocks[index].typed(resident_dtype(piece.master))
            self._expand(piece, region_block, target[: piece.master.count])

    def _expand(
        self, piece: Piece, region_block: Block | None, target: torch.Tensor
    ) -> None:
        """Cast or decode what was copied of a master."""
        master, code = piece.master, piece.master.code
        if code is None:
            source, start = self._rest_source(piece, region_block)
            target.copy_(source[start : start + master.count])
        elif not code.fits:
            target.copy_(master.flat)  # see [Note: coded masters]
        elif piece.region_offset is None:
            code.decode_into(code.data, target)
        else:
            assert region_block is not None and self.region is not None
            start = self.region.offset + piece.region_offset
            code.decode_into(region_block.bytes[start : start + code.nbytes], target)

    def _rest_source(
        self, piece: Piece, region_block: Block | None
    ) -> tuple[torch.Tensor, int]:
        master = piece.master
        if piece.region_offset is None:
            return master.flat, 0
        assert region_block is not None and self.region is not None
        dtype = torch.uint8 if master.mixed else master.codec.rest
        start = (self.region.offset + piece.region_offset) // dtype.itemsize
        return region_block.typed(dtype), start

    def write_back(self) -> bool:
        """Copy bound values that were written to since `bind` into their masters.

        Waits for the device, but only if there is something to copy: BatchNorm
        statistics and caches are buffers, which have blocks of their own.

        Returns:
            Whether there was.
        """
        written = False
        for piece in self.pieces:
            for member in piece.master.members:
                written |= piece.master.take_bound(member)
        return written

    def put_to_rest(self) -> None:
        """Point every member at its master again."""
        for piece in self.pieces:
            piece.master.put_to_rest()

    def revision(self) -> int:
        """Look at the masters at rest and count their changes; see `reconcile`."""
        for member in self._members:
            tensor = member.tensor
            moved = tensor.data_ptr() != member.rest_pointer
            if moved or version_of(tensor) != member.version:
                for piece in self.pieces:
                    piece.master.reconcile()
                break
        return self.known_revision()

    def known_revision(self) -> int:
        """Count the changes of the masters that have been noticed so far.

        For a copy that begins before the forward: `revision` looks again then.
        """
        total = 0
        for piece in self.pieces:
            master = piece.master
            if master.code is not None:
                master.renew_code()
            total += master.revision
        return total

    @property
    def can_stay_bound(self) -> bool:
        """Whether a resident is what the forward reads, in the dtype at rest.

        Only then may members point at it between passes: ``.dtype`` stays right.
        """
        return all(
            piece.resident_scratch_offset is None
            and piece.master.codec.resident == piece.master.codec.rest
            and all(member.stays for member in piece.master.members)
            for piece in self.pieces
        )

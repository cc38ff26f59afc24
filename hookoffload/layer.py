"""One layer: its masters, what it needs on the compute device, and its bindings."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import torch

from .alignment import SMALL_TENSOR_BYTES, align
from .copies import Copy
from .device_memory import Block
from .layer_fp8 import put_scales_on, scratch_size, take_scales_off, work_sizes
from .layer_parts import Piece, resident_size
from .layer_values import make_values, scaled_values, where_it_lies
from .master import Master
from .member import Member, are_untouched, bind_members, rest_members
from .ring import Region, RegionRing, RegionStack


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


def is_readable(master: Master, device: torch.device) -> bool:
    """Tell whether a device computes with a master where that waits."""
    return device.type == "cpu" and not master.on_disk


class Layer:
    """The unit that moves: a module's name and the masters that it brings along.

    Geometry (`measure`) depends on where the masters lie and on the compute device;
    everything else is the state of this moment.
    """

    __slots__ = (
        "_device",
        "_members",
        "asked",
        "away",
        "bound",
        "can_stay",
        "cast_bytes",
        "coded_bytes",
        "copied_revision",
        "copy",
        "copy_bytes",
        "disk_bytes",
        "held",
        "home",
        "index",
        "keep",
        "keeps_code",
        "masters",
        "name",
        "pieces",
        "poses",
        "region",
        "resident",
        "resident_bytes",
        "resident_cast_bytes",
        "scales",
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
        self.coded_bytes = 0  # resident and kept coded; 0 if it cannot be
        self.can_stay = False
        # How many running forwards need it: bound at 0 -> 1, released at 1 -> 0.
        self.bound = 0
        self.away = False  # members may point elsewhere than at their masters
        self.held = False  # other layers can run while it is bound
        self.keep = False  # the plan wants it resident
        self.scales = False  # some of it multiplies in 8 bits
        self.resident: list[Block] | None = None
        self.keeps_code = False  # the residence holds what was copied, coded
        self.stays_bound = False  # resident without a cast: bound between passes too
        self.stands_in = False  # an embedding's weight is a stand-in for its table
        self.asked: list[tuple[Master, Member]] = []  # for their device, while at rest
        self.poses = False  # these are up, see [Note: stand-ins]
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
        self.scales = any(master.codec.scaled for master in self.masters)
        scratch, resident_scratch = work_sizes(self.masters)
        self.copy_bytes = self.resident_bytes = self.disk_bytes = 0
        self.can_stay = may_stay
        for master in self.masters:
            codec = master.codec
            readable = is_readable(master, device)
            if readable and not codec.casts_streamed:
                continue
            piece = Piece(master)
            self.pieces.append(piece)
            self.copy_bytes += master.nbytes
            self.disk_bytes += master.nbytes if master.on_disk else 0
            if not readable:
                piece.region_offset = 0  # until all are known
            elif codec.resident == codec.rest and not codec.coded:
                self.can_stay = False  # a second copy beside the master gains nothing
            if codec.casts_streamed:
                piece.scratch_offset = scratch
                scratch += scratch_size(master, codec.rest)
            if codec.casts_resident:
                piece.resident_scratch_offset = resident_scratch
                resident_scratch += scratch_size(master, codec.resident)
            self.resident_bytes += resident_size(master)
        self._members = [m for piece in self.pieces for m in piece.master.members]
        self.stream_bytes = self._place_pieces()
        self.cast_bytes = scratch
        self.resident_cast_bytes = resident_scratch
        self.coded_bytes = self.stream_bytes if self._can_keep_code() else 0

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

    def _can_keep_code(self) -> bool:
        """Tell whether a residence can hold the bytes as they are copied, coded."""
        coded = any(piece.master.code is not None for piece in self.pieces)
        return coded and all(p.is_kept_as_copied(coded=True) for p in self.pieces)

    def residence_bytes(self, piece: Piece) -> int:
        """Return what a piece takes in the residence that the plan wants."""
        return piece.master.nbytes if self.keeps_code else resident_size(piece.master)

    @property
    def has_values(self) -> bool:
        """Whether it is resident, and the residence holds no code."""
        return self.resident is not None and not self.keeps_code

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch that it is cast or decoded into when it is bound now."""
        return self.resident_cast_bytes if self.has_values else self.cast_bytes

    def scratch_offset(self, piece: Piece) -> int | None:
        """Return where a piece's value is made in the scratch when it is bound now."""
        if self.has_values:
            return piece.resident_scratch_offset
        return piece.scratch_offset

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
    def is_kept_as_copied(self) -> bool:
        """Whether a resident that is not kept coded holds the bytes as they come."""
        return all(piece.is_kept_as_copied(coded=False) for piece in self.pieces)

    @property
    def copies_into_residence(self) -> bool:
        """Whether the residence holds the bytes as they come."""
        return self.keeps_code or self.is_kept_as_copied

    def bind(self, region_block: Block | None) -> None:
        """Point every member at its value on the compute device.

        Casts and decoders run on the stream that is current, from the region or the
        resident block into the scratch.
        """
        found = where_it_lies(self, region_block)
        if self.scales:
            values = [*scaled_values(self, found), *found.values]
            take_scales_off(self)
            bind_members(values)
            put_scales_on(self)
            return
        if self.scratch is not None:
            bind_members(make_values(self, found))
        bind_members(found.values)

    def write_back(self) -> bool:
        """Copy bound values that were written to since `bind` into their masters.

        Waits for the device, but only if there is something to copy: BatchNorm
        statistics and caches are buffers, which have blocks of their own.

        Returns:
            Whether there was.
        """
        if not self.scales and are_untouched(self._members, bound=True):
            return False
        written = False
        for piece in self.pieces:
            for member in piece.master.members:
                written |= piece.master.take_bound(member)
        return written

    def put_to_rest(self) -> None:
        """Point every member at its master again."""
        if self.scales:
            take_scales_off(self)
        for piece in self.pieces:  # some may have been parted from their masters
            rest_members(piece.master.members)

    def revision(self, before_writing: Callable[[], None] | None = None) -> int:
        """Look at the masters at rest and count their changes; see `reconcile`.

        Args:
            before_writing: called before anything is written that copies read.
        """
        if not are_untouched(self._members, bound=False):
            if before_writing is not None:
                before_writing()
            for piece in self.pieces:
                piece.master.reconcile()
        return self.known_revision(before_writing)

    def known_revision(self, before_writing: Callable[[], None] | None = None) -> int:
        """Count the changes of the masters that have been noticed so far.

        For a copy that begins before the forward: `revision` looks again then.
        """
        total = 0
        for piece in self.pieces:
            master = piece.master
            if master.has_old_code:
                if before_writing is not None:
                    before_writing()
                master.renew_code()
            total += master.revision
        return total

    @property
    def can_stay_bound(self) -> bool:
        """Whether a resident is what the forward reads, in the dtype at rest.

        Only then may members point at it between passes: ``.dtype`` stays right. Where
        peft merges between passes, base and adapters must lie on one device.
        """
        return not self.keeps_code and all(
            piece.resident_scratch_offset is None
            and not piece.master.codec.scaled
            and piece.master.codec.resident == piece.master.codec.rest
            and all(m.stays and not m.merges for m in piece.master.members)
            for piece in self.pieces
        )

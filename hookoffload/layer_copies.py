"""Layers' bytes on their way: where they go, when, and what is copied ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from .alignment import align
from .copies import Copy
from .copy_engine import make_copy_engine
from .device_memory import DeviceMemory
from .layer import Layer
from .layer_values import as_copied, fill_residence, views_in
from .moves import Moves
from .order import ExecutionOrder
from .profiler_ranges import profiler_range
from .recorder import Recorder
from .tiers import staging_bytes
from .window import Window

logger = logging.getLogger(__name__)

# Residents on their way that nothing computes with yet: enough to keep the link busy.
_RESIDENT_BYTES_UNDER_WAY = 512 * 2**20


class Counters:
    """What has happened since attach."""

    __slots__ = (
        "bytes_moved",
        "bytes_read",
        "bytes_written_back",
        "forwards",
        "hits",
        "misses",
    )

    def __init__(self) -> None:
        self.forwards = 0
        self.bytes_moved = 0
        self.bytes_read = 0
        self.bytes_written_back = 0
        self.hits = 0
        self.misses = 0


class LayerCopies:
    """Copies layers to their places in the window or their residences.

    Args:
        memory: the compute device's.
        poison: overwrite released memory, to find late readers.

    Attributes:
        order: the sequence in which layers are expected.
        beside_bytes: what the plan leaves free for activations; None without a plan.
        make_room_for: asked to give up residents until so many bytes fit the limit.
    """

    def __init__(self, memory: DeviceMemory, *, poison: bool) -> None:
        self.memory = memory
        self.engine = make_copy_engine(memory.device)
        self.window = Window(memory, self.engine, poison=poison)
        self.counters = Counters()
        self.layers: Sequence[Layer] = ()
        self.order = ExecutionOrder(())
        self.recorder: Recorder | None = None
        self.host_limit_bytes: int | None = None
        self.beside_bytes: int | None = None
        self.make_room_for: Callable[[int], None] = _make_none
        self._under_way = 0  # bytes of residents whose copy nobody has waited for
        self._expected: tuple[int, ...] | None = None  # the order that is read ahead in

    def set_layers(self, layers: Sequence[Layer], order: ExecutionOrder) -> None:
        """Take other layers; those before must have been dropped."""
        self.layers = layers
        self.order = order

    def bring(self, layer: Layer, *, aside: bool) -> None:
        """Have the layer's bytes in its region or residence, current and ready.

        Args:
            layer: the layer.
            aside: see `LayerMover.bind`.
        """
        # Of an earlier forward, too: the host runs ahead of the device.
        revision = layer.revision(self.engine.drain)
        current = layer.copied_revision == revision
        if layer.copy is None and layer.resident is not None and current:
            return
        if layer.copy is not None and not current:
            self.cancel(layer)  # edited at rest after the copy had begun
        if layer.copy is None:
            self.counters.misses += bool(layer.stream_bytes)
            if self.recorder is not None and layer.stream_bytes:
                self.recorder.looked_for(layer.name, hit=False)
            self.start(layer, now=True, aside=aside)
        else:
            self.counters.hits += 1
            if self.recorder is not None:
                self.recorder.looked_for(layer.name, hit=True)
        if layer.copy is not None:
            self._finish(layer)
        if layer.resident is not None and not layer.copies_into_residence:
            layer.copied_revision = -1  # until `fill`

    def fill(self, layer: Layer) -> None:
        """Cast or decode what was brought for a resident, which has its scratch now."""
        if layer.resident is None or layer.is_filled:
            return
        found = as_copied(layer, self.window.block_of(layer))
        fill_residence(layer, layer.resident, found)
        self.engine.note_filled()
        layer.copied_revision = layer.known_revision()  # `bring` has looked
        self.window.release(layer)

    def _finish(self, layer: Layer) -> None:
        copy = layer.copy
        assert copy is not None
        try:
            with profiler_range("wait", layer.name):
                self.engine.wait(copy)
        except BaseException:
            self.cancel(layer)
            raise
        self.counters.bytes_moved += copy.nbytes
        self.counters.bytes_read += layer.disk_bytes
        if self.recorder is not None:
            self.recorder.copied(layer.name, copy.nbytes)
        if layer.resident is not None and layer.region is None:
            self._under_way -= copy.nbytes
            self.engine.note_filled()
        layer.copy = None

    def start(self, layer: Layer, *, now: bool, aside: bool = False) -> bool:
        """Begin to copy a layer.

        Args:
            layer: at rest, nothing under way.
            now: it is needed at once: make room, whatever else must go.
            aside: see `bind`.

        Returns:
            Whether it was begun; False only if there was no room.
        """
        streams = layer.resident is None or not layer.copies_into_residence
        # The same places in each pass, so that nothing has to be made anew for them.
        first = not now and layer.index == self.order.first
        if not now and streams and not self.window.has_room(layer, first=first):
            return False  # as half of all attempts to go on with copying
        # If it is needed now, `bring` has looked.
        revision = layer.known_revision(self.engine.drain)
        tokens: tuple[object, ...] = ()
        moves: Moves | None = None
        if not streams:
            assert layer.resident is not None
            if layer.is_filled:
                self.engine.fence()  # forwards under way may still read what was there
            pieces = [
                (piece.master, block.bytes[: piece.master.nbytes])
                for piece, block in zip(layer.pieces, layer.resident, strict=True)
            ]
            self._under_way += layer.copy_bytes
        elif not layer.stream_bytes:
            layer.copied_revision = revision
            return True  # the compute device reads it where it rests, and casts
        else:
            found = self._room(layer, now=now, aside=aside, first=first)
            if found is None:
                return False
            tokens = found
            block = self.window.block_of(layer)
            assert block is not None, "a layer with a place is in a block"
            views = views_in(layer, block)
            pieces, moves = views.targets, views.moves()
        copy = Copy(layer.name, pieces, layer.copy_bytes, tokens, moves)
        if self.recorder is not None:
            copy.entry = self.recorder.copy_queued(layer.name, copy.nbytes)
        # Started first: nothing waits for a copy that an interrupt kept from starting.
        self.engine.start(copy)
        layer.copy = copy
        layer.copied_revision = revision
        return True

    def _room(
        self, layer: Layer, *, now: bool, aside: bool, first: bool
    ) -> tuple[object, ...] | None:
        """Give the layer a place; None if there is none and it can wait."""
        window, size = self.window, layer.stream_bytes
        aside = aside and self.memory.budget.fits(align(size))
        fits = window.can_hold(layer) and not aside
        tokens = window.take(layer, first=first) if fits else None
        if tokens is None and not now:
            return None
        if tokens is None and fits and not self._has_spare(size):
            self.cancel_prefetches()
            tokens = window.take(layer)
        if tokens is None:
            # More layers are in use at once than the plan knows of: nothing that is
            # in use can go, so the window grows by this one, if the limit allows.
            logger.info("%s is needed beside the layers of the plan", layer.name)
            self.make_room_for(size)
            tokens = window.take_own(layer)
        return tokens

    def _has_spare(self, nbytes: int) -> bool:
        """Tell whether the limit has room beside the plan.

        The first pass follows a guess. What it asks for out of turn is better brought
        into memory of its own than in place of copies that will be needed as well.
        """
        limit = self.memory.budget.limit_bytes
        if limit is None or self.beside_bytes is None:
            return self.beside_bytes is not None and self.memory.device.type != "cpu"
        beside = self.memory.budget.total_used + self.beside_bytes
        return beside + align(nbytes) <= limit

    # -- prefetch -------------------------------------------------------------------

    def prefetch(self) -> None:
        """Start copying the next layers of the order that now fit."""
        layers, order = self.layers, self.order
        if order.sequence is not self._expected:
            self._expect(order.sequence)
        settling = True
        for index in order.unsettled():
            layer = layers[index]
            if layer.bound:
                settling = False  # whether it is needed again is seen when it is free
                continue
            if not self._is_ahead(layer):
                resident = layer.resident is not None
                if resident and self._under_way > _RESIDENT_BYTES_UNDER_WAY:
                    return
                if not self.start(layer, now=False):
                    return
            settling = settling and order.settle(index)

    def _expect(self, sequence: tuple[int, ...]) -> None:
        """Tell the engine what streams from files, so that it reads ahead."""
        coming = []
        for index in sequence:
            layer = self.layers[index]
            waiting = tuple(
                piece.master
                for piece in layer.pieces
                if piece.region_offset is not None and not piece.master.pinned
            )
            stays = layer.resident is not None
            if waiting and layer.stream_bytes and not (stays and layer.is_filled):
                coming.append((waiting, stays))
        sizes = [sum(master.nbytes for master in masters) for masters, _ in coming]
        largest, total = max(sizes, default=0), sum(sizes)
        self.engine.expect(coming, staging_bytes(largest, total, self.host_limit_bytes))
        self._expected = sequence

    def _is_ahead(self, layer: Layer) -> bool:
        """Tell whether there is nothing to start for a layer before its forward."""
        if layer.copy is not None or layer.stays_bound:
            return True
        if layer.resident is not None:
            return layer.copied_revision >= 0 or not layer.copies_into_residence
        # Where a held layer goes is not known beforehand.
        return not layer.stream_bytes or layer.held

    def cancel_prefetches(self) -> None:
        """Give up copies that no forward has asked for yet."""
        for layer in self.layers:
            if layer.copy is not None and not layer.bound:
                self.cancel(layer)

    def cancel(self, layer: Layer) -> None:
        """Give up a layer's copy and the place that it had for it."""
        copy = layer.copy
        assert copy is not None
        self.order.unsettle()
        if copy.queued is not None and not copy.is_left_behind:
            copy.queued.wait()
        layer.copy = None
        layer.copied_revision = -1
        if layer.region is None:
            self._under_way -= copy.nbytes
            return
        self.window.give_up(layer, copy)

    def replan(self, beside_bytes: int) -> None:
        """Begin to follow a plan that leaves so much for activations."""
        self.engine.fence()
        self.order.unsettle()
        self.beside_bytes = beside_bytes
        self._expected = None  # others stream than before

    def stop(self) -> None:
        """Read nothing ahead any more; return when no copy is under way."""
        self._expected = None
        self.engine.expect((), 0)
        self.engine.drain()

    def settle(self) -> None:
        """Begin anew: every layer rests, and nothing is on its way."""
        self._under_way = 0
        self.beside_bytes = None


def _make_none(nbytes: int) -> None:
    """Make no room."""

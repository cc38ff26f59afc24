"""Layers to the compute device and back: window, residents, prefetch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from .alignment import align
from .budget import MemoryBudget
from .copies import Copy
from .copy_engine import make_copy_engine
from .device_memory import Block, DeviceMemory
from .layer import Layer, resident_dtype
from .moves import Move
from .order import ExecutionOrder
from .planner import Plan
from .profiler_ranges import LayerRanges, profiler_range
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


class LayerMover:
    """Binds layers for their forwards and keeps the copies ahead of them.

    Args:
        device: the compute device.
        budget: the accountant.
        poison: overwrite released memory, to find late readers.
    """

    def __init__(
        self, device: torch.device, budget: MemoryBudget, *, poison: bool = False
    ) -> None:
        self.device = device
        self.memory = DeviceMemory(device, budget)
        self.engine = make_copy_engine(device)
        self.counters = Counters()
        self.layers: Sequence[Layer] = ()
        self.order = ExecutionOrder(())
        self.plan: Plan | None = None
        self.recorder: Recorder | None = None
        self.on_evict: Callable[[Layer], None] | None = None
        # Asked to have other models give way, so that so many bytes fit.
        self.ask_others: Callable[[int], None] | None = None
        self._ranges = LayerRanges()
        self.window = Window(self.memory, self.engine, poison=poison)
        self.reached_bytes = 0  # taken when `apply` last ran out of memory
        self._under_way = 0  # bytes of residents whose copy nobody has waited for
        self.host_limit_bytes: int | None = None
        self._expected: tuple[int, ...] | None = None  # the order that is read ahead in

    # -- plan -----------------------------------------------------------------------

    def set_layers(self, layers: Sequence[Layer], predicted: Sequence[int]) -> None:
        """Take other layers; those before must have been dropped."""
        self.layers = layers
        names = [layer.name for layer in layers]
        self.order = ExecutionOrder(predicted, names)
        self.plan = None

    def expect_order(self, seen: Sequence[int]) -> None:
        """Expect the layers as a pass has been seen to ask for them."""
        self.order = ExecutionOrder(seen)

    def apply(self, plan: Plan) -> None:
        """Make memory what the plan says: give up first, take second.

        Raises:
            BudgetExceededError: It does not fit; then nothing is resident or taken.
        """
        if plan == self.plan:
            return
        self.cancel_prefetches()
        for layer in self.layers:
            layer.keep = layer.index in plan.resident
            if not layer.keep and layer.resident is not None:
                self.evict(layer)
        try:
            self.window.resize(plan)
            for layer in self.layers:
                if layer.keep and layer.resident is None and layer.pieces:
                    layer.resident = self._residence(layer)
                    layer.copied_revision = -1
        except BaseException:
            self.reached_bytes = self.memory.budget.used
            self.drop_all()
            raise
        self.engine.fence()
        self.order.unsettle()
        self.plan = plan
        self._expected = None  # others stream than before

    def _residence(self, layer: Layer) -> list[Block]:
        blocks: list[Block] = []
        try:
            for piece in layer.pieces:
                size = piece.master.count * resident_dtype(piece.master).itemsize
                blocks.append(self.memory.allocate("residents", size, layer.name))
        except BaseException:
            for block in blocks:
                self.memory.free(block)
            raise
        return blocks

    # -- bind and release -----------------------------------------------------------

    def bind(self, layer: Layer, *, aside: bool = False) -> None:
        """Make a layer usable by what the current stream computes from now on.

        Args:
            layer: the layer.
            aside: it may stay bound for long while others come and go: it gets memory
                of its own if the limit allows, so that it does not cut up the window.
        """
        if layer.bound:
            layer.bound += 1
            return
        self.order.visit(layer.index)
        if not layer.stays_bound and layer.pieces:
            layer.away = True  # first: an interrupt leaves some members bound
            self._bring(layer, aside=aside)
            self._take_scratch(layer)
            if torch.is_inference_mode_enabled():
                # Views made inside it would take their versions from the tensors.
                with torch.inference_mode(False):
                    layer.bind(self.window.block_of(layer))
            else:
                layer.bind(self.window.block_of(layer))
        layer.bound = 1
        self._ranges.begin(layer.name)
        if self.recorder is not None:
            self.recorder.bound(layer.name)

    def release(self, layer: Layer) -> None:
        """Undo one `bind`; at the last, swap back to the masters and go on copying."""
        layer.bound -= 1
        if not layer.bound:
            self._ranges.end(layer.name)
            if self.recorder is not None:
                self.recorder.released(layer.name)
        if layer.bound or layer.stays_bound or not layer.pieces:
            return
        if layer.resident is not None and layer.can_stay_bound:
            layer.stays_bound = True
        else:
            self._unbind(layer)
        self.prefetch()

    def _bring(self, layer: Layer, *, aside: bool) -> None:
        """Have the layer's bytes in its region or residence, current and ready."""
        revision = layer.revision()
        current = layer.copied_revision == revision
        if layer.copy is None and layer.resident is not None and current:
            return
        if layer.copy is not None and not current:
            self._cancel(layer)  # edited at rest after the copy had begun
        if layer.copy is None:
            self.counters.misses += bool(layer.stream_bytes)
            if self.recorder is not None and layer.stream_bytes:
                self.recorder.looked_for(layer.name, hit=False)
            self._start(layer, now=True, aside=aside)
        else:
            self.counters.hits += 1
            if self.recorder is not None:
                self.recorder.looked_for(layer.name, hit=True)
        if layer.copy is not None:
            self._finish(layer)
        if layer.resident is not None and not layer.copies_into_residence:
            layer.fill_residence(layer.resident, self.window.block_of(layer))
            layer.copied_revision = revision
            self.window.release(layer)

    def _finish(self, layer: Layer) -> None:
        copy = layer.copy
        assert copy is not None
        try:
            with profiler_range("wait", layer.name):
                self.engine.wait(copy)
        except BaseException:
            self._cancel(layer)
            raise
        self.counters.bytes_moved += copy.nbytes
        self.counters.bytes_read += layer.disk_bytes
        if self.recorder is not None:
            self.recorder.copied(layer.name, copy.nbytes)
        if layer.resident is not None and layer.region is None:
            self._under_way -= copy.nbytes
        layer.copy = None

    def _start(self, layer: Layer, *, now: bool, aside: bool = False) -> bool:
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
        revision = layer.revision()
        tokens: tuple[object, ...] = ()
        moves: Callable[[], list[Move]] | None = None
        if not streams:
            assert layer.resident is not None
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
            views = layer.views_in(block)
            pieces, moves = views.targets, views.moves
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
            self._make_room_for(size)
            tokens = window.take_own(layer)
        return tokens

    def _has_spare(self, nbytes: int) -> bool:
        """Tell whether the limit has room beside the plan.

        The first pass follows a guess. What it asks for out of turn is better brought
        into memory of its own than in place of copies that will be needed as well.
        """
        limit, plan = self.memory.budget.limit_bytes, self.plan
        if limit is None or plan is None:
            return plan is not None and self.device.type != "cpu"
        beside = self.memory.budget.total_used + plan.activation_bytes
        return beside + align(nbytes) <= limit

    def _take_scratch(self, layer: Layer) -> None:
        resident = layer.resident is not None
        size = layer.resident_cast_bytes if resident else layer.cast_bytes
        if not size or self.window.take_scratch(layer, size):
            return
        try:  # more is in use at once than the plan knows of, as in `_room`
            self._make_room_for(size)
            self.window.take_own_scratch(layer, size)
        except BaseException:
            self.window.release(layer)
            raise

    def _make_room_for(self, nbytes: int) -> None:
        """Give up residents that are not in use until so many bytes fit the limit."""
        if self.ask_others is not None:
            self.ask_others(align(nbytes))
        for layer in self.layers:
            if self.memory.budget.fits(align(nbytes)):
                return
            if layer.resident is not None and not layer.bound:
                layer.keep = False
                self.evict(layer)

    def _unbind(self, layer: Layer) -> None:
        """Swap a bound layer back to its masters and free what it used."""
        if layer.write_back():
            self.counters.bytes_written_back += layer.copy_bytes
            layer.copied_revision = -1
        layer.put_to_rest()
        layer.stays_bound = False
        self.window.release_scratch(layer)
        self.window.release(layer)
        layer.away = False

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
                if not self._start(layer, now=False):
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
                self._cancel(layer)

    def _cancel(self, layer: Layer) -> None:
        copy = layer.copy
        assert copy is not None
        self.order.unsettle()
        if copy.queued is not None:
            copy.queued.wait()
        layer.copy = None
        layer.copied_revision = -1
        if layer.region is None:
            self._under_way -= copy.nbytes
            return
        self.window.give_up(layer, copy)

    # -- giving up ------------------------------------------------------------------

    def evict(self, layer: Layer) -> None:
        """Make a resident layer rest again; what was written to it is kept."""
        if self.on_evict is not None:
            self.on_evict(layer)
        self.order.unsettle()
        if layer.copy is not None:
            self._cancel(layer)
        if layer.stays_bound and not layer.bound:
            self._unbind(layer)
        self.engine.drain()  # a cancelled copy may still be running into its blocks
        for block in layer.resident or ():
            self.memory.free(block)
        layer.resident = None
        layer.copied_revision = -1

    @property
    def in_use(self) -> bool:
        """Whether some layer is bound for a forward."""
        return any(layer.bound for layer in self.layers)

    def free_window(self) -> None:
        """Give back what streamed layers pass through; nothing may be in use."""
        for layer in self.layers:
            if layer.copy is not None and layer.region is not None:
                self._cancel(layer)
        self.window.free()
        self.plan = None

    def give_up_residents(self, enough: Callable[[], bool]) -> None:
        """Make residents rest that are not in use, those that are needed last first.

        Args:
            enough: says whether to stop.
        """
        last_first = list(dict.fromkeys(self.order.whole))[::-1]
        absent = set(range(len(self.layers))).difference(last_first)
        for index in (*absent, *last_first):
            if enough():
                return
            layer = self.layers[index]
            if layer.resident is not None and not layer.bound:
                layer.keep = False
                self.evict(layer)

    def sync(self, layer: Layer) -> None:
        """Bring what was written to a resident into its masters."""
        if layer.stays_bound:
            if layer.write_back():
                self.evict(layer)  # it may have been given other data than its blocks
                self.plan = None  # so that the next pass makes it resident again
        elif not layer.bound and not layer.stands_in:
            for master in layer.masters:
                master.reconcile(lenient=True)

    def drop_all(self) -> None:
        """Put every layer to rest and give all memory back, from whatever state.

        Used by offload, by detach and behind an interrupted pass; a layer that is
        bound at that moment counts as released.
        """
        self.plan = None  # first: what an interrupt leaves half done is done again
        self._expected = None
        self.engine.expect((), 0)
        self._ranges.forget()
        self.engine.drain()
        for layer in self.layers:
            if layer.copy is not None:
                self._cancel(layer)
            if layer.stands_in:
                layer.put_to_rest()
                layer.stands_in = False
            layer.bound = 0
            if layer.away:
                if layer.stays_bound and self.on_evict is not None:
                    self.on_evict(layer)  # its hooks hang before it rests
                self._unbind(layer)
            # An interrupt may have fallen between two steps.
            self.window.release_scratch(layer)
            self.window.release(layer)
            if layer.resident is not None:
                self.evict(layer)
            layer.keep = False
        self.window.free()
        self._under_way = 0
        self.plan = None
        self.memory.settle()

    def close(self) -> None:
        """End the engine's thread."""
        self.engine.close()

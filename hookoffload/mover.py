"""Layers to the compute device and back: bound, released, resident, given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .alignment import align
from .budget import MemoryBudget
from .device_memory import UNUSED_BYTES, Block, DeviceMemory
from .layer import Layer
from .layer_copies import LayerCopies
from .order import ExecutionOrder
from .plan import Plan
from .profiler_ranges import LayerRanges
from .recorder import Recorder
from .stand_ins import StandIns


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
        self.memory = DeviceMemory(device, budget)
        self.copies = LayerCopies(self.memory, poison=poison)
        self.copies.make_room_for = self._make_room_for
        self.engine = self.copies.engine
        self.window = self.copies.window
        self.counters = self.copies.counters
        self.stand_ins = StandIns(device)
        self.layers: Sequence[Layer] = ()
        self.plan: Plan | None = None
        self.on_evict: Callable[[Layer], None] | None = None
        # Asked to have other models give way, so that so many bytes fit.
        self.ask_others: Callable[[int], None] | None = None
        self._ranges = LayerRanges()
        self._beyond_plan = False  # a pass took more at once than the plan knows of
        self._gave_way = False  # so that residents are missing
        self.reached_bytes = 0  # taken when `apply` last ran out of memory

    @property
    def order(self) -> ExecutionOrder:
        """The sequence in which layers are expected."""
        return self.copies.order

    @property
    def recorder(self) -> Recorder | None:
        """Who is told what happens."""
        return self.copies.recorder

    # -- plan -----------------------------------------------------------------------

    def set_layers(self, layers: Sequence[Layer], predicted: Sequence[int]) -> None:
        """Take other layers; those before must have been dropped."""
        self.layers = layers
        self.stand_ins.set_layers(layers)
        names = [layer.name for layer in layers]
        self.copies.set_layers(layers, ExecutionOrder(predicted, names))
        self.plan = None

    def expect_order(self, seen: Sequence[int]) -> None:
        """Expect the layers as a pass has been seen to ask for them."""
        self.copies.set_layers(self.layers, ExecutionOrder(seen))

    def apply(self, plan: Plan, most: int | None = None) -> bool:
        """Make memory what the plan says: give up first, take second.

        Args:
            plan: the plan.
            most: bytes that PyTorch's allocator may hold; None: nobody counts them.

        Returns:
            Whether all of it is there; if not, blocks took more than their bytes, and
            there must be another plan.

        Raises:
            BudgetExceededError: It does not fit; then nothing is resident or taken.
        """
        if plan == self.plan and not self._can_take_back():
            return True
        self.copies.cancel_prefetches()
        for layer in self.layers:
            layer.keep = layer.index in plan.resident
            stays = layer.keep and layer.keeps_code == (layer.index in plan.kept_coded)
            if layer.resident is not None and not stays:
                self.evict(layer)
        try:
            self.window.resize(plan)
            self.memory.return_unused()
            taken = 0
            for layer in self.layers:
                if layer.keep and layer.resident is None and layer.pieces:
                    coded = layer.index in plan.kept_coded
                    nbytes = layer.coded_bytes if coded else layer.resident_bytes
                    if most is not None and not self._fits(nbytes, most):
                        self.plan = None
                        return False
                    taken += nbytes
                    if taken > UNUSED_BYTES:
                        self.memory.return_unused()
                        taken = 0
                    layer.keeps_code = coded
                    layer.resident = self._residence(layer)
                    layer.copied_revision = -1
        except BaseException:
            self.reached_bytes = self.memory.budget.used
            self.drop_all()
            raise
        self.copies.replan(plan.activation_bytes)
        self.plan = plan
        self._gave_way = False
        return True

    def _can_take_back(self) -> bool:
        """Tell whether residents gave way, and the last pass would not have asked."""
        beyond, self._beyond_plan = self._beyond_plan, False
        return self._gave_way and not beyond

    def _fits(self, nbytes: int, most: int) -> bool:
        return (self.memory.allocated_bytes() or 0) + nbytes <= most

    def _residence(self, layer: Layer) -> list[Block]:
        blocks: list[Block] = []
        try:
            for piece in layer.pieces:
                size = layer.residence_bytes(piece)
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
            self.stand_ins.require_unwritten(layer)
            layer.away = True  # first: an interrupt leaves some members bound
            self.stand_ins.drop(layer)
            self.copies.bring(layer, aside=aside)
            self._take_scratch(layer)
            self.copies.fill(layer)
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
        self.copies.prefetch()

    def _take_scratch(self, layer: Layer) -> None:
        size = layer.scratch_bytes
        if not size or self.window.take_scratch(layer, size):
            return
        try:  # more is in use at once than the plan knows of, as in `LayerCopies._room`
            self._make_room_for(size, keep=layer)
            self.window.take_own_scratch(layer, size)
        except BaseException:
            self.window.release(layer)
            raise

    def _make_room_for(self, nbytes: int, keep: Layer | None = None) -> None:
        """Give up residents that are not in use until so many bytes fit the limit.

        Args:
            nbytes: the bytes.
            keep: is about to be bound.
        """
        self._beyond_plan = True
        if self.ask_others is not None:
            self.ask_others(align(nbytes))
        for layer in self.layers:
            if self.memory.budget.fits(align(nbytes)):
                return
            if layer.resident is not None and not layer.bound and layer is not keep:
                self._gave_way = True
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
        self.stand_ins.put_up(layer)

    # -- giving up ------------------------------------------------------------------

    def unbind_resident(self, layer: Layer) -> None:
        """Have a resident rest that is bound between passes; its copy stays current."""
        if self.on_evict is not None:
            self.on_evict(layer)
        self._unbind(layer)

    def evict(self, layer: Layer) -> None:
        """Make a resident layer rest again; what was written to it is kept."""
        if self.on_evict is not None:
            self.on_evict(layer)
        self.order.unsettle()
        if layer.copy is not None:
            self.copies.cancel(layer)
        if layer.stays_bound and not layer.bound:
            self._unbind(layer)
        self.engine.drain()  # a cancelled copy may still be running into its blocks
        for block in layer.resident or ():
            self.memory.free(block)
        layer.resident = None
        layer.keeps_code = False
        layer.copied_revision = -1

    @property
    def in_use(self) -> bool:
        """Whether some layer is bound for a forward."""
        return any(layer.bound for layer in self.layers)

    def free_window(self) -> None:
        """Give back what streamed layers pass through; nothing may be in use."""
        for layer in self.layers:
            if layer.copy is not None and layer.region is not None:
                self.copies.cancel(layer)
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
        self.stand_ins.end()
        self._ranges.forget()
        self.copies.stop()
        for layer in self.layers:
            if layer.copy is not None:
                self.copies.cancel(layer)
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
        self.copies.settle()
        self.plan = None
        self.memory.settle()

    def close(self) -> None:
        """End the engine's thread."""
        self.engine.close()

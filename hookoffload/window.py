"""The window: the memory that streamed layers pass through, and that casts are made in.

[Note: places in the window]
Layers that run one behind the other pass through the ring, first in first out. Those
during whose forward others pass (held ones) have the stack. Cast values live in the
scratch, a stack as well. What finds no place there has a block of its own for as long
as it is bound.

A place is the layer's from `take` to `release`. Its bytes are the copy stream's until
the copy is ready and the compute stream's from then on; the token that `release` leaves
there says when the latter is done, and the next owner's copy waits for it.
"""

from __future__ import annotations

from .alignment import ALIGNMENT
from .copies import POISON, Copy, CopyEngine
from .device_memory import Block, DeviceMemory
from .layer import Layer
from .plan import Plan
from .ring import Region, RegionRing, RegionStack

Tokens = tuple[object, ...]


class Window:
    """Gives layers their places in the compute device's memory.

    Args:
        memory: the compute device's.
        engine: what copies into it.
        poison: overwrite released memory, to find late readers.
    """

    def __init__(
        self, memory: DeviceMemory, engine: CopyEngine, *, poison: bool
    ) -> None:
        self._memory = memory
        self._engine = engine
        self._poison = poison
        self._ring_block: Block | None = None
        self._ring = RegionRing(0)
        self._stack_block: Block | None = None
        self._stack = RegionStack(0)
        self._scratch_block: Block | None = None
        self._scratch = RegionStack(0)

    def resize(self, plan: Plan) -> None:
        """Have the sizes that a plan says; no layer may have a place.

        Raises:
            BudgetExceededError: They do not fit the limit.
        """
        # Regions are aligned: what is left over behind the last would never be used.
        ring_bytes = plan.ring_bytes // ALIGNMENT * ALIGNMENT
        have = (self._ring.capacity, self._stack.capacity, self._scratch.capacity)
        want = (ring_bytes, plan.stack_bytes, plan.scratch_bytes)
        if have == want and any(want):
            return
        self.free()
        self._ring, self._stack, self._scratch = (
            RegionRing(want[0]),
            RegionStack(want[1]),
            RegionStack(want[2]),
        )
        # One by one: an interrupt must leave none that nobody knows of.
        self._ring_block = self._allocate("window", want[0])
        self._stack_block = self._allocate("window", want[1])
        self._scratch_block = self._allocate("casts", want[2])

    def _allocate(self, kind: str, nbytes: int) -> Block | None:
        return self._memory.allocate(kind, nbytes) if nbytes else None

    def free(self) -> None:
        """Give the memory back, before anything is taken instead of it."""
        # Copies that were cancelled may still be running into them.
        self._engine.drain()
        ring, stack, scratch = RegionRing(0), RegionStack(0), RegionStack(0)
        self._ring, self._stack, self._scratch = ring, stack, scratch
        # Known until they are given back: an interrupt leaves the rest to the next try.
        for block in (self._ring_block, self._stack_block, self._scratch_block):
            if block is not None:
                self._memory.free(block)
        self._ring_block = self._stack_block = self._scratch_block = None

    # -- regions --------------------------------------------------------------------

    def can_hold(self, layer: Layer) -> bool:
        """Tell whether a layer could have a place here if nothing else had one."""
        return layer.stream_bytes <= self._home_of(layer).capacity

    def has_room(self, layer: Layer, *, first: bool = False) -> bool:
        """Tell whether `take` would give a layer a place now."""
        home, size = self._home_of(layer), layer.stream_bytes
        if isinstance(home, RegionRing):
            return home.has_room(size, at_start=first)
        return home.has_room(size)

    def take(self, layer: Layer, *, first: bool = False) -> Tokens | None:
        """Give a layer its place; None if there is none now.

        Args:
            layer: the layer.
            first: a pass begins with it: the ring begins anew.

        Returns:
            What its copy has to wait for.
        """
        home, size = self._home_of(layer), layer.stream_bytes
        if isinstance(home, RegionRing):
            found = home.allocate(size, at_start=first)
        else:
            found = home.push(size)
        if found is None:
            return None
        layer.home = home
        layer.region = found[0]
        return found[1]

    def take_own(self, layer: Layer) -> Tokens:
        """Give a layer memory of its own.

        Raises:
            BudgetExceededError: It does not fit the limit.
        """
        size = layer.stream_bytes
        layer.home = self._memory.allocate("window", size, layer.name)
        self._engine.fence()
        layer.region = Region(0, size)
        return ()

    def block_of(self, layer: Layer) -> Block | None:
        """Return the block in which a layer's region is."""
        if isinstance(layer.home, Block):
            return layer.home
        return self._stack_block if layer.held else self._ring_block

    def release(self, layer: Layer) -> None:
        """Take a layer's place back behind its forward, if it has one."""
        region, home = layer.region, layer.home
        if region is None:
            return
        block = self.block_of(layer)
        layer.region = layer.home = None
        token = self._engine.done()
        if self._poison and block is not None and home is not block:
            used = block.bytes[region.offset : region.offset + region.nbytes]
            self._engine.poison(used, token)
        if isinstance(home, Block):
            self._memory.free(home)
        else:
            _give_back(home, region, token)

    def give_up(self, layer: Layer, copy: Copy) -> None:
        """Take a layer's place back whose copy nobody wants any more."""
        region, home = layer.region, layer.home
        assert region is not None, "a copy into a residence has no place here"
        layer.region = layer.home = None
        if isinstance(home, Block):
            self._engine.drain()
            self._memory.free(home)
        else:
            # The next owner's copy is behind this one on the copy stream.
            _give_back(home, region, copy.ready)

    def _home_of(self, layer: Layer) -> RegionRing | RegionStack:
        return self._stack if layer.held else self._ring

    # -- scratch --------------------------------------------------------------------

    def take_scratch(self, layer: Layer, size: int) -> bool:
        """Give a layer room to cast into; False if there is none."""
        pushed = self._scratch.push(size) if size <= self._scratch.capacity else None
        if pushed is None:
            return False
        layer.scratch, tokens = pushed
        layer.scratch_block = self._scratch_block
        self._engine.order_after(tokens)
        return True

    def take_own_scratch(self, layer: Layer, size: int) -> None:
        """Give a layer memory of its own to cast into.

        Raises:
            BudgetExceededError: It does not fit the limit.
        """
        layer.scratch_block = self._memory.allocate("casts", size, layer.name)
        layer.scratch = Region(0, size)

    def release_scratch(self, layer: Layer) -> None:
        """Take the room for casts back, if the layer has some."""
        region, block = layer.scratch, layer.scratch_block
        if region is None or block is None:
            return
        layer.scratch = layer.scratch_block = None
        if self._poison:  # it is the compute stream's alone
            block.bytes[region.offset : region.offset + region.nbytes].fill_(POISON)
        if block is self._scratch_block:
            self._scratch.pop(region, self._engine.computed())
        else:
            self._memory.free(block)


def _give_back(
    home: RegionRing | RegionStack | None, region: Region, token: object | None
) -> None:
    if isinstance(home, RegionRing):
        home.free(region, token)
    elif home is not None:
        home.pop(region, token)

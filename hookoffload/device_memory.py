"""Every byte that the library takes on the compute device: blocks under one budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from .alignment import align
from .budget import MemoryBudget


class Block:
    """A piece of device memory and its views, one a dtype.

    Attributes:
        kept: what a layer made of its places in the block, by layer and place. Here,
            so that nothing keeps the memory when the block goes.
    """

    __slots__ = ("_typed", "bytes", "end", "kept", "kind", "start")

    def __init__(self, memory: torch.Tensor, kind: str) -> None:
        self.bytes = memory
        self.kind = kind
        self.start = memory.data_ptr()
        self.end = self.start + memory.numel()
        self._typed: dict[torch.dtype, torch.Tensor] = {torch.uint8: memory}
        self.kept: dict[object, dict[Any, Any]] = {}

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.bytes.numel()

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the block as a flat tensor of ``dtype``."""
        view = self._typed.get(dtype)
        if view is None:
            with torch.inference_mode(False):  # it is kept beyond the user's context
                view = self._typed[dtype] = self.bytes.view(dtype)
        return view


class DeviceMemory:
    """Blocks on the compute device, reserved with the budget before they exist.

    Args:
        device: the compute device.
        budget: the accountant.
    """

    def __init__(self, device: torch.device, budget: MemoryBudget) -> None:
        self.device = device
        self.budget = budget
        self._module = _statistics_of(device)
        self._live: dict[int, Block] = {}
        self._transient: list[Block] = []  # one or two; residents can be thousands

    def allocate(self, kind: str, nbytes: int, what: str = "") -> Block:
        """Return a block of at least ``nbytes`` bytes.

        Raises:
            BudgetExceededError: It does not fit the limit; nothing was allocated.
        """
        size = align(nbytes)
        self.budget.reserve(kind, size, what)
        try:
            with torch.inference_mode(False):
                memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except BaseException:
            self.budget.release(kind, size)
            raise
        block = Block(memory, kind)
        self._live[id(block)] = block
        if kind in TRANSIENT_KINDS:
            self._transient.append(block)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to the budget and to PyTorch's allocator.

        Twice is not wrong: behind an interrupt nobody knows how far the first got.
        """
        if self._live.pop(id(block), None) is None:
            return
        if block in self._transient:
            self._transient.remove(block)
        self.budget.release(block.kind, block.nbytes)

    def settle(self) -> None:
        """Make the budget agree with the blocks that there are, behind an interrupt."""
        taken: Counter[str] = Counter()
        for block in self._live.values():
            taken[block.kind] += block.nbytes
        self.budget.settle(taken)

    def overlaps_transient(self, pointer: int) -> bool:
        """Tell whether an address lies in memory that is reused within a pass."""
        return any(block.start <= pointer < block.end for block in self._transient)

    def allocated_bytes(self) -> int | None:
        """Return what this process's PyTorch allocator holds, None where unknown."""
        return self._statistic("allocated", "current", "memory_allocated")

    def within_reach(self) -> int | None:
        """Return what the allocator could hold at most, beside other programs."""
        ask = getattr(self._module, "mem_get_info", None)
        reserved = self._statistic("reserved", "current", "memory_reserved")
        if ask is None or reserved is None:
            return None
        return int(ask(self.device)[0]) + reserved

    def peak_bytes(self) -> int | None:
        """Return the allocator's peak since it was last reset, None where unknown."""
        return self._statistic("allocated", "peak", "max_memory_allocated")

    def return_unused(self) -> None:
        """Have PyTorch's allocator return to the device what it keeps past the limit.

        Blocks that were freed are of little use for others of other sizes, and the
        device shows them as taken. It waits for the device: not for steady passes.
        """
        limit = self.budget.limit_bytes
        give = getattr(self._module, "empty_cache", None)
        if not limit or give is None:
            return
        reserved = self._statistic("reserved", "current", "memory_reserved") or 0
        unused = reserved - (self.allocated_bytes() or 0)
        if min(reserved - limit, unused) > UNUSED_BYTES:
            give()

    def reset_peak(self) -> None:
        """Start the allocator's peak anew, where there is one."""
        reset = getattr(self._module, "reset_peak_memory_stats", None)
        if reset is not None:
            reset(self.device)

    @property
    def measures_peak(self) -> bool:
        """Whether activations can be counted on this device."""
        return getattr(self._module, "max_memory_allocated", None) is not None

    def _statistic(self, what: str, key: str, name: str) -> int | None:
        # Where the statistics can be had as they are: the functions make a flat, sorted
        # copy of all of them first, which takes a tenth of a millisecond in each pass.
        nested = getattr(self._module, "memory_stats_as_nested_dict", None)
        if nested is not None:
            found = nested(self.device).get(f"{what}_bytes")
            if found is not None:
                return int(found["all"][key])
        function = getattr(self._module, name, None)
        return None if function is None else int(function(self.device))


# PyTorch's allocator may keep so much beyond the limit: activations come again.
UNUSED_BYTES = 2**27

# Kinds of memory whose bytes have other owners later in the same pass.
TRANSIENT_KINDS = frozenset({"window", "casts"})


def _statistics_of(device: torch.device) -> Any:
    """Return the module with the allocator's statistics; None for a CPU, without."""
    # torch.cuda, torch.xpu, torch.npu, torch.mps: the same names where they exist.
    return None if device.type == "cpu" else torch.get_device_module(device)

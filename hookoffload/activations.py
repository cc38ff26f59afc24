"""What passes take of the compute device beside the library."""

from __future__ import annotations

from .budget import MemoryBudget
from .containers import tensors_in
from .device_memory import DeviceMemory
from .measured_memory import Measured, MeasuredPasses

# The allocator hands out up to 1 MiB more than a tensor asks for, depending on what is
# free: the same activations take a little more in one pass than in the one before.
ROOM_BYTES = 2 * 2**20
_ROOM_SHARE = 64

# Room that is not needed any more goes to residents when so many passes, one behind the
# other, have not needed it, and if it is at least this part of the limit.
_PASSES_WITH_ROOM = 3
_SPARE_SHARE = 32


class Activations:
    """Measures what passes take beside the library, and says what the next one wants.

    [Note: the limit and activations] On an accelerator the limit bounds what PyTorch's
    allocator reaches in this process. How much of that is not the library's (the
    activations, and tensors of other code) is measured in a pass that streams
    everything: the first one, each one whose inputs are larger than all before, and
    one of many whose inputs are much smaller.
    What other code holds at the beginning of a later pass, beyond what it held then, is
    added, and what it has given back is taken off. So is what the allocator hands out
    beyond what is asked for: it cuts a free block only if more than 1 MiB is left,
    which nobody can tell beforehand. It is seen once a plan's blocks are there
    (`PassPlanner.applied`), before the pass begins. On a CPU nobody can count
    activations apart: the limit bounds the library's own bytes, and one plan serves all
    passes.

    Args:
        budget: the accountant.
        memory: statistics of the compute device.

    Attributes:
        most: bytes that any pass took; None before one was measured.
        peak_bytes: what the allocator reached in any pass.
    """

    __slots__ = (
        "_budget",
        "_earlier",
        "_entry",
        "_grown",
        "_held_before",
        "_known",
        "_memory",
        "_old_peak",
        "_passes",
        "_size",
        "_with_room",
        "most",
        "peak_bytes",
    )

    def __init__(self, budget: MemoryBudget, memory: DeviceMemory) -> None:
        self._budget = budget
        self._memory = memory
        self._passes = MeasuredPasses()
        self._known: Measured | None = None  # of passes like the one that runs now
        self._entry = ""  # the module that it calls
        self._size = 0  # of its inputs, in elements
        self._grown = 0  # what others hold more than in the pass that measured
        self._with_room = 0  # passes that did not need all that was left to them
        self._held_before = 0  # by others, when the pass that measures began
        self._old_peak = False  # there is one beyond the limit from before the pass
        self._earlier = (0, 0)  # of the pass under way, see `pause`
        self.most: int | None = None
        self.peak_bytes = 0

    @property
    def are_counted(self) -> bool:
        """Whether anybody counts what is not the library's."""
        return self._memory.measures_peak

    @property
    def are_known(self) -> bool:
        """Whether a pass like the one under way was measured."""
        return self._known is not None

    @property
    def held_by_others(self) -> int:
        """Bytes that are not the library's, now."""
        return (self._memory.allocated_bytes() or 0) - self._budget.total_used

    # -- the pass under way ---------------------------------------------------------

    def begin(self) -> None:
        """Begin a pass: it has taken nothing yet."""
        self._earlier = (0, 0)

    def recall(self, entry: str, size: int, *, can_gain: bool) -> bool:
        """Tell whether it is known what the pass under way takes.

        Args:
            entry: the module that it calls; empty for the root.
            size: of its inputs, in elements.
            can_gain: more memory would be of use.

        Returns:
            False if the pass should be measured.
        """
        self._entry, self._size = entry, size
        self._known = self._passes.find(entry, size, can_gain=can_gain)
        if self._known is None:
            self._grown = 0
        return self._known is not None

    def note_old_peak(self, limit: int) -> None:
        """Look whether a limit was exceeded before: under another one, by others."""
        self._old_peak = (self._memory.peak_bytes() or 0) > limit

    def forget_old_peak(self) -> None:
        """Drop that peak, once what was too much has been given up."""
        if self._old_peak:
            self._old_peak = False
            self._memory.reset_peak()

    def begin_to_measure(self) -> None:
        """Note what there is before the forward, which is to be measured."""
        self._memory.reset_peak()
        self._held_before = self.held_by_others

    def pause(self) -> None:
        """Note what the pass under way took so far: another one begins inside it."""
        peak = self._memory.peak_bytes()
        if peak is not None:
            self._earlier = self._taken_so_far(peak)
            self._memory.reset_peak()

    def resume(self) -> None:
        """Go on with the pass under way: what ran inside it is not its own."""
        self._memory.reset_peak()

    def _taken_so_far(self, peak: int) -> tuple[int, int]:
        before, beside = self._earlier
        return max(before, peak), max(beside, peak - self._budget.total_used)

    # -- what it wants --------------------------------------------------------------

    def beyond(self, room: int) -> int | None:
        """Return the room that the pass under way wants, if it is more than it has."""
        known = self._known
        if known is None:
            return None
        held = self.held_by_others
        self._grown = held - known.held
        if self._grown < 0:
            # What the pass itself came to hold it will take again.
            self._grown = min(held - known.before, 0)
        if known.activations + self._grown <= room:
            return None
        self._with_room = 0
        return self._wanted(known)

    def well_below(self, room: int, limit: int) -> int | None:
        """Return the room that passes want, if it is much less than they have.

        Args:
            room: what they have.
            limit: for all that is on the device, in bytes.
        """
        known = self._known
        if known is None:
            return None
        wanted = self._wanted(known)
        if room - wanted <= max(limit // _SPARE_SHARE, 4 * ROOM_BYTES):
            self._with_room = 0
            return None
        self._with_room += 1
        if self._with_room < _PASSES_WITH_ROOM:
            return None
        self._with_room = 0
        return wanted

    def _wanted(self, known: Measured) -> int:
        return known.activations + self._grown + max(self._grown, 0) // 4

    # -- behind it ------------------------------------------------------------------

    def end(self) -> tuple[int, int] | None:
        """Return the peak of the pass that ends, and what of it others took."""
        peak = self._memory.peak_bytes()
        if peak is None:
            return None
        taken = self._taken_so_far(peak)
        self.peak_bytes = max(self.peak_bytes, taken[0])
        return taken

    def note(self, beside: int, output: object, limit: int) -> int:
        """Learn from the pass that ends, which was measured.

        Args:
            beside: what others took at its peak.
            output: what it returned.
            limit: for all that is on the device, in bytes.

        Returns:
            The bytes to leave to passes like it.
        """
        held = self._held_between(output)
        least_room = min(ROOM_BYTES, limit // _ROOM_SHARE)
        beside += max(least_room, (beside - held) // _ROOM_SHARE)
        self._known = Measured(self._size, beside, held, self._held_before)
        self._passes.note(self._entry, self._known)
        self.most = self._passes.most
        return beside

    def note_excess(self, beside: int) -> None:
        """Learn that with so many bytes beside the library a pass exceeded the limit.

        The passes that come would take its peak for theirs.
        """
        self.most = max(self.most or 0, beside)
        known = self._known
        if known is not None:
            known.activations = max(known.activations, beside - self._grown)
        self._memory.reset_peak()

    def _held_between(self, output: object) -> int:
        """Return what others hold, without what the pass that ends has made.

        Who keeps an output has it beside what the next pass takes.
        """
        held = self.held_by_others
        device = self._memory.device
        made = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in tensors_in(output)
            if tensor.device == device
        }
        return max(held - sum(made.values()), min(held, self._held_before))

"""The plan of each pass: from the limit, the sizes and the measured activations."""

from __future__ import annotations

import logging
from dataclasses import replace

from .assembly import Assembly
from .budget import MemoryBudget, format_gib
from .coded_residents import fastest
from .containers import tensors_in
from .cost import Rates
from .device_memory import DeviceMemory
from .measured_memory import Measured, MeasuredPasses
from .plan import Plan
from .plan_maker import PlanMaker
from .resolved_policy import ResolvedPolicy

logger = logging.getLogger(__name__)

# The allocator hands out up to 1 MiB more than a tensor asks for, depending on what is
# free: the same activations take a little more in one pass than in the one before.
_ROOM_BYTES = 2 * 2**20
_ROOM_SHARE = 64

# In a pass that measures, with less than this between the least and the limit, all of
# it is left to activations: 64 MiB of a window are 1 ms of copying.
_GUESSED_BYTES = 256 * 2**20

# Room that is not needed any more goes to residents when so many passes, one behind the
# other, have not needed it, and if it is at least this part of the limit.
_PASSES_WITH_ROOM = 3
_SPARE_SHARE = 32


class PassPlanner:
    """Decides what is resident, pass by pass.

    [Note: the limit and activations] On an accelerator the limit bounds what PyTorch's
    allocator reaches in this process. How much of that is not the library's (the
    activations, and tensors of other code) is measured in a pass that streams
    everything: the first one, each one whose inputs are larger than all before, and
    one of many whose inputs are much smaller.
    What other code holds at the beginning of a later pass, beyond what it held then, is
    added, and what it has given back is taken off. So is what the allocator hands out
    beyond what is asked for: it cuts a free block only if more than 1 MiB is left,
    which nobody can tell beforehand. It is seen once a plan's blocks are there
    (`applied`), before the pass begins. On a CPU nobody can count activations apart:
    the limit bounds the library's own bytes, and one plan serves all passes.

    Args:
        policy: the limit and the placements.
        budget: the accountant.
        memory: statistics of the compute device.
    """

    def __init__(
        self, policy: ResolvedPolicy, budget: MemoryBudget, memory: DeviceMemory
    ) -> None:
        self._maker = PlanMaker(policy)
        self._budget = budget
        self._memory = memory
        self._activations: int | None = None  # measured, bytes
        self._measured = MeasuredPasses()
        self._known: Measured | None = None  # of passes like the one that runs now
        self._entry = ""  # the module that it calls
        self._grown = 0  # what others hold more than in the pass that measured
        self._with_room = 0  # passes that did not need all that was left to them
        self._size = 0  # of its inputs, in elements
        self._reduced: tuple[int, Plan, Plan] | None = None  # see `beside`
        self._streaming: tuple[Plan, Plan] | None = None  # see `streaming_plan`
        self._measuring: Plan | None = None  # what the pass under way measures with
        self._held_before = 0  # by others, when the pass that measures began
        self._old_peak = False  # there is one beyond the limit from before the pass
        self._earlier = (0, 0)  # of the pass under way, see `pause`
        self._checked: Plan | None = None  # the allocator's share of it was looked at
        self._warned = False
        self.weighed = False
        self.peak_bytes = 0
        self.plan: Plan

    def set_assembly(
        self, assembly: Assembly, order: tuple[int, ...], looked_up: frozenset[int]
    ) -> None:
        """Plan for a model's layers.

        Args:
            assembly: the layers.
            order: the sequence of layers in a pass.
            looked_up: tables whose rows are looked up where they rest.

        Raises:
            BudgetExceededError: The limit is below the least; the old plan stands.
        """
        maker = self._maker
        self._follow(
            replace(maker, assembly=assembly, order=order, looked_up=looked_up)
        )

    def _follow(self, maker: PlanMaker) -> None:
        """Plan as another maker does, unless it raises."""
        self.plan = maker.make(self._activations or 0)
        self._maker = maker

    def forget(self) -> None:
        """Drop what refers to layers, behind detach."""
        self._maker = replace(self._maker, assembly=None)

    def for_pass(self, input_elements: int, *, probing: bool, entry: str = "") -> Plan:
        """Return the plan for a pass that begins now.

        Args:
            input_elements: how many elements the tensors among the inputs have.
            probing: layers may turn out to be needed at once that were not foreseen.
            entry: the module that is called by itself; empty for the root.
        """
        limit = self._maker.limit()
        self._earlier, self._measuring = (0, 0), None
        if limit and not self._memory.measures_peak and probing:
            return self._measuring_plan()
        if not limit or not self._memory.measures_peak:
            return self.plan
        self._entry, self._size = entry, input_elements
        can_gain = bool(self.plan.streamed)
        known = self._measured.find(entry, input_elements, can_gain=can_gain)
        self._known = known
        if known is None:
            self._grown = 0
            self._measuring = self._measuring_plan()
            return self._measuring
        # It was reached before: under another limit, or by other code.
        most = self._maker.policy.limit_bytes or limit
        self._old_peak = (self._memory.peak_bytes() or 0) > most
        self._leave_room_beside(known)
        self._take_room_back(known, limit)
        return self.plan

    @property
    def plan_under_way(self) -> Plan:
        """The plan that the pass under way began with, or would begin with."""
        return self._measuring or self.plan

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
        """Return the peak of the pass under way, and what of it others took."""
        before, beside = self._earlier
        return max(before, peak), max(beside, peak - self._budget.total_used)

    @property
    def most_bytes(self) -> int | None:
        """What the allocator may hold; None if nobody counts it, or nobody minds."""
        return (self._maker.limit() or None) if self._memory.measures_peak else None

    def applied(self, *, complete: bool = True) -> Plan | None:
        """Look at memory, now that it is what `for_pass` wanted it to be.

        Args:
            complete: all of the plan was applied, see `LayerMover.apply`.

        Returns:
            Another plan, to be applied instead; None if the pass can begin.
        """
        if self._measuring:
            self._memory.reset_peak()
            self._held_before = self._held_by_others()
            return None
        if self._old_peak:  # now that what was too much has been given up
            self._old_peak = False
            self._memory.reset_peak()
        known, before = self._known, self.plan
        if not complete:
            self.plan = self._maker.make(before.activation_bytes + _ROOM_BYTES)
        elif known is None or self._checked is before:
            return None
        self._checked = before
        if known is not None:
            self._leave_room_beside(known)
        return None if self.plan is before else self.plan

    def _leave_room_beside(self, known: Measured) -> None:
        held = self._held_by_others()
        self._grown = held - known.held
        if self._grown < 0:
            # What the pass itself came to hold it will take again.
            self._grown = min(held - known.before, 0)
        if known.activations + self._grown > self.plan.activation_bytes:
            self.plan = self._maker.make(self._wanted(known))
            self._with_room = 0

    def _wanted(self, known: Measured) -> int:
        return known.activations + self._grown + max(self._grown, 0) // 4

    def _take_room_back(self, known: Measured, limit: int) -> None:
        wanted = self._wanted(known)
        spare = self.plan.activation_bytes - wanted
        if spare <= max(limit // _SPARE_SHARE, 4 * _ROOM_BYTES):
            self._with_room = 0
            return
        self._with_room += 1
        if self._with_room == _PASSES_WITH_ROOM:
            self.plan = self._maker.make(wanted)
            self._with_room = 0

    def _measuring_plan(self, taken: int = 0) -> Plan:
        # Unknown activations get three quarters of what is neither taken by others nor
        # needed at least; all of it where a larger window would gain next to nothing.
        held, counted = 0, self._memory.measures_peak
        if counted:
            held = self._held_by_others()
        limit = self._maker.limit(taken) or 0
        spare = max(limit - self.plan.least_bytes - held, 0)
        if not counted or spare > _GUESSED_BYTES:
            spare = spare * 3 // 4
        return self._maker.make(held + spare, keep_residents=False, taken=taken)

    def beside(self, nbytes: int, plan: Plan) -> Plan:
        """Cut a plan down to what other models leave.

        Args:
            nbytes: bytes of the limit that they keep.
            plan: what `for_pass` returned.

        Raises:
            BudgetExceededError: They leave less than the least.
        """
        known = self._reduced
        if known is not None and known[0] == nbytes and known[1] is plan:
            return known[2]
        taken = nbytes
        if self._memory.measures_peak:
            # Blocks of the window, too, take more than their bytes.
            spare = (self._maker.limit(nbytes) or 0) - self.plan.least_bytes
            taken += min(max(spare, 0), _ROOM_BYTES)
        if plan is self.plan:
            reduced = self._maker.make(plan.activation_bytes, taken=taken)
        else:
            reduced = self._measuring_plan(taken)
        self._reduced = (nbytes, plan, reduced)
        return reduced

    @property
    def least_bytes(self) -> int:
        """Bytes of the limit without which a pass cannot run, or would exceed it."""
        return self.plan.least_bytes + self._counted_activations(self.plan)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the limit that the pass under way needs for activations."""
        return self._counted_activations(self.plan_under_way)

    def _counted_activations(self, plan: Plan) -> int:
        return plan.activation_bytes if self._memory.measures_peak else 0

    @property
    def streaming_plan(self) -> Plan:
        """A plan that keeps nothing and streams at full speed."""
        if self._streaming is None or self._streaming[0] is not self.plan:
            plan = self._maker.make(self.plan.activation_bytes, keep_residents=False)
            self._streaming = (self.plan, plan)
        return self._streaming[1]

    @property
    def streaming_bytes(self) -> int:
        """Bytes of the limit that a pass takes with that."""
        return self.with_activations(self.streaming_plan)

    def with_activations(self, plan: Plan) -> int:
        """Return the bytes of a plan that count against the limit."""
        return plan.total_bytes + self._counted_activations(plan)

    def room(self, limit_bytes: int | None) -> int | None:
        """Return what a limit leaves for weights; None where all of them fit."""
        if limit_bytes is None or self._maker.assembly is None:
            return None
        room = max(limit_bytes - self.fixed_bytes - (self._activations or 0), 0)
        return None if self.weight_bytes <= room else room

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are on the device whatever is planned."""
        return self._maker.always_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers, as residents."""
        return self._maker.weight_bytes

    def after_pass(self, *, complete: bool, output: object = None) -> None:
        """Look at what the pass that has ended took.

        Args:
            complete: it came to its end.
            output: what it returned.
        """
        peak = self._memory.peak_bytes()
        if peak is None:
            return
        peak, beside = self._taken_so_far(peak)
        self.peak_bytes = max(self.peak_bytes, peak)
        measuring, self._measuring = self._measuring, None
        limit = self._maker.policy.limit_bytes
        if not limit:
            return
        if measuring and complete:
            held = self._held_between(output)
            least_room = min(_ROOM_BYTES, limit // _ROOM_SHARE)
            beside += max(least_room, (beside - held) // _ROOM_SHARE)
            self._known = Measured(self._size, beside, held, self._held_before)
            self._measured.note(self._entry, self._known)
            self._activations = self._measured.most
            self.plan = self._maker.make(self._activations)
        if peak > limit:
            self._activations = max(self._activations or 0, beside)
            known = self._known
            if known is not None:
                known.activations = max(known.activations, beside - self._grown)
            self._warn(peak, beside, limit)
            # Or the passes that come would take it for theirs.
            self._memory.reset_peak()

    def set_limit(self, policy: ResolvedPolicy) -> None:
        """Plan for another limit.

        Raises:
            BudgetExceededError: It is below the least; the old limit stands.
        """
        self._follow(replace(self._maker, policy=policy, ceiling=None, code_share=1.0))
        self._warned = self.weighed = False

    def follow(self, policy: ResolvedPolicy) -> None:
        """Take a policy for layers that are told next, with `set_assembly`."""
        self._maker = replace(self._maker, policy=policy, ceiling=None, code_share=1.0)
        self.weighed = False

    def set_adapter_bytes(self, nbytes: int) -> None:
        """Plan beside so many bytes of adapters, which are always on the device.

        Raises:
            BudgetExceededError: The limit has no room for them; the old plan stands.
        """
        self._follow(replace(self._maker, adapter_bytes=nbytes))

    def weigh_codes(self, rates: Rates) -> None:
        """Plan with as many residents kept coded as make passes shortest.

        Once for each limit: another answer would have them all brought in again.
        """
        beside = self.plan.activation_bytes
        self.weighed = True

        def plan_at(share: float) -> Plan:
            return replace(self._maker, code_share=share).make(beside)

        self.plan = fastest(plan_at, rates)
        self._maker = replace(self._maker, code_share=self.plan.code_share)

    def step_down(self, taken: int) -> bool:
        """Plan for less, because the device ran out of memory.

        Args:
            taken: bytes of the library that there was room for.

        Returns:
            Whether there is anything left to give up.
        """
        least = self.plan.least_bytes
        if self.plan.total_bytes <= least and not self.plan.resident:
            return False
        beside = self.plan.activation_bytes
        ceiling = max(taken + beside, least)
        self._maker = replace(self._maker, ceiling=ceiling)
        before = self.plan
        self.plan = self._maker.make(beside)
        logger.warning(
            "the device is out of memory: %s of weights stay on it instead of %s. "
            "Other programs take the rest; limit_gb=%.3g would ask for no more",
            format_gib(self.plan.resident_bytes),
            format_gib(before.resident_bytes),
            ceiling / 2**30,
        )
        return True

    def _held_by_others(self) -> int:
        return (self._memory.allocated_bytes() or 0) - self._budget.total_used

    def _held_between(self, output: object) -> int:
        """Return what others hold, without what the pass that ends has made.

        Who keeps an output has it beside what the next pass takes.
        """
        held = self._held_by_others()
        device = self._memory.device
        made = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in tensors_in(output)
            if tensor.device == device
        }
        return max(held - sum(made.values()), min(held, self._held_before))

    def _warn(self, peak: int, beside: int, limit: int) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "limit_gb=%g was exceeded: the peak was %s, of which activations and other "
            "tensors of this process took %s and the model's weights %s. A smaller "
            "input (batch, resolution, context) or limit_gb=%.3g would keep it",
            limit / 2**30,
            format_gib(peak),
            format_gib(beside),
            format_gib(self._budget.total_used),
            (beside + self.plan.least_bytes) / 2**30 + 0.01,
        )

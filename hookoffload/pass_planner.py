"""The plan of each pass: from the limit, the sizes and the measured activations."""

from __future__ import annotations

import logging
from dataclasses import replace

from .activations import ROOM_BYTES, Activations
from .assembly import Assembly
from .budget import MemoryBudget, format_gib
from .coded_residents import fastest
from .cost import Rates
from .device_memory import DeviceMemory
from .plan import Plan
from .plan_maker import PlanMaker
from .resolved_policy import ResolvedPolicy

logger = logging.getLogger(__name__)

# In a pass that measures, with less than this between the least and the limit, all of
# it is left to activations: 64 MiB of a window are 1 ms of copying.
_GUESSED_BYTES = 256 * 2**20


class PassPlanner:
    """Decides what is resident, pass by pass.

    `Activations` tell it what a pass needs beside the library, see
    [Note: the limit and activations].

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
        self._activations = Activations(budget, memory)
        self._reduced: tuple[int, Plan, Plan] | None = None  # see `beside`
        self._streaming: tuple[Plan, Plan] | None = None  # see `streaming_plan`
        self._measuring: Plan | None = None  # what the pass under way measures with
        self._checked: Plan | None = None  # the allocator's share of it was looked at
        self._warned = False
        self.weighed = False
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
        self.plan = maker.make(self._activations.most or 0)
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
        limit, activations = self._maker.limit(), self._activations
        activations.begin()
        self._measuring = None
        if limit and not activations.are_counted and probing:
            return self._measuring_plan()
        if not limit or not activations.are_counted:
            return self.plan
        can_gain = bool(self.plan.streamed)
        if not activations.recall(entry, input_elements, can_gain=can_gain):
            self._measuring = self._measuring_plan()
            return self._measuring
        activations.note_old_peak(self._maker.policy.limit_bytes or limit)
        self._leave_room()
        wanted = activations.well_below(self.plan.activation_bytes, limit)
        if wanted is not None:
            self.plan = self._maker.make(wanted)
        return self.plan

    @property
    def plan_under_way(self) -> Plan:
        """The plan that the pass under way began with, or would begin with."""
        return self._measuring or self.plan

    def pause(self) -> None:
        """Note what the pass under way took so far: another one begins inside it."""
        self._activations.pause()

    def resume(self) -> None:
        """Go on with the pass under way: what ran inside it is not its own."""
        self._activations.resume()

    @property
    def peak_bytes(self) -> int:
        """What the allocator reached in any pass."""
        return self._activations.peak_bytes

    @property
    def most_bytes(self) -> int | None:
        """What the allocator may hold; None if nobody counts it, or nobody minds."""
        return (self._maker.limit() or None) if self._activations.are_counted else None

    def applied(self, *, complete: bool = True) -> Plan | None:
        """Look at memory, now that it is what `for_pass` wanted it to be.

        Args:
            complete: all of the plan was applied, see `LayerMover.apply`.

        Returns:
            Another plan, to be applied instead; None if the pass can begin.
        """
        activations, before = self._activations, self.plan
        if self._measuring:
            activations.begin_to_measure()
            return None
        activations.forget_old_peak()
        if not complete:
            self.plan = self._maker.make(before.activation_bytes + ROOM_BYTES)
        elif not activations.are_known or self._checked is before:
            return None
        self._checked = before
        self._leave_room()
        return None if self.plan is before else self.plan

    def _leave_room(self) -> None:
        """Plan for more activations, where the pass under way wants more."""
        wanted = self._activations.beyond(self.plan.activation_bytes)
        if wanted is not None:
            self.plan = self._maker.make(wanted)

    def _measuring_plan(self, taken: int = 0) -> Plan:
        # Unknown activations get three quarters of what is neither taken by others nor
        # needed at least; all of it where a larger window would gain next to nothing.
        counted = self._activations.are_counted
        held = self._activations.held_by_others if counted else 0
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
        if self._activations.are_counted:
            # Blocks of the window, too, take more than their bytes.
            spare = (self._maker.limit(nbytes) or 0) - self.plan.least_bytes
            taken += min(max(spare, 0), ROOM_BYTES)
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
        return plan.activation_bytes if self._activations.are_counted else 0

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
        beside = self.fixed_bytes + (self._activations.most or 0)
        room = max(limit_bytes - beside, 0)
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
        taken = self._activations.end()
        if taken is None:
            return
        peak, beside = taken
        measuring, self._measuring = self._measuring, None
        limit = self._maker.policy.limit_bytes
        if not limit:
            return
        if measuring and complete:
            beside = self._activations.note(beside, output, limit)
            self.plan = self._maker.make(self._activations.most or 0)
        if peak > limit:
            self._warn(peak, beside, limit)
            self._activations.note_excess(beside)

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
        ceiling = taken + beside
        reach = self._memory.within_reach()
        if reach is not None:  # nine tenths: they take more while this is found out
            ceiling = min(ceiling, reach * 9 // 10)
        ceiling = max(ceiling, least)
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

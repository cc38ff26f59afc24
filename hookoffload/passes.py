"""Passes: what happens where a forward of the root begins and ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .budget import BudgetExceededError
from .calls import in_functional_call
from .code_choice import follow
from .containers import tensors_in
from .plan import Plan
from .probe import Probe
from .sideways import hint_at_sideways_reads, reads_of_siblings
from .wrappers import is_under_fsdp, require_undivided

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

# While there are layers that no forward has asked for, one may read them sideways. But
# some are never asked for (an expert that no token chooses), and the probe takes time.
_PROBED_WITHOUT_NEWS = 2


class Passes:
    """Begins and ends the passes of one session.

    Attributes:
        joined: pairs of a module's name and the name of a tensor of another one: the
            tensor was seen to be used by the module, and comes with it.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.joined: list[tuple[str, str]] = []
        self._asked_for: set[int] = set()
        self._seen: set[int] = set()
        self._without_news = 0  # passes that asked for nothing new, one after another
        self._probe_next = True
        self._told_of: set[str] = set()
        self._autocast_cache = True

    def set_layers(self, asked_for: set[int]) -> None:
        """Learn which layers sites need, after layers were built."""
        self._asked_for = asked_for
        self._seen = set()  # those of them that a forward has asked for
        self._without_news = 0

    def probe_next(self) -> None:
        """Have the probe look at the next pass."""
        self._probe_next = True

    def begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Get ready for one forward of the root; return inputs that were moved.

        Args:
            args: of the forward.
            kwargs: of the forward.
            compiled: the model is, as a whole.
        """
        session = self._session
        self._autocast_cache = torch.is_autocast_cache_enabled()
        if is_under_fsdp(session.model):
            require_undivided(session.model)
        session.merges.unmerge_disabled()
        session.merges.take_over()  # before residents go, or what they have goes too
        if session.inventory.replaced() and not in_functional_call():
            with torch.inference_mode(False):
                session.edits.take_over_replaced()
        session.rebuilding.finish()
        if moved := session.inventory.given_other_data():
            for _, member in moved:
                member.require_unmoved()
            session.edits.sync_masters()
        session.edits.take_over_held()
        session.merges.forget_unwrapped()
        measured = session.meter.take()
        if measured is not None:
            with torch.inference_mode(False):
                follow(session, measured)
        session.ownership.begin_outermost_call()
        if session.group is not None:
            session.group.note(session, "")
        size = sum(tensor.numel() for tensor in tensors_in((args, kwargs)))
        probing = self._probe_next and bool(session.sites)
        first = probing and not session.mover.counters.forwards
        self._take(session.planner.for_pass(size, probing=first))
        all_stay = session.all_stay
        if probing:
            session.hooks.hang_all()
        else:
            session.hooks.hang_if_needed()
        self.retire_probe()  # of a pass that was interrupted at its very end
        if probing:
            session.probe = Probe(session)
        if session.recorder is not None:
            session.recorder.begin_pass()
        session.mover.order.begin_pass()
        if not all_stay:
            session.mover.copies.prefetch()
        inputs = session.to_compute_device((args, kwargs))
        if torch.is_autocast_enabled(session.policy.compute_device.type):
            # It would keep a cast copy of every weight, beyond any limit.
            torch.set_autocast_cache_enabled(False)
        session.mover.stand_ins.begin()
        session.meter.begin()
        if session.probe is not None:
            session.probe.begin(compiled=compiled)
        return inputs

    def begin_part(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Get ready for a call of a part by itself (``vae.decode``).

        It has activations of its own, which the limit must have room for.
        """
        session = self._session
        session.ownership.begin_outermost_call()
        if session.group is not None:
            session.group.note(session, name)
        size = sum(tensor.numel() for tensor in tensors_in((args, kwargs)))
        self._take(session.planner.for_pass(size, probing=False, entry=name))
        session.mover.stand_ins.begin()

    def end_part(self, output: object, *, complete: bool) -> None:
        """Account for the call of a part that has ended."""
        self._account(output, complete=complete)

    def _account(self, output: object, *, complete: bool) -> None:
        session = self._session
        session.planner.after_pass(complete=complete, output=output)
        if session.group is not None:
            session.group.end(session)

    def end(self, output: object, *, complete: bool) -> None:
        """Account for the forward that has ended."""
        session = self._session
        session.meter.end(complete=complete)
        joined: list[tuple[str, str]] = []
        enclosing: Mapping[str, frozenset[str]] = {}
        torch.set_autocast_cache_enabled(self._autocast_cache)
        error = sys.exc_info()[1]
        if session.probe is not None:
            joined = session.probe.end()
            enclosing = session.probe.enclosing
            session.probe = None
        elif not complete and error is not None and not session.all_stay:
            hint_at_sideways_reads(error)
        if not complete and isinstance(error, torch.OutOfMemoryError):
            # The next call must find more: half of what the residents took.
            half = session.plan.resident_bytes // 2
            session.planner.step_down(session.plan.total_bytes - half)
        # A tensor may be used sideways on a path that this pass did not take: look
        # again after an exception, which may come from just that, and while there are
        # layers that no forward has asked for and every few passes ask for others.
        news = not self._seen.issuperset(session.mover.order.recorded)
        self._seen.update(session.mover.order.recorded)
        self._without_news = 0 if news or not complete else self._without_news + 1
        waits = self._without_news < _PROBED_WITHOUT_NEWS
        self._probe_next = not complete or (waits and not self._asked_for <= self._seen)
        session.mover.order.end_pass(complete)
        session.mover.counters.forwards += complete
        if session.recorder is not None:
            session.recorder.end_pass(complete=complete)
        self._account(output, complete=complete)
        # They may also be why the limit was too small: the next forward plans for them.
        if joined and complete:
            self._join(joined)
        elif joined and isinstance(error, BudgetExceededError):
            self._join(joined)
            error.args = (
                f"{error} [hookoffload: modules were found to read weights of other "
                "ones, which the plan knows from now on: call the model again]",
            )
        if isinstance(error, BudgetExceededError):
            # More is in use at once than the plan knows of: the next call needs less.
            session.units.divide_all()
        if complete and (not self._probe_next or session.all_stay):
            if not session.all_stay:
                session.units.choose(enclosing)
            session.hooks.slim()

    def _take(self, plan: Plan | None) -> None:
        """Make memory what a pass needs that begins now."""
        while plan is not None:
            planner = self._session.planner
            complete = self.apply(plan, planner.most_bytes)
            plan = planner.applied(complete=complete)

    def apply(self, plan: Plan, most: int | None = None) -> bool:
        """Make memory what the plan says, or less where the device has less.

        Args:
            plan: the plan.
            most: see `LayerMover.apply`; what stops there must be followed by another
                plan, which only the begin of a pass has.

        Returns:
            Whether all of it is there, see `LayerMover.apply`.
        """
        session, group = self._session, self._session.group
        while True:
            fitting = plan if group is None else group.fit(session, plan)
            try:
                return session.mover.apply(fitting, most)
            except torch.OutOfMemoryError:
                if group is not None and group.give_all(session):
                    continue
                # Nine tenths: the forward needs something too.
                if not session.planner.step_down(session.mover.reached_bytes * 9 // 10):
                    raise
                plan = session.planner.plan

    def keep_to_plan(self) -> None:
        """Give up at once what a plan that has changed does not keep."""
        if self._session.mover.plan is not None:
            self.apply(self._session.plan)

    def apply_again(self) -> None:
        """Make memory what the pass under way needs, which has lost some of it."""
        session, planner = self._session, self._session.planner
        if session.mover.in_use:
            return  # what is bound keeps its place; the next pass makes the others'
        if not self.apply(planner.plan_under_way, planner.most_bytes):
            self.apply(planner.streaming_plan)

    def interrupted(self) -> None:
        """Clean up behind a pass that never reached its end."""
        session = self._session
        if session.recorder is not None:
            session.recorder.end_pass(complete=False)
        session.mover.order.end_pass(complete=False)
        self._probe_next = True

    def retire_probe(self) -> None:
        """End a probe that was interrupted; see [Note: modes left behind]."""
        session = self._session
        if session.probe is not None:
            session.probe.abandon()
            session.probe = None

    # -- reads sideways -------------------------------------------------------------

    def _join(self, joined: list[tuple[str, str]]) -> None:
        """Let tensors that were used sideways come with the modules that use them."""
        session = self._session
        session.units.forget()
        before = self.joined
        alike = reads_of_siblings(session.model, joined)
        self.joined = list(dict.fromkeys([*before, *joined, *alike]))
        try:
            session.rebuilding.rebuild()
        except BudgetExceededError as error:
            self._warn_of_joined({user or "the model" for user, _ in joined}, error)
            self.joined = before
            session.rebuilding.rebuild()
            self._probe_next = True
        session.adapters.warn_of_unused()

    def _warn_of_joined(self, users: set[str], error: BudgetExceededError) -> None:
        """Say once of each module that its reads cost more than they should."""
        if users <= self._told_of:  # the probe comes back with them each time
            return
        self._told_of |= users
        logger.warning(
            "%s read(s) weights of other modules, which do not fit the limit for "
            "that long; they are brought in each time they are used. %s",
            ", ".join(sorted(users)),
            error,
        )

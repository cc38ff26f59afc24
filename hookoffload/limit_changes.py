"""Other limits for an attached model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .budget import BudgetExceededError
from .partition import partition
from .resolved_policy import ResolvedPolicy
from .safetensors_header import CheckpointError
from .tier_changes import Tiers
from .units import Unit

if TYPE_CHECKING:
    from .session import Session


class LimitChanges:
    """Changes the limits of one session."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def keep(self, policy: ResolvedPolicy) -> None:
        """Keep those of another policy from the next pass on.

        Raises:
            BudgetExceededError: They are below the least; the old ones stand.
            CheckpointError: The disk refuses; the old limits stand.
        """
        session = self._session
        before = session.policy
        try:
            self.plan_for(policy)
            session.budget.set_limit(policy.limit_bytes or None)
        except BaseException as error:
            if not isinstance(error, Exception):  # what fails has done so itself
                self.plan_for(before)
                session.budget.set_limit(before.limit_bytes or None)
            raise
        limit = policy.limit_bytes
        most = limit or session.plan.total_bytes
        if limit is not None and session.budget.used > most:
            session.mover.apply(session.plan)  # give the memory back now

    def plan_for(self, policy: ResolvedPolicy) -> None:
        """Plan for a policy that has other limits.

        Raises:
            BudgetExceededError: They are below the least; the old ones stand.
            CheckpointError: The disk refuses; the old limits stand.
        """
        session = self._session
        session.edits.untie()
        if session.inventory.replaced() or session.edits.parted:
            self._take_over_replaced(policy)
        anew = policy.host_limit_bytes != session.policy.host_limit_bytes
        units = session.units.now
        wanted = session.units.at(policy)
        # They can need more than the limit to come, and lie in several tiers.
        apart = any(units) if anew else wanted != units
        if apart:
            session.units.make(Unit())
        try:
            if anew:
                self._divide_anew(policy)
            else:
                session.planner.set_limit(policy)
        except (BudgetExceededError, CheckpointError):
            if apart:
                session.units.make(units)
            raise
        session.policy = policy
        if wanted != session.units.now:
            session.units.make(wanted)
        session.hooks.hang_all()

    def _take_over_replaced(self, policy: ResolvedPolicy) -> None:
        """Manage what replaced parameters or their data; new layers hide it."""
        session = self._session
        session.planner.follow(policy)  # the old limit may be below what they need
        try:
            with torch.inference_mode(False):
                session.edits.take_over_replaced()
        except BaseException:
            session.planner.follow(session.policy)
            raise

    def _divide_anew(self, policy: ResolvedPolicy) -> None:
        """Have layers wait in other tiers, or in the old ones if that fails."""
        session = self._session
        session.placement.offload()
        with torch.inference_mode(False):
            session.store.note_private_writes()
            masters, old = session.moved_masters, session.policy
            before = Tiers.as_they_are(masters)
            found = partition(session.model, session.map, session.passes.joined)
            after = Tiers.for_policy(masters, found, policy)
            session.page_lock.unlock(session.store.masters)
            try:
                self._divide(policy, after)
            except BaseException:
                self._divide(old, before)
                raise
            finally:
                if session.policy.waits_where_it_rests:
                    session.page_lock.lock(session.store.masters)

    def _divide(self, policy: ResolvedPolicy, tiers: Tiers) -> None:
        """Have masters at rest in their tiers, and layers made of them."""
        session = self._session
        tiers.apply()
        session.policy = policy
        session.planner.follow(policy)
        session.mover.copies.host_limit_bytes = policy.host_limit_bytes
        if policy.compute_device.type == "cpu":
            # Others move than before: the order of these says nothing of them.
            session.mover.set_layers(session.layers, ())
        session.rebuilding.rebuild()
        session.placement.adopt(policy)

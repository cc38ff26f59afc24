"""Several models under one limit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from .budget import BudgetExceededError, MemoryBudget, format_gib
from .calls import CallTracker
from .tensor_bytes import distinct_bytes
from .tiers import host_shares
from .use_order import UseOrder

if TYPE_CHECKING:
    from .pinning import PageLock
    from .plan import Plan
    from .resolved_policy import ResolvedPolicy
    from .session import Session

logger = logging.getLogger(__name__)


class Group:
    """The sessions of several models that share a limit.

    [Note: several models, one limit]
    Every byte of every member is reserved with one budget. Each member plans for the
    whole limit, as if it were alone. Where its pass begins and its plan does not fit
    beside what the idle members keep, these give way, only as far as needed: first
    their windows, which hold nothing, then their residents, last what is always on the
    device. Least soon needed goes first, by the order seen over whole runs, and within
    a member the layers that its pass needs last.

    Members that will be needed before this one's own next pass keep their residents:
    to take their place would cost a copy sooner than it saves one. The member then
    plans for what they leave, as long as that is enough to stream at full speed. So two
    models that are called in turns in a loop do not take each other's place.

    A member is idle while no thread is inside it. One thread at a time is inside any
    of them, so that nothing gives way under a forward that runs in another thread. A
    member that calls another one in its own forward is not idle: it keeps all it has
    unless the other one could not run at all.

    What waits in host RAM stays there while its model is idle, so a host limit is
    divided once, by the sizes of the models.

    Args:
        policy: the limits.
        models: the models by name.
    """

    def __init__(self, policy: ResolvedPolicy, models: Mapping[str, nn.Module]) -> None:
        self.policy = policy
        # As little as possible is what the plans find out, not a number to hold.
        self.budget = MemoryBudget(policy.limit_bytes or None)
        modules = (id(m) for model in models.values() for m in model.modules())
        self.turns = CallTracker(frozenset(modules))
        self._sizes = {n: distinct_bytes(m.parameters()) for n, m in models.items()}
        self.order = UseOrder()
        self.members: dict[str, Session] = {}
        self.page_locks: list[PageLock] = []
        self._chosen: tuple[Session, ...] = ()  # by `activate`
        self._active: Session | None = None
        self._owed: set[Session] = set()  # gave way in the middle of their pass

    def name_of(self, session: Session) -> str:
        """Return the name under which a member was attached."""
        return next(n for n, member in self.members.items() if member is session)

    @property
    def sessions(self) -> list[Session]:
        """The members that are attached."""
        return [session for session in self.members.values() if not session.ended]

    # -- whose turn it is -----------------------------------------------------------

    def begin(self, session: Session) -> None:
        """Make a member the active one, where a thread comes into it.

        What moves between RAM and disk when it is not needed goes to its offload
        placement: first, so that the host never holds both.
        """
        for other in self._running_around(session):
            other.planner.pause()
        if session is self._active:
            return
        if session not in self._chosen:
            self._chosen = ()
        for other in self._idle(session):
            moves = not other.policy.waits_where_it_rests
            if other.placement.onloaded and moves and other not in self._chosen:
                with other.ownership.by_hand("offload"):
                    other.placement.offload()
        self._active = session

    def end(self, session: Session) -> None:
        """Go on with the members inside whose forwards one has run.

        What it took goes as far as their activations need the room.
        """
        limit, around = self.policy.limit_bytes, self._running_around(session)
        if limit and around:
            room = limit - max(other.planner.activation_bytes for other in around)
            if self.budget.used > room:
                session.mover.free_window()
                session.mover.give_up_residents(lambda: self.budget.used <= room)
        for other in around:
            other.planner.resume()

    def note(self, session: Session, entry: str) -> None:
        """Note that a pass begins, of a member or of a part of it."""
        self.order.note(self.name_of(session), entry)
        if session in self._owed:
            self._owed.discard(session)
            session.mover.plan = None

    def choose(self, sessions: Sequence[Session]) -> None:
        """Onload these members and offload the others."""
        for other in self.sessions:
            if other not in sessions:
                with other.ownership.by_hand("activate"):
                    other.placement.offload()
        self._chosen = tuple(sessions)
        self._active = None
        for session in sessions:
            with session.ownership.by_hand("activate"):
                session.placement.onload()

    # -- room -----------------------------------------------------------------------

    def fit(self, session: Session, plan: Plan) -> Plan:
        """Return the plan that a member can follow now, having made room for it.

        Args:
            session: the member.
            plan: what it would follow if it were alone.

        Raises:
            BudgetExceededError: Models that are running leave it too little.
        """
        limit = self.policy.limit_bytes
        if limit is None:
            return plan
        idle = self._idle(session)
        if limit == 0:
            self._evict(idle, lambda: self._beside(session) == 0)
            return plan
        room = limit - session.planner.with_activations(plan)
        if self._beside(session) <= room:
            return plan
        # A pass that measures needs all that there is.
        measuring = plan is not session.planner.plan
        if measuring:
            sooner: list[str] = []
            later = self._by_next_use(session, idle)
        else:
            sooner, later = self._split(session, idle)
        if self._evict_named(later, sooner, lambda: self._beside(session) <= room):
            return plan
        least = session.planner.streaming_bytes
        self._evict_named(sooner, [], lambda: self._beside(session) <= limit - least)
        if measuring:
            self._interrupt_running(session, lambda: self._beside(session) <= room)
        elif self._beside(session) > limit - session.planner.least_bytes:
            self._interrupt_running(
                session, lambda: self._beside(session) <= limit - least
            )
        try:
            return session.planner.beside(self._beside(session), plan)
        except BudgetExceededError as error:
            running = [
                f"{name} ({format_gib(other.budget.used)})"
                for name, other in self.members.items()
                if other is not session and other.budget.used
            ]
            raise BudgetExceededError(
                f"{self.name_of(session)} does not fit the limit beside "
                f"{', '.join(running)}, which is running: {error}"
            ) from error

    def make_room(self, session: Session, nbytes: int) -> None:
        """Have others give way until a member can take so many bytes more."""

        def enough() -> bool:
            return self.budget.fits(nbytes)

        if enough():
            return
        idle = self._idle(session)
        if self._evict_named(self._by_next_use(session, idle), [], enough):
            return
        self._interrupt_running(session, enough)

    def give_all(self, session: Session) -> bool:
        """Have all idle members give back all that they hold.

        Returns:
            Whether that was anything.
        """
        before = self.budget.used
        self._evict(self._idle(session), lambda: False)
        return self.budget.used < before

    def share(self, name: str, policy: ResolvedPolicy) -> ResolvedPolicy:
        """Return the policy of one member: with its share of the host limit."""
        shares = host_shares(policy.host_limit_bytes, self._sizes)
        return replace(policy, host_limit_bytes=shares[name])

    def set_limits(self, policy: ResolvedPolicy) -> None:
        """Keep the limits of another policy.

        Raises:
            BudgetExceededError: They are below the least of a member; the old ones
                stand.
            CheckpointError: The disk refuses; the old limits stand.
        """
        limit_bytes, before = policy.limit_bytes, self.policy
        done: list[Session] = []
        try:
            for session in self.sessions:
                session.limits.plan_for(self.share(self.name_of(session), policy))
                done.append(session)
            self.policy = policy
            self.budget.set_limit(limit_bytes or None)
        except BaseException as error:
            self.policy = before
            self.budget.set_limit(before.limit_bytes or None)
            if isinstance(error, Exception):
                name = self.name_of(self.sessions[len(done)])
                error.args = (f"{name}: {error}",)
            else:
                done = self.sessions  # Ctrl-C: nobody knows how far it got
            for session in done:
                session.limits.plan_for(self.share(self.name_of(session), before))
            raise
        if limit_bytes:
            last = self._active or self.sessions[0]
            # None is running, though none looks idle: this thread holds them all.
            rest = [session for session in self.sessions if session is not last]
            others = self._by_next_use(last, rest)
            members = [*others, self.name_of(last)]
            self._evict(
                [self.members[name] for name in members],
                lambda: self.budget.used <= limit_bytes,
                owned=True,
            )
        elif limit_bytes == 0:
            for session in self.sessions:
                session.placement.give_way(lambda: False, owned=True)

    def _beside(self, session: Session) -> int:
        """Bytes that the other members hold."""
        return self.budget.used - session.budget.used

    def _idle(self, session: Session) -> list[Session]:
        return [
            other
            for other in self.sessions
            if other is not session and not other.calls.is_running()
        ]

    def _running_around(self, session: Session) -> list[Session]:
        return [
            other
            for other in self.sessions
            if other is not session and other.calls.is_running()
        ]

    def _split(
        self, session: Session, idle: Iterable[Session]
    ) -> tuple[list[str], list[str]]:
        """Divide members by whether they are needed sooner; the last needed first."""
        names = [self.name_of(other) for other in idle]
        sooner, later = self.order.split(self.name_of(session), names)
        return sooner[::-1], later[::-1]

    def _by_next_use(self, session: Session, idle: Iterable[Session]) -> list[str]:
        """List members, the last needed first."""
        sooner, later = self._split(session, idle)
        return [*later, *sooner]

    def _evict_named(
        self, names: list[str], kept: list[str], enough: Callable[[], bool]
    ) -> bool:
        members = self.members
        return self._evict(
            [members[name] for name in names], enough, [members[name] for name in kept]
        )

    def _evict(
        self,
        sessions: Sequence[Session],
        enough: Callable[[], bool],
        only_windows: Sequence[Session] = (),
        *,
        owned: bool = False,
    ) -> bool:
        """Have members give way in this order until there is enough.

        Args:
            sessions: the members.
            enough: says whether to stop.
            only_windows: members that give nothing but their windows.
            owned: this thread owns all of them by hand.
        """
        for session in (*sessions, *only_windows):
            if enough():
                return True
            if session.budget.used:
                session.placement.give_way(None, owned=owned)
        for session in sessions:
            if enough():
                return True
            if session.budget.used:
                session.placement.give_way(enough, owned=owned)
        for session in sessions:
            if enough():
                return True
            if session.budget.used:
                by_hand = session.ownership.by_hand("making room")
                with nullcontext() if owned else by_hand:
                    session.placement.offload()
        return enough()

    def _interrupt_running(self, session: Session, enough: Callable[[], bool]) -> None:
        """Take what members do not use that are in the middle of their forwards."""
        running = self._running_around(session)
        for other in running:
            if not enough():
                other.mover.give_up_residents(enough)
                self._owed.add(other)
        for other in running:
            if not other.mover.in_use and not enough():
                other.mover.free_window()

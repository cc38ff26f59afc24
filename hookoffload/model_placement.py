"""Where a model as a whole is: at its offload placement or at its onload placement."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from .coding import renew_codes
from .filling import Filled
from .host_memory import trim_heap
from .locking_beside import locking_beside
from .master import Master
from .placement import Placement
from .resolved_policy import ResolvedPolicy
from .store import Store

if TYPE_CHECKING:
    from .session import Session

# Whether a master waits on disk. Those that do first: what is written frees RAM.
_TIERS = (True, False)


class ModelPlacement:
    """Brings one session's model to its placements, and makes it give memory back.

    Attributes:
        onloaded: whether it is at its onload placement.
    """

    __slots__ = ("_masters_wait", "_session", "onloaded")

    def __init__(self, session: Session) -> None:
        self._session = session
        self.onloaded = False
        # Whether masters were moved to the onload placement, also while the device has
        # nothing (`rest_everything`).
        self._masters_wait = False

    def adopt(self, policy: ResolvedPolicy, filled: Filled | None = None) -> None:
        """Have masters rest where a policy says.

        Args:
            policy: says it.
            filled: called with masters that were read into RAM, a group at a time.
        """
        store = self._session.store
        for tier in _TIERS:
            store.adopt(self._tier(tier), policy.rests(on_disk=tier), filled)
        store.choose_reads()

    def adopt_buffers(self) -> None:
        """Have buffers rest in host RAM: they are small, and forwards write to them."""
        Store([], None).adopt(self._session.always.masters, Placement(device="cpu"))

    def onload(self) -> None:
        """Bring the model to its onload placement, if it is not there."""
        if self.onloaded:
            return
        session, store = self._session, self._session.store
        policy = session.policy
        with torch.inference_mode(False):
            store.note_private_writes()
            if not policy.waits_where_it_rests:
                self._masters_wait = True  # first: an interrupt leaves some of them so
                for tier in _TIERS:
                    store.onload(self._tier(tier), policy.waits(on_disk=tier))
            renew_codes(store.masters, policy, session.budget)
            if not policy.waits_where_it_rests:
                session.page_lock.lock(store.masters)
            self.make_room(session.planner.fixed_bytes)
            session.always.onload()
            session.adapters.onload()
        self.onloaded = True

    def offload(self) -> None:
        """Bring the model to its offload placement; no memory of the device is kept."""
        session, store = self._session, self._session.store
        policy = session.policy
        self.onloaded = False
        with torch.inference_mode(False):
            session.mover.drop_all()
            session.always.release()
            session.adapters.release()
            store.doubt_codes()
            freed = self._masters_wait or policy.compute_device.type == "cpu"
            if self._masters_wait:
                session.page_lock.unlock(store.masters)
                for tier in _TIERS:
                    store.offload(self._tier(tier), policy.rests(on_disk=tier))
                self._masters_wait = False
        if freed:  # masters, or a CPU's window: host RAM
            trim_heap()
        session.hooks.hang_all()

    def _tier(self, on_disk: bool) -> list[Master]:
        """List the masters that wait on disk, or those that wait in host RAM."""
        masters = self._session.store.masters
        return [master for master in masters if master.on_disk == on_disk]

    def adopt_and_lock(self, policy: ResolvedPolicy) -> None:
        """Have masters rest where a policy says, page-locked if copies begin there."""
        session = self._session
        if not policy.waits_where_it_rests:
            self.adopt(policy)
            return
        with locking_beside(session.page_lock, self._tier(False)) as filled:
            self.adopt(policy, filled)
        session.page_lock.lock(session.store.masters)

    def rest_everything(self) -> None:
        """Put everything to rest, so that loading and saving see masters only."""
        session = self._session
        session.edits.sync_masters()
        self.onloaded = False
        with torch.inference_mode(False):
            session.mover.drop_all()
            session.always.release()
        session.hooks.hang_if_needed()  # a part may be called by itself

    def make_room(self, nbytes: int) -> None:
        """Have models that share the limit give way, so that so many bytes fit."""
        group = self._session.group
        if group is not None:
            group.make_room(self._session, nbytes)

    def give_way(
        self, enough: Callable[[], bool] | None, *, owned: bool = False
    ) -> None:
        """Give memory of the compute device back, while other models need it.

        Args:
            enough: says when to stop with residents; None: the window alone.
            owned: this thread owns the model by hand already.
        """
        session = self._session
        owning = nullcontext() if owned else session.ownership.by_hand("making room")
        with owning, torch.inference_mode(False):
            try:
                session.mover.free_window()
                if enough is not None:
                    session.mover.give_up_residents(enough)
            except BaseException:
                session.mover.drop_all()  # nothing may be given up by half
                raise
            finally:
                session.hooks.hang_if_needed()

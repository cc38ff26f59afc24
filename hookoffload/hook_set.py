"""Which of a model's modules carry hooks at the moment."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch.utils.hooks import RemovableHandle

from .hooks import Site
from .layer import Layer
from .outside_hooks import OutsideHooks
from .plan import Plan

if TYPE_CHECKING:
    from .session import Session


class HookSet:
    """Hangs the hooks of a session's sites, and takes off those that are not needed.

    Those of the root are `RootHooks`' and hang from attach to detach.

    Args:
        session: what the sites belong to.

    Attributes:
        all_off: whether no layer needs a hook, because all of them stay bound.
    """

    __slots__ = (
        "_outside_handles",
        "_session",
        "_slimmed_for",
        "_standing_by",
        "all_off",
    )

    def __init__(self, session: Session) -> None:
        self._session = session
        self._outside_handles: list[RemovableHandle] = []
        self._slimmed_for: Plan | None = None
        self._standing_by: dict[int, list[Site]] = {}  # by the layers' indices
        self.all_off = True

    def hang_all(self) -> None:
        """Hang the hooks of every site."""
        self._hang(self._session.sites)
        for entry in self._session.entries:
            entry.register()
        self.all_off = False

    def take_off(self) -> None:
        """Take the hooks off every site."""
        self._hang(())
        self.all_off = True

    def hang_if_needed(self) -> None:
        """Hang the hooks again if they are off and not all layers stay bound."""
        if self.all_off and not self._session.all_stay:
            self.hang_all()

    def slim(self) -> None:
        """Leave no more hooks than steady passes under the plan need."""
        session = self._session
        plan = session.mover.plan
        if plan is None or self._slimmed_for is plan or self.all_off:
            return
        # One of several models has to hear of every call: its residents may give way.
        # So has one whose state dict somebody holds: a write there changes residents.
        alone = session.group is None and not session.inventory.is_watched
        if session.all_stay and alone:
            self._hang([site for site in session.sites if site.casts_buffers])
            self.all_off = True
            return
        if session.recorder is not None:
            return  # it is to see every layer
        heard: set[int] = set()
        self._standing_by = {}
        for site in session.sites:
            indices = [layer.index for layer in site.layers]
            if site is session.root_site or not site.can_stand_by:
                heard.update(indices)
                continue
            for index in indices:  # first: an interrupt leaves it without hooks
                self._standing_by.setdefault(index, []).append(site)
            site.stand_by()
        session.mover.order.hear_only(heard)
        self._slimmed_for = plan

    def slim_again(self) -> None:
        """Have the next pass look anew which hooks it needs."""
        self._slimmed_for = None
        self.all_off = False

    def layer_evicted(self, layer: Layer) -> None:
        """Hang the hooks of a layer that no longer stays bound."""
        self._slimmed_for = None
        for site in self._standing_by.pop(layer.index, ()):
            site.register()
            self._session.mover.order.hear(layer.index)

    def _hang(self, wanted: Collection[Site]) -> None:
        """Hang the hooks of these sites, whole, and of no other ones."""
        session = self._session
        self._slimmed_for = None
        session.mover.order.hear_all()
        wanted = [site for site in wanted if site is not session.root_site]
        kept = set(map(id, wanted))
        for site in (*session.sites, *session.entries):
            if id(site) not in kept:
                site.remove()
        for site in wanted:
            site.register()
        outside = {id(site.module): site for site in wanted if site.outside}
        if outside and not self._outside_handles:
            OutsideHooks(outside).register(self._outside_handles)
        if not outside:
            for handle in self._outside_handles:
                handle.remove()
            self._outside_handles = []
        # Last: an interrupt leaves sites with one hook that still have to be known.
        self._standing_by = {}

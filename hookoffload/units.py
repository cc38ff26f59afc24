"""Modules that move as one layer although modules inside them own tensors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from .budget import BudgetExceededError, format_gib
from .bundles import BundleChoice, most_bytes
from .compiling import captures_cuda_graphs
from .gather import GatherSite
from .resolved_policy import ResolvedPolicy

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

# The window holds three of the largest layer, and something should be resident beside.
_WHOLE_SHARE = 4


class Unit(NamedTuple):
    """Full names of modules.

    Attributes:
        bundles: their layers move as one, see [Note: bundles].
        whole: they move with their subtree, inside of which no hook hangs.
    """

    bundles: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


class Units:
    """Chooses what moves as one in one session, behind passes that showed what can.

    [Note: compiled modules] A graph ends at each hook inside a module that was compiled
    in place. So it moves as a whole, as far as the limit allows: its hooks are at both
    ends of one graph, which knows nothing of residents, limits and places in the window
    and is compiled once for all modules that are alike.

    Attributes:
        now: those in force.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.now = Unit()
        self._choice: BundleChoice | None = None
        self._divided: set[str] = set()  # seen not to work as one
        self._compiled: dict[str, int] = {}  # bytes of modules, by name
        self._look_for_compiled = True
        # What `choose` last chose for: this is asked behind every pass.
        self._chosen_for: tuple[int | None, int] | None = None
        self._told = False
        self._told_of_cuda_graphs = False

    def divide(self, name: str) -> None:
        """Make no unit of a module any more: its layers are called without it."""
        self._divided.add(name)

    def divide_all(self) -> None:
        """Make none of those any more that are in force."""
        if any(self.now):
            self._divided.update(*self.now)
            self.make(Unit())

    def forget(self) -> None:
        """Divide all before layers are made anew: modules may have changed."""
        self.now = Unit()
        self._choice = None
        self._divided = set()
        self._look_for_compiled = True
        self._chosen_for = None

    def note_compiled(self) -> None:
        """Look for modules that were compiled behind the pass under way."""
        self._look_for_compiled = True

    def at(self, policy: ResolvedPolicy) -> Unit:
        """Return the units that there should be at the limit of a policy."""
        room = self._session.planner.room(policy.limit_bytes)
        if room is None:
            return self.now
        whole = tuple(
            name
            for name, nbytes in self._compiled.items()
            if nbytes <= room // _WHOLE_SHARE and name not in self._divided
        )
        bundles: tuple[str, ...] = ()
        if self._choice is not None:
            most = most_bytes(room, self._session.planner.weight_bytes)
            bundles = self._choice.of_at_most(most, self._divided, whole)
        return Unit(bundles, whole)

    def make(self, wanted: Unit) -> None:
        """Make layers anew, of these units as far as the limit allows."""
        session = self._session
        self.now = wanted
        try:
            session.rebuilding.rebuild()
        except BudgetExceededError:
            self.now = Unit()
            self._divided.update(*wanted)
            session.rebuilding.rebuild()

    def choose(self, enclosing: Mapping[str, frozenset[str]]) -> None:
        """Have the units that fit the room which a pass has left.

        Args:
            enclosing: what its probe saw; see `BundleChoice`.
        """
        session = self._session
        if self._choice is None:
            self._choice = BundleChoice(
                session.model, session.sites, session.read_in_place, enclosing
            )
        if self._look_for_compiled:
            self._look_for_compiled = False
            self._compiled = _compiled_in_place(session)
            self._chosen_for = None
            if session.policy.compute_device.type == "cuda":
                self._tell_of_cuda_graphs()
        if self.now.bundles:
            for site in session.sites:
                if site.bundled and site.was_wasted():
                    self._divided.add(site.name)
        room = session.planner.room(session.policy.limit_bytes)
        if self._chosen_for == (room, len(self._divided)):
            return
        self._chosen_for = room, len(self._divided)
        wanted = self.at(session.policy)
        if len(wanted.whole) < len(self._compiled):
            self._tell_of_compiled(set(self._compiled).difference(wanted.whole))
        if wanted != self.now:
            logger.info("%d modules move as one layer each", sum(map(len, wanted)))
            self.make(wanted)

    def _tell_of_cuda_graphs(self) -> None:
        """Warn of what is right and slow: a graph is for one place of its weights."""
        if self._told_of_cuda_graphs:
            return
        modules = self._session.model.named_modules()
        names = [name for name, module in modules if captures_cuda_graphs(module)]
        if not names:
            return
        self._told_of_cuda_graphs = True
        logger.warning(
            '%d modules were compiled to replay CUDA graphs (mode="reduce-overhead"), '
            "such as %s. Weights that stream lie elsewhere each time, and graphs are "
            "captured anew for them: leave the mode out, take "
            'mode="max-autotune-no-cudagraphs", or a limit in which all weights stay',
            len(names),
            names[0] or "the model",
        )

    def _tell_of_compiled(self, names: set[str]) -> None:
        if self._told:
            return
        self._told = True
        name = max(names, key=lambda name: self._compiled[name])
        logger.warning(
            "%d compiled modules are too large to move as one, such as %s with %s: "
            "their graphs end at each layer. A limit that leaves four times as much "
            "for weights would keep them whole",
            len(names),
            name,
            format_gib(self._compiled[name]),
        )


def _compiled_in_place(session: Session) -> dict[str, int]:
    """Find modules that were compiled in place, the outer ones, with their bytes."""
    by_module = {id(site.module): site for site in session.sites}
    users = Counter(layer.index for site in session.sites for layer in site.layers)
    found: dict[str, int] = {}
    last = ""
    for name, module in session.model.named_modules():
        inner = last and name.startswith(f"{last}.")
        if inner or not name or module._compiled_call_impl is None:
            continue
        last = name
        inside = [by_module.get(id(m)) for m in module.modules()]
        sites = [site for site in inside if site is not None]
        here = Counter(layer.index for site in sites for layer in site.layers)
        if not here or any(here[index] != users[index] for index in here):
            continue
        if any(id(p) in session.read_in_place for p in module.parameters()):
            continue
        if not any(s.outside or isinstance(s, GatherSite) for s in sites):
            layers = [session.layers[index] for index in here]
            streams = sum(layer.stream_bytes for layer in layers)
            found[name] = max(streams, sum(layer.cast_bytes for layer in layers))
    return found

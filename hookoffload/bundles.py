"""Bundles: the many small layers inside one module move as one layer.

[Note: bundles]
A layer that streams costs the host about a tenth of a millisecond, however small it
is: a place, copies, events, two hooks. In a UNet of five hundred such layers that is
more than the link needs for their bytes. So what is small beside the limit and runs
inside one module becomes one layer, which that module's hooks bring; those of the
layers inside stand by.

Whether layers run inside a module cannot be told from the model: a forward may call
the children of a module and never the module. The probe sees it. Bundles are therefore
made behind the first pass, and a module whose layers are called without it later is
divided again behind that pass. In between they are right and slow: each such call
brings the whole bundle.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .gather import GatherSite
from .layer import Layer
from .partition import is_called, needs_outside_hooks
from .window_size import largest_for_free

if TYPE_CHECKING:
    from .hooks import Site

# The window holds three of the largest layer: a bundle of a sixteenth of what there is
# for weights leaves most of it to residents, and one of a third of the window that is
# wanted anyway takes nothing from them. 96 MiB take 2 ms at 50 GiB/s, beside which what
# the host does for a layer does not count any more.
BUNDLE_SHARE = 16
BUNDLE_BYTES = 96 * 2**20

# Fewer layers than this less, and making all of them anew does not pay.
LEAST_SAVED = 16

# What no forward has asked for yet may come along if it is at most this part of it.
_UNUSED_SHARE = 8


@dataclass(frozen=True)
class _Candidate:
    """A module whose layers could move as one.

    Attributes:
        name: its full name.
        nbytes: what it would take in the window, or for its casts.
        layers: how many layers it has.
    """

    name: str
    nbytes: int
    layers: int


class BundleChoice:
    """The modules of a model that could be bundles, outer ones first.

    Args:
        model: the root module.
        sites: its sites, as they are without bundles.
        read_in_place: ids of tables that are looked up where they rest.
        enclosing: for the name of each site that was called, the names of the modules
            that were around it in each of its calls.
    """

    __slots__ = ("_candidates",)

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        read_in_place: Collection[int],
        enclosing: Mapping[str, Collection[str]],
    ) -> None:
        by_module = {id(site.module): site for site in sites}
        users: dict[int, int] = {}
        for site in sites:
            for layer in site.layers:
                users[layer.index] = users.get(layer.index, 0) + 1
        self._candidates: list[_Candidate] = []
        for name, module in model.named_modules():
            if module is model or not is_called(module) or needs_outside_hooks(module):
                continue
            if any(id(p) in read_in_place for p in module.parameters()):
                continue
            inside = [by_module.get(id(m)) for m in module.modules()]
            found = [site for site in inside if site is not None and site.layers]
            layers = _layers_of(found, users, name, enclosing)
            if len(layers) > 1:
                nbytes = max(
                    sum(layer.stream_bytes for layer in layers),
                    sum(layer.cast_bytes for layer in layers),
                )
                self._candidates.append(_Candidate(name, nbytes, len(layers)))

    def of_at_most(
        self, nbytes: int, without: Collection[str] = (), whole: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Choose the largest modules of at most so many bytes.

        Args:
            nbytes: the most that one may take.
            without: names of modules that must not be bundles.
            whole: names of modules that move as one otherwise.

        Returns:
            Their full names, none inside another one; none at all if that would save
            too few layers to pay.
        """
        chosen: list[str] = []
        saved = 0
        for candidate in self._candidates:
            name = candidate.name
            inside = chosen and name.startswith(f"{chosen[-1]}.")
            if inside or candidate.nbytes > nbytes or name in without:
                continue
            if any(_overlap(name, other) for other in whole):
                continue
            chosen.append(name)
            saved += candidate.layers - 1
        return tuple(chosen) if saved >= LEAST_SAVED else ()


def _layers_of(
    sites: Sequence[Site],
    users: Mapping[int, int],
    name: str,
    enclosing: Mapping[str, Collection[str]],
) -> list[Layer]:
    """Return the layers of a module's sites; none if they cannot move as one.

    Args:
        sites: those of the module and of all inside it, which bring layers.
        users: how many sites of the whole model need each layer.
        name: the module's full name.
        enclosing: see `BundleChoice`.
    """
    layers: dict[int, Layer] = {}
    here: dict[int, int] = {}
    used: set[int] = set()
    for site in sites:
        if site.outside or isinstance(site, GatherSite):
            return []
        around = enclosing.get(site.name)
        if around is not None and site.name != name and name not in around:
            return []
        for layer in site.layers:
            layers[layer.index] = layer
            here[layer.index] = here.get(layer.index, 0) + 1
            if around is not None:
                used.add(layer.index)
    found = list(layers.values())
    if not found or any(here[index] != users[index] for index in layers):
        return []
    if len({(layer.can_stay, bool(layer.disk_bytes)) for layer in found}) > 1:
        return []  # they do not go the same way
    unused = sum(x.copy_bytes for x in found if x.index not in used)
    total = sum(layer.copy_bytes for layer in found)
    return found if unused * _UNUSED_SHARE <= total and used else []


def _overlap(one: str, other: str) -> bool:
    """Tell whether one of two modules is, or is inside, the other one."""
    return f"{one}.".startswith(f"{other}.") or other.startswith(f"{one}.")


def most_bytes(room: int, total: int) -> int:
    """Return what a bundle may take.

    Args:
        room: bytes that there are for weights.
        total: bytes of all weights.
    """
    most = max(room // BUNDLE_SHARE, largest_for_free(total, room))
    return min(most, BUNDLE_BYTES)

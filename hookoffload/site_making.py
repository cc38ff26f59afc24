"""Which modules get hooks, and of which kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .assembly import Assembly
from .entry_site import EntrySite
from .gather import GatherSite, Lookup, lookup_of
from .hooks import Site
from .partition import SiteSketch, needs_outside_hooks

if TYPE_CHECKING:
    from .session import Session


def make_sites(
    session: Session, assembly: Assembly, moving: set[int]
) -> tuple[list[Site], set[int]]:
    """Make the sites of the modules whose forward needs something done.

    Args:
        session: what they belong to.
        assembly: the layers.
        moving: indices of the layers that the compute device cannot use at rest.

    Returns:
        The sites, and the ids of tables that are read where they rest without one.
    """
    sites: list[Site] = []
    read_in_place: set[int] = set()
    for sketch in assembly.sites:
        layers = tuple(assembly.layers[i] for i in sketch.layers if i in moving)
        lookup = lookup_of(sketch.module, layers, session.policy.compute_device)
        if lookup is Lookup.IN_PLACE:
            read_in_place.add(id(layers[0].masters[0].members[0].tensor))
        elif lookup is Lookup.GATHERED:
            sites.append(GatherSite(session, sketch.name, sketch.module, layers[0]))
        elif layers or _is_needed_empty(session, assembly, sketch):
            site = Site(
                session,
                sketch.name,
                sketch.module,
                layers,
                atomic=sketch.atomic,
                outside=sketch.outside,
                casts_buffers=assembly.casts_buffers(sketch),
            )
            sites.append(site)
    _link_bundles(assembly, sites)
    return sites, read_in_place


def _link_bundles(assembly: Assembly, sites: list[Site]) -> None:
    by_module = {id(site.module): site for site in sites}
    for sketch in assembly.sites:
        site = by_module.get(id(sketch.module))
        if site is not None and sketch.bundle is not None:
            site.bundle = by_module[id(sketch.bundle)]
            site.bundle.bundled += (site,)


def _is_needed_empty(session: Session, assembly: Assembly, sketch: SiteSketch) -> bool:
    """Tell whether a module needs hooks although it brings no layer.

    The probe steps aside in those that have their hooks outside; a part that is called
    while the model is offloaded has to onload it; and one that is called by itself
    finds its buffers as it does in a forward of the root.
    """
    waits_elsewhere = not session.policy.waits_where_it_rests
    return sketch.outside or waits_elsewhere or assembly.casts_buffers(sketch)


def make_entries(session: Session, assembly: Assembly) -> list[EntrySite]:
    """Make sites of the root's children that have none and hold some."""
    have = {id(site.module) for site in session.sites}
    if id(session.model) in assembly.atomic:
        return []
    return [
        EntrySite(session, name, child, ())
        for name, child in session.model.named_children()
        if id(child) not in have
        and id(child) not in assembly.inside_atomic
        and type(child).forward is not nn.Module.forward
        and any(id(module) in have for module in child.modules())
        and not needs_outside_hooks(child)
    ]

"""Model -> layers: which tensors move together, and whose forward needs them.

Everything here only reads the model; nothing is changed before the plan stands.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from .module_map import ModuleMap
from .registered import ManagedTensor, TensorGroup, group_tensors

logger = logging.getLogger(__name__)


@dataclass
class LayerSketch:
    """A layer before it has masters: a module's name and the groups that it moves."""

    name: str
    module: nn.Module
    groups: list[TensorGroup]


@dataclass
class SiteSketch:
    """A module that gets hooks, and the layers that its forward needs.

    Attributes:
        name: full name of the module.
        module: the module.
        layers: indices of layers, its own first.
        atomic: its subtree moves as one and is not entered.
        outside: its hooks must not hang on the module itself (see
            `needs_outside_hooks`).
        buffers: groups of buffers that its forward needs, which belong to no layer.
        bundle: the module around it whose hooks bring its layer, if there is one.
    """

    name: str
    module: nn.Module
    layers: list[int]
    atomic: bool
    outside: bool
    buffers: list[TensorGroup] = field(default_factory=list)
    bundle: nn.Module | None = None


@dataclass
class Partition:
    """What `partition` found.

    Attributes:
        layers: the units that move.
        sites: the modules that get hooks.
        always: groups that are on the compute device whatever happens: buffers, empty
            tensors, and parameters of a root without a forward.
        chains: layers that are bound at the same time at some moment, outermost
            first, one chain a site.
        held: indices of layers during whose forward other layers can run.
    """

    layers: list[LayerSketch]
    sites: list[SiteSketch]
    always: list[TensorGroup]
    chains: list[tuple[int, ...]]
    held: frozenset[int]


def partition(
    model: nn.Module,
    module_map: ModuleMap,
    joined: Sequence[tuple[str, str]] = (),
    bundles: Sequence[str] = (),
    atomic: Sequence[str] = (),
) -> Partition:
    """Divide a model into layers and find the modules whose forward needs them.

    Args:
        model: the root module.
        module_map: what the user wants otherwise than the rules say.
        joined: pairs (user module, tensor name) that the probe found: the user's
            forward reads the tensor although another module owns it.
        bundles: full names of modules whose layers move as one, see [Note: bundles].
        atomic: full names of modules that move with their subtree.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tensors, groups = group_tensors(model)
    _note_other_readers(model, tensors)
    group_of = {id(m.tensor): g for g in groups for m in g.members}
    groups_of: dict[int, list[TensorGroup]] = defaultdict(list)
    by_name: dict[str, ManagedTensor] = {}
    for managed in tensors:
        for holder in managed.holders:
            groups_of[id(holder)].append(group_of[id(managed.tensor)])
        for tensor_name in (managed.name, *managed.aliases):
            by_name.setdefault(tensor_name, managed)  # the bulk of a packed tensor
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[int, _Wanted] = {}
    root_only: list[TensorGroup] = []
    # What is read sideways inside of one comes with it already.
    joined = [(u, t) for u, t in joined if not any(_is_in(u, a) for a in atomic)]
    whole_ids = {id(modules[name]) for name in atomic}
    for owner, module, kind in _units(model, module_map, whole_ids):
        whole = kind == "atomic"
        own = list(module.parameters(recurse=whole))
        own_buffers = list(module.buffers(recurse=whole))
        if not own and not own_buffers:
            continue
        if owner is None:
            root_only.extend(g for p in own for g in groups_of[id(p)])
            continue
        entry = wanted.setdefault(id(owner), _Wanted(owner))
        entry.atomic |= whole and bool(own)
        entry.groups.extend(g for p in own for g in groups_of[id(p)])
        entry.buffers.extend(g for b in own_buffers for g in groups_of[id(b)])
    always = [g for g in groups if g.is_buffer or g.low == g.high]
    always += [g for g in _unique(root_only) if g not in always]
    resting = {id(g) for g in always}
    layers: list[LayerSketch] = []
    layer_of: dict[int, int] = {}
    sites: list[SiteSketch] = []
    # Registration order: a parent's own tensors come before its children's, and a
    # tensor that several modules use belongs to the first of them.
    position = {id(module): i for i, module in enumerate(modules.values())}
    for entry in sorted(wanted.values(), key=lambda e: position[id(e.module)]):
        mine = [g for g in _unique(entry.groups) if id(g) not in resting]
        fresh = [g for g in mine if id(g) not in layer_of]
        name = names[id(entry.module)]
        used = [layer_of[id(g)] for g in mine if id(g) in layer_of]
        if fresh:
            index = len(layers)
            label = name or type(model).__name__  # the root's full name is empty
            layers.append(LayerSketch(label, entry.module, fresh))
            layer_of.update((id(g), index) for g in fresh)
            used.insert(0, index)
        buffers = _unique(entry.buffers)
        if used or buffers:
            outside = bool(used) and needs_outside_hooks(entry.module)
            indices = list(dict.fromkeys(used))
            site = SiteSketch(
                name, entry.module, indices, entry.atomic, outside, buffers
            )
            sites.append(site)
    _join(sites, joined, modules, by_name, layer_of, group_of)
    for name in bundles:
        _bundle(layers, sites, name, modules[name])
    layers = _renumbered(layers, sites)
    chains, held = _nesting(sites)
    return Partition(layers, sites, always, chains, held)


def _note_other_readers(model: nn.Module, tensors: list[ManagedTensor]) -> None:
    """Note which weights of Linear layers are read by fused kernels around them."""
    read = {
        id(parameter)
        for module in model.modules()
        if default_kind(module) == "atomic"
        for parameter in module.parameters()
    }
    for managed in tensors:
        managed.multiplies &= id(managed.tensor) not in read


def _join(
    sites: list[SiteSketch],
    joined: Sequence[tuple[str, str]],
    modules: dict[str, nn.Module],
    by_name: dict[str, ManagedTensor],
    layer_of: dict[int, int],
    group_of: dict[int, TensorGroup],
) -> None:
    """Let the layers of tensors that were read sideways come with their users too."""
    by_module = {id(site.module): site for site in sites}
    for user_name, tensor_name in joined:
        user = modules.get(user_name)
        managed = by_name.get(tensor_name)
        if user is None or managed is None:
            continue  # the model has changed since
        layer = layer_of.get(id(group_of[id(managed.tensor)]))
        site = by_module.get(id(user))
        if layer is None:
            continue
        if site is None:
            site = SiteSketch(user_name, user, [], atomic=False, outside=False)
            by_module[id(user)] = site
            sites.append(site)
        if layer not in site.layers:
            site.layers.append(layer)


def _is_in(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _bundle(
    layers: list[LayerSketch], sites: list[SiteSketch], name: str, module: nn.Module
) -> None:
    """Make one layer of those inside a module; the others are left without tensors."""
    inside = {id(m) for m in module.modules()}
    members = [site for site in sites if site.layers and id(site.module) in inside]
    first, *others = sorted({index for site in members for index in site.layers})
    groups = [group for index in (first, *others) for group in layers[index].groups]
    for index in others:
        layers[index].groups = []
    layers[first] = LayerSketch(name, module, groups)
    for site in members:
        site.layers = [first]
        site.bundle = None if site.module is module else module
    own = next((site for site in sites if site.module is module), None)
    if own is None:
        own = SiteSketch(name, module, [], atomic=False, outside=False)
        sites.append(own)
    own.layers = [first]  # it may have had buffers only


def _renumbered(
    layers: list[LayerSketch], sites: list[SiteSketch]
) -> list[LayerSketch]:
    """Leave out layers without tensors."""
    kept = [index for index, layer in enumerate(layers) if layer.groups]
    if len(kept) == len(layers):
        return layers
    place = {index: number for number, index in enumerate(kept)}
    for site in sites:
        site.layers = [place[index] for index in site.layers]
    return [layers[index] for index in kept]


@dataclass
class _Wanted:
    """A module whose forward needs tensors, while they are being collected."""

    module: nn.Module
    groups: list[TensorGroup] = field(default_factory=list)
    buffers: list[TensorGroup] = field(default_factory=list)
    atomic: bool = False


def _units(
    model: nn.Module, module_map: ModuleMap, atomic: Collection[int]
) -> Iterator[tuple[nn.Module | None, nn.Module, Literal["layer", "atomic"]]]:
    """Yield (module whose forward needs the tensors, module that owns them, kind)."""
    seen: set[int] = set()

    def walk(
        module: nn.Module, caller: nn.Module | None
    ) -> Iterator[tuple[nn.Module | None, nn.Module, Literal["layer", "atomic"]]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        kind = module_map.kind_of(module) or default_kind(module)
        if id(module) in atomic:
            kind = "atomic"
        if is_called(module):
            caller = module
        yield caller, module, kind
        if kind == "layer":
            for child in module.children():
                yield from walk(child, caller)

    yield from walk(model, None)


def is_called(module: nn.Module) -> bool:
    """Tell whether a module can be called: containers without a forward never are."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return True  # compiled modules and other wrappers set it on the instance
    return type(module).forward is not nn.Module.forward


def default_kind(module: nn.Module) -> Literal["layer", "atomic"]:
    """Return "atomic" for classes whose forward reads their children's tensors."""
    atomic = (
        isinstance(module, _READ_THEIR_CHILDREN)
        or parametrize.is_parametrized(module)
        or type(module).__name__ == "OptimizedModule"
    )
    return "atomic" if atomic else "layer"


_READ_THEIR_CHILDREN = (
    nn.MultiheadAttention,
    nn.RNNBase,
    # Its fused path reads all tensors of the subtree and calls no child.
    nn.TransformerEncoderLayer,
    torch.jit.ScriptModule,
)


def needs_outside_hooks(module: nn.Module) -> bool:
    """Tell whether hooks on a module would change what it computes.

    A transformer encoder layer takes its fused path only if no module in its subtree
    has a hook, and the two paths differ in the last bits. Scripted modules refuse
    hooks.
    """
    return isinstance(module, nn.TransformerEncoderLayer | torch.jit.ScriptModule)


def _unique(groups: list[TensorGroup]) -> list[TensorGroup]:
    return list({id(group): group for group in groups}.values())


def _nesting(
    sites: list[SiteSketch],
) -> tuple[list[tuple[int, ...]], frozenset[int]]:
    """Find the chains of sites that run inside one another, and the held layers."""
    sites = [site for site in sites if site.layers]
    by_module = {id(site.module): site for site in sites}
    inside: dict[int, list[SiteSketch]] = {id(s): [] for s in sites}
    for site in sites:
        if site.atomic:
            continue
        for module in site.module.modules():
            other = by_module.get(id(module))
            if other is not None and other is not site:
                inside[id(other)].append(site)
    chains: list[tuple[int, ...]] = []
    held: set[int] = set()
    for site in sites:
        # An ancestor contains more sites than its descendants do.
        outer = sorted(inside[id(site)], key=lambda s: len(inside[id(s)]))
        for ancestor in outer:
            if not set(site.layers) <= set(ancestor.layers):
                held.update(ancestor.layers)
        if len(site.layers) > 1:
            held.update(site.layers)
        chain = [i for s in (*outer, site) for i in s.layers]
        chains.append(tuple(dict.fromkeys(chain)))
    return chains, frozenset(held)

"""Partition -> layers with masters: what a session works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .codec import Codec, choose_codec, is_castable
from .layer import Layer
from .master import Master
from .partition import Partition, SiteSketch, TensorGroup
from .policy import ResolvedPolicy
from .safetensors_file import TensorLocation


@dataclass(frozen=True)
class Assembly:
    """A model's layers and masters, and where hooks are needed.

    Attributes:
        layers: the layers; ``layers[i].index == i``.
        always: a layer of everything that is on the compute device whatever happens.
        always_cast: the same for what has another dtype there than at rest.
        chains: layers that are bound at the same time at some moment.
        sites: modules that need hooks; none if nothing moves.
        atomic: ids of modules that move with their subtree.
        inside_atomic: ids of modules inside atomic ones.
        masters: every master, by the id of its first tensor object.
    """

    layers: list[Layer]
    always: Layer
    always_cast: Layer
    chains: list[tuple[int, ...]]
    sites: list[SiteSketch]
    atomic: frozenset[int]
    inside_atomic: frozenset[int]
    masters: dict[int, Master]

    @property
    def moved_masters(self) -> list[Master]:
        """The masters of the layers, without those that are always on the device."""
        return [master for layer in self.layers for master in layer.masters]

    @property
    def always_bytes(self) -> int:
        """Bytes that are on the compute device whatever happens."""
        return self.always.resident_bytes + self.always_cast.resident_bytes

    def casts_buffers(self, sketch: SiteSketch) -> bool:
        """Tell whether buffers of a site have another dtype while a call goes on."""
        masters = (self.masters[id(g.members[0].tensor)] for g in sketch.buffers)
        return any(master.codec.casts_streamed for master in masters)

    @property
    def moving(self) -> set[int]:
        """Indices of the layers that the compute device cannot use where they rest."""
        return {layer.index for layer in self.layers if not layer.in_place}


def assemble(
    found: Partition,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    known: dict[int, Master],
    prepare: Callable[[list[Master]], None] | None = None,
) -> Assembly:
    """Make layers from a partition; changes no tensor.

    Args:
        found: the partition.
        policy: where masters rest and in which dtypes.
        locations: where the bytes of tensors lie that were never in memory, by name.
        known: masters from an earlier assembly of the same model, which are kept.
        prepare: called with the masters of layers before these are measured.
    """
    masters: dict[int, Master] = {}

    def master_of(group: TensorGroup, *, always: bool = False) -> Master:
        key = id(group.members[0].tensor)
        master = known.get(key)
        if master is None or not master.is_of(group):
            master = make_master(group, policy, locations, always=always)
        masters[key] = master
        return master

    layers = []
    for index, sketch in enumerate(found.layers):
        layer = Layer(index, sketch.name, [master_of(g) for g in sketch.groups])
        layer.held = index in found.held
        layers.append(layer)
    if prepare is not None:
        prepare([master for layer in layers for master in layer.masters])
    for layer in layers:
        layer.measure(
            policy.compute_device,
            on_disk=policy.onload.on_disk,
            may_stay=policy.preparing is not None,
        )
    fixtures = [master_of(group, always=True) for group in found.always]
    always = Layer(-1, "buffers", [m for m in fixtures if not m.codec.casts_streamed])
    always.measure(policy.compute_device, on_disk=False, may_stay=True)
    cast = Layer(-2, "cast buffers", [m for m in fixtures if m.codec.casts_streamed])
    cast.measure(policy.compute_device, on_disk=False, may_stay=True)
    moves = any(not layer.in_place for layer in layers)
    return Assembly(
        layers=layers,
        always=always,
        always_cast=cast,
        chains=found.chains,
        sites=found.sites
        if moves or cast.masters or policy.offload != policy.onload
        else [],
        atomic=frozenset(id(s.module) for s in found.sites if s.atomic),
        inside_atomic=frozenset(
            id(module)
            for sketch in found.sites
            if sketch.atomic
            for module in sketch.module.modules()
            if module is not sketch.module
        ),
        masters=masters,
    )


def make_master(
    group: TensorGroup,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    *,
    always: bool,
) -> Master:
    """Make the master of a tensor group: its dtypes, and its file if it has one.

    What is always on the device rests uncast, and lies there as it computes.
    """
    names = [n for m in group.members for n in (m.name, *m.aliases)]
    location = next((locations[name] for name in names if name in locations), None)
    first = group.members[0].tensor
    one_dtype = len({m.tensor.dtype for m in group.members}) == 1
    if not one_dtype or not all(is_castable(m.tensor) for m in group.members):
        return Master(group, Codec(first.dtype, first.dtype, first.dtype), location)
    storage = None
    if not always:
        waits = policy.offload if policy.onload.on_disk else policy.onload
        # A user's file keeps its dtype: the cast happens on the compute device.
        from_file = location is not None and policy.onload.on_disk
        storage = None if from_file else waits.dtype
    kept = policy.preparing.dtype if policy.preparing is not None else None
    codec = choose_codec(
        first,
        storage_dtype=storage,
        resident_dtype=policy.compute_dtype if always else kept,
        compute_dtype=policy.compute_dtype,
    )
    return Master(group, codec, location)

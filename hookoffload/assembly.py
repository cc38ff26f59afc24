"""Partition -> layers with masters: what a session works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .codec import Codec, choose_codec
from .fp8 import wide_dtype
from .fp8_choice import multiplies_in_fp8
from .gather import can_gather
from .layer import Layer
from .master import Master
from .partition import Partition, SiteSketch
from .plan import LayerSpec
from .registered import TensorGroup
from .resolved_policy import ResolvedPolicy
from .safetensors_file import TensorLocation
from .tiers import host_bytes_left, host_tier

HostSize = Callable[[Master], int]


def plain_size(master: Master) -> int:
    """Return what a master takes in host RAM if nothing of it is coded there."""
    return master.plain_bytes


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
    host_size: HostSize = plain_size,
) -> Assembly:
    """Make layers from a partition; changes no tensor.

    Args:
        found: the partition.
        policy: where masters rest and in which dtypes.
        locations: where the bytes of tensors lie that were never in memory, by name.
        known: masters from an earlier assembly of the same model, which are kept.
        prepare: called with the masters of layers before these are measured.
        host_size: what a master takes where it waits in host RAM.
    """
    masters: dict[int, Master] = {}
    may_stay = policy.preparing is not None

    def master_of(
        group: TensorGroup, *, always: bool = False, on_disk: bool = False
    ) -> Master:
        master = _known(group, known)
        if master is not None:
            master.rename(group)
        else:
            master = make_master(
                group, policy, locations, always=always, on_disk=on_disk
            )
        masters[id(group.members[0].tensor)] = master
        return master

    in_ram = choose_tiers(found, policy, locations, known, host_size)
    layers = []
    for index, sketch in enumerate(found.layers):
        on_disk = index not in in_ram
        taken = [master_of(group, on_disk=on_disk) for group in sketch.groups]
        layer = Layer(index, sketch.name, taken)
        layer.held = index in found.held
        layers.append(layer)
    if prepare is not None:
        prepare([master for layer in layers for master in layer.masters])
    for layer in layers:
        layer.measure(policy.compute_device, may_stay=may_stay)
    fixtures = [master_of(group, always=True) for group in found.always]
    always = Layer(-1, "buffers", [m for m in fixtures if not m.codec.casts_streamed])
    always.measure(policy.compute_device, may_stay=True)
    cast = Layer(-2, "cast buffers", [m for m in fixtures if m.codec.casts_streamed])
    cast.measure(policy.compute_device, may_stay=True)
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


def _known(group: TensorGroup, known: dict[int, Master]) -> Master | None:
    master = known.get(id(group.members[0].tensor))
    return master if master is not None and master.is_of(group) else None


def choose_tiers(
    found: Partition,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    known: dict[int, Master],
    host_size: HostSize,
) -> frozenset[int]:
    """Choose the layers whose masters wait in host RAM, by index.

    Args:
        found: the partition.
        policy: the host limit, and in which dtypes masters rest.
        locations: where the bytes of tensors lie, by name, if not in host RAM.
        known: masters that stay where they are, and count first.
        host_size: what a master takes where it waits in host RAM.
    """
    everything = frozenset(range(len(found.layers)))
    if policy.host_limit_bytes is None:
        return frozenset() if policy.onload.on_disk else everything
    waiting_before = 0
    specs = []
    for index, sketch in enumerate(found.layers):
        tiers: dict[bool, list[Master]] = {False: [], True: []}
        for group in sketch.groups:
            before = _known(group, known)
            if before is not None:
                waiting_before += 0 if before.on_disk else before.nbytes
                tiers[True].append(before)
                continue
            for on_disk, masters in tiers.items():
                made = make_master(
                    group, policy, locations, always=False, on_disk=on_disk
                )
                masters.append(made)
        layer = Layer(index, sketch.name, tiers[True])
        layer.measure(policy.compute_device, may_stay=True)
        spec = LayerSpec(
            name=sketch.name,
            stream_bytes=layer.stream_bytes,
            copy_bytes=layer.copy_bytes,
            resident_bytes=layer.resident_bytes,
            held=index in found.held,
            host_bytes=sum(map(host_size, tiers[False])),
        )
        specs.append(spec)
    room = host_bytes_left(
        specs, policy.host_limit_bytes - waiting_before, policy.compute_device.type
    )
    looked_up = only_looked_up(found)
    order = [index for index in range(len(specs)) if index not in looked_up]
    return host_tier(specs, order, room)


def only_looked_up(found: Partition) -> set[int]:
    """List the layers that only embeddings need, which look rows up in the master."""
    moved = {
        index
        for site in found.sites
        if not can_gather(site.module)
        for index in site.layers
    }
    return {index for site in found.sites for index in site.layers} - moved


def make_master(
    group: TensorGroup,
    policy: ResolvedPolicy,
    locations: dict[str, TensorLocation],
    *,
    always: bool,
    on_disk: bool,
) -> Master:
    """Make the master of a tensor group: its dtypes, and its file if it has one.

    What is always on the device rests uncast, and lies there as it computes.

    Args:
        group: the tensors.
        policy: where masters rest and in which dtypes.
        locations: where the bytes of tensors lie that were never in memory, by name.
        always: it is on the compute device whatever happens.
        on_disk: it waits in a file.
    """
    names = [n + m.path for m in group.members for n in (m.name, *m.aliases)]
    location = next((locations[name] for name in names if name in locations), None)
    first = group.members[0].tensor
    one_dtype = len({m.tensor.dtype for m in group.members}) == 1
    if not one_dtype or not all(m.castable for m in group.members):
        codec = Codec(first.dtype, first.dtype, first.dtype)
        return Master(group, codec, location, on_disk=on_disk)
    storage = None
    if not always:
        # A user's file keeps its dtype: the cast happens on the compute device.
        from_file = location is not None and on_disk
        storage = None if from_file else policy.waits(on_disk=on_disk).dtype
    kept = policy.preparing.dtype if policy.preparing is not None else None
    compute = policy.compute_dtype
    codec = choose_codec(
        first,
        storage_dtype=storage,
        resident_dtype=wide_dtype(first.dtype, compute) if always else kept,
        compute_dtype=compute,
        multiplies=not always and multiplies_in_fp8(group, policy),
    )
    return Master(group, codec, location, on_disk=on_disk)

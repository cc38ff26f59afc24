"""Everything that is attached to one model: its hooks, its layers, its plan."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .budget import BudgetExceededError, MemoryBudget, format_gib
from .calls import CallTracker
from .checkpoint import TensorLocation
from .codec import Codec, choose_codec, is_castable
from .hooks import (
    GatherSite,
    OutsideHooks,
    RootHooks,
    Site,
    can_gather,
    map_tensors,
    tensors_in,
)
from .layer import Layer
from .mover import LayerMover
from .partition import Partition, TensorGroup, partition
from .planner import LayerSpec, Plan, make_plan
from .policy import Placement, ResolvedPolicy
from .probe import Probe
from .report import OffloadStats
from .state_hooks import StateHooks
from .store import Master, Store

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()

# Looking rows up in the master pays when the table is larger than a few copies.
_GATHER_BYTES = 2**20


class Session:
    """One attached model.

    [Note: attach is all or nothing] The constructor only reads: it divides the model
    and plans, and raises before anything has changed. `begin` changes the model and
    puts everything back if any step fails. `end` undoes it all.

    Args:
        model: the root module.
        policy: what the user wants, with nothing left open.
        locations: where the bytes of tensors lie that were never in memory.
        poison: overwrite released memory, to find late readers.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ResolvedPolicy,
        locations: dict[str, TensorLocation],
        *,
        poison: bool = False,
    ) -> None:
        self.model = model
        self.policy = policy
        self.map = policy.module_map.for_model(model)
        self._locations = locations
        # As little as possible is what the plan finds out, not a number to hold.
        self.budget = MemoryBudget(policy.limit_bytes or None)
        self.mover = LayerMover(policy.compute_device, self.budget, poison=poison)
        self.probe: Probe | None = None
        self.sites: list[Site] = []
        self.layers: list[Layer] = []
        self.inside_atomic: frozenset[int] = frozenset()
        self.onloaded = False
        self._masters: dict[int, Master] = {}
        self._joined: list[tuple[str, str]] = []
        self._stand_in: torch.Tensor | None = None
        self._global_handles: list[RemovableHandle] = []
        self._probe_next = True
        self._hooks_hang = False
        self._activations: int | None = None  # measured, bytes
        self._measured_size = -1  # input elements of the pass that measured them
        self._measuring = False
        self._held_when_measured = 0
        self._peak = 0
        self._warned: set[str] = set()
        self.calls = CallTracker(frozenset(id(m) for m in model.modules()))
        self.root = RootHooks(self, model)
        self.state_hooks = StateHooks(self)
        self._build(partition(model, self.map))
        self.plan = self._make_plan()
        moved = [m for layer in self.layers for m in layer.masters]
        self.store = Store(moved, policy.disk_dir)

    # -- what there is --------------------------------------------------------------

    def _build(self, found: Partition) -> None:
        """Make layers, masters and sites from a partition; changes no tensor."""
        known = self._masters
        masters: dict[int, Master] = {}

        def master_of(group: TensorGroup) -> Master:
            key = id(group.members[0].tensor)
            master = known.get(key)
            if master is None or len(master.members) != len(group.members):
                master = self._make_master(group)
            masters[key] = master
            return master

        policy = self.policy
        self.layers = []
        for index, sketch in enumerate(found.layers):
            layer = Layer(index, sketch.name, [master_of(g) for g in sketch.groups])
            layer.measure(
                policy.compute_device,
                on_disk=policy.onload.on_disk,
                may_stay=policy.preparing is not None,
            )
            layer.held = index in found.held
            self.layers.append(layer)
        self.always = Layer(-1, "buffers", [master_of(g) for g in found.always])
        self.always.measure(policy.compute_device, on_disk=False, may_stay=True)
        self._masters = masters
        self._chains = found.chains
        moves = any(not layer.in_place for layer in self.layers)
        self.sites = [
            site
            for sketch in found.sites
            if moves
            and (
                site := self._make_site(
                    sketch.name,
                    sketch.module,
                    tuple(self.layers[i] for i in sketch.layers),
                    atomic=sketch.atomic,
                    outside=sketch.outside,
                )
            )
        ]
        self.inside_atomic = frozenset(
            id(module)
            for sketch in found.sites
            if sketch.atomic
            for module in sketch.module.modules()
            if module is not sketch.module
        )
        predicted = [layer.index for layer in self.layers if not layer.in_place]
        self.mover.set_layers(self.layers, predicted)

    def _make_master(self, group: TensorGroup) -> Master:
        policy = self.policy
        location = next(
            (
                self._locations[name]
                for managed in group.members
                for name in (managed.name, *managed.aliases)
                if name in self._locations
            ),
            None,
        )
        storage = None
        if not group.is_buffer:
            waits = policy.offload if policy.onload.on_disk else policy.onload
            # A user's file keeps its dtype: the cast happens on the compute device.
            from_file = location is not None and policy.onload.on_disk
            storage = None if from_file else waits.dtype
        kept = policy.preparing.dtype if policy.preparing is not None else None
        first = group.members[0].tensor
        plain = len({m.tensor.dtype for m in group.members}) == 1 and all(
            is_castable(m.tensor) for m in group.members
        )
        if not plain:
            return Master(group, Codec(first.dtype, first.dtype, first.dtype), location)
        codec = choose_codec(
            first,
            storage_dtype=storage,
            resident_dtype=policy.compute_dtype if group.is_buffer else kept,
            compute_dtype=policy.compute_dtype,
        )
        return Master(group, codec, location)

    def _make_site(
        self,
        name: str,
        module: nn.Module,
        layers: tuple[Layer, ...],
        *,
        atomic: bool,
        outside: bool,
    ) -> Site | None:
        layers = tuple(layer for layer in layers if not layer.in_place)
        gathers = len(layers) == 1 and can_gather(module) and not outside
        table = layers[0] if gathers else None
        if table is not None and len(table.masters) == 1:
            master = table.masters[0]
            at_rest_as_computed = not master.codec.casts_streamed
            if self.policy.compute_device.type == "cpu" and at_rest_as_computed:
                return None  # rows are read from the memory map of the file
            if len(master.members) == 1 and master.nbytes >= _GATHER_BYTES:
                return GatherSite(self, name, module, table)
        if not layers and not outside:  # (the probe steps aside in those outside)
            return None
        return Site(self, name, module, layers, atomic=atomic, outside=outside)

    def _make_plan(
        self, activations: int = 0, *, keep_residents: bool = True
    ) -> Plan:
        """Plan for the limit.

        Tables whose rows are looked up stay out of it, unless the whole model fits.
        """
        everything = {layer.index for layer in self.layers if not layer.in_place}
        if keep_residents and self._fits_whole(activations):
            try:
                whole = self._plan_for(everything, activations, keep_residents=True)
            except BudgetExceededError:
                whole = None  # all but the casts would fit
            if whole is not None and whole.resident == everything:
                return whole
        moved = {
            layer.index
            for site in self.sites
            if not isinstance(site, GatherSite)
            for layer in site.layers
        }
        plan = self._plan_for(moved, activations, keep_residents=keep_residents)
        if self._onload_on_device and self.policy.limit_bytes:
            whole_bytes = self._always_bytes() + sum(
                self.layers[index].resident_bytes for index in everything
            )
            raise BudgetExceededError(
                f"onload=Placement(device={str(self.policy.onload.device)!r}) keeps the "
                f"whole model on the compute device, {format_gib(whole_bytes)}, which "
                f"limit_gb={self.policy.limit_bytes / 2**30:g} does not allow. Onload "
                'to "cpu" or "disk", or raise limit_gb'
            )
        return plan

    def _plan_for(
        self, used: set[int], activations: int, *, keep_residents: bool
    ) -> Plan:
        unlimited = self._onload_on_device and self.policy.limit_bytes == 0
        return make_plan(
            [self._spec(layer, layer.index in used) for layer in self.layers],
            order=[i for i in self.mover.order.sequence if i in used],
            chains=[tuple(i for i in chain if i in used) for chain in self._chains],
            limit_bytes=None if unlimited else self.policy.limit_bytes,
            always_bytes=self._always_bytes(),
            activation_bytes=activations,
            keep_residents=keep_residents,
        )

    def _fits_whole(self, activations: int) -> bool:
        limit = self.policy.limit_bytes
        if any(not layer.can_stay for layer in self.layers if not layer.in_place):
            return False
        if limit is None:
            return True
        whole = sum(layer.resident_bytes for layer in self.layers)
        return self._always_bytes() + whole + activations <= limit

    @property
    def _onload_on_device(self) -> bool:
        device = self.policy.onload.device
        return isinstance(device, torch.device) and device.type != "cpu"

    @staticmethod
    def _spec(layer: Layer, used: bool) -> LayerSpec:
        if not used or layer.in_place:
            return LayerSpec(
                name=layer.name, stream_bytes=0, copy_bytes=0, can_stay=False
            )
        return LayerSpec(
            name=layer.name,
            stream_bytes=layer.stream_bytes,
            copy_bytes=layer.copy_bytes,
            cast_bytes=layer.cast_bytes,
            resident_bytes=layer.resident_bytes,
            resident_cast_bytes=layer.resident_cast_bytes,
            held=layer.held,
            can_stay=layer.can_stay,
        )

    def _always_bytes(self) -> int:
        return self.always.resident_bytes

    # -- begin and end --------------------------------------------------------------

    def begin(self) -> None:
        """Take the masters over and hang the hooks, or put everything back."""
        policy = self.policy
        try:
            self._adopt_buffers(self.always.masters)
            self.store.adopt(self.store.masters, policy.offload)
            self.register_hooks()
            self.state_hooks.register()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Take the hooks off and give the model back as it was."""
        if self.probe is not None:
            self.probe.abandon()
            self.probe = None
        self.remove_hooks()
        self.root.remove()
        self.state_hooks.remove()
        try:
            self.mover.drop_all()
            self._release_always()
            Store(self.always.masters, None).restore()
            self.store.restore()
        finally:
            self.mover.close()
            self.onloaded = False

    def register_hooks(self) -> None:
        """Hang the hooks on the root and on every site.

        A transformer encoder layer takes its fused path only if no module in its
        subtree has a hook, and the two paths differ in the last bits. Its site is
        called from PyTorch's global module hooks, which exist for as long as a model
        with such a layer is attached.
        """
        for site in self.sites:
            site.register()
        outside = {id(site.module): site for site in self.sites if site.outside}
        if outside and not self._global_handles:
            hooks = OutsideHooks(outside)
            self._global_handles = [
                torch_module.register_module_forward_pre_hook(hooks.pre),
                torch_module.register_module_forward_hook(hooks.post, always_call=True),
            ]
        # Last, so that its prepended pre hook runs before that of the root's own site.
        self.root.remove()
        self.root.register()
        self._hooks_hang = True

    def remove_hooks(self) -> None:
        """Take the hooks off every site; those of the root stay."""
        for site in self.sites:
            site.remove()
        for handle in self._global_handles:
            handle.remove()
        self._global_handles = []
        self._hooks_hang = False

    # -- calls ----------------------------------------------------------------------

    def enter_call(self) -> None:
        """Let the current thread in, after those that are inside."""
        if self.calls.enter():
            self._forget_interrupted_calls()

    def leave_call(self) -> None:
        """Come out of one hooked call."""
        self.calls.leave()

    def recover(self) -> None:
        """Clean up behind a call that never reached its post hook (Ctrl-C)."""
        self.calls.release()
        self._forget_interrupted_calls()

    def _forget_interrupted_calls(self) -> None:
        logger.info("cleaning up behind an interrupted forward")
        if self.probe is not None:
            self.probe.abandon()
            self.probe = None
        for site in self.sites:
            site.forget_calls()
        self.root.active = 0
        self.mover.drop_all()
        self.mover.order.end_pass(complete=False)
        self._probe_next = True

    def require_idle(self, what: str) -> None:
        """Raise if the model is running in this thread; wait for other threads.

        The caller owns the model afterwards and must call `leave_call`.
        """
        self.enter_call()
        if self.calls.depth > 1:
            if self.calls.runs_here():
                self.calls.leave()
                raise RuntimeError(
                    f"{what} was called from inside the model's own forward; call it "
                    "between two forwards"
                )
            self.recover()
            self.calls.enter()

    # -- passes ---------------------------------------------------------------------

    def begin_pass(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Get ready for one forward of the root; return inputs that were moved."""
        self.store.check_unchanged()
        if self.state_hooks.replaced_parameters():
            self._take_over_replaced()
        self.onload()
        self._replan(args, kwargs)
        if self._probe_next and self.sites:
            self.probe = Probe(self)
        self.mover.order.begin_pass()
        if not self.all_stay:
            self.mover.prefetch()
        inputs = self.to_compute_device((args, kwargs))
        if self.probe is not None:
            self.probe.begin()
        return inputs  # type: ignore[no-any-return]

    def end_pass(self, *, complete: bool) -> None:
        """Account for the forward that has ended."""
        joined: list[tuple[str, str]] = []
        if self.probe is not None:
            joined = self.probe.end()
            self.probe = None
        # A tensor may be used sideways on a path that this pass did not take: look
        # again after an exception, which may come from just that.
        self._probe_next = not complete
        self.mover.order.end_pass(complete)
        self.mover.counters.forwards += complete
        self._account(complete)
        if joined:
            self._join(joined)
        if self.all_stay and self._hooks_hang:
            self.remove_hooks()

    @property
    def all_stay(self) -> bool:
        """Whether every layer is bound between passes, so that no hook is needed."""
        return all(layer.stays_bound or layer.in_place for layer in self.layers)

    def _replan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide the plan of the pass that begins; on a CPU it never changes.

        [Note: the limit and activations] On an accelerator the limit bounds what
        PyTorch's allocator reaches. How much of that the activations take is measured
        in a pass that streams everything: the first one, and each one whose inputs
        are larger than all before. What other code of this process holds at the
        beginning of a pass counts as well.
        """
        memory = self.mover.memory
        if not self.policy.limit_bytes or not memory.measures_peak:
            self.mover.apply(self.plan)
            return
        size = sum(t.numel() for t in tensors_in((args, kwargs)))
        if self._activations is None or size > self._measured_size:
            self._measuring = True
            self._measured_size = max(size, self._measured_size)
            # Unknown activations get three quarters of what is not needed at least.
            least = self.plan.least_bytes
            spare = max(self.policy.limit_bytes - least, 0) * 3 // 4
            self.mover.apply(self._make_plan(spare, keep_residents=False))
            self._hang_hooks_again()
            memory.reset_peak()
            return
        held = (memory.allocated_bytes() or 0) - self.budget.used
        growth = held - self._held_when_measured
        wanted = self._activations + max(growth, 0)
        if wanted > self.plan.activation_bytes:
            self.plan = self._make_plan(wanted + max(growth, 0) // 4)
        self.mover.apply(self.plan)
        self._hang_hooks_again()

    def _hang_hooks_again(self) -> None:
        if not self._hooks_hang and not self.all_stay:
            self.register_hooks()

    def _account(self, complete: bool) -> None:
        memory = self.mover.memory
        peak = memory.peak_bytes()
        if peak is None:
            return
        self._peak = max(self._peak, peak)
        limit = self.policy.limit_bytes
        if not limit:
            return
        beside = peak - self.budget.used
        if self._measuring and complete:
            self._measuring = False
            self._activations = beside
            self._held_when_measured = (memory.allocated_bytes() or 0) - self.budget.used
            self.plan = self._make_plan(beside)
        if peak > limit:
            self._warn_over_limit(peak, beside, limit)
            self._activations = max(self._activations or 0, beside)

    def _warn_over_limit(self, peak: int, beside: int, limit: int) -> None:
        if "limit" in self._warned:
            return
        self._warned.add("limit")
        logger.warning(
            "limit_gb=%g was exceeded: the peak was %s, of which activations and other "
            "tensors of this process took %s and the model's weights %s. A smaller "
            "input (batch, resolution, context) or limit_gb=%.3g would keep it",
            limit / 2**30,
            format_gib(peak),
            format_gib(beside),
            format_gib(self.budget.used),
            (beside + self.plan.least_bytes) / 2**30 + 0.01,
        )

    def _join(self, joined: list[tuple[str, str]]) -> None:
        """Let tensors that were used sideways come with the modules that use them."""
        before = self._joined
        self._joined = list(dict.fromkeys([*before, *joined]))
        try:
            self._rebuild()
        except BudgetExceededError as error:
            logger.warning(
                "%s read(s) weights of other modules, which do not fit the limit for "
                "that long; they are brought in each time they are used. %s",
                ", ".join(sorted({user or "the model" for user, _ in joined})),
                error,
            )
            self._joined = before
            self._rebuild()
            self._probe_next = True

    def _take_over_replaced(self) -> None:
        """Manage parameters that replaced others (``load_state_dict(assign=True)``)."""
        self._release_always()
        self._rebuild()
        moved = [m for layer in self.layers for m in layer.masters]
        self.store.replace_masters(moved, self.policy.offload)
        if self.onloaded and self.policy.offload.on_disk:
            self.onloaded = False
        self._adopt_buffers(self.always.masters)

    @staticmethod
    def _adopt_buffers(masters: list[Master]) -> None:
        """Have buffers rest in host RAM: they are small, and forwards write to them."""
        Store([], None).adopt(masters, Placement(device="cpu"))

    def _rebuild(self) -> None:
        self.remove_hooks()
        self.mover.drop_all()
        self._build(partition(self.model, self.map, self._joined))
        self.plan = self._make_plan(self._activations or 0)
        self.register_hooks()
        self.state_hooks.renew()
        self._held_when_measured = 0

    # -- states ---------------------------------------------------------------------

    def onload(self) -> None:
        """Bring the model to its onload placement, if it is not there."""
        if self.onloaded:
            return
        if self.policy.offload.on_disk and not self.policy.onload.on_disk:
            self.store.onload()
        self._bind_always()
        self.onloaded = True

    def offload(self) -> None:
        """Bring the model to its offload placement; no memory of the device is kept."""
        self.mover.drop_all()
        self._release_always()
        if self.onloaded and self.policy.offload.on_disk:
            self.store.offload()
        self.onloaded = False
        self.register_hooks()

    def _bind_always(self) -> None:
        """Put buffers on the compute device, for as long as the model is onloaded."""
        layer = self.always
        if layer.stays_bound or not layer.pieces:
            return
        memory = self.mover.memory
        layer.resident = []
        for piece in layer.pieces:
            master = piece.master
            dtype = torch.uint8 if master.mixed else master.codec.resident
            size = master.count * dtype.itemsize
            block = memory.allocate("always", size, master.name)
            layer.resident.append(block)
            block.typed(dtype)[: master.count].copy_(master.flat)
        layer.bind(None, None)
        layer.stays_bound = True

    def _release_always(self) -> None:
        layer = self.always
        if layer.stays_bound:
            self._take_buffers_back()
            layer.put_to_rest()
            layer.stays_bound = False
        for block in layer.resident or ():
            self.mover.memory.free(block)
        layer.resident = None

    def _take_buffers_back(self) -> None:
        """Copy buffers that a forward wrote to into their masters.

        Some kernels write to statistics without moving their version (batch norm does
        under inference mode), so values are compared; buffers are few and small.
        """
        for piece in self.always.pieces:
            for member in piece.master.members:
                if not torch.equal(member.tensor.data, member.rest.to(member.tensor)):
                    member.rest.copy_(member.tensor.data)
                    piece.master.dirty = True

    def sync_masters(self) -> None:
        """Bring what was written to bound tensors into their masters."""
        if self.always.stays_bound:
            self._take_buffers_back()
        for layer in self.layers:
            self.mover.sync(layer)

    def rest_for_loading(self) -> None:
        """Put everything to rest, so that loading writes to masters only."""
        self.sync_masters()
        self.mover.drop_all()
        self._release_always()
        self.onloaded = False

    # -- what hooks need ------------------------------------------------------------

    def bind(self, layer: Layer) -> None:
        """Bind a layer for a forward that begins."""
        with self._unwatched():
            if not self.onloaded:  # a submodule is called, and the root never was
                self.onload()
            if self.mover.plan is None:
                self.mover.apply(self.plan)
            self.mover.bind(layer)

    def release(self, layer: Layer) -> None:
        """Release a layer behind a forward that has ended."""
        with self._unwatched():
            self.mover.release(layer)

    def _unwatched(self) -> AbstractContextManager[object]:
        """Keep the probe from taking the library's own reads for the model's."""
        return _NOTHING if self.probe is None else self.probe.looking_away()

    def bind_stand_in(self, layer: Layer) -> None:
        """Point an embedding's weight at one row of zeros on the compute device."""
        if not self.onloaded:
            self.onload()
        layer.revision()
        member = layer.masters[0].members[0]
        dtype = layer.masters[0].codec.compute
        row = self._stand_in
        if row is None or row.dtype != dtype or row.numel() < member.shape[1]:
            with torch.inference_mode(False):
                row = torch.zeros(
                    member.shape[1], dtype=dtype, device=self.policy.compute_device
                )
            self._stand_in = row
        member.tensor.data = row[: member.shape[1]].expand(member.shape)

    def take_stand_in_away(self, layer: Layer) -> None:
        """Point an embedding's weight at its master again."""
        layer.masters[0].put_to_rest()

    def count_moved(self, layer: Layer, nbytes: int) -> None:
        """Count bytes that crossed the link without a copy of a layer."""
        self.mover.counters.bytes_moved += nbytes

    def to_compute_device(self, value: Any) -> Any:
        """Move the tensors of a call's inputs; containers are made anew as needed."""
        device = self.policy.compute_device

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.device == device else tensor.to(device)

        return map_tensors(value, move)

    def checked_output(self, site: Site, output: Any) -> Any:
        """Return an output that is safe to keep when the layers are released.

        Raises:
            RuntimeError: It would need a gradient through a streamed weight.
        """
        if output is None or all(layer.stays_bound for layer in site.layers):
            return None
        memory = self.mover.memory
        aliases = False
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                self.refuse_gradient(site, tensor)
            if tensor.device == memory.device and tensor.layout is torch.strided:
                aliases |= memory.overlaps_transient(tensor.data_ptr())
        if not aliases:
            return None

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            inside = memory.overlaps_transient(tensor.data_ptr())
            return tensor.clone() if inside else tensor

        return map_tensors(output, keep)

    def refuse_gradient(self, site: Site, output: torch.Tensor) -> None:
        """Raise if an output carries a graph through weights that are gone later."""
        if not output.requires_grad or not torch.is_grad_enabled():
            return
        raise RuntimeError(
            f"{site.name or type(self.model).__name__} is streamed, and its output "
            "would need a gradient through weights that are not there any more at "
            "backward. hookoffload runs inference: call the model under "
            "torch.no_grad() or torch.inference_mode(). To train, detach(model), or "
            "attach without a limit (limit_gb=None) where the model fits"
        )

    # -- figures --------------------------------------------------------------------

    def stats(self) -> OffloadStats:
        """Return what has happened since attach."""
        counters = self.mover.counters
        measured = self.mover.memory.measures_peak
        return OffloadStats(
            forwards=counters.forwards,
            bytes_moved=counters.bytes_moved,
            bytes_written_back=counters.bytes_written_back,
            peak_bytes=self._peak if measured else self.budget.peak,
            limit_bytes=self.policy.limit_bytes,
            stall_seconds=self.mover.engine.stall_seconds(),
            hits=counters.hits,
            misses=counters.misses,
            peak_by_kind=self.budget.peak_by_kind(),
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse: a copied hook would run the original's layers."""
        raise RuntimeError(
            f"{type(self.model).__name__} has offload hooks attached and cannot be "
            "copied; call detach(model), copy it, and attach again"
        )

    def __reduce__(self) -> NoReturn:
        """Refuse: streams and threads cannot be pickled."""
        raise RuntimeError(
            f"{type(self.model).__name__} has offload hooks attached and cannot be "
            "pickled; save model.state_dict(), or call detach(model) first"
        )

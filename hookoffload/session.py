"""Everything that is attached to one model: its hooks, its layers, its plan."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .always import AlwaysResident
from .assembly import Assembly, assemble
from .budget import BudgetExceededError, MemoryBudget
from .calls import CallTracker, calls_under_way, in_functional_call
from .containers import map_tensors, tensors_in
from .hooks import GatherSite, OutsideHooks, RootHooks, Site, can_gather
from .layer import Layer
from .mover import LayerMover
from .partition import Partition, SiteSketch, check_tensors, partition
from .pass_planner import PassPlanner
from .pinning import PageLock
from .placement import Placement
from .plan import Plan
from .policy import ResolvedPolicy
from .probe import Probe
from .refusals import NotCopied, purge_hooks
from .report import OffloadStats
from .safetensors_file import TensorLocation
from .state_hooks import StateHooks
from .store import Master, Store

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()

# Looking rows up in the master pays when the table is larger than a few copies.
_GATHER_BYTES = 2**20


class Session(NotCopied):
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
        self.session = self
        self.model = model
        self.policy = policy
        self.map = policy.module_map.for_model(model)
        self._locations = locations
        # As little as possible is what the plan finds out, not a number to hold.
        self.budget = MemoryBudget(policy.limit_bytes or None)
        self.mover = LayerMover(policy.compute_device, self.budget, poison=poison)
        self.planner = PassPlanner(policy, self.budget, self.mover.memory)
        self.probe: Probe | None = None
        self._left_probes: list[Probe] = []
        self.onloaded = False
        self.ended = False  # a thread may still wait at a hook that is off by now
        self.sites: list[Site] = []
        self.root_site: Site | None = None
        self.layers: list[Layer]
        self._moved_masters: list[Master]
        self._asked_for: set[int]  # layers that sites need
        self._seen: set[int]  # and those that a forward has asked for
        self.always: AlwaysResident
        self.atomic: frozenset[int]  # ids of modules that move with their subtree
        self.inside_atomic: frozenset[int]
        self.read_in_place: set[int]  # ids of tables that are never brought in
        self._masters: dict[int, Master] = {}
        self._joined: list[tuple[str, str]] = []
        self._stand_in: torch.Tensor | None = None
        self._outside_handles: list[RemovableHandle] = []
        self._hooks_hang = False
        self._probe_next = True
        self._autocast_cache = True
        self._guard: (
            tuple[torch.autograd.graph.saved_tensors_hooks, threading.Thread] | None
        ) = None
        self.calls = CallTracker(frozenset(id(m) for m in model.modules()))
        self.root = RootHooks(self, model)
        self.state_hooks = StateHooks(self)
        self._build(partition(model, self.map))
        self.store = Store(self._moved_masters, policy.disk_dir)
        self._page_lock = PageLock(policy.compute_device, policy.pin_limit_bytes)

    # -- what there is --------------------------------------------------------------

    def _build(self, found: Partition) -> None:
        """Make layers, masters, sites and the plan; changes no tensor.

        Raises:
            BudgetExceededError: The limit is below the least that these layers need.
        """
        assembly = assemble(found, self.policy, self._locations, self._masters)
        self.read_in_place = set()
        sites = [s for k in assembly.sites if (s := self._make_site(k, assembly))]
        moved = {
            layer.index
            for site in sites
            if not isinstance(site, GatherSite)
            for layer in site.layers
        }
        predicted = tuple(sorted(assembly.moving))
        looked_up = frozenset(assembly.moving - moved)
        self.planner.set_assembly(assembly, predicted, looked_up)
        self.sites = sites
        self.root_site = next((s for s in sites if s.module is self.model), None)
        self.layers = assembly.layers
        self.always = AlwaysResident(
            assembly.always, assembly.always_cast, self.mover.memory
        )
        self.atomic = assembly.atomic
        self.inside_atomic = assembly.inside_atomic
        self._masters = assembly.masters
        self._asked_for = moved
        self._seen = set()
        self.mover.set_layers(assembly.layers, predicted)
        self._moved_masters = assembly.moved_masters

    def _make_site(self, sketch: SiteSketch, assembly: Assembly) -> Site | None:
        layers = tuple(
            assembly.layers[i] for i in sketch.layers if i in assembly.moving
        )
        if len(layers) == 1 and can_gather(sketch.module):
            masters = layers[0].masters
            if len(masters) == 1 and len(masters[0].members) == 1:
                on_cpu = self.policy.compute_device.type == "cpu"
                if on_cpu and not masters[0].codec.casts_streamed:
                    # Rows are read from the memory map of the file.
                    self.read_in_place.add(id(masters[0].members[0].tensor))
                    return None
                if masters[0].nbytes >= _GATHER_BYTES:
                    return GatherSite(self, sketch.name, sketch.module, layers[0])
        # The probe steps aside in those that have their hooks outside; and a part that
        # is called while the model is offloaded has to onload it.
        if not layers and not sketch.outside and self._waits_where_it_rests:
            return None
        return Site(
            self,
            sketch.name,
            sketch.module,
            layers,
            atomic=sketch.atomic,
            outside=sketch.outside,
        )

    @property
    def plan(self) -> Plan:
        """The plan that stands; the first pass may run with a smaller one."""
        return self.planner.plan

    # -- begin and end --------------------------------------------------------------

    def begin(self) -> None:
        """Take the masters over and hang the hooks, or put everything back."""
        policy = self.policy
        with torch.inference_mode(False):
            self._begin(policy)

    def _begin(self, policy: ResolvedPolicy) -> None:
        try:
            self._adopt_buffers(self.always.masters)
            self.store.adopt(self.store.masters, policy.offload)
            if self._waits_where_it_rests:
                self._page_lock.lock(self.store.masters)
            self.root.register()
            self.register_hooks()
            self.state_hooks.register()
            logger.info("attached %s: %r", type(self.model).__name__, self.plan)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Take the hooks off and give the model back as it was."""
        with torch.inference_mode(False):
            self._end()

    def _end(self) -> None:
        self._retire_probe()
        self.remove_hooks()
        self.root.remove()
        try:
            self.mover.drop_all()
            self.always.release()
            self._page_lock.unlock(self.store.masters)
            Store(self.always.masters, None).restore()
            self.store.restore()
        except Exception:
            self._let_go()  # a disk or a device refused: the hooks go nevertheless
            raise
        # Not behind Ctrl-C: what says that the model is attached goes last, and detach
        # can be called again.
        self._let_go()

    def _let_go(self) -> None:
        """Drop everything that refers to the model; the last step of detach."""
        self.mover.close()
        self.state_hooks.remove()
        purge_hooks(self)  # an interrupt may have come between a hook and its handle
        self.onloaded = False
        self.ended = True
        # The hooks and this object refer to each other: until Python's collector comes
        # round, nothing here may keep the weights.
        self.sites, self.root_site = [], None
        self.layers, self._masters, self._moved_masters = [], {}, []
        self.mover.set_layers((), ())
        self.store.masters = []
        self.state_hooks.forget()
        self.always.forget()
        self.planner.forget()

    def register_hooks(self) -> None:
        """Hang the hooks on every site but the root's, which `RootHooks` serves."""
        for site in self.sites:
            if site is not self.root_site:
                site.register()
        outside = {
            id(site.module): site
            for site in self.sites
            if site.outside and site is not self.root_site
        }
        if outside and not self._outside_handles:
            OutsideHooks(outside).register(self._outside_handles)
        self._hooks_hang = True

    def remove_hooks(self) -> None:
        """Take the hooks off every site; those of the root stay."""
        for site in self.sites:
            site.remove()
        for handle in self._outside_handles:
            handle.remove()
        self._outside_handles = []
        self._hooks_hang = False

    # -- calls ----------------------------------------------------------------------

    def enter_call(self) -> None:
        """Let the current thread in, after those that are inside."""
        if self.calls.enter():
            self._forget_interrupted_calls()

    def leave_call(self) -> None:
        """Come out of one hooked call."""
        if self.calls.depth == 1:
            self._end_outermost_call()
        self.calls.leave()

    def begin_outermost_call(self) -> None:
        """Get ready for calls, of the root or of a part."""
        if not self.onloaded:
            self.onload()
        self.always.enter()
        # Also under no_grad: a forward can enable gradients for itself.
        if self._guard is None and not self.all_stay:
            guard = torch.autograd.graph.saved_tensors_hooks(
                self._refuse_to_keep, _as_it_is
            )
            guard.__enter__()
            self._guard = (guard, threading.current_thread())

    def _end_outermost_call(self) -> None:
        if self._guard is not None:
            guard, thread = self._guard
            self._guard = None
            if thread is threading.current_thread():  # else it died with its thread
                guard.__exit__()
        self.always.leave()

    def _refuse_to_keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Raise if autograd keeps a streamed weight for backward."""
        memory = self.mover.memory
        plain = tensor.device == memory.device and tensor.layout is torch.strided
        if self.calls.depth and plain and memory.overlaps_transient(tensor.data_ptr()):
            names = {id(site.module): site.name for site in self.sites}
            inside = (names.get(id(module)) for module in calls_under_way())
            name = next((name for name in inside if name), None)
            self._refuse_gradient(name or type(self.model).__name__)
        return tensor

    def recover(self) -> None:
        """Clean up behind a call that never reached its post hook (Ctrl-C).

        The thread stays the owner all the time, and is at the outermost level then:
        that of the call which noticed.
        """
        self._forget_interrupted_calls()
        self.calls.depth = 1

    def _forget_interrupted_calls(self) -> None:
        logger.info("cleaning up behind an interrupted forward")
        self._retire_probe()
        for site in self.sites:
            site.forget_calls()
        self.root.forget_calls()
        self._end_outermost_call()
        self.mover.drop_all()
        self.mover.order.end_pass(complete=False)
        self._probe_next = True

    def _retire_probe(self) -> None:
        """End a probe that was interrupted; it leaves the thread that it watched.

        Only that thread can take it off its stack of modes: the others leave it there,
        blind, for the next hook that runs in it.
        """
        if self.probe is not None:
            self._left_probes.append(self.probe)
            self.probe.abandon()
            self.probe = None
        self._left_probes = [p for p in self._left_probes if not p.has_left()]

    def is_left_behind(self, root: RootHooks) -> bool:
        """Tell whether the levels around a call of the root are a dead call's."""
        called = list(calls_under_way())
        inside = sum(module is self.model for module in called)
        if root.active:
            return inside <= root.active
        # The innermost is the call of the root that asks.
        return not any(self.calls.knows(module) for module in called[1:])

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

    # -- passes ---------------------------------------------------------------------

    def begin_pass(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Get ready for one forward of the root; return inputs that were moved."""
        self.store.check_unchanged()
        if self.state_hooks.replaced_parameters() and not in_functional_call():
            with torch.inference_mode(False):
                self._take_over_replaced()
        if self.state_hooks.edited_while_bound():
            self.sync_masters()
        self.begin_outermost_call()
        size = sum(tensor.numel() for tensor in tensors_in((args, kwargs)))
        probing = self._probe_next and bool(self.sites)
        first = probing and not self.mover.counters.forwards
        self._apply(self.planner.for_pass(size, probing=first))
        if not self._hooks_hang and not self.all_stay:
            self.register_hooks()
        self._retire_probe()  # of a pass that was interrupted at its very end
        if probing:
            self.probe = Probe(self)
        self.mover.order.begin_pass()
        if not self.all_stay:
            self.mover.prefetch()
        inputs = self.to_compute_device((args, kwargs))
        self._autocast_cache = torch.is_autocast_cache_enabled()
        if torch.is_autocast_enabled(self.policy.compute_device.type):
            # It would keep a cast copy of every weight, beyond any limit.
            torch.set_autocast_cache_enabled(False)
        if self.probe is not None:
            self.probe.begin()
        return inputs  # type: ignore[no-any-return]

    def end_pass(self, *, complete: bool) -> None:
        """Account for the forward that has ended."""
        joined: list[tuple[str, str]] = []
        torch.set_autocast_cache_enabled(self._autocast_cache)
        if self.probe is not None:
            joined = self.probe.end()
            self.probe = None
        error = sys.exc_info()[1]
        if not complete and isinstance(error, torch.OutOfMemoryError):
            # The next call must find more: half of what the residents took.
            half = self.plan.resident_bytes // 2
            self.planner.step_down(self.plan.total_bytes - half)
        # A tensor may be used sideways on a path that this pass did not take: look
        # again after an exception, which may come from just that, and as long as there
        # are layers that no forward has asked for.
        self._seen.update(self.mover.order.recorded)
        self._probe_next = not complete or not self._asked_for <= self._seen
        self.mover.order.end_pass(complete)
        self.mover.counters.forwards += complete
        self.planner.after_pass(complete=complete)
        if joined and complete:
            self._join(joined)
        if complete and self.all_stay and self._hooks_hang:
            self.remove_hooks()

    def _apply(self, plan: Plan) -> None:
        """Make memory what the plan says, or less where the device has less."""
        while True:
            try:
                self.mover.apply(plan)
                return
            except torch.OutOfMemoryError:
                # Nine tenths: the forward needs something too.
                if not self.planner.step_down(self.mover.reached_bytes * 9 // 10):
                    raise
                plan = self.planner.plan

    def set_limit(self, limit_bytes: int | None) -> None:
        """Keep another limit from the next pass on.

        Raises:
            BudgetExceededError: It is below the least; the old limit stands.
        """
        policy = replace(self.policy, limit_bytes=limit_bytes)
        self.planner.set_limit(policy)
        self.policy = policy
        self.budget.set_limit(limit_bytes or None)
        self.register_hooks()
        if limit_bytes and self.budget.used > limit_bytes:
            self.mover.apply(self.plan)  # give the memory back now

    @property
    def all_stay(self) -> bool:
        """Whether every layer is bound between passes, so that no hook is needed."""
        return all(layer.stays_bound or layer.in_place for layer in self.layers)

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
        try:
            check_tensors(self.model)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        self._rebuild()
        self._page_lock.unlock(self.store.masters)
        self.store.replace_masters(self._moved_masters, self.policy.offload)
        if not self._waits_where_it_rests:
            self.onloaded = False
        self._page_lock.lock(self.store.masters)
        self._adopt_buffers(self.always.masters)

    @staticmethod
    def _adopt_buffers(masters: list[Master]) -> None:
        """Have buffers rest in host RAM: they are small, and forwards write to them."""
        Store([], None).adopt(masters, Placement(device="cpu"))

    def _rebuild(self) -> None:
        self.remove_hooks()
        self.mover.drop_all()
        self.always.release()
        self._build(partition(self.model, self.map, self._joined))
        self.register_hooks()
        self.state_hooks.renew()
        if self.onloaded:
            self.always.onload()

    # -- states ---------------------------------------------------------------------

    def onload(self) -> None:
        """Bring the model to its onload placement, if it is not there."""
        if self.onloaded:
            return
        with torch.inference_mode(False):
            if not self._waits_where_it_rests:
                self.store.onload(self.policy.onload)
                self._page_lock.lock(self.store.masters)
            self.always.onload()
        self.onloaded = True

    @property
    def _waits_where_it_rests(self) -> bool:
        """Whether onload moves no master: only the device's memory changes."""
        offload, onload = self.policy.offload, self.policy.onload
        same_place = offload.on_disk == onload.on_disk
        return same_place and (onload.on_disk or offload.dtype == onload.dtype)

    def offload(self) -> None:
        """Bring the model to its offload placement; no memory of the device is kept."""
        was, self.onloaded = self.onloaded, False
        with torch.inference_mode(False):
            self.mover.drop_all()
            self.always.release()
            if was and not self._waits_where_it_rests:
                self._page_lock.unlock(self.store.masters)
                self.store.offload(self.policy.offload)
        self.onloaded = False
        self.register_hooks()

    def sync_masters(self) -> None:
        """Bring everything that was written to tensors into their masters."""
        if self.calls.depth and not self.calls.runs_here():
            self.require_idle("state_dict")  # Ctrl-C ended the last forward
            self.leave_call()
        with torch.inference_mode(False):
            self.always.sync()
            for layer in self.layers:
                self.mover.sync(layer)
        if not self._hooks_hang and not self.all_stay:
            self.register_hooks()

    def rest_for_loading(self) -> None:
        """Put everything to rest, so that loading writes to masters only."""
        self.sync_masters()
        self.onloaded = False
        with torch.inference_mode(False):
            self.mover.drop_all()
            self.always.release()

    # -- what hooks need ------------------------------------------------------------

    def bind(self, layer: Layer) -> None:
        """Bind a layer for a forward that begins."""
        with self._unwatched():
            self.begin_outermost_call()  # a part is called without the root
            if self.mover.plan is None:
                self._apply(self.plan)
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
        self.begin_outermost_call()
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
        layer.stands_in = True
        member.tensor.data = row[: member.shape[1]].expand(member.shape)

    def take_stand_in_away(self, layer: Layer) -> None:
        """Point an embedding's weight at its master again."""
        layer.masters[0].put_to_rest()
        layer.stands_in = False

    def count_moved(self, layer: Layer, nbytes: int) -> None:
        """Count bytes that crossed the link without a copy of a layer."""
        self.mover.counters.bytes_moved += nbytes

    def to_compute_device(self, value: Any) -> Any:
        """Move the tensors of a call's inputs; containers are made anew as needed."""
        device = self.policy.compute_device

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.device == device else tensor.to(device)

        return map_tensors(value, move)

    def checked_output(self, site: Site, args: tuple[Any, ...], output: Any) -> Any:
        """Return an output that is safe to keep when the layers are released.

        Raises:
            RuntimeError: It would need a gradient through a streamed weight.
        """
        if output is None or all(_stays(layer) for layer in site.layers):
            return None
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                self.refuse_gradient(site, tensor, args)
        return self.outside_window(output)

    def in_window(self, output: Any) -> bool:
        """Tell whether a tensor among these will have other bytes soon.

        That is a view of memory that is used again, and a parameter itself.
        """
        memory = self.mover.memory
        return any(
            isinstance(tensor, nn.Parameter)
            or memory.overlaps_transient(tensor.data_ptr())
            for tensor in tensors_in(output)
            if tensor.device == memory.device and tensor.layout is torch.strided
        )

    def outside_window(self, output: Any) -> Any:
        """Return an output clear of memory that is used again; None if it is so."""
        if not self.in_window(output):
            return None
        return map_tensors(
            output, lambda tensor: tensor.clone() if self.in_window(tensor) else tensor
        )

    def refuse_gradient(
        self, site: Site, output: torch.Tensor, args: tuple[Any, ...]
    ) -> None:
        """Raise if an output carries a graph through weights that are gone later.

        Without gradients enabled around it, a forward may pass an input on that has a
        graph of its own; what else has one was made in the forward.
        """
        passed_on = any(output is tensor for tensor in tensors_in(args))
        if output.grad_fn is not None and (torch.is_grad_enabled() or not passed_on):
            self._refuse_gradient(site.name or type(self.model).__name__)

    @staticmethod
    def _refuse_gradient(name: str) -> NoReturn:
        raise RuntimeError(
            f"{name} is streamed, and its output would need a gradient through weights "
            "that are not there any more at backward. hookoffload runs inference: call "
            "the model under torch.no_grad() or torch.inference_mode(). To train, "
            "detach(model), or attach without a limit (limit_gb=None) where it fits"
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
            peak_bytes=self.planner.peak_bytes if measured else self.budget.peak,
            limit_bytes=self.policy.limit_bytes,
            stall_seconds=self.mover.engine.stall_seconds(),
            hits=counters.hits,
            misses=counters.misses,
            peak_by_kind=self.budget.peak_by_kind(),
        )


def _stays(layer: Layer) -> bool:
    """Tell whether a bound layer's bytes stay where they are behind its forward."""
    if layer.stays_bound:
        return True
    return layer.resident is not None and layer.can_stay_bound


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

"""Everything that is attached to one model: its hooks, its layers, its plan."""

from __future__ import annotations

import gc
import logging
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from .adapters import Adapters
from .always import AlwaysResident
from .budget import MemoryBudget
from .cached_codes import CodeCache
from .calls import CallTracker, TurnTaker
from .coding import assemble_coded, complete_codes
from .containers import map_tensors
from .edits import Edits
from .entry_site import EntrySite
from .escapes import Escapes
from .gather import GatherSite
from .graph_guard import take_off_left_guards
from .group import Group
from .hook_set import HookSet
from .hooks import Site
from .inventory import Inventory
from .layer import Layer
from .limit_changes import LimitChanges
from .master import Master
from .measured_pass import PassMeter
from .merges import Merges
from .model_placement import ModelPlacement
from .mover import LayerMover
from .ownership import Ownership
from .partition import Partition, partition
from .pass_planner import PassPlanner
from .passes import Passes
from .pinning import PageLock
from .plan import Plan
from .probe import Probe
from .probe_mode import take_off_left_modes
from .rebuilding import Rebuilding
from .recorder import Recorder
from .refusals import NotCopied, purge_hooks
from .registered import unreadable_at_rest
from .resolved_policy import ResolvedPolicy
from .root_hooks import RootHooks
from .safetensors_file import TensorLocation
from .site_making import make_entries, make_sites
from .state_hooks import StateHooks
from .store import Store
from .units import Units

logger = logging.getLogger(__name__)

# Layers and hooks for so many weights are so many objects that Python soon looks at all
# that there are, a quarter of a second with a model library loaded: here rather than in
# the first forward, with a GPU waiting.
_MANY = 500

ValueT = TypeVar("ValueT")


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
        group: the models with which this one shares a limit.
        code_cache: where codes of the tensors in files are kept, if they are to be.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ResolvedPolicy,
        locations: dict[str, TensorLocation],
        *,
        poison: bool = False,
        group: Group | None = None,
        code_cache: CodeCache | None = None,
    ) -> None:
        self.session = self
        self.model = model
        self._class_name = type(model).__name__
        self.group = group
        self.poison = poison
        self.loaded = False  # by `load_model`, and attached by that
        self.policy = policy
        self.map = policy.module_map.for_model(model)
        # Quantised for a device whose format their class cannot read in host RAM.
        self.unreadable_at_rest = unreadable_at_rest(model)
        self._locations = locations
        # As little as possible is what the plan finds out, not a number to hold.
        if group is None:
            self.budget = MemoryBudget(policy.limit_bytes or None)
        else:
            self.budget = MemoryBudget(None, within=group.budget)
        self.mover = LayerMover(policy.compute_device, self.budget, poison=poison)
        self.recorder = Recorder(self.mover.memory) if policy.record else None
        self.mover.copies.recorder = self.recorder
        self.mover.copies.host_limit_bytes = policy.host_limit_bytes
        self.planner = PassPlanner(policy, self.budget, self.mover.memory)
        self.meter = PassMeter(policy, self.mover)
        self.probe: Probe | None = None
        self.ended = False  # a thread may still wait at a hook that is off by now
        self.sites: list[Site] = []
        self.entries: list[EntrySite] = []
        self.root_site: Site | None = None
        self.layers: list[Layer]
        self.moved_masters: list[Master]
        self.always: AlwaysResident
        self.atomic: frozenset[int]  # ids of modules that move with their subtree
        self.inside_atomic: frozenset[int]
        self.read_in_place: set[int]  # ids of tables that are never brought in
        self.masters: dict[int, Master] = {}
        self._copied: frozenset[int]  # ids of masters that are not used where they rest
        self.placement = ModelPlacement(self)
        self.edits = Edits(self)
        self.merges = Merges(self)
        self.limits = LimitChanges(self)
        self.units = Units(self)
        self.rebuilding = Rebuilding(self)
        self.hooks = HookSet(self)
        self.mover.on_evict = self.hooks.layer_evicted
        if group is not None:
            self.mover.ask_others = partial(group.make_room, self)
        self.passes = Passes(self)
        modules = frozenset(id(m) for m in model.modules())
        self.calls = (
            CallTracker(modules) if group is None else TurnTaker(modules, group.turns)
        )
        self.ownership = Ownership(self, self.calls)
        stand_ins = self.mover.stand_ins
        self.escapes = Escapes(model, self.mover.memory, self.calls, stand_ins)
        self.root = RootHooks(self, model)
        self.adapters = Adapters(self)
        self.state_hooks = StateHooks(self)
        self.inventory = Inventory()
        found = partition(model, self.map)
        if code_cache is not None:
            complete_codes(code_cache, found, policy, locations, self.budget)
        self.build(found)
        self.store = Store(self.moved_masters, policy.disk_dir)
        self.page_lock = PageLock(
            policy.compute_device,
            policy.pin_limit_bytes,
            None if group is None else group.page_locks,
        )

    # -- what there is --------------------------------------------------------------

    def build(self, found: Partition) -> None:
        """Make layers, masters, sites and the plan; changes no tensor.

        Raises:
            BudgetExceededError: The limit is below the least that these layers need.
        """
        assembly = assemble_coded(
            found,
            self.policy,
            self._locations,
            self.masters,
            self.planner,
            self.budget,
        )
        moving = assembly.moving
        sites, self.read_in_place = make_sites(self, assembly, moving)
        moved = {
            layer.index
            for site in sites
            if not isinstance(site, GatherSite)
            for layer in site.layers
        }
        predicted = tuple(sorted(moving))
        looked_up = frozenset(moving - moved)
        self.planner.set_assembly(assembly, predicted, looked_up)
        self.sites = sites
        self.entries = make_entries(self, assembly)
        self.escapes.set_sites(sites, assembly.moved_masters)
        self.root_site = next((s for s in sites if s.module is self.model), None)
        self.layers = assembly.layers
        self.always = AlwaysResident(
            assembly.always, assembly.always_cast, self.mover.memory
        )
        self.atomic = assembly.atomic
        self.inside_atomic = assembly.inside_atomic
        self.masters = assembly.masters
        self.passes.set_layers(moved)
        self.mover.set_layers(assembly.layers, predicted)
        self.moved_masters = assembly.moved_masters
        self._copied = frozenset(
            id(piece.master)
            for layer in (*assembly.layers, assembly.always, assembly.always_cast)
            for piece in layer.pieces
        )

    @property
    def label(self) -> str:
        """What to call the model in messages: its name among others, and its class."""
        kind = self._class_name
        return kind if self.group is None else f"{self.group.name_of(self)} ({kind})"

    @property
    def undo(self) -> str:
        """How to write in messages that the hooks have to go."""
        return "detach(model)" if self.group is None else "detach on the pipeline"

    @property
    def plan(self) -> Plan:
        """The plan that stands; the first pass may run with a smaller one."""
        return self.planner.plan

    @property
    def all_stay(self) -> bool:
        """Whether every layer is bound between passes, so that no hook is needed."""
        return all(layer.stays_bound or layer.in_place for layer in self.layers)

    def may_be_bound(self, master: Master) -> bool:
        """Tell whether the compute device uses a copy of a master."""
        return id(master) in self._copied

    def site_of(self, module: nn.Module) -> Site | None:
        """Return the site of a module, None if it needs none."""
        sites = (*self.sites, *self.entries)
        return next((site for site in sites if site.module is module), None)

    def take_stock(self) -> None:
        """Look which tensors the model has, to notice what becomes of them."""
        masters = (*self.moved_masters, *self.always.masters)
        self.inventory.renew(self.model, masters)
        self.merges.take_stock()

    # -- begin and end --------------------------------------------------------------

    def begin(self) -> None:
        """Take the masters over and hang the hooks, or put everything back."""
        policy = self.policy
        with torch.inference_mode(False):
            self._begin(policy)

    def _begin(self, policy: ResolvedPolicy) -> None:
        try:
            self.placement.adopt_buffers()
            self.placement.adopt_and_lock(policy)
            self.root.register()
            self.hooks.hang_all()
            self.take_stock()
            self.state_hooks.register()
            logger.info("attached %s: %r", type(self.model).__name__, self.plan)
            self.collect_garbage()
        except BaseException:
            self.end()
            raise

    def collect_garbage(self) -> None:
        """Look for garbage now, if a GPU would wait for that in a forward."""
        on_cpu = self.policy.compute_device.type == "cpu"
        if not on_cpu and len(self.masters) >= _MANY:
            gc.collect()

    def end(self) -> None:
        """Take the hooks off and give the model back as it was."""
        with torch.inference_mode(False):
            self._end()

    def _end(self) -> None:
        self.passes.retire_probe()
        take_off_left_modes()
        take_off_left_guards()
        self.hooks.take_off()
        self.root.remove()
        try:
            self.edits.untie()
            self.mover.drop_all()
            self.always.release()
            self.page_lock.unlock(self.store.masters)
            Store([*self.always.masters, *self.edits.parted], None).restore()
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
        self.placement.onloaded = False
        self.ended = True
        # The hooks and this object refer to each other: until Python's collector comes
        # round, nothing here may keep the weights.
        for site in self.sites:
            site.bundle, site.bundled = None, ()
        self.sites, self.entries, self.root_site = [], [], None
        self.layers, self.masters, self.moved_masters = [], {}, []
        self.edits.forget()
        self.merges.forget()
        self.mover.set_layers((), ())
        self.store.masters = []
        self.state_hooks.forget()
        self.inventory.forget()
        self.adapters.forget()
        self.always.forget()
        self.planner.forget()
        self.model = self.root.module = nn.Module()  # not what held the weights

    # -- what hooks need ------------------------------------------------------------

    def bind(self, layer: Layer, *, aside: bool = False) -> None:
        """Bind a layer for a forward that begins; ``aside``: see `LayerMover.bind`."""
        if self.probe is None:
            self._bind(layer, aside=aside)
            return
        # The probe must not take the library's own reads for the model's. It is
        # switched off instead of being told: each look costs microseconds.
        with torch._C.DisableTorchFunction():
            self._bind(layer, aside=aside)

    def _bind(self, layer: Layer, *, aside: bool) -> None:
        if not self.ownership.call_begun:
            self.ownership.begin_outermost_call()  # a part is called without the root
        if self.mover.plan is None:
            self.passes.apply_again()
        self.mover.bind(layer, aside=aside)

    def release(self, layer: Layer) -> None:
        """Release a layer behind a forward that has ended."""
        if self.probe is None:
            self.mover.release(layer)
            return
        with torch._C.DisableTorchFunction():
            self.mover.release(layer)

    def count_moved(self, layer: Layer, nbytes: int) -> None:
        """Count bytes that crossed the link without a copy of a layer."""
        self.mover.counters.bytes_moved += nbytes
        if self.recorder is not None:
            self.recorder.looked_up(layer.name, nbytes)

    def to_compute_device(self, value: ValueT) -> ValueT:
        """Move the tensors of a call's inputs; containers are made anew as needed."""
        device = self.policy.compute_device

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.device == device else tensor.to(device)

        moved: ValueT = map_tensors(value, move)
        return moved

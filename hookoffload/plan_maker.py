"""Plans of one model's layers, whatever the pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .assembly import Assembly
from .budget import BudgetExceededError, format_gib
from .layer_specs import spec_of
from .plan import Plan
from .planner import make_plan
from .resolved_policy import ResolvedPolicy


@dataclass(frozen=True, eq=False)
class PlanMaker:
    """What every plan of a model follows; only the room for activations differs.

    Who wants another one asks it for a plan first: if that raises, nothing has changed.

    Attributes:
        policy: the limit and the placements.
        assembly: the layers; None before there are any, and behind detach.
        order: the sequence of layers in a pass.
        looked_up: tables whose rows are looked up where they rest.
        adapter_bytes: of adapters, which are always on the device.
        ceiling: what was found to fit, below the limit.
        code_share: of what can be kept coded, see [Note: residents that are kept
            coded].
    """

    policy: ResolvedPolicy
    assembly: Assembly | None = None
    order: tuple[int, ...] = ()
    looked_up: frozenset[int] = frozenset()
    adapter_bytes: int = 0
    ceiling: int | None = None
    code_share: float = 1.0

    def limit(self, taken: int = 0) -> int | None:
        """Return the limit of the policy, or less if less was found to be there.

        Args:
            taken: bytes of it that other models keep.
        """
        limit = self.policy.limit_bytes
        if limit == 0:
            return limit
        if self.ceiling is not None:
            limit = self.ceiling if limit is None else min(limit, self.ceiling)
        # Not 0, which would mean something else.
        return limit if limit is None else max(limit - taken, 1)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all layers, as residents."""
        layers = () if self.assembly is None else self.assembly.layers
        return sum(layer.resident_bytes for layer in layers)

    @property
    def always_bytes(self) -> int:
        """Bytes that are on the device whatever is planned."""
        if self.assembly is None:
            return 0
        return self.assembly.always_bytes + self.adapter_bytes

    def make(
        self, activations: int, *, keep_residents: bool = True, taken: int = 0
    ) -> Plan:
        """Plan for so many bytes of activations.

        Tables whose rows are looked up stay out of it, unless the whole model fits.

        Args:
            activations: what a pass needs beside the plan.
            keep_residents: False streams everything.
            taken: bytes of the limit that other models keep.

        Raises:
            BudgetExceededError: The limit is below the least.
        """
        assembly, limit = self.assembly, self.limit(taken)
        assert assembly is not None, "a session plans for its assembly only"
        moving = assembly.moving
        whole_bytes = self.always_bytes + self.weight_bytes
        all_stay = all(assembly.layers[index].can_stay for index in moving)
        fits = limit is None or whole_bytes + activations <= limit
        if keep_residents and all_stay and fits:
            try:
                whole = self._plan_for(assembly, moving, activations, limit)
            except BudgetExceededError:
                whole = None  # all but the casts would fit
            if whole is not None and whole.resident == moving:
                return whole
        if self._onload_on_device and limit:
            raise BudgetExceededError(
                f"onload=Placement(device={str(self.policy.onload.device)!r}) keeps "
                f"the whole model on the compute device, {format_gib(whole_bytes)}, "
                f"which limit_gb={limit / 2**30:g} does not allow. Onload to "
                '"cpu" or "disk", or raise limit_gb'
            )
        used = moving - self.looked_up
        return self._plan_for(
            assembly, used, activations, limit, keep_residents=keep_residents
        )

    def _plan_for(
        self,
        assembly: Assembly,
        used: set[int],
        activations: int,
        limit: int | None,
        *,
        keep_residents: bool = True,
    ) -> Plan:
        on_device = self._onload_on_device and limit == 0
        return make_plan(
            [spec_of(layer, used=layer.index in used) for layer in assembly.layers],
            order=[index for index in self.order if index in used],
            chains=[tuple(i for i in c if i in used) for c in assembly.chains],
            limit_bytes=None if on_device else limit,
            always_bytes=self.always_bytes,
            activation_bytes=activations,
            keep_residents=keep_residents,
            code_share=self.code_share,
        )

    @property
    def _onload_on_device(self) -> bool:
        device = self.policy.onload.device
        return isinstance(device, torch.device) and device.type != "cpu"

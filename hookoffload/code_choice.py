"""Which layers codec="auto" codes: those that the link has too little time for.

[Note: what "auto" codes] Codes make copies a quarter shorter and forwards longer by
decoding. Whether that pays depends on how long a model computes, which only a run of it
tells. So layers that lie in RAM are attached as they are, and nothing is encoded for
layers that stay on the device, or for a model that computes longer than its copies
take. One pass is measured, the second one with the same residents: how long it took,
and how long of that it waited for copies. Where it waited, the link was busy all the
time or the window too small. How fast the link and the decoder are is measured then,
and the cost model says which share of the streamed bytes should be coded: so many that
copies take no longer than computing and decoding. They are encoded before the
next pass begins, spread evenly over the order. A plan with other residents is measured
again.

What `load_model` leaves in files is read in any case, and encoded on the way as far as
it streams: there the codes are also what makes host RAM hold more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from .budget import BudgetExceededError, MemoryBudget, format_gib
from .coding import can_pay, expected_bytes, has_link, looked_up, make_codes
from .layer import Layer
from .lossless import TIMED_BYTES, decode_seconds, seconds_of
from .master import Master
from .mover import LayerMover
from .plan import Plan
from .resolved_policy import ResolvedPolicy

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

# Measured passes differ by as much; what would save less is not worth the wait for
# codes.
_LEAST_GAIN = 0.02


@dataclass(frozen=True, kw_only=True)
class MeasuredPass:
    """One pass with the residents that the plan wants.

    Attributes:
        seconds: How long it took.
        stalled_seconds: How long of that compute waited for copies.
    """

    seconds: float
    stalled_seconds: float

    @property
    def waits(self) -> bool:
        """Whether it waited long enough for codes to be worth a thought."""
        return self.stalled_seconds > _LEAST_GAIN * self.seconds

    def share_to_code(
        self, *, link_seconds: float, saved: float, decode_seconds: float
    ) -> float:
        """Return which share of the streamed bytes should be coded, from 0 to 1.

        Args:
            link_seconds: what copies take, where none waits for its place.
            saved: the share of its bytes that a coded layer does not copy.
            decode_seconds: what a pass would take to decode all of them.

        Example:
            >>> measured = MeasuredPass(seconds=1.0, stalled_seconds=0.5)
            >>> cost = {"saved": 0.25, "decode_seconds": 0.05}
            >>> measured.share_to_code(link_seconds=1.0, **cost)
            1.0
            >>> measured.share_to_code(link_seconds=0.65, **cost)
            0.7058823529411765
            >>> measured.share_to_code(link_seconds=0.4, **cost)
            0.0
        """
        if not self.waits:
            return 0.0
        # Coded as far as that, copies take as long as computing and decoding:
        # link * (1 - share * saved) == compute + share * decode.
        link = min(link_seconds, self.seconds)
        compute = self.seconds - self.stalled_seconds
        share = min((link - compute) / (link * saved + decode_seconds), 1.0)
        return share if share * saved > _LEAST_GAIN else 0.0


class PassMeter:
    """Measures the pass that decides about codes, see [Note: what "auto" codes]."""

    __slots__ = ("_begun", "_ended", "_known", "_mover", "_plan", "_stalled", "_wants")

    def __init__(self, policy: ResolvedPolicy, mover: LayerMover) -> None:
        self._wants = policy.codec == "auto" and has_link(policy)
        self._mover = mover
        self._plan: Plan | None = None  # of the pass before
        self._known: Plan | None = None  # what was measured
        self._stalled = 0.0
        self._begun: float | torch.Event | None = None
        self._ended: float | torch.Event | None = None

    def begin(self) -> None:
        """Begin to measure, if the pass that begins is one to be measured."""
        if not self._wants:
            return
        before, plan = self._plan, self._mover.plan
        self._plan, self._begun, self._ended = plan, None, None
        if plan is None or plan is not before or plan is self._known:
            return
        if self._known is not None and plan.resident == self._known.resident:
            return
        # Waits for the pass before, once for each set of residents.
        self._stalled = self._mover.engine.stall_seconds()
        self._begun = self._mark()

    def end(self, *, complete: bool) -> None:
        """Note that the pass has ended."""
        if self._begun is not None:
            self._ended = self._mark() if complete else None

    def take(self) -> MeasuredPass | None:
        """Return what was measured and is not yet known, None without.

        What was measured is of the plan that the device still follows.
        """
        begun, ended, plan = self._begun, self._ended, self._plan
        self._begun = self._ended = None
        if begun is None or ended is None or plan is not self._mover.plan:
            return None
        self._known = plan
        if isinstance(begun, float) or isinstance(ended, float):
            assert isinstance(begun, float) and isinstance(ended, float)
            seconds = ended - begun
        else:
            ended.synchronize()
            seconds = begun.elapsed_time(ended) / 1e3
        stalled = self._mover.engine.stall_seconds() - self._stalled
        return MeasuredPass(seconds=seconds, stalled_seconds=min(stalled, seconds))

    def _mark(self) -> float | torch.Event:
        device = self._mover.memory.device
        if device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(device, enable_timing=True)
        event.record(torch.accelerator.current_stream(device.index))
        return event


def code_by(session: Session, measured: MeasuredPass) -> None:
    """Have the layers coded for which a measured pass says that it pays."""
    policy, budget, plan = session.policy, session.budget, session.mover.plan
    assert plan is not None, "what was measured is of a plan"
    tables = looked_up(session.model.modules())
    codable = streamed_raw(plan, session.layers, tables)
    if not codable:
        return
    session.mover.drop_all()
    device = policy.compute_device
    chosen = choose_masters(measured, plan, codable, device, budget)
    made = make_codes(chosen, policy, budget)
    if not made:
        return
    try:
        for master, code in made:
            master.code_as(code)
        session.rebuild()
    except BaseException as error:
        for master, _ in made:
            master.forget_code()
        session.rebuild()
        if not isinstance(error, BudgetExceededError):
            raise
        logger.info("the limit has no room to decode into: %s", error)
        return
    session.page_lock.unlock_coded(master for master, _ in made)
    session.page_lock.lock(session.store.masters)


def streamed_raw(
    plan: Plan, layers: Sequence[Layer], tables: frozenset[int]
) -> list[list[Master]]:
    """List what could be coded of the layers that a plan streams, layer by layer.

    Args:
        plan: the plan.
        layers: its layers.
        tables: ids of weights whose rows are looked up where they rest.
    """
    streamed = [index for index in dict.fromkeys(plan.order) if index in plan.streamed]
    found = [
        [m for m in layers[index].masters if m.code is None and can_pay(m, tables)]
        for index in streamed
    ]
    return [masters for masters in found if masters]


def choose_masters(
    measured: MeasuredPass,
    plan: Plan,
    codable: Sequence[Sequence[Master]],
    device: torch.device,
    budget: MemoryBudget,
) -> list[Master]:
    """Choose what is to be coded, while nothing is on the device.

    Args:
        measured: a pass with the plan.
        plan: the plan.
        codable: what could be coded, layer by layer.
        device: the compute device.
        budget: its budget.
    """
    sizes = [sum(master.plain_bytes for master in masters) for masters in codable]
    total = sum(sizes)
    masters = list(chain.from_iterable(codable))
    spared = sum(m.plain_bytes - expected_bytes(m) for m in masters)
    size = TIMED_BYTES  # or what the limit has
    while not budget.fits(2 * size):
        size //= 2
    budget.reserve("measuring", 2 * size)
    try:
        copying = _copy_seconds(max(masters, key=lambda m: m.plain_bytes), device, size)
        decoding = decode_seconds(device, size)
    finally:
        budget.release("measuring", 2 * size)
    link_seconds = plan.pass_bytes * copying
    share = measured.share_to_code(
        link_seconds=link_seconds,
        saved=spared / plan.pass_bytes,
        decode_seconds=total * decoding,
    )
    logger.info(
        "a pass of %.3f s waited %.3f s for copies, which take %.3f s: %.0f%% of %s "
        "are coded",
        measured.seconds,
        measured.stalled_seconds,
        link_seconds,
        100 * share,
        format_gib(total),
    )
    return [master for place in spread(sizes, share) for master in codable[place]]


def _copy_seconds(master: Master, device: torch.device, most: int) -> float:
    """Measure how long a byte takes to the device."""
    source = master.bytes[:most]
    target = torch.empty_like(source, device=device)
    seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), device)
    return seconds / source.numel()


def spread(sizes: Sequence[int], share: float) -> list[int]:
    """Choose about this share of the bytes, spread over the sequence.

    Returns:
        Places in the sequence.

    Example:
        >>> spread([10] * 8, 0.5)
        [0, 2, 4, 6]
    """
    chosen, seen, taken = [], 0, 0
    for place, size in enumerate(sizes):
        seen += size
        if taken + size / 2 <= seen * share:
            chosen.append(place)
            taken += size
    return chosen

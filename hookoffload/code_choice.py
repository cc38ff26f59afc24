"""What is coded, and which residents are kept so, by what a measured pass says.

[Note: what "auto" codes] Codes make copies a quarter shorter and forwards longer by
decoding. Whether that pays depends on how long a model computes, which only a run of it
tells. So layers that lie in RAM are attached as they are, and nothing is encoded for
layers that stay on the device, or for a model that computes longer than its copies
take. Passes with the same residents are measured, from the second one on, until they
get no faster: how long the fastest took, and how long of that it waited for copies.
Where it waited, the link was busy all the time or the window too small. How fast the
link and the decoder are is measured then, and the cost model says which share of the
streamed bytes should be coded: so many that copies take no longer than computing and
decoding. If they do with all of them coded, so many of the residents are coded, too,
that make room for others: see [Note: residents that are kept coded]. They are encoded
before the next pass begins, spread evenly over the order, and no more of them than host
RAM has room for. A plan with other residents is measured again. So is the same one,
ever more rarely: a busy machine seems to compute longer, and more codes may pay later.

What `load_model` leaves in files is read in any case, and encoded on the way as far as
it streams: there the codes are also what makes host RAM hold more.

With "lossless" everything is coded at attach. A pass is measured only where residents
are kept coded. If it did not wait for copies, though decoding them took part of it, the
cost model says which share of them should be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

from .budget import BudgetExceededError, MemoryBudget, format_gib
from .codable import can_code, can_pay, expected_bytes, looked_up
from .coded_residents import LEAST_GAIN, spread
from .coding import make_codes
from .cost import Rates
from .host_memory import spare_memory
from .layer import Layer
from .lossless import TIMED_BYTES, decode_seconds, known_decode_seconds, seconds_of
from .master import Master
from .measured_pass import MeasuredPass, share_that_balances
from .plan import Plan
from .priorities import SMALL_LAYER_BYTES

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

# What could be coded, layer by layer.
Codable = Sequence[Sequence[Master]]


def follow(session: Session, measured: MeasuredPass) -> None:
    """Have coded, and kept coded, what a measured pass says that pays."""
    if not can_code(session.policy):
        return  # since another host limit was set: what passes through a disk waits
    plan = session.mover.plan
    assert plan is not None, "what was measured is of a plan"
    streamed: Codable = []
    residents: Codable = []
    if session.policy.codec == "auto" and measured.waits:
        layers, tables = session.layers, looked_up(session.model.modules())
        order = list(dict.fromkeys(plan.order))
        streamed = _raw(layers, [i for i in order if i not in plan.resident], tables)
        large = [i for i in order if i in plan.resident and _can_be_kept(plan, i)]
        residents = _raw(layers, large, tables)
    if streamed or residents:
        _code_more(session, measured, plan, streamed, residents)
    elif not session.planner.weighed and _may_gain(session, measured, plan):
        source = max(
            chain.from_iterable(session.layers[i].masters for i in plan.kept_coded),
            key=lambda master: master.nbytes,
        )
        rates = _rates(session, measured, plan, source)
        session.planner.weigh_codes(rates)


def _can_be_kept(plan: Plan, index: int) -> bool:
    layer = plan.layers[index]
    return not layer.held and layer.stream_bytes > SMALL_LAYER_BYTES


def _may_gain(session: Session, measured: MeasuredPass, plan: Plan) -> bool:
    """Tell whether decoding residents may take long enough to think about it."""
    if measured.waits or not plan.kept_coded:
        return False
    known = known_decode_seconds(session.policy.compute_device)
    decoded = sum(plan.layers[index].decoded_bytes for index in plan.kept_coded)
    return known is None or known * decoded > LEAST_GAIN * measured.seconds


def _raw(
    layers: Sequence[Layer], indices: Iterable[int], tables: frozenset[int]
) -> Codable:
    """List what could be coded of layers, layer by layer.

    Args:
        layers: of the model.
        indices: of those to look at.
        tables: ids of weights whose rows are looked up where they rest.
    """
    found = [
        [m for m in layers[index].masters if m.code is None and can_pay(m, tables)]
        for index in indices
    ]
    return [masters for masters in found if masters]


def _rates(
    session: Session, measured: MeasuredPass, plan: Plan, source: Master
) -> Rates:
    """Return how fast the link, the decoder and the model are.

    Puts everything to rest to measure the first two, if they are not known.

    Args:
        session: the session.
        measured: a pass with the plan.
        plan: the plan.
        source: what to copy, to measure the link.
    """
    device = session.policy.compute_device
    speeds = session.meter.speeds
    if speeds is None:
        session.mover.drop_all()
        speeds = session.meter.speeds = _measure(source, device, session.budget)
    copying, decoding = speeds
    on_device = measured.seconds - measured.stalled_seconds
    return Rates(
        link_bytes_per_second=1 / copying,
        compute_seconds=max(on_device - plan.decoded_bytes * decoding, 0.0),
        decode_bytes_per_second=1 / decoding,
    )


def _measure(
    source: Master, device: torch.device, budget: MemoryBudget
) -> tuple[float, float]:
    """Measure how long a byte takes to copy and to decode; nothing is on the device."""
    size = TIMED_BYTES  # or what the limit has
    while not budget.fits(2 * size):
        size //= 2
    budget.reserve("measuring", 2 * size)
    try:
        return _copy_seconds(source, device, size), decode_seconds(device, size)
    finally:
        budget.release("measuring", 2 * size)


def _copy_seconds(master: Master, device: torch.device, most: int) -> float:
    """Measure how long a byte takes to the device."""
    source = master.bytes[:most]
    target = torch.empty_like(source, device=device)
    seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), device)
    return seconds / source.numel()


def _code_more(
    session: Session,
    measured: MeasuredPass,
    plan: Plan,
    streamed: Codable,
    residents: Codable,
) -> None:
    """Have layers coded for which a measured pass says that it pays."""
    policy, budget = session.policy, session.budget
    source = max(
        chain.from_iterable([*streamed, *residents]), key=lambda m: m.plain_bytes
    )
    rates = _rates(session, measured, plan, source)
    chosen = _within_ram(choose_masters(measured, plan, rates, streamed, residents))
    if not chosen:
        return
    session.mover.drop_all()
    made = make_codes(chosen, policy, budget)
    if not made:
        return
    try:
        for master, code in made:
            master.code_as(code)
        session.rebuilding.rebuild()
    except BaseException as error:
        for master, _ in made:
            master.forget_code()
        session.rebuilding.rebuild()
        if not isinstance(error, BudgetExceededError):
            raise
        logger.info("the limit has no room to decode into: %s", error)
        return
    session.page_lock.unlock_coded(master for master, _ in made)
    session.page_lock.lock(session.store.masters)
    session.collect_garbage()  # the layers of before
    session.planner.weigh_codes(rates)


def _within_ram(masters: list[Master]) -> list[Master]:
    """Leave out masters whose codes host RAM has no room for, spread over the list."""
    sizes = [expected_bytes(master) for master in masters]
    spare = spare_memory()
    if sum(sizes) <= spare:
        return masters
    logger.warning(
        "codes of %s of weights would pay, and would take %s of host RAM, of which "
        "there are %s to spare: fewer are coded. Weights that load_model leaves in "
        "their file need no room beside their codes",
        format_gib(sum(master.plain_bytes for master in masters)),
        format_gib(sum(sizes)),
        format_gib(spare),
    )
    places = spread(sizes, spare / sum(sizes))
    while sum(sizes[place] for place in places) > spare:
        places.pop()  # they come within half a master of it
    return [masters[place] for place in places]


def choose_masters(
    measured: MeasuredPass,
    plan: Plan,
    rates: Rates,
    streamed: Codable,
    residents: Codable,
) -> list[Master]:
    """Choose what is to be coded.

    Args:
        measured: a pass with the plan.
        plan: the plan.
        rates: how fast the link, the decoder and the model are.
        streamed: what could be coded of what streams.
        residents: what could be of the residents, to keep it coded.
    """
    assert rates.link_bytes_per_second and rates.decode_bytes_per_second
    link = min(plan.pass_bytes / rates.link_bytes_per_second, measured.seconds)
    compute = measured.seconds - measured.stalled_seconds
    chosen, share, kept, copied = [], 0.0, 0.0, 1.0
    if streamed:
        saved = _spared(streamed) / plan.pass_bytes
        decode = _plain(streamed) / rates.decode_bytes_per_second
        share = measured.share_to_code(
            link_seconds=plan.pass_bytes / rates.link_bytes_per_second,
            saved=saved,
            decode_seconds=decode,
        )
        copied -= share * saved
        compute += share * decode
        chosen += _spread_over(streamed, share)
    if residents and plan.pass_bytes:
        # What coding them spares is room for as many coded bytes of others.
        kept = share_that_balances(
            link_seconds=link * copied,
            compute_seconds=compute,
            saved=_spared(residents) / (plan.pass_bytes * copied),
            decode_seconds=_plain(residents) / rates.decode_bytes_per_second,
        )
        chosen += _spread_over(residents, kept)
    logger.info(
        "a pass of %.3f s waited %.3f s for copies, which take %.3f s: %.0f%% of %s "
        "that stream are coded, and %.0f%% of %s that stay",
        measured.seconds,
        measured.stalled_seconds,
        link,
        100 * share,
        format_gib(_plain(streamed)),
        100 * kept,
        format_gib(_plain(residents)),
    )
    return chosen


def _plain(codable: Codable) -> int:
    return sum(master.plain_bytes for master in chain.from_iterable(codable))


def _spared(codable: Codable) -> int:
    """Return the bytes that codes are expected to save."""
    masters = chain.from_iterable(codable)
    return sum(master.plain_bytes - expected_bytes(master) for master in masters)


def _spread_over(codable: Codable, share: float) -> list[Master]:
    sizes = [sum(master.plain_bytes for master in masters) for masters in codable]
    return [master for place in spread(sizes, share) for master in codable[place]]

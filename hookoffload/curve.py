"""A plan at other limits: what a GiB more or less would change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .budget import GIB
from .cost import CurvePoint, Rates
from .limits import checked_limit
from .plan import Plan
from .planner import make_plan
from .priorities import priorities

# Limits that a curve has by itself: enough to see its shape, few enough for a table.
_STEPS = 8

_Ranked = tuple[list[int], int]  # what `priorities` returns


def curve_of(
    plan: Plan, limits_gb: Sequence[float] | None, rates: Rates | None
) -> list[CurvePoint]:
    """Plans anew for other limits; see `Plan.curve`."""
    # The same at every limit, and most of the work where layers are many.
    ranked = priorities(plan.layers, plan.order)
    if limits_gb is None:
        limits: list[int | None] = list(_usual_limits(plan, ranked))
    else:
        checked = [checked_limit("limits_gb", limit) for limit in limits_gb]
        limits = [None if gib is None else int(gib * GIB) for gib in checked]
    return [_point(_at_limit(plan, limit, ranked), limit, rates) for limit in limits]


def _at_limit(plan: Plan, limit_bytes: int | None, ranked: _Ranked) -> Plan:
    """Returns the plan of the same model at another limit."""
    made = make_plan(
        plan.layers,
        order=plan.order,
        chains=plan.chains,
        limit_bytes=limit_bytes,
        always_bytes=plan.always_bytes,
        activation_bytes=plan.activation_bytes,
        code_share=plan.code_share,
        ranked=ranked,
    )
    return replace(made, device=plan.device, rates=plan.rates)


def _point(plan: Plan, limit_bytes: int | None, rates: Rates | None) -> CurvePoint:
    prediction = plan.predict(rates)
    seconds = None if prediction is None else prediction.seconds
    return CurvePoint(limit_bytes, seconds, plan.resident_bytes)


def _usual_limits(plan: Plan, ranked: _Ranked) -> list[int]:
    """The least, where everything stays, and round numbers of GiB in between."""
    whole = _at_limit(plan, None, ranked)
    least, most = plan.least_bytes, whole.total_bytes + whole.activation_bytes
    step = _round_step(most / _STEPS / GIB) * GIB
    between = [int(n * step) for n in range(1, _STEPS + 1)]
    inside = [limit for limit in between if least < limit < most]
    return list(dict.fromkeys([least, *inside, max(least, most)]))


def _round_step(gib: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, the first that is not smaller."""
    power = 1.0
    while power * 10 <= gib:
        power *= 10
    while power > gib > 0:
        power /= 10
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= gib)

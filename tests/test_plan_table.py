"""What a plan shows: its table at any width, predicted seconds, and curves."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from hookoffload import BudgetExceededError, Rates, curve, planner
from hookoffload.cost import COPIES_SLOW_COMPUTE, Prediction, predict
from hookoffload.plan import LayerSpec, Plan
from hookoffload.plan_table import (
    cut_name,
    format_curve,
    format_plan,
    groups_of,
    plan_record,
)
from hookoffload.planner import make_plan
from hookoffload.priorities import priorities

MIB = 2**20
GIB = 2**30


def blocks(count: int = 16, nbytes: int = 64 * MIB, **more: Any) -> list[LayerSpec]:
    sizes = {"stream_bytes": nbytes, "copy_bytes": nbytes, "resident_bytes": nbytes}
    return [
        LayerSpec(name=f"blocks.{index}.attn.to_q", **{**sizes, **more})
        for index in range(count)
    ]


def plan_of(
    layers: list[LayerSpec], limit_bytes: int | None, rates: Rates | None = None
) -> Plan:
    plan = make_plan(
        layers, order=range(len(layers)), chains=[], limit_bytes=limit_bytes
    )
    return with_rates(plan, rates)


def with_rates(plan: Plan, rates: Rates | None) -> Plan:
    return Plan(**{**vars(plan), "rates": rates})


def rows(plan: Plan, width: int = 80) -> dict[str, str]:
    lines = [line.strip() for line in format_plan(plan, width).splitlines()]
    return {line.split("  ")[0]: " ".join(line.split()) for line in lines}


# -- seconds ------------------------------------------------------------------------


def test_slowest_of_compute_link_and_disk_sets_the_pace() -> None:
    rates = {
        "link_bytes_per_second": 10.0,
        "disk_bytes_per_second": 2.0,
        "compute_seconds": 3.0,
    }
    for link, disk, seconds in (
        (20, 0, 3.0 + 2.0 * COPIES_SLOW_COMPUTE),
        (40, 0, 4.0),
        (40, 10, 5.0),
        (0, 0, 3.0),
    ):
        prediction = predict(Rates(**rates), link_bytes=link, disk_bytes=disk)
        assert prediction.seconds == pytest.approx(seconds)
        assert prediction.complete


def test_computing_is_slower_for_as_long_as_copies_run_beside_it() -> None:
    rates = Rates(link_bytes_per_second=10.0, compute_seconds=4.0)
    alone, half, whole = (
        predict(rates, link_bytes=link, disk_bytes=0).seconds for link in (0, 20, 40)
    )
    assert alone == 4.0
    assert whole - half == pytest.approx(half - alone)
    assert whole / alone == pytest.approx(1 + COPIES_SLOW_COMPUTE)


def test_decoding_is_added_to_computing() -> None:
    rates = Rates(link_bytes_per_second=10.0, compute_seconds=3.0)
    fast = replace(rates, decode_bytes_per_second=100.0)
    for known, decoded, seconds, complete in (
        (fast, 50, 3.5 + 3.0 * COPIES_SLOW_COMPUTE, True),
        (fast, 150, 4.5 + 3.0 * COPIES_SLOW_COMPUTE, True),
        (fast, 0, 4.0, True),
        (rates, 50, 4.0, False),
        (rates, 0, 4.0, True),
    ):
        link = 30 if decoded else 40
        link = 40 if known is rates else link
        prediction = predict(
            known, link_bytes=link, disk_bytes=0, decoded_bytes=decoded
        )
        assert prediction.seconds == pytest.approx(seconds)
        assert prediction.complete == complete
        assert ("decoding" in prediction.parts) == (decoded > 0)
    with pytest.raises(ValueError, match="decode_bytes_per_second=0"):
        Rates(decode_bytes_per_second=0)


def test_without_rates_no_second_is_named() -> None:
    plan = plan_of(blocks(), GIB // 2)
    assert plan.predict() is None
    assert "predicted" not in str(plan)
    assert plan_record(plan)["predicted"] is None
    assert {point.seconds for point in plan.curve()} == {None}
    assert "s a pass" not in format_curve(plan.curve())


def test_what_is_not_known_makes_the_seconds_a_lower_bound() -> None:
    plan = plan_of(blocks(), GIB // 2, Rates(link_bytes_per_second=GIB / 4))
    prediction = plan.predict()
    assert prediction is not None
    assert not prediction.complete
    expected = plan.pass_bytes / (GIB / 4)
    assert prediction.seconds == pytest.approx(expected)
    shown = rows(plan)["predicted"]
    assert shown.startswith(f"predicted >= {expected:.3f} s a pass: compute not known")


def test_what_is_known_makes_the_seconds_exact() -> None:
    rates = Rates(link_bytes_per_second=GIB, compute_seconds=0.125)
    plan = plan_of(blocks(disk_bytes=0), None, rates)
    assert rows(plan)["predicted"] == (
        "predicted 0.125 s a pass: compute 0.125, link 0.000, disk 0.000"
    )
    assert plan_record(plan)["predicted"] == {
        "compute_seconds": 0.125,
        "link_seconds": 0.0,
        "disk_seconds": 0.0,
        "decode_seconds": 0.0,
        "seconds": 0.125,
        "complete": True,
    }


def test_bytes_from_disk_take_their_time() -> None:
    rates = Rates(link_bytes_per_second=GIB, disk_bytes_per_second=GIB / 8)
    plan = plan_of(blocks(disk_bytes=64 * MIB), 0, rates)
    assert plan.disk_bytes == plan.pass_bytes == GIB
    assert plan.predict() == Prediction(
        compute_seconds=None, link_seconds=1.0, disk_seconds=8.0
    )
    assert rows(plan)["read from disk"] == "read from disk 1.000 GiB per pass"


def test_rates_that_are_given_go_before_the_plans_own() -> None:
    plan = plan_of(blocks(), 0, Rates(link_bytes_per_second=GIB))
    prediction = plan.predict(Rates(link_bytes_per_second=2 * GIB))
    assert prediction is not None
    assert prediction.link_seconds == 0.5


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
def test_rate_that_is_no_positive_number_is_refused(rate: float) -> None:
    for name in ("link_bytes_per_second", "disk_bytes_per_second"):
        with pytest.raises(ValueError, match=f"{name}.*positive"):
            Rates(**{name: rate})
    if rate != 0:
        with pytest.raises(ValueError, match="compute_seconds"):
            Rates(compute_seconds=rate)


# -- curves -------------------------------------------------------------------------


def test_curve_goes_from_the_least_to_where_everything_stays() -> None:
    plan = plan_of(blocks(), GIB // 2, Rates(link_bytes_per_second=GIB))
    points = plan.curve()
    assert points[0].limit_bytes == plan.least_bytes
    assert (points[0].resident_bytes, points[0].seconds) == (0, 1.0)
    assert points[-1].limit_bytes == points[-1].resident_bytes == GIB
    assert points[-1].seconds == 0.0
    assert 4 <= len(points) <= 10
    for smaller, larger in itertools.pairwise(points):
        assert smaller.limit_bytes < larger.limit_bytes
        assert smaller.seconds >= larger.seconds
        assert smaller.resident_bytes <= larger.resident_bytes


def test_curve_at_given_limits_is_what_plans_at_these_would_be() -> None:
    layers = blocks()
    rates = Rates(link_bytes_per_second=GIB)
    points = plan_of(layers, 0).curve([0.25, 0.5, 0], rates)
    for point, limit in zip(points, (GIB // 4, GIB // 2, 0), strict=True):
        there = plan_of(layers, limit, rates)
        prediction = there.predict()
        assert prediction is not None
        assert point == (limit, prediction.seconds, there.resident_bytes)


def test_curve_of_a_model_on_the_cpu_counts_no_link() -> None:
    plan = plan_of(blocks(disk_bytes=64 * MIB), 0)
    plan = Plan(**{**vars(plan), "device": "cpu"})
    rates = Rates(link_bytes_per_second=1.0, disk_bytes_per_second=float(GIB))
    assert [point.seconds for point in plan.curve([0], rates)] == [1.0]


def test_curve_keeps_layers_together_that_run_inside_one_another() -> None:
    outer, middle, inner = (
        LayerSpec(name=name, stream_bytes=MIB, copy_bytes=MIB, held=name != "a.b.c")
        for name in ("a", "a.b", "a.b.c")
    )
    plan = make_plan(
        [outer, middle, inner], order=[0, 1, 2], chains=[(0, 1, 2)], limit_bytes=None
    )
    assert plan.curve()[0].limit_bytes == 3 * MIB
    with pytest.raises(BudgetExceededError, match=r"a and a\.b \(bound while"):
        plan.curve([2.5 * MIB / GIB])


def test_curve_refuses_limits_that_cannot_be() -> None:
    plan = plan_of(blocks(), 0)
    with pytest.raises(BudgetExceededError, match="Set limit_gb="):
        plan.curve([1, 0.01])
    with pytest.raises(ValueError, match="limits_gb=-1"):
        plan.curve([-1])


def test_curve_of_a_model_that_moves_nothing_is_one_point() -> None:
    layers = [LayerSpec(name="a", stream_bytes=0, copy_bytes=0, can_stay=False)]
    points = plan_of(layers, None, Rates(compute_seconds=1.5)).curve()
    assert points == [(0, 1.5, 0)]


def test_curve_shows_a_bar_for_each_second() -> None:
    plan = plan_of(blocks(), 0, Rates(link_bytes_per_second=GIB, compute_seconds=0.5))
    lines = format_curve(plan.curve([0, 0.8]), 60).splitlines()
    assert ">=" not in lines[0]
    assert lines[1].split()[-2] == "1.000"
    full, half = (line.count("#") for line in lines[1:])
    assert 0.45 * full < half < 0.55 * full
    assert ">= s a pass" in format_curve(plan.curve(), 40, at_least=True)


def test_curve_ranks_the_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(blocks(), 0)
    ranked: list[Any] = []

    def counted(*args: Any) -> Any:
        ranked.append(args)
        return priorities(*args)

    monkeypatch.setattr(planner, "priorities", counted)
    monkeypatch.setattr(curve, "priorities", counted, raising=False)
    assert len(plan.curve()) > 4
    assert len(ranked) == 1


def test_curve_names_limits_that_do_as_they_are_typed_back() -> None:
    plan = plan_of(blocks(nbytes=67 * MIB), 0)
    least = format_curve(plan.curve(), 60).splitlines()[1].split()[0]
    assert plan.curve([float(least)])


# -- the table ----------------------------------------------------------------------


def test_groups_say_size_dtype_and_tiers() -> None:
    plan = plan_of(blocks(dtype="BF16"), GIB // 2)
    (group,) = groups_of(plan)
    kept = len(plan.resident)
    assert 0 < kept < 16
    assert group[2:6] == (64 * MIB, "BF16", kept, False)
    assert (len(group.members), group.streamed) == (16, 16 - kept)
    row = format_plan(plan).splitlines()[-1].split()
    name = "blocks.0-15.attn.to_q"
    assert row == [name, "64.0", "MiB", "BF16", str(kept), str(16 - kept)]


def test_layers_of_other_dtypes_are_groups_of_their_own() -> None:
    layers = blocks(4, dtype="BF16")[:2] + blocks(4, dtype="F8_E4M3 > BF16")[2:]
    names = [group.name for group in groups_of(plan_of(layers, None))]
    assert names == ["blocks.0-1.attn.to_q", "blocks.2-3.attn.to_q"]


def test_layers_that_are_read_where_they_rest_are_not_called_streamed() -> None:
    table = LayerSpec(name="table", stream_bytes=0, copy_bytes=0, can_stay=False)
    plan = plan_of([table, *blocks(2)], 0)
    assert plan.summary == "0 of 3 layers resident, 2 streamed, 1 in place"
    assert rows(plan)["table"].split() == ["table", "in", "place", "0", "0"]


@pytest.mark.parametrize("width", [40, 63, 64, 80, 200])
@pytest.mark.parametrize("dtype", ["", "BF16", "F8_E4M3 > BF16 + I64"])
def test_table_fits_any_terminal(width: int, dtype: str) -> None:
    rates = Rates(link_bytes_per_second=1e6, disk_bytes_per_second=1e5)
    long = "a_name_without_end." * 9 + "q"
    layers = [*blocks(dtype=dtype), *blocks(1, disk_bytes=MIB)]
    layers.append(LayerSpec(name=long, stream_bytes=MIB, copy_bytes=MIB, dtype=dtype))
    for limit in (0, 2 * GIB, None):
        plan = plan_of(layers, limit, rates)
        text = format_plan(plan, width)
        assert max(map(len, text.splitlines())) <= width
        assert "end.q" in text
        assert "streamed" in text
        curve = format_curve(plan.curve(), width, at_least=True)
        assert max(map(len, curve.splitlines())) <= width


def test_summary_has_its_figures_in_one_unit() -> None:
    layers = blocks(count=8, nbytes=MIB)
    summary, _, table = format_plan(plan_of(layers, 4 * MIB)).partition("  layers")
    assert table
    units = re.findall(r"\b[GMK]iB\b|\bbytes\b", summary)
    assert len(units) > 8
    assert len(set(units) - {"GiB"}) <= 1
    assert "  limit             4.000 MiB" in summary
    rows = [row for row in summary.splitlines() if "least" not in row]
    assert not any("GiB" in row for row in rows)


@pytest.mark.parametrize("width", [40, 80])
def test_name_that_is_cut_begins_where_a_component_does(width: int) -> None:
    layers = [
        LayerSpec(
            name=f"model.language_model.of_some.length.layers.{index}.mlp.up_proj",
            stream_bytes=MIB,
            copy_bytes=MIB,
            dtype="BF16",
        )
        for index in range(126)
    ]
    text = format_plan(plan_of(layers, 0), width)
    assert re.search(r"\.\.\.((of_some\.)?length\.)?layers\.0-125\.mlp\.up_proj", text)


def test_component_that_alone_is_too_long_is_cut_itself() -> None:
    assert cut_name("layers.0.a_long_name_of_a_layer", 16) == "...me_of_a_layer"
    assert cut_name("layers.0.up", 11) == "layers.0.up"


def test_narrow_table_says_the_same_as_the_wide_one() -> None:
    plan = plan_of(blocks(dtype="BF16"), GIB // 2)
    kept = len(plan.resident)
    text = " ".join(format_plan(plan, 40).split())
    assert (
        f"blocks.0-15.attn.to_q 64.0 MiB BF16, {kept} resident, {16 - kept} streamed"
        in text
    )


def test_record_is_json_and_adds_up() -> None:
    plan = plan_of(blocks(dtype="BF16"), GIB // 2, Rates(compute_seconds=1))
    record = json.loads(json.dumps(plan_record(plan)))
    assert record["limit_bytes"] == GIB // 2
    assert record["together_bytes"] <= GIB // 2
    assert record["layers"] == sum(group["layers"] for group in record["groups"])
    streamed = sum(
        group["streamed"] * group["bytes_each"] for group in record["groups"]
    )
    assert streamed == record["pass_bytes"] == record["link_bytes"]

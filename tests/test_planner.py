"""Plans: within the limit, nested, monotone, evenly spread, readable."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hookoffload.budget import BudgetExceededError
from hookoffload.plan import LayerSpec, Plan
from hookoffload.planner import make_plan
from hookoffload.priorities import SMALL_LAYER_BYTES
from hookoffload.window_size import WINDOW_BYTES

MIB = 2**20
GIB = 2**30


def layer(name: str, nbytes: int, **more: Any) -> LayerSpec:
    sizes = {"stream_bytes": nbytes, "copy_bytes": nbytes, "resident_bytes": nbytes}
    return LayerSpec(name=name, **{**sizes, **more})


def blocks(count: int, nbytes: int = 8 * MIB, **more: Any) -> list[LayerSpec]:
    return [layer(f"blocks.{i}", nbytes, **more) for i in range(count)]


def plan_of(
    layers: list[LayerSpec],
    limit_bytes: int | None,
    chains: Sequence[tuple[int, ...]] = (),
    **more: Any,
) -> Plan:
    more.setdefault("order", range(len(layers)))
    return make_plan(layers, chains=chains, limit_bytes=limit_bytes, **more)


class Model(NamedTuple):
    layers: list[LayerSpec]
    order: list[int]
    chains: list[tuple[int, ...]]
    always: int
    activations: int

    def plan(self, limit_bytes: int | None, **more: Any) -> Plan:
        return make_plan(
            self.layers,
            order=self.order,
            chains=self.chains,
            limit_bytes=limit_bytes,
            always_bytes=self.always,
            activation_bytes=self.activations,
            **more,
        )

    @property
    def all_bytes(self) -> int:
        sizes = sum(s.resident_bytes + 3 * s.stream_bytes for s in self.layers)
        return sizes + self.always + self.activations

    def ring_least(self) -> int:
        return max((s.stream_bytes for s in self.layers if not s.held), default=0)

    def stack(self) -> int:
        held = [[self.layers[i] for i in c if self.layers[i].held] for c in self.chains]
        return max((sum(s.stream_bytes for s in chain) for chain in held), default=0)

    def scratch(self) -> int:
        def most(spec: LayerSpec) -> int:
            resident = spec.resident_cast_bytes if spec.can_stay else 0
            return max(spec.cast_bytes, resident)

        casts = [sum(most(self.layers[i]) for i in chain) for chain in self.chains]
        return max(casts, default=0)


@st.composite
def models(draw: st.DrawFn) -> Model:
    # Sizes on both sides of the small-layer bound, with a giant now and then.
    sizes = st.one_of(
        st.integers(0, SMALL_LAYER_BYTES),
        st.integers(SMALL_LAYER_BYTES, 12 * MIB),
        st.integers(12 * MIB, 400 * MIB),
    )
    layers = []
    for index in range(draw(st.integers(1, 24))):
        size, cast, kind = draw(sizes), draw(st.booleans()), draw(st.integers(0, 9))
        layers.append(
            LayerSpec(
                name=f"part{index % 3}.{index}",
                stream_bytes=size,
                copy_bytes=draw(st.integers(0, size)),
                cast_bytes=2 * size if cast else 0,
                resident_bytes=size * draw(st.integers(1, 2)),
                resident_cast_bytes=draw(st.integers(0, 3)) * size if cast else 0,
                held=kind < 2,
                can_stay=kind != 9,
            )
        )
    indices = st.integers(0, len(layers) - 1)
    held = [index for index, spec in enumerate(layers) if spec.held]
    chains = []
    for index, spec in enumerate(layers):
        outer = draw(st.lists(st.sampled_from(held), unique=True)) if held else []
        chains.append((*(i for i in outer if i != index), index))
        assert sum(not layers[i].held for i in chains[-1]) == (not spec.held)
    order = list(range(len(layers)))
    if draw(st.booleans()):
        order = draw(st.lists(indices, max_size=40))
    always = draw(st.integers(0, 3 * MIB))
    return Model(layers, order, chains, always, draw(st.integers(0, 100 * MIB)))


@given(models(), st.floats(0, 1.2))
def test_a_plan_keeps_its_limit_activations_included(
    model: Model, share: float
) -> None:
    least = model.plan(0).least_bytes
    limit = least + int(share * model.all_bytes)
    plan = model.plan(limit)
    assert plan.total_bytes <= limit
    assert plan.scratch_bytes <= model.scratch()
    assert plan.stack_bytes <= model.stack()
    if limit - model.activations >= least:
        assert plan.total_bytes + model.activations <= limit
    streamed = [model.layers[i] for i in plan.streamed if not model.layers[i].held]
    assert plan.ring_bytes >= max((s.stream_bytes for s in streamed), default=0)
    assert plan.ring_bytes <= sum(s.stream_bytes for s in streamed)


@given(models(), st.floats(0, 1.2), st.floats(0, 1.2))
def test_more_memory_keeps_the_residents_and_copies_no_more(
    model: Model, one_share: float, other_share: float
) -> None:
    least = model.plan(0).least_bytes
    shares = sorted((one_share, other_share))
    small, large = (model.plan(least + int(s * model.all_bytes)) for s in shares)
    assert model.plan(0).resident <= small.resident <= large.resident
    assert large.resident <= model.plan(None).resident
    assert large.pass_bytes <= small.pass_bytes <= model.plan(0).pass_bytes


@given(models())
def test_the_scratch_and_the_stack_cover_every_chain(model: Model) -> None:
    for limit in (0, model.plan(0).least_bytes + model.all_bytes // 3, None):
        plan = model.plan(limit)
        for chain in model.chains:
            casts = held = 0
            for index in chain:
                spec = model.layers[index]
                resident = index in plan.resident
                casts += spec.resident_cast_bytes if resident else spec.cast_bytes
                held += spec.stream_bytes if spec.held and not resident else 0
            assert casts <= plan.scratch_bytes
            assert held <= plan.stack_bytes


@given(models())
def test_the_least_works_and_a_byte_less_is_refused(model: Model) -> None:
    least = model.plan(0).least_bytes
    ring, always = model.ring_least(), model.always
    assert least == always + ring + model.stack() + model.scratch()
    assume(least > 1)
    plan = model.plan(least)
    assert plan.limit_bytes == plan.least_bytes == least
    with pytest.raises(BudgetExceededError):
        model.plan(least - 1)


@given(models())
def test_the_least_that_a_refusal_prints_is_accepted_when_typed(model: Model) -> None:
    assume(model.plan(0).least_bytes > 1)
    with pytest.raises(BudgetExceededError) as refused:
        model.plan(1)
    message = str(refused.value)
    found = re.search(r"the least this model needs, ([0-9.]+) GiB: ", message)
    assert found is not None
    assert f"Set limit_gb={found[1]} or more" in message
    model.plan(int(float(found[1]) * GIB))


def test_a_refusal_says_which_layers_casts_and_tensors_need_the_memory() -> None:
    layers = [
        layer("blocks.7", 2 * MIB, held=True),
        layer("blocks.7.mlp.up", 57 * MIB, cast_bytes=20 * MIB),
        layer("blocks.7.mlp.down", 56 * MIB),
    ]
    with pytest.raises(BudgetExceededError) as refused:
        plan_of(layers, int(0.05 * GIB), [(0, 1), (0, 2)], always_bytes=15 * MIB)
    assert str(refused.value) == (
        "limit_gb=0.05 is below the least this model needs, 0.092 GiB: "
        "blocks.7.mlp.up takes 0.056, always-resident tensors 0.015, "
        "blocks.7 (bound while other layers run) 0.00196, "
        "casts to the computation dtype 0.020. "
        "Set limit_gb=0.092 or more, or 0 for as little as possible."
    )


def test_a_refusal_leaves_out_what_takes_nothing() -> None:
    only_layer = r"GiB: blocks\.0 takes 0\.00782\. Set"
    with pytest.raises(BudgetExceededError, match=only_layer):
        plan_of(blocks(2), 1)


def test_no_limit_keeps_everything_and_needs_no_window() -> None:
    layers = [layer("root", MIB, held=True), *blocks(9, resident_cast_bytes=MIB)]
    plan = plan_of(layers, None, [(0, i) for i in range(1, 10)])
    assert plan.resident == frozenset(range(10))
    assert plan.streamed == ()
    assert (plan.ring_bytes, plan.stack_bytes, plan.pass_bytes) == (0, 0, 0)
    assert plan.scratch_bytes == MIB
    assert plan.limit_bytes is None


def test_a_limit_that_just_holds_everything_keeps_everything() -> None:
    layers = blocks(9, cast_bytes=7 * MIB, resident_cast_bytes=MIB)
    needed = 9 * 8 * MIB + MIB + 5 * MIB + 3 * MIB
    more: dict[str, Any] = {"always_bytes": 5 * MIB, "activation_bytes": 3 * MIB}
    plan = plan_of(layers, needed, **more)
    assert len(plan.resident) == 9
    assert plan.total_bytes + plan.activation_bytes == needed
    assert len(plan_of(layers, needed - 1, **more).resident) < 9


def test_a_limit_of_zero_streams_everything_through_the_least_window() -> None:
    layers = [layer("norm", 1024), *blocks(9)]
    plan = plan_of(layers, 0, activation_bytes=GIB)
    assert plan.resident == frozenset()
    assert plan.ring_bytes == 8 * MIB
    assert plan.limit_bytes == plan.least_bytes == plan.total_bytes == 8 * MIB


def test_a_layer_that_cannot_stay_is_streamed_without_any_limit() -> None:
    layers = [*blocks(3), layer("head", 5 * MIB, can_stay=False, cast_bytes=MIB)]
    plan = plan_of(layers, None)
    assert plan.streamed == (3,)
    assert plan.ring_bytes == 5 * MIB
    assert plan.scratch_bytes == MIB
    assert plan.pass_bytes == 5 * MIB


def test_a_measuring_pass_keeps_nothing_and_has_its_window() -> None:
    layers = [layer("norm", 1024), *blocks(40)]
    for limit in (200 * MIB, None):
        plan = plan_of(layers, limit, keep_residents=False)
        assert plan.resident == frozenset()
        assert plan.ring_bytes == 24 * MIB


def test_a_window_holds_three_of_the_largest_streamed_layer() -> None:
    plan = plan_of(blocks(40), 100 * MIB)
    assert plan.ring_bytes == 24 * MIB
    assert plan.resident_bytes == 72 * MIB


def test_a_large_model_of_small_layers_has_a_window_of_fixed_size() -> None:
    plan = plan_of(blocks(1000), GIB)
    assert plan.ring_bytes == WINDOW_BYTES
    assert plan.resident_bytes == GIB - WINDOW_BYTES


def test_the_window_is_never_larger_than_what_passes_through_it() -> None:
    layers = [*blocks(40), *(layer(n, 4 * MIB, can_stay=False) for n in "ab")]
    plan = plan_of(layers, None)
    assert plan.streamed == (40, 41)
    assert plan.ring_bytes == 8 * MIB


def test_a_tight_limit_goes_to_the_window_before_the_residents() -> None:
    plan = plan_of(blocks(40), 20 * MIB)
    assert plan.resident == frozenset()
    assert plan.ring_bytes == 20 * MIB


def test_small_layers_stay_even_where_the_window_shrinks_for_them() -> None:
    layers = [*blocks(40), *(layer(f"norms.{i}", MIB // 40) for i in range(40))]
    plan = plan_of(layers, 17 * MIB)
    assert plan.resident == frozenset(range(40, 80))
    assert plan.ring_bytes == 17 * MIB - plan.resident_bytes
    assert plan_of(layers, 15 * MIB).resident == frozenset()


def test_small_layers_come_first_then_held_ones_then_the_rest() -> None:
    layers = [
        *blocks(20),
        layer("norm", 1024),
        layer("root", 2 * MIB, held=True),
    ]
    chains = [(21, i) for i in range(21)]
    window = 24 * MIB
    assert plan_of(layers, window + 2 * MIB + 1024, chains).resident == {20, 21}
    only_small = plan_of(layers, window + 2 * MIB + 1023, chains)
    assert only_small.resident <= {20}
    more = plan_of(layers, window + 10 * MIB + 1024, chains)
    assert more.resident == {20, 21, 0}


def test_a_resident_held_layer_leaves_its_place_in_the_window() -> None:
    layers = [layer("root", 30 * MIB, held=True), *blocks(20)]
    chains = [(0, i) for i in range(1, 21)]
    plan = plan_of(layers, 54 * MIB, chains)
    assert plan.resident == {0}
    assert (plan.ring_bytes, plan.stack_bytes) == (24 * MIB, 0)


def test_a_giant_stays_where_streaming_it_would_take_more() -> None:
    layers = [*blocks(40), layer("head", 100 * MIB)]
    plan = plan_of(layers, 130 * MIB)
    assert plan.resident == {40}
    assert plan.ring_bytes <= 30 * MIB
    assert plan_of(layers, 110 * MIB).resident == frozenset()


def test_layers_outside_of_the_order_stay_last() -> None:
    layers = blocks(20)
    order = list(range(5, 20))
    plan = plan_of(layers, 24 * MIB + 10 * 8 * MIB, order=order)
    assert min(plan.resident) >= 5
    largest = plan_of(layers, 19 * 8 * MIB, order=order)
    assert set(order) <= largest.resident


def test_residents_are_spread_over_the_order_and_not_over_the_numbers() -> None:
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    plan = plan_of(blocks(40), 24 * MIB + 4 * 8 * MIB, order=order)
    assert sorted(order.index(index) for index in plan.resident) == [0, 10, 20, 30]


def test_residents_are_spread_by_bytes() -> None:
    large = [layer(f"large.{i}", 6 * MIB) for i in range(32)]
    plan = plan_of([*blocks(32, 2 * MIB), *large], 90 * MIB)
    first = [i for i in plan.resident if i < 32]
    second = [i for i in plan.resident if i >= 32]
    assert len(second) >= 2 * len(first) > 0


def test_small_layers_of_a_block_stay_before_its_large_ones() -> None:
    layers = [
        layer(f"blocks.{i}.{name}", nbytes)
        for i in range(8)
        for name, nbytes in (("up", 32 * MIB), ("q", 8 * MIB), ("down", 32 * MIB))
    ]
    resident = plan_of(layers, 3 * 32 * MIB + 8 * 8 * MIB).resident
    assert {layers[i].name for i in resident} == {f"blocks.{i}.q" for i in range(8)}
    more = plan_of(layers, 3 * 32 * MIB + 8 * 8 * MIB + 4 * 32 * MIB).resident
    blocks_of_more = {layers[i].name.split(".")[1] for i in more - resident}
    assert resident < more and len(blocks_of_more) == 4  # evenly, in four blocks


def largest_gap(places: list[int], count: int) -> int:
    """The longest way from one resident to the next, round the cycle."""
    ends = [*places[1:], places[0] + count]
    return max(end - start for start, end in zip(places, ends, strict=True))


@given(st.integers(4, 300), st.floats(0, 1))
@example(129, 127 / 129)
def test_the_largest_gap_between_residents_is_below_three_times_the_ideal(
    count: int, share: float
) -> None:
    nbytes = 90 * MIB
    plan = plan_of(blocks(count, nbytes), 3 * nbytes + int(share * count * nbytes))
    kept = len(plan.resident)
    assume(kept)
    assert largest_gap(sorted(plan.resident), count) < 3 * count / kept


def test_at_powers_of_two_the_residents_are_spread_perfectly() -> None:
    for kept in (1, 2, 4, 8, 16, 32):
        plan = plan_of(blocks(64), (kept + 4) * 8 * MIB)
        assert largest_gap(sorted(plan.resident), 64) == 64 // kept


def test_a_layer_that_runs_twice_crosses_the_link_twice() -> None:
    plan = plan_of(blocks(4), 0, order=[0, 1, 2, 3, 1])
    assert plan.pass_bytes == 5 * 8 * MIB


def test_the_scratch_is_the_largest_sum_of_a_chain() -> None:
    layers = [
        layer("root", 0, held=True, cast_bytes=3),
        layer("a", 0, cast_bytes=4, resident_cast_bytes=5),
        layer("b", 0, cast_bytes=6, can_stay=False, resident_cast_bytes=99),
    ]
    plan = plan_of(layers, 0, [(0, 1), (0, 2)])
    assert (plan.scratch_bytes, plan.least_bytes) == (9, 9)


def test_the_scratch_is_only_what_the_actual_residents_need() -> None:
    layers = [layer("a", 0, cast_bytes=4, resident_cast_bytes=50)]
    plan = plan_of(layers, 0)
    assert (plan.scratch_bytes, plan.least_bytes) == (4, 50)
    assert plan_of(layers, None).scratch_bytes == 50


def test_layers_that_run_several_times_are_kept_once_like_all_others() -> None:
    order = [0, 1, 2, 0, 3, 0, 1, 4, 0]
    layers = blocks(5, resident_cast_bytes=MIB)
    assert len(plan_of(layers, None, order=order).resident) == 5
    assert len(plan_of(layers, 41 * MIB, order=order).resident) == 5


def test_a_layer_named_in_no_chain_is_counted_alone() -> None:
    plan = plan_of([layer("a", MIB, held=True, cast_bytes=5)], 0, [])
    assert (plan.stack_bytes, plan.scratch_bytes) == (MIB, 5)


def test_two_layers_that_are_not_held_cannot_be_bound_at_the_same_time() -> None:
    with pytest.raises(AssertionError, match=r"blocks\.0, blocks\.1 are bound"):
        plan_of(blocks(3), None, [(0, 1)])


def test_activations_shrink_the_residents_but_never_refuse_a_limit() -> None:
    layers = blocks(40)
    roomy, tight = (
        plan_of(layers, 200 * MIB, activation_bytes=n * MIB) for n in (0, 100)
    )
    assert tight.resident < roomy.resident
    none_left = plan_of(layers, 200 * MIB, activation_bytes=GIB)
    assert none_left.resident == frozenset()
    assert none_left.ring_bytes == 8 * MIB


def test_a_model_without_layers_has_an_empty_plan() -> None:
    plan = plan_of([], 5)
    assert (plan.total_bytes, plan.window_bytes, plan.resident) == (0, 0, frozenset())
    assert "0 of 0 layers resident" in str(plan)


def test_plans_are_data_that_cannot_change() -> None:
    plan = plan_of(blocks(4), 0)
    assert plan == plan_of(blocks(4), 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.ring_bytes = 1  # type: ignore[misc]


def transformer(count: int = 60) -> list[LayerSpec]:
    layers = [layer("patch_embed.proj", 4 * MIB)]
    for block in range(count):
        layers.append(layer(f"blocks.{block}.norm", 2048))
        layers.append(layer(f"blocks.{block}.attn.to_q", 18 * MIB))
        layers.append(layer(f"blocks.{block}.mlp.0.proj", 72 * MIB))
        layers.append(layer(f"blocks.{block}.mlp.1.proj", 72 * MIB))
    return layers


def test_its_text_says_what_is_kept_and_what_it_costs() -> None:
    plan = plan_of(transformer(), 2 * GIB, activation_bytes=GIB // 2)
    lines = str(plan).splitlines()
    kept, total = len(plan.resident), len(plan.layers)
    summary = f"{kept} of {total} layers resident, {total - kept} streamed"
    assert lines[0] == f"Plan: {summary}"
    text = re.sub(" +", " ", str(plan))
    assert "limit 2.000 GiB least 0.071 GiB" in text
    assert f"residents {plan.resident_bytes / GIB:.3f} GiB {kept} layers" in text
    assert f"window {plan.window_bytes / GIB:.3f} GiB" in text
    assert "activations 0.500 GiB" in text
    assert f"copied per pass {plan.pass_bytes / GIB:.3f} GiB" in text
    assert repr(plan) == f"Plan({summary})"
    assert "limit none" in re.sub(" +", " ", str(plan_of(blocks(2), None)))


def test_its_table_folds_repeated_blocks_and_counts_their_residents() -> None:
    plan = plan_of(transformer(), 2 * GIB)
    rows = [" ".join(line.split()) for line in str(plan).splitlines()[-5:]]
    kept = [plan.layers[index].name for index in plan.resident]
    queries = sum(name.endswith("to_q") for name in kept)
    wide = sum(".mlp." in name for name in kept)
    patches = int("patch_embed.proj" in kept)
    assert rows == [
        "layers each resident streamed",
        f"patch_embed.proj 4.0 MiB {patches} {1 - patches}",
        "blocks.0-59.norm 2.0 KiB 60 0",
        f"blocks.0-59.attn.to_q 18.0 MiB {queries} {60 - queries}",
        f"blocks.0-59.mlp.0-1.proj 72.0 MiB {wide} {120 - wide}",
    ]


def test_its_table_folds_only_runs_of_one_size() -> None:
    sizes = {0: 8, 1: 8, 2: 4, 4: 4, 5: 4, 6: 0}
    layers = [layer(f"h.{i}.mlp", size * MIB) for i, size in sizes.items()]
    names = [line.split()[0] for line in str(plan_of(layers, None)).splitlines()[-4:]]
    assert names == ["h.0-1.mlp", "h.2.mlp", "h.4-5.mlp", "h.6.mlp"]


def test_its_text_fits_eighty_columns() -> None:
    layers = [*transformer(), layer("a_name_without_end." * 9 + "q", 1000 * MIB)]
    for limit in (0, 20 * GIB, None):
        text = str(plan_of(layers, limit, always_bytes=123, activation_bytes=GIB))
        assert max(map(len, text.splitlines())) <= 80
        assert "..." in text

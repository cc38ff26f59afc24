"""The order of layers: predicted, recorded, followed, healed."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookoffload.order import ExecutionOrder

PASSES = st.lists(st.integers(0, 7), max_size=24)


def run_pass(
    order: ExecutionOrder, layers: list[int], complete: bool = True
) -> list[bool]:
    order.begin_pass()
    hits = [order.visit(layer) for layer in layers]
    order.end_pass(complete)
    return hits


def test_a_right_prediction_is_all_hits() -> None:
    assert run_pass(ExecutionOrder([3, 1, 2]), [3, 1, 2]) == [True, True, True]


def test_a_complete_pass_becomes_the_prediction() -> None:
    order = ExecutionOrder([0, 1, 2])
    run_pass(order, [2, 0, 2, 1])
    assert order.sequence == (2, 0, 2, 1)
    assert list(order.upcoming()) == [2, 0, 2, 1]


def test_a_pass_cut_short_keeps_the_prediction_and_starts_over() -> None:
    order = ExecutionOrder([0, 1, 2])
    run_pass(order, [2, 0], complete=False)
    assert order.sequence == (0, 1, 2)
    assert list(order.upcoming()) == [0, 1, 2]


def test_a_pass_without_visits_keeps_the_prediction() -> None:
    order = ExecutionOrder([0, 1, 2])
    run_pass(order, [])
    assert order.sequence == (0, 1, 2)


def test_a_skipped_layer_costs_one_miss() -> None:
    order = ExecutionOrder([0, 1, 2, 3])
    assert run_pass(order, [0, 2, 3]) == [True, False, True]


def test_a_repeated_layer_costs_one_miss() -> None:
    order = ExecutionOrder([0, 1, 2, 3])
    assert run_pass(order, [0, 1, 1, 2, 3]) == [True, True, False, True, True]


def test_an_unknown_layer_leaves_the_cursor_where_it_is() -> None:
    order = ExecutionOrder([0, 1, 2])
    assert run_pass(order, [0, 9, 1, 2]) == [True, False, True, True]


def test_a_miss_prefers_the_nearest_later_occurrence() -> None:
    order = ExecutionOrder([5, 0, 1, 5, 2, 5, 3])
    order.begin_pass()
    order.visit(5)
    order.visit(0)
    assert not order.visit(5)
    assert list(order.upcoming(2)) == [2, 5]


def test_a_miss_without_later_occurrence_goes_to_the_first_one() -> None:
    order = ExecutionOrder([5, 0, 5, 1, 2])
    order.begin_pass()
    for layer in (5, 0, 5, 1):
        order.visit(layer)
    assert not order.visit(5)
    assert next(order.upcoming()) == 0


def test_behind_the_last_layer_the_first_is_expected() -> None:
    order = ExecutionOrder([0, 1])
    order.begin_pass()
    assert [order.visit(layer) for layer in (0, 1, 0, 1)] == [True] * 4


def test_upcoming_wraps_round_and_yields_each_position_once() -> None:
    order = ExecutionOrder([0, 1, 2, 1])
    order.begin_pass()
    order.visit(0)
    order.visit(1)
    assert list(order.upcoming()) == [2, 1, 0, 1]
    assert list(order.upcoming(3)) == [2, 1, 0]
    assert list(order.upcoming(99)) == [2, 1, 0, 1]
    assert list(order.upcoming(0)) == []


def test_upcoming_is_fixed_when_called() -> None:
    order = ExecutionOrder([0, 1, 2])
    ahead = order.upcoming()
    order.visit(0)
    assert list(ahead) == [0, 1, 2]


def test_upcoming_costs_only_what_is_taken() -> None:
    order = ExecutionOrder(range(200_000))
    order.visit(100_000)
    for _ in range(10_000):
        next(order.upcoming())


def test_visits_outside_of_a_pass_follow_the_cursor_and_record_nothing() -> None:
    order = ExecutionOrder([0, 1, 2])
    run_pass(order, [0, 1, 2])
    assert order.visit(0)
    assert order.visit(1)
    assert order.recorded == (0, 1, 2)
    assert run_pass(order, [0, 1, 2]) == [True, True, True]


def test_what_is_recorded_stays_until_the_next_pass_begins() -> None:
    order = ExecutionOrder([0, 1])
    run_pass(order, [1, 0], complete=False)
    assert order.recorded == (1, 0)
    order.begin_pass()
    assert not order.recorded


def test_ending_a_pass_twice_changes_nothing() -> None:
    order = ExecutionOrder([0, 1])
    run_pass(order, [1, 0], complete=False)
    order.end_pass(complete=True)
    assert order.sequence == (0, 1)


BLOCK = ["norm", "mlp.up", "mlp.down", "attn.q", "attn.out"]  # as registered
INSIDE = [3, 4, 0, 1, 2]  # as executed


def _blocks(count: int) -> tuple[list[str], list[int]]:
    """Return names in order of registration, and the layers in that of execution."""
    names = [f"blocks.{n}.{part}" for n in range(count) for part in BLOCK]
    runs = [n * len(BLOCK) + i for n in range(count) for i in INSIDE]
    return ["embed", *names, "head"], [0, *(1 + i for i in runs), 1 + len(names)]


def test_the_first_block_tells_the_order_in_the_others() -> None:
    names, runs = _blocks(6)
    order = ExecutionOrder(range(len(names)), names)
    hits = run_pass(order, runs)
    # What the guess has wrong in the first block, and where the second begins.
    assert hits.count(False) <= len(BLOCK)
    assert all(hits[2 + len(BLOCK) :])
    assert run_pass(order, runs) == [True] * len(runs)


def test_the_rest_of_the_first_pass_is_all_the_layers_that_have_not_run() -> None:
    names, runs = _blocks(4)
    order = ExecutionOrder(range(len(names)), names)
    order.begin_pass()
    for position, layer in enumerate(runs):
        order.visit(layer)
        if position > 2 * len(BLOCK):
            coming = list(order.upcoming())
            assert sorted(coming) == list(range(len(names)))
            assert coming[: len(runs) - position - 1] == runs[position + 1 :]


def test_blocks_that_skip_layers_leave_none_out() -> None:
    names, _ = _blocks(4)
    order = ExecutionOrder(range(len(names)), names)
    order.begin_pass()
    for layer in (0, 4, 5, 9):  # attn of block 0, the first of block 1
        order.visit(layer)
    assert sorted(order.upcoming()) == list(range(len(names)))
    assert list(order.upcoming(4)) == [10, 6, 7, 8]


def test_nothing_is_learnt_from_blocks_once_a_pass_was_recorded() -> None:
    names, runs = _blocks(3)
    order = ExecutionOrder(range(len(names)), names)
    run_pass(order, runs)
    order.begin_pass()
    for layer in runs[:1] + runs[6:]:  # without block 0
        order.visit(layer)
    assert order.sequence == tuple(runs)


def test_layers_that_are_on_their_way_are_not_looked_at_again() -> None:
    order = ExecutionOrder([0, 1, 2, 3])
    assert list(order.unsettled()) == [0, 1, 2, 3]
    assert order.settle(0) and order.settle(1)
    assert list(order.unsettled()) == [2, 3]
    order.visit(0)
    assert list(order.unsettled()) == [2, 3, 0]
    order.unsettle()
    assert list(order.unsettled()) == [1, 2, 3, 0]


def test_a_surprise_has_everything_looked_at_again() -> None:
    order = ExecutionOrder([0, 1, 2, 3])
    assert order.settle(0) and order.settle(1) and order.settle(2)
    order.visit(2)
    assert list(order.unsettled()) == [3, 0, 1, 2]


def test_a_layer_that_runs_twice_is_never_settled() -> None:
    order = ExecutionOrder([0, 1, 0])
    assert not order.settle(0)


@pytest.mark.parametrize("predicted", [[], [4]])
def test_tiny_predictions_work(predicted: list[int]) -> None:
    order = ExecutionOrder(predicted)
    assert list(order.upcoming()) == predicted
    assert run_pass(order, [4]) == [predicted == [4]]
    assert run_pass(order, [4]) == [True]


@given(PASSES, PASSES.filter(bool))
def test_after_a_complete_pass_the_same_pass_is_all_hits(
    predicted: list[int], layers: list[int]
) -> None:
    order = ExecutionOrder(predicted)
    run_pass(order, layers)
    assert all(run_pass(order, layers))
    assert order.recorded == order.sequence == tuple(layers)


@given(PASSES, st.lists(st.tuples(PASSES, st.booleans()), max_size=4))
def test_any_passes_are_followed_without_error_and_the_cursor_behind_each_visit(
    predicted: list[int], passes: list[tuple[list[int], bool]]
) -> None:
    order = ExecutionOrder(predicted)
    for layers, complete in passes:
        order.begin_pass()
        for layer in layers:
            expected = next(order.upcoming(), None)
            assert order.visit(layer) == (layer == expected)
            if layer in order.sequence:
                assert list(order.upcoming())[-1] == layer
            else:
                assert next(order.upcoming(), None) == expected
        assert order.recorded == tuple(layers)
        order.end_pass(complete)


@given(PASSES.filter(bool), st.data())
def test_upcoming_is_exactly_what_comes_in_steady_passes(
    layers: list[int], data: st.DataObject
) -> None:
    order = ExecutionOrder(layers)
    done = data.draw(st.integers(0, len(layers)))
    order.begin_pass()
    for layer in layers[:done]:
        assert order.visit(layer)
    rest_and_next_pass = layers[done:] + layers
    promised = list(order.upcoming())
    assert promised == list(islice(rest_and_next_pass, len(layers)))


def test_layers_that_are_not_heard_of_are_neither_expected_nor_forgotten() -> None:
    order = ExecutionOrder([0, 1, 2, 3, 4])
    run_pass(order, [0, 1, 2, 3, 4])
    order.hear_only({1, 3})
    assert run_pass(order, [1, 3]) == [True, True]
    run_pass(order, [3, 1])
    assert order.sequence == (3, 1)
    order.hear_all()
    assert order.sequence == (0, 3, 4, 1, 2)


def test_a_layer_that_is_heard_again_is_expected_from_the_next_pass_on() -> None:
    order = ExecutionOrder([0, 1, 2, 3])
    order.hear_only({0, 3})
    order.begin_pass()
    order.visit(0)
    order.hear(2)
    assert not order.visit(2)
    order.visit(3)
    order.end_pass(complete=True)
    assert run_pass(order, [0, 2, 3]) == [True, True, True]
    order.hear_all()
    assert order.sequence == (0, 1, 2, 3)


@given(PASSES, st.lists(st.tuples(PASSES, st.sets(st.integers(0, 7))), max_size=4))
def test_every_layer_of_a_prediction_is_still_there_when_all_are_heard_again(
    predicted: list[int], rounds: list[tuple[list[int], set[int]]]
) -> None:
    order = ExecutionOrder(predicted)
    for layers, heard in rounds:
        unheard = set(order.sequence) - heard
        order.hear_only(heard)
        run_pass(order, [layer for layer in layers if layer in heard])
        order.hear_all()
        assert unheard <= set(order.sequence)


def test_layers_that_ran_are_not_expected_again_while_the_order_is_a_guess() -> None:
    order = ExecutionOrder([0, 1, 2, 3], names=["a", "b", "c", "d"])
    order.begin_pass()
    order.visit(0)
    order.visit(3)
    order.visit(1)
    assert list(order.unsettled()) == [2]
    order.visit(2)
    order.end_pass(complete=True)
    assert list(order.unsettled()) == [0, 3, 1, 2]

"""The accountant: reserves, refuses, remembers its peak, and writes figures."""

from __future__ import annotations

import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hookoffload.budget import (
    BudgetExceededError,
    MemoryBudget,
    format_gib,
    format_gib_up,
    format_limit,
)
from tests.interrupts import NthCall

GIB = 2**30


def test_bytes_are_counted_by_kind() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 30)
    budget.reserve("resident", 20)
    budget.reserve("window", 10)
    assert budget.used == 60
    assert budget.by_kind() == {"window": 40, "resident": 20}


def test_a_kind_with_nothing_reserved_is_left_out() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 30)
    budget.release("window", 30)
    budget.reserve("resident", 0)
    assert budget.by_kind() == {}
    assert budget.used == 0


def test_the_limit_itself_can_be_reserved_but_not_a_byte_more() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 100)
    with pytest.raises(BudgetExceededError):
        budget.reserve("window", 1)


def test_a_refused_reservation_takes_nothing() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    with pytest.raises(BudgetExceededError):
        budget.reserve("resident", 50)
    assert budget.by_kind() == {"window": 60}
    assert budget.peak == 60


def test_without_a_limit_everything_fits() -> None:
    budget = MemoryBudget(None)
    budget.reserve("resident", 2**60)
    assert budget.fits(2**60)
    assert budget.limit_bytes is None


def test_fits_says_what_reserve_would_do() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    assert budget.fits(40)
    assert not budget.fits(41)


def test_a_refusal_names_limit_kind_layer_figures_and_what_is_reserved() -> None:
    budget = MemoryBudget(2 * GIB)
    budget.reserve("window", GIB // 4)
    budget.reserve("resident", GIB)
    with pytest.raises(BudgetExceededError) as refused:
        budget.reserve("cast", GIB, "blocks.3.mlp.up")
    message = str(refused.value)
    assert "limit_gb=2 (2.000 GiB)" in message
    assert "1.000 GiB of cast for blocks.3.mlp.up" in message
    assert "1.250 GiB are reserved (resident 1.000 GiB, window 0.250 GiB)" in message
    assert "0.250 GiB are missing" in message
    assert "Raise limit_gb to at least 2.250" in message


def test_a_refusal_with_an_empty_budget_says_that_nothing_is_reserved() -> None:
    with pytest.raises(BudgetExceededError, match="nothing is reserved"):
        MemoryBudget(10).reserve("window", 11)


def test_releasing_more_than_was_reserved_of_a_kind_is_an_error() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    budget.reserve("resident", 10)
    with pytest.raises(AssertionError, match="11 bytes of kind 'resident'"):
        budget.release("resident", 11)
    assert budget.by_kind() == {"window": 60, "resident": 10}


def test_negative_sizes_are_an_error() -> None:
    budget = MemoryBudget(100)
    with pytest.raises(AssertionError, match="negative"):
        budget.reserve("window", -1)
    with pytest.raises(AssertionError, match="negative"):
        budget.release("window", -1)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        MemoryBudget(-1)
    with pytest.raises(ValueError, match="negative"):
        MemoryBudget(1).set_limit(-1)


def test_a_lowered_limit_keeps_what_is_reserved_and_refuses_more() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    budget.set_limit(50)
    assert budget.used == 60
    assert not budget.fits(1)
    assert budget.fits(0)
    budget.release("window", 20)
    budget.reserve("window", 10)
    assert budget.limit_bytes == 50


def test_a_raised_limit_makes_room() -> None:
    budget = MemoryBudget(10)
    budget.set_limit(None)
    budget.reserve("window", 11)
    assert budget.used == 11


def test_the_peak_remembers_its_moment() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    budget.reserve("cast", 30)
    budget.release("cast", 30)
    budget.reserve("resident", 20)
    assert budget.peak == 90
    assert budget.peak_by_kind() == {"window": 60, "cast": 30}


def test_a_reset_peak_starts_from_what_is_reserved() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    budget.reserve("cast", 30)
    budget.release("cast", 30)
    budget.reset_peak()
    assert budget.peak == 60
    assert budget.peak_by_kind() == {"window": 60}


def test_what_is_returned_can_be_changed_without_harm() -> None:
    budget = MemoryBudget(100)
    budget.reserve("window", 60)
    budget.by_kind()["window"] = 0
    budget.peak_by_kind()["window"] = 0
    assert budget.by_kind() == budget.peak_by_kind() == {"window": 60}


def test_its_repr_shows_limit_use_and_peak() -> None:
    budget = MemoryBudget(GIB)
    budget.reserve("window", GIB // 2)
    shown = repr(budget)
    assert shown == "MemoryBudget(limit 1.000 GiB, used 0.500 GiB, peak 0.500 GiB)"
    assert "no limit" in repr(MemoryBudget(None))


def test_threads_together_never_pass_the_limit_and_lose_no_byte() -> None:
    budget = MemoryBudget(50)
    refused = []

    def work() -> None:
        for _ in range(300):
            try:
                budget.reserve("window", 20)
            except BudgetExceededError:
                refused.append(1)
            else:
                budget.release("window", 20)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used == 0
    assert budget.by_kind() == {}
    assert 20 <= budget.peak <= 40


@given(
    limit=st.integers(0, 60),
    steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-20, 20))),
)
def test_used_is_the_sum_of_the_kinds_and_stays_within_the_limit(
    limit: int, steps: list[tuple[str, int]]
) -> None:
    budget = MemoryBudget(limit)
    peak = 0
    for kind, nbytes in steps:
        reserved = budget.by_kind().get(kind, 0)
        if nbytes >= 0 and budget.fits(nbytes):
            budget.reserve(kind, nbytes)
        elif nbytes < 0:
            budget.release(kind, min(-nbytes, reserved))
        peak = max(peak, budget.used)
        assert budget.used == sum(budget.by_kind().values()) <= limit
    assert budget.peak == peak == sum(budget.peak_by_kind().values())


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.000 GiB"),
        (76_235_670, "0.071 GiB"),
        (2 * GIB, "2.000 GiB"),
        (-GIB, "-1.000 GiB"),
        (5 * 2**20, "5.000 MiB"),
        (2**19, "0.500 MiB"),
        (2**13, "8.000 KiB"),
        (1, "1 bytes"),
    ],
)
def test_figures_use_the_largest_unit_that_tells_something(
    nbytes: int, text: str
) -> None:
    assert format_gib(nbytes) == text


@given(st.integers(1, 2**45))
def test_figures_are_never_zero_for_something_and_right_to_five_per_cent(
    nbytes: int,
) -> None:
    number, unit = format_gib(nbytes).split()
    scale = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}[unit]
    assert float(number) * scale == pytest.approx(nbytes, rel=0.051)


@given(st.integers(0, 2**45))
@example(2**30)
@example(2**30 + 1)
@example(1)
def test_a_figure_rounded_up_is_enough_when_typed_and_hardly_more(nbytes: int) -> None:
    text = format_gib_up(nbytes)
    assert set(text) <= set("0123456789.")
    typed = int(float(text) * GIB)
    assert nbytes <= typed <= nbytes * 1.11 + 1


@given(st.integers(0, 2**41))
def test_a_limit_is_written_to_the_byte(limit_bytes: int) -> None:
    assert abs(float(format_limit(limit_bytes)) * GIB - limit_bytes) < 1


@given(st.decimals(0, 1000, places=3, allow_nan=False))
def test_a_limit_is_written_as_the_user_gave_it(limit_gb: object) -> None:
    given_gb = float(str(limit_gb))
    for whole in (int(given_gb * GIB), round(given_gb * GIB)):
        assert float(format_limit(whole)) == given_gb


@pytest.mark.parametrize("change", ["reserve", "release"])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_in_a_shared_budget_is_corrected_by_what_there_is(
    change: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = MemoryBudget(100)
    one, other = MemoryBudget(None, within=total), MemoryBudget(None, within=total)
    one.reserve("window", 30)
    other.reserve("residents", 20)
    stopped = NthCall(getattr(MemoryBudget, change), 1, after=after)  # that of `total`
    with monkeypatch.context() as patch:
        patch.setattr(MemoryBudget, change, stopped)
        with pytest.raises(KeyboardInterrupt):
            getattr(one, change)("window", 30)
    assert stopped.calls == 2
    one.settle({"window": 30})
    assert (one.used, total.used) == (30, 50)
    assert total.by_kind() == {"window": 30, "residents": 20}
    one.settle({})
    assert (one.used, total.by_kind()) == (0, {"residents": 20})
    other.release("residents", 20)
    assert total.used == 0


def test_refusal_has_its_figures_in_one_unit() -> None:
    limit = 2**30 // 10
    budget = MemoryBudget(limit)
    budget.reserve("residents", 2**20)
    with pytest.raises(BudgetExceededError) as refused:
        budget.reserve("window", limit)
    text = str(refused.value)
    assert "(residents 0.000977 GiB)" in text
    assert "MiB" not in text

"""Regions of the window: placed first in first out or last in first out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookoffload.ring import Region, RegionRing, RegionStack

STEPS = st.lists(st.one_of(st.integers(0, 5), st.floats(0, 0.999)), max_size=60)


class Bytes:
    """What a block must do, told byte by byte."""

    def __init__(self, capacity: int) -> None:
        self.live: list[Region | None] = [None] * capacity
        self.token: list[object | None] = [None] * capacity

    def take(self, region: Region) -> set[object]:
        span = range(region.offset, region.end)
        assert all(self.live[at] is None for at in span), "live regions overlap"
        assert region.end <= len(self.live)
        wanted = {self.token[at] for at in span} - {None}
        for at in span:
            self.live[at] = region
            self.token[at] = None
        return wanted

    def give(self, region: Region, token: object | None) -> None:
        for at in range(region.offset, region.end):
            self.live[at] = None
            self.token[at] = token


def allocated(ring: RegionRing, nbytes: int) -> tuple[Region, tuple[object, ...]]:
    result = ring.allocate(nbytes)
    assert result is not None
    return result


def pushed(stack: RegionStack, nbytes: int) -> tuple[Region, tuple[object, ...]]:
    result = stack.push(nbytes)
    assert result is not None
    return result


def test_regions_follow_each_other() -> None:
    ring = RegionRing(10)
    offsets = [allocated(ring, nbytes)[0].offset for nbytes in (3, 3, 4)]
    assert offsets == [0, 3, 6]
    assert (ring.used, ring.live, ring.capacity) == (10, 3, 10)


def test_a_full_ring_gives_none() -> None:
    ring = RegionRing(10)
    allocated(ring, 6)
    assert ring.allocate(5) is None
    allocated(ring, 4)
    assert ring.allocate(1) is None
    assert (ring.used, ring.live) == (10, 2)


def test_the_head_wraps_when_the_rest_is_too_short() -> None:
    ring = RegionRing(10)
    first, _ = allocated(ring, 4)
    allocated(ring, 4)
    ring.free(first, "first")
    wrapped, tokens = allocated(ring, 3)
    assert wrapped.offset == 0
    assert tokens == ("first",)
    assert ring.allocate(2) is None
    assert allocated(ring, 1)[0].offset == 3


def test_a_ring_filled_up_to_its_oldest_region_is_full() -> None:
    ring = RegionRing(10)
    first, _ = allocated(ring, 4)
    allocated(ring, 6)
    ring.free(first)
    assert allocated(ring, 4)[0].offset == 0
    assert ring.allocate(1) is None


def test_going_on_at_the_head_comes_before_going_back() -> None:
    ring = RegionRing(10)
    first, _ = allocated(ring, 4)
    ring.free(first, "first")
    second, tokens = allocated(ring, 4)
    assert (second.offset, tokens) == (4, ())


def test_space_comes_back_oldest_first() -> None:
    ring = RegionRing(9)
    first, middle, last = (allocated(ring, 3)[0] for _ in range(3))
    ring.free(middle, "middle")
    assert ring.used == 9
    assert ring.allocate(3) is None
    ring.free(first, "first")
    assert ring.used == 3
    taken, tokens = allocated(ring, 6)
    assert (taken.offset, tokens) == (0, ("first", "middle"))
    assert (last.freed, middle.freed, ring.live) == (False, True, 2)


def test_a_partly_overwritten_region_keeps_its_token_for_the_rest() -> None:
    ring = RegionRing(10)
    first, _ = allocated(ring, 10)
    ring.free(first, "first")
    second, tokens = allocated(ring, 4)
    assert (second.offset, tokens) == (0, ("first",))
    ring.free(second, "second")
    third, tokens = allocated(ring, 10)
    assert (third.offset, tokens) == (0, ("second", "first"))


def test_a_region_waits_for_nobody_beside_it() -> None:
    ring = RegionRing(9)
    parts = [allocated(ring, 3)[0] for _ in range(3)]
    for part, token in zip(parts, "abc", strict=True):
        ring.free(part, token)
    assert [allocated(ring, 3)[1] for _ in range(3)] == [("a",), ("b",), ("c",)]


def test_a_token_that_stands_for_several_regions_is_given_once() -> None:
    ring = RegionRing(9)
    parts = [allocated(ring, 3)[0] for _ in range(3)]
    for part, token in zip(parts, ("shared", "own", "shared"), strict=True):
        ring.free(part, token)
    assert allocated(ring, 9)[1] == ("shared", "own")


def test_with_nothing_live_any_size_up_to_the_capacity_fits() -> None:
    ring = RegionRing(10)
    first, _ = allocated(ring, 7)
    ring.free(first, "first")
    assert allocated(ring, 10)[0].offset == 0


def test_regions_freed_without_a_token_leave_none() -> None:
    ring = RegionRing(4)
    first, _ = allocated(ring, 4)
    ring.free(first)
    assert allocated(ring, 4)[1] == ()


def test_an_empty_region_is_legal_even_in_a_full_ring() -> None:
    ring = RegionRing(4)
    full, _ = allocated(ring, 4)
    empty, tokens = allocated(ring, 0)
    assert (empty.nbytes, tokens, ring.live) == (0, (), 2)
    ring.free(full, "full")
    assert allocated(ring, 4)[1] == ("full",)
    ring.free(empty, "empty")
    assert ring.live == 1


def test_an_empty_ring_holds_empty_regions_only() -> None:
    ring = RegionRing(0)
    assert allocated(ring, 0)[0].nbytes == 0
    with pytest.raises(ValueError, match="1 bytes"):
        ring.allocate(1)


@pytest.mark.parametrize("nbytes", [11, -1])
def test_a_size_that_can_never_fit_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="never fit"):
        RegionRing(10).allocate(nbytes)
    with pytest.raises(ValueError, match="never fit"):
        RegionStack(10).push(nbytes)


def test_a_negative_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        RegionRing(-1)


def test_freeing_twice_or_elsewhere_is_an_error() -> None:
    ring, other = RegionRing(4), RegionRing(4)
    region, _ = allocated(ring, 4)
    with pytest.raises(AssertionError, match="no such live region"):
        other.free(region)
    ring.free(region)
    with pytest.raises(AssertionError, match="freed before"):
        ring.free(region)


def test_what_is_freed_first_behind_a_region_that_lives_is_free_again() -> None:
    """Copies that were given up do not wait for an older layer that stays bound."""
    ring = RegionRing(10)
    long, _ = allocated(ring, 2)
    given_up, _ = allocated(ring, 7)
    ring.free(given_up, "given up")
    assert ring.used == 2
    region, tokens = allocated(ring, 8)
    assert (region.offset, tokens) == (2, ("given up",))
    ring.free(region)
    ring.free(long)
    assert ring.used == 0


def test_a_reset_takes_everything_back() -> None:
    ring = RegionRing(4)
    old, _ = allocated(ring, 1)
    ring.free(old, "old")
    live, _ = allocated(ring, 3)
    ring.reset()
    assert (ring.used, ring.live, live.freed) == (0, 0, True)
    region, tokens = allocated(ring, 2)
    assert (region.offset, tokens) == (0, ())
    stack = RegionStack(4)
    live, _ = pushed(stack, 3)
    stack.reset()
    assert (stack.used, stack.live, live.freed) == (0, 0, True)


def test_a_stack_gives_the_top_back_first() -> None:
    stack = RegionStack(10)
    outer, _ = pushed(stack, 4)
    inner, _ = pushed(stack, 4)
    assert (outer.offset, inner.offset) == (0, 4)
    stack.pop(inner, "inner")
    again, tokens = pushed(stack, 6)
    assert (again.offset, tokens, stack.used) == (4, ("inner",), 10)


def test_a_stack_keeps_space_below_a_live_region() -> None:
    stack = RegionStack(10)
    outer, _ = pushed(stack, 4)
    inner, _ = pushed(stack, 4)
    stack.pop(outer, "outer")
    assert (stack.used, stack.live) == (8, 1)
    assert stack.push(3) is None
    stack.pop(inner, "inner")
    assert pushed(stack, 10)[1] == ("outer", "inner")


def test_empty_regions_do_not_hold_a_stack_up() -> None:
    stack = RegionStack(4)
    outer, _ = pushed(stack, 4)
    empty, tokens = pushed(stack, 0)
    assert (tokens, stack.live) == ((), 2)
    stack.pop(outer)
    assert stack.used == 0
    stack.pop(empty)
    assert stack.live == 0


@given(capacity=st.integers(0, 12), steps=STEPS, bare=st.integers(2, 5))
def test_a_ring_never_overlaps_live_bytes_and_hands_over_exactly_their_tokens(
    capacity: int, steps: list[int | float], bare: int
) -> None:
    ring, model = RegionRing(capacity), Bytes(capacity)
    live: list[Region] = []
    queue: list[Region] = []
    for number, step in enumerate(steps):
        if isinstance(step, int):
            nbytes = min(step, capacity)
            result = ring.allocate(nbytes)
            if result is None:
                assert live and nbytes
                continue
            region, tokens = result
            assert set(tokens) == model.take(region)
            assert len(tokens) == len(set(tokens))
            live.append(region)
            queue.append(region)
        elif live:
            region = live.pop(int(step * len(live)))
            token = f"token {number}" if number % bare else None
            ring.free(region, token)
            model.give(region, token)
            assert region.freed and region.token == token
            # An empty region protects no bytes, so it holds nobody up.
            queue = [r for r in queue if r.nbytes]
            while queue and queue[0].freed:
                queue.pop(0)
            while queue and queue[-1].freed:
                queue.pop()
        assert ring.live == len(live)
        assert ring.used == sum(region.nbytes for region in queue)


@given(sizes=st.lists(st.integers(1, 8), max_size=40))
def test_a_ring_freed_in_order_goes_round_without_waiting_for_the_newest(
    sizes: list[int],
) -> None:
    ring = RegionRing(24)
    live: list[tuple[int, Region]] = []
    for number, nbytes in enumerate(sizes):
        while (result := ring.allocate(nbytes)) is None:
            oldest, region = live.pop(0)
            ring.free(region, oldest)
        region, tokens = result
        # With room for three of the largest, at least the newest stays untouched.
        assert number - 1 not in tokens
        live.append((number, region))


@given(capacity=st.integers(0, 12), steps=STEPS, bare=st.integers(2, 5))
def test_a_stack_never_overlaps_live_bytes_and_hands_over_exactly_their_tokens(
    capacity: int, steps: list[int | float], bare: int
) -> None:
    stack, model = RegionStack(capacity), Bytes(capacity)
    live: list[Region] = []
    for number, step in enumerate(steps):
        top = max((region.end for region in live if region.nbytes), default=0)
        assert stack.used == top
        if isinstance(step, int):
            nbytes = min(step, capacity)
            result = stack.push(nbytes)
            assert (result is None) == (top + nbytes > capacity)
            if result is not None:
                region, tokens = result
                assert region.offset == top
                assert set(tokens) == model.take(region)
                assert len(tokens) == len(set(tokens))
                live.append(region)
        elif live:
            region = live.pop(int(step * len(live)))
            token = f"token {number}" if number % bare else None
            stack.pop(region, token)
            model.give(region, token)
        assert stack.live == len(live)

"""The limit holds for what the device's allocator hands out, not for what is asked for.

Seen without a GPU, on memory that is counted as CUDA's caching allocator does.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
    set_limit,
)
from hookoffload.device_memory import UNUSED_BYTES
from tests.samples import GIB, same_bits
from tests.simulated_allocator import MIB, CachingAllocator, CountedMemory

LONG = settings.get_current_profile_name() == "long"


class Crooked(nn.Module):
    """Linear layers of odd sizes, outputs of which are kept for a while."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        sizes = [512, 900, 1100, 1333, 1500, 1777]
        widths = [choose.choice(sizes) for _ in range(choose.randint(16, 24))]
        self.width = widths[0]
        self.parts = nn.ModuleList(
            nn.Linear(wide, next_one, bias=choose.random() < 0.5)
            for wide, next_one in itertools.pairwise(widths)
        )
        self.kept = [choose.random() < 0.3 for _ in self.parts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for part, keep in zip(self.parts, self.kept, strict=True):
            x = torch.relu(part(x))
            kept = [*kept[-1:], x] if keep else kept
        return x


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountedMemory]:
    counted = CountedMemory()
    counted.stand_in(monkeypatch)
    yield counted


def _policy(limit: int) -> OffloadPolicy:
    # From disk: what lies in RAM would not have to move for a CPU.
    return OffloadPolicy(limit_gb=limit / GIB, compute_device="cpu", store="disk")


@pytest.mark.parametrize("rows", [7, 800])
@pytest.mark.parametrize("seed", range(8 if LONG else 4))
def test_the_allocators_peak_keeps_the_limit(
    seed: int, rows: int, memory: CountedMemory
) -> None:
    choose = random.Random(f"{seed} {rows}")
    torch.manual_seed(seed)
    model = Crooked(choose)
    size = sum(p.nbytes for p in model.parameters())
    x = torch.randn(rows, model.width)
    allocator = memory.allocator
    with memory, torch.no_grad():
        # What other code left behind: free blocks of all sizes, and blocks in use.
        used = [
            torch.empty(int(choose.uniform(0.2, 6) * MIB), dtype=torch.uint8)
            for _ in range(choose.choice([0, 5, 20]))
        ]
        used = used[::3]
        x = x.clone()
        held = allocator.allocated
        allocator.reset_peak()
        want = model(x)
        activations = allocator.peak - held
        activations += 4 * MIB  # they take other blocks in each pass
        limit = int(held + activations + choose.uniform(0.4, 0.8) * size)
        attach_offload_hooks(model, _policy(limit))
        for _ in range(5):
            allocator.reset_peak()
            assert same_bits(model(x), want)
            assert allocator.peak <= limit
        assert offload_stats(model).peak_bytes <= limit
        plan = offload_plan(model)
        assert plan.total_bytes + plan.activation_bytes > limit * 3 // 4
        detach(model)


class Taking(nn.Module):
    """Equal layers, and memory that is taken while they run."""

    def __init__(self, depth: int, width: int, taken: int = 0) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(depth)
        )
        self.taken = taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = torch.empty(self.taken, dtype=torch.uint8)
        for part in self.parts:
            x = part(x)
        del taken
        return x


def test_what_others_hold_before_the_first_pass_is_theirs(
    memory: CountedMemory,
) -> None:
    model, x = Taking(6, 4096, taken=240 * MIB), torch.randn(2, 4096)
    with memory, torch.no_grad():
        held = torch.empty(400 * MIB, dtype=torch.uint8)
        limit = memory.allocator.allocated + 400 * MIB
        attach_offload_hooks(model, _policy(limit))
        for _ in range(3):
            model(x)
            assert memory.allocator.peak <= limit
        assert offload_stats(model).peak_bytes <= limit
        detach(model)
        del held


def test_a_small_limit_leaves_the_first_pass_all_that_is_not_needed(
    memory: CountedMemory,
) -> None:
    model, x = Taking(6, 2048, taken=40 * MIB), torch.randn(2, 2048)
    with memory, torch.no_grad():
        limit = (16 + 40 + 2) * MIB
        attach_offload_hooks(model, _policy(limit))
        for _ in range(3):
            model(x)
        assert offload_stats(model).peak_bytes <= limit
        detach(model)


@pytest.mark.parametrize("taken", [0, 8 * MIB])
def test_what_blocks_of_residents_take_beyond_their_bytes_is_counted(
    taken: int, memory: CountedMemory
) -> None:
    # Of the 20 MiB that the allocator gets at once, two take 9.6 each, and it all.
    model, x = Taking(20, 1586, taken), torch.randn(2, 1586)
    layer = 1586 * 1586 * 4
    with memory, torch.no_grad():
        limit = 16 * layer + taken + 5 * MIB // 2
        attach_offload_hooks(model, _policy(limit))
        for _ in range(3):
            model(x)
            assert memory.allocator.peak <= limit
        assert offload_stats(model).peak_bytes <= limit
        assert len(offload_plan(model).resident) >= 11
        detach(model)


def test_models_give_way_to_one_that_is_measured(memory: CountedMemory) -> None:
    models = {
        name: nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(depth)))
        for name, depth in (("text", 6), ("unet", 10), ("vae", 6))
    }
    x = torch.randn(2, 1024)
    with memory, torch.no_grad():
        workspace = torch.empty(99 * MIB, dtype=torch.uint8)
        limit = memory.allocator.allocated + 32 * MIB
        attach_offload_hooks(models, _policy(limit))
        for name in ("text", "unet", "text", "unet", "vae", "unet", "vae"):
            models[name](x)
            assert memory.allocator.peak <= limit
        assert offload_stats(models).peak_bytes <= limit
        detach(models)
        del workspace


@pytest.mark.parametrize("by", ["another limit", "other code"])
def test_a_peak_from_before_a_pass_is_not_taken_for_its_own(
    by: str, memory: CountedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Taking(20, 1024), torch.randn(2, 1024)
    layer = 1024 * 1024 * 4
    with memory, torch.no_grad():
        first = 16 if by == "another limit" else 9
        attach_offload_hooks(model, _policy(first * layer))
        for _ in range(3):
            model(x)
        if by == "another limit":
            set_limit(model, 9 * layer / GIB)
        else:
            torch.empty(10 * layer, dtype=torch.uint8)
        wanted = offload_plan(model).resident
        for _ in range(3):
            model(x)
        assert offload_plan(model).resident == wanted
        assert len(wanted) >= 5
        detach(model)
    assert not caplog.records


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("layers", [12, 6, 4, 2])
def test_the_forward_behind_one_that_ran_out_of_memory_fits_what_others_leave(
    layers: int, limited: bool, memory: CountedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    layer = 1024 * 1024 * 4
    model, x = Taking(20, 1024, taken=3 * layer), torch.randn(2, 1024)
    with memory, torch.no_grad():
        want, held = model(x), memory.allocator.allocated
        limit = held + (24 if limited else 99) * layer
        attach_offload_hooks(model, _policy(limit))
        for _ in range(3):
            model(x)
        before = len(offload_plan(model).resident)
        assert before >= 17
        memory.capacity = held + (3 + layers) * layer
        with pytest.raises(torch.OutOfMemoryError):
            model(x)
        assert "limit_gb=" in caplog.text and "out of memory" in caplog.text
        for _ in range(3):
            assert same_bits(model(x), want)
        left = len(offload_plan(model).resident)
        assert min(layers - 5, 5) <= left < before
        memory.capacity = None
        detach(model)


class Calling(Taking):
    """One that calls another model in the middle, which has a limit with it."""

    def __init__(self, inner: nn.Module, depth: int, taken: int) -> None:
        super().__init__(depth, 1024, taken)
        self.__dict__["inner"] = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.inner(super().forward(x)))


@pytest.mark.parametrize("taken", [0, 30 * MIB])
@pytest.mark.parametrize("layers", [3, 6, 10])
def test_a_model_inside_anothers_forward_has_its_own_peak(
    layers: int, taken: int, memory: CountedMemory, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Taking(8, 1024)
    models = {"inner": inner, "outer": Calling(inner, 8, taken)}
    x = torch.randn(2, 1024)
    allocator = memory.allocator
    with memory, torch.no_grad():
        limit = allocator.allocated + layers * 4 * MIB + taken + 4 * MIB
        attach_offload_hooks(models, _policy(limit))
        for _ in range(4):
            allocator.most = 0
            models["outer"](x)
            assert allocator.most <= limit
        assert offload_stats(models).peak_bytes <= limit
        if layers > 9:
            assert len(offload_plan(models)["outer"].resident) == 8
        detach(models)
    assert not caplog.records


@pytest.mark.parametrize("from_the_beginning", [False, True])
def test_room_that_others_took_for_a_while_goes_back_to_residents(
    from_the_beginning: bool,
    memory: CountedMemory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Taking(20, 1024), torch.randn(2, 1024)
    with memory, torch.no_grad():
        attach_offload_hooks(model, _policy(64 * MIB))
        if not from_the_beginning:
            for _ in range(3):
                model(x)
            assert len(offload_plan(model).resident) == 12
        for _ in range(2):
            held = torch.empty(40 * MIB, dtype=torch.uint8)
            for _ in range(3):
                model(x)
            assert len(offload_plan(model).resident) <= 2
            del held
            for _ in range(3):
                model(x)
            memory.allocator.most = 0
            model(x)
            assert memory.allocator.most <= 64 * MIB
            assert len(offload_plan(model).resident) == 12
        detach(model)
    assert not caplog.records


def test_a_pass_that_needs_less_now_and_then_leaves_residents_as_they_are(
    memory: CountedMemory,
) -> None:
    model, x = Taking(20, 1024), torch.randn(2, 1024)
    with memory, torch.no_grad():
        attach_offload_hooks(model, _policy(64 * MIB))
        model(x)
        plans = []
        for _ in range(3):
            held = torch.empty(20 * MIB, dtype=torch.uint8)
            model(x)
            plans.append(offload_plan(model))
            del held
            model(x)
            plans.append(offload_plan(model))
        assert all(plan == plans[0] for plan in plans)
        detach(model)


def test_outputs_that_are_kept_take_room_from_residents(
    memory: CountedMemory,
) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(26)))
    x = torch.randn(2048, 1024)
    with memory, torch.no_grad():
        x = x.clone()
        limit = memory.allocator.allocated + 80 * MIB
        attach_offload_hooks(model, _policy(limit))
        kept = []
        for _ in range(4):
            kept.append(model(x))
            assert memory.allocator.peak <= limit
        assert offload_stats(model).peak_bytes <= limit
        detach(model)


def test_residents_come_back_where_inputs_stay_small(memory: CountedMemory) -> None:
    model, small, large = (
        Taking(20, 1024),
        torch.randn(2, 1024),
        torch.randn(3000, 1024),
    )
    with memory, torch.no_grad():
        limit = 64 * MIB
        attach_offload_hooks(model, _policy(limit))

        def residents(x: torch.Tensor, passes: int) -> int:
            for _ in range(passes):
                memory.allocator.reset_peak()
                model(x)
                assert memory.allocator.peak <= limit
            return len(offload_plan(model).resident)

        few = residents(large, 2)
        assert residents(small, 5) == few  # large ones may come again soon
        many = residents(small, 8)
        assert many > few + 2
        moved = offload_stats(model).bytes_moved
        for x in (large, small, large):  # and are known when they do
            assert residents(x, 1) == few
        per_pass = (offload_stats(model).bytes_moved - moved) / 3
        assert per_pass < 1.1 * offload_plan(model).pass_bytes
        assert residents(small, 3) == many
        detach(model)


def test_memory_that_is_given_up_is_returned_to_the_device(
    memory: CountedMemory,
) -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(22)))
    x = torch.randn(2, 2048)
    with memory, torch.no_grad():
        attach_offload_hooks(model, _policy(330 * MIB))
        for limit in (330 * MIB, 60 * MIB):
            set_limit(model, limit / GIB)
            for _ in range(2):
                model(x)
            assert memory.allocator.reserved <= limit + UNUSED_BYTES
        detach(model)


def test_memory_that_was_freed_does_not_pile_up_beside_blocks_of_other_sizes(
    memory: CountedMemory,
) -> None:
    models = {
        str(width): nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        for width, depth in ((2048, 16), (2300, 14), (2600, 12))
    }
    with memory, torch.no_grad():
        limit = 240 * MIB
        attach_offload_hooks(models, _policy(limit))
        memory.allocator.reset_peak()
        for width in ("2048", "2300", "2600"):
            for _ in range(2):
                models[width](torch.randn(2, int(width)))
        assert memory.allocator.peak_reserved <= limit + 2 * UNUSED_BYTES
        detach(models)


def test_a_block_is_cut_only_where_more_than_a_mebibyte_is_left() -> None:
    allocator = CachingAllocator()
    first = allocator.allocate(15 * MIB)  # gets a segment of 16
    assert allocator.allocated == 16 * MIB
    allocator.release(first)
    allocator.allocate(14 * MIB)
    assert allocator.allocated == 14 * MIB
    allocator.allocate(5 * MIB)  # what is left is too small: a segment of 20
    assert (allocator.allocated, allocator.reserved) == (19 * MIB, 36 * MIB)
    allocator.allocate(100)
    assert allocator.allocated == 19 * MIB + 512


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(5))
def test_cudas_allocator_hands_out_as_much(seed: int) -> None:
    choose = random.Random(seed)
    gc.collect()  # what other tests have left would go in between
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    allocator = CachingAllocator()
    # On a stream of its own, as nothing is free there.
    with torch.cuda.stream(torch.cuda.Stream()):
        pairs = []
        for _ in range(200):
            if pairs and choose.random() < 0.4:
                allocator.release(pairs.pop(choose.randrange(len(pairs)))[0])
            else:
                nbytes = int(2 ** choose.uniform(8, 26))
                block = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
                pairs.append((allocator.allocate(nbytes), block))
                del block
            assert torch.cuda.memory_allocated() - before == allocator.allocated

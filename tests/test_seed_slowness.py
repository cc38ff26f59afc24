"""What is slow or missing in the seed system by its source, one test a failure."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    set_limit,
)
from tests.samples import (
    GIB,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    seen_inside,
    weight_bytes,
)

ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs the memory map of Linux"
)


def test_copies_are_under_way_before_their_layer_needs_them() -> None:
    model = linears(depth=8)
    window = 3 * model[0].weight.nbytes
    with offloaded(model, store="disk", limit_gb=window / GIB):
        for _ in range(2):
            run(model, torch.randn(2, 32))
        before = offload_stats(model)
        run(model, torch.randn(2, 32))
        after = offload_stats(model)
        streamed = len(offload_plan(model).streamed)
    assert after.hits - before.hits == streamed > 0
    assert after.misses == before.misses


@pytest.mark.gpu
def test_masters_in_host_memory_are_page_locked_for_an_accelerator() -> None:
    model = linears(width=1024)
    with offloaded(model, compute_device="cuda", limit_gb=0):
        assert all(parameter.is_pinned() for parameter in model.parameters())


def test_no_module_and_no_parameter_is_copied_for_a_forward() -> None:
    class NotToBeCopied(nn.LayerNorm):
        def __deepcopy__(self, memo: object) -> NoReturn:
            raise AssertionError("a module was copied")

    model = nn.Sequential(nn.Linear(8, 8), NotToBeCopied(8), nn.Linear(8, 8))
    parameters = [list(module.parameters()) for module in model]
    inside = [seen_inside(m, lambda called: list(called.parameters())) for m in model]
    modules = [seen_inside(module, lambda called: called) for module in model]
    with offloaded(model, store="disk", limit_gb=0):
        run(model, torch.randn(2, 8))
    for seen, mine in zip(inside, parameters, strict=True):
        assert [id(p) for p in seen[0]] == [id(p) for p in mine]
    assert [seen[0] for seen in modules] == list(model)


@pytest.mark.gpu
def test_a_steady_pass_makes_no_call_that_stops_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("the host asked the driver and waited")

    model, x = linears(width=1024, depth=24), torch.randn(2, 1024, device="cuda")
    with offloaded(model, compute_device="cuda", limit_gb=0.06):
        for _ in range(3):
            run(model, x)
        torch.cuda.synchronize()
        with monkeypatch.context() as patched:
            for name in ("mem_get_info", "synchronize", "empty_cache"):
                patched.setattr(torch.cuda, name, stop)
            patched.setattr(torch.accelerator, "synchronize", stop)
            patched.setattr(torch.cuda.Stream, "synchronize", stop)
            patched.setattr(torch.cuda.Event, "synchronize", stop)
            run(model, x)


def test_residents_are_spread_over_the_pass_and_not_its_first_layers() -> None:
    model = linears(width=512, depth=16)
    limit = 8.5 * model[0].weight.nbytes
    with offloaded(model, store="disk", limit_gb=limit / GIB):
        resident = sorted(offload_plan(model).resident)
    assert 4 <= len(resident) <= 7
    ends = [-1, *resident, 16]
    gaps = [after - before - 1 for before, after in pairwise(ends)]
    even = (16 - len(resident)) / len(resident)
    assert max(gaps) <= 2 * even + 1


def test_residents_give_their_memory_back_when_the_model_is_offloaded() -> None:
    model = linears(depth=4)
    one, other = OffloadPolicy(store="disk"), OffloadPolicy(store="disk", limit_gb=0)
    attach_offload_hooks(model, one)
    run(model, torch.randn(2, 32))
    assert not any(lies_in_a_file(p) for p in model.parameters())
    offload(model)
    assert all(lies_in_a_file(p) for p in model.parameters())
    detach(model)
    attach_offload_hooks(model, other)
    assert not offload_plan(model).resident


def test_a_lower_limit_makes_residents_stream_again() -> None:
    model, x = linears(depth=12), torch.randn(2, 32)
    one = model[0].weight.nbytes
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=8 * one / GIB):
        residents = []
        for layers in (8, 4, 2, 8):
            set_limit(model, layers * one / GIB)
            for _ in range(2):
                assert same_bits(run(model, x), want)
            residents.append(len(offload_plan(model).resident))
            in_files = sum(lies_in_a_file(p) for p in model.parameters())
            assert in_files == 12 - residents[-1]
    assert residents[0] > residents[1] > residents[2] and residents[3] == residents[0]


@pytest.mark.gpu
def test_a_larger_input_makes_residents_stream_again() -> None:
    model = linears(width=1024, depth=48)
    # The larger input takes three tensors of 32 MiB; what other code of this process
    # holds, a workspace of the matrix library among it, counts as well.
    held = torch.cuda.memory_allocated() + 2 * 32 * 2**20
    limit = held + 40 * model[0].weight.nbytes
    residents = []
    with offloaded(model, compute_device="cuda", limit_gb=limit / GIB):
        for rows in (2, 8192):
            for _ in range(3):
                run(model, torch.randn(rows, 1024))
            residents.append(offload_plan(model).resident)
        assert residents[1] < residents[0]
        assert offload_stats(model).peak_bytes <= limit


class _SmallDevice:
    """Lets the library have so many bytes at once, as a device with less memory.

    Args:
        capacity: Bytes that blocks may take together.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._live: list[tuple[StorageWeakRef, int]] = []
        self._empty = torch.empty

    def empty(self, *size: Any, **options: Any) -> torch.Tensor:
        """Stand in for ``torch.empty``."""
        if options.get("dtype") is not torch.uint8 or options.get("pin_memory"):
            return self._empty(*size, **options)
        self._live = [entry for entry in self._live if not entry[0].expired()]
        block = self._empty(*size, **options)
        taken = sum(nbytes for _, nbytes in self._live) + block.nbytes
        if taken > self.capacity:
            raise torch.OutOfMemoryError(f"no {block.nbytes} bytes are left")
        self._live.append((StorageWeakRef(block.untyped_storage()), block.nbytes))
        return block


def test_a_device_without_the_memory_that_the_limit_allows_gets_fewer_residents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = linears(depth=12), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    device = _SmallDevice(5 * model[0].weight.nbytes)
    with offloaded(model, store="disk"):
        monkeypatch.setattr(torch, "empty", device.empty)
        for _ in range(3):
            assert same_bits(run(model, x), want)
        assert len(offload_plan(model).resident) < 5


class _Greedy(nn.Module):
    """Runs out of memory unless some of its model's layers stream."""

    def __init__(self) -> None:
        super().__init__()
        self.free_layers = 0
        self.model: list[nn.Module] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        resident = len(offload_plan(self.model[0]).resident)
        if 8 - resident < self.free_layers:
            raise torch.OutOfMemoryError("the activations do not fit")
        return x


def test_a_forward_that_ran_out_of_memory_has_more_when_it_is_called_again() -> None:
    greedy = _Greedy()
    model, x = nn.Sequential(*linears(depth=8), greedy), torch.randn(2, 32)
    greedy.model.append(model)
    with offloaded(model, store="disk"):
        want = run(model, x)
        assert offload_stats(model).bytes_moved == weight_bytes(model)
        greedy.free_layers = 1
        with pytest.raises(torch.OutOfMemoryError):
            run(model, x)
        assert same_bits(run(model, x), want)
        assert len(offload_plan(model).resident) < 8

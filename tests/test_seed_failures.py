"""What the seed system gets wrong, tried: one test a failure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
)
from tests.samples import (
    GIB,
    STREAMING,
    Picture,
    Stack,
    hooks_of,
    lies_in_a_file,
    linears,
    run,
    same_bits,
)

ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs the memory map of Linux"
)


def test_the_limit_holds_without_any_pipeline_around_the_model() -> None:
    model = linears(depth=12)
    limit = 4 * model[0].weight.nbytes
    attach_offload_hooks(model, OffloadPolicy(store="disk", limit_gb=limit / GIB))
    for _ in range(3):
        run(model, torch.randn(2, 32))
    assert 0 < len(offload_plan(model).resident) < 4
    assert offload_stats(model).peak_bytes <= limit


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_a_shared_module_is_managed_under_all_its_names(fields: dict[str, Any]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.between = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.between(self.first(x)))

    model = Twice()
    dtype = fields.get("compute_dtype", torch.float32)
    x = torch.randn(2, 8, dtype=dtype)
    want = run(copy.deepcopy(model).to(dtype), x)
    at_rest = Picture(model)
    with offloaded(model, **fields):
        assert all(same_bits(run(model, x), want) for _ in range(3))
        assert len(offload_plan(model).layers) == 2
    assert at_rest.differences(model) == []


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_tied_weights_stay_tied(store: Any) -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, False))
    model[2].weight = model[0].weight
    x = torch.randint(0, 50, (2, 3))
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store=store, limit_gb=0):
        assert same_bits(run(model, x), want)
        assert model[2].weight is model[0].weight
        state = model.state_dict()
        assert state["2.weight"].data_ptr() == state["0.weight"].data_ptr()
    assert model[2].weight is model[0].weight
    assert same_bits(run(model, x), want)


def test_names_in_the_state_dict_are_those_of_the_plain_model() -> None:
    model = Stack()
    checkpoint = {name: t.clone() for name, t in Stack().state_dict().items()}
    names = list(model.state_dict())
    with offloaded(model, store="disk", limit_gb=0):
        run(model, torch.randn(2, 32))
        assert list(model.state_dict()) == names
        loaded = model.load_state_dict(checkpoint)
        assert not loaded.missing_keys and not loaded.unexpected_keys
    assert all(same_bits(model.state_dict()[n], checkpoint[n]) for n in names)


class _LowRank(nn.Linear):
    """A Linear whose forward does more."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.a = nn.Parameter(torch.randn(2, width))
        self.b = nn.Parameter(torch.randn(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("module_map", [None, {nn.Linear: "layer"}])
def test_the_forward_of_a_subclass_of_linear_runs(module_map: Any) -> None:
    model, x = nn.Sequential(_LowRank(16), _LowRank(16)), torch.randn(2, 16)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=0, module_map=module_map):
        assert type(model[0]) is _LowRank
        assert same_bits(run(model, x), want)


def test_hooks_of_the_user_go_on_being_called() -> None:
    model, x = Stack(), torch.randn(2, 32)
    called = []
    for module in (model, model.blocks[0], model.blocks[0].up):
        module.register_forward_pre_hook(lambda m, a: called.append(("pre", m)))
        module.register_forward_hook(lambda m, a, o: called.append(("post", m)))
    run(model, x)
    want, called[:] = list(called), []
    for fields in STREAMING.values():
        dtype = fields.get("compute_dtype", torch.float32)
        with offloaded(model, **fields):
            for _ in range(3):
                run(model, x.to(dtype))
                assert called == want
                called.clear()
    run(model, x)
    assert called == want


def test_training_flags_do_not_flip() -> None:
    model = Stack()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with offloaded(model, store="disk", limit_gb=0):
        run(model, torch.randn(2, 32))
        now = {name: module.training for name, module in model.named_modules()}
        assert now == before
    assert {name: m.training for name, m in model.named_modules()} == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_batch_norm_statistics_of_a_streamed_forward_are_kept(
    store: Any, mode: Any
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    plain = copy.deepcopy(model)
    with offloaded(model, store=store, limit_gb=0):
        for _ in range(3):
            x = torch.randn(16, 4)
            with mode():
                assert torch.equal(model(x), plain(x))
        state = model.state_dict()
        assert all(same_bits(state[n], t) for n, t in plain.state_dict().items())
    after = model.state_dict()
    assert all(same_bits(after[n], t) for n, t in plain.state_dict().items())
    assert int(after["1.num_batches_tracked"]) == 3


@pytest.mark.parametrize("limit_gb", [0, None])
def test_batch_norm_statistics_are_kept_in_their_own_dtype(
    limit_gb: float | None,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    plain = copy.deepcopy(model).double()
    with offloaded(model, compute_dtype=torch.float64, limit_gb=limit_gb):
        for _ in range(3):
            x = torch.randn(16, 4, dtype=torch.float64)
            assert torch.allclose(run(model, x), run(plain, x))
        state = model.state_dict()
        assert state["1.running_mean"].dtype == torch.float32
        assert torch.allclose(state["1.running_mean"], plain[1].running_mean.float())
    assert torch.allclose(model[1].running_var, plain[1].running_var.float())
    assert model[1].running_var.dtype == torch.float32
    assert int(model[1].num_batches_tracked) == 3


class _Mixed(nn.Module):
    """Parameters and buffers that no cast may touch, beside one that it may."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        whole = torch.tensor([1, 2, 2**20 + 1, -7])
        self.whole = nn.Parameter(whole, requires_grad=False)
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64))
        self.register_buffer("index", torch.tensor([3, 2, 1, 2**31 + 5]))
        self.seen: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        untouched = ("whole", "wave", "mask", "phase", "index")
        self.seen = {name: getattr(self, name).clone() for name in untouched}
        return self.linear(x)


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["whole", "mask", "index", "wave", "phase"])
def test_integers_bools_and_complex_numbers_are_never_cast(
    store: Any, name: str
) -> None:
    model = _Mixed()
    want = getattr(model, name).detach().clone()
    fields: dict[str, Any] = {"storage_dtype": torch.float16, "limit_gb": 0}
    with offloaded(model, store=store, compute_dtype=torch.bfloat16, **fields):
        run(model, torch.randn(2, 4, dtype=torch.bfloat16))
        assert same_bits(model.seen[name], want)
        assert same_bits(model.state_dict()[name], want)
    assert same_bits(getattr(model, name), want)


@ON_LINUX
@pytest.mark.parametrize("train", [False, True])
def test_a_module_with_buffers_leaves_host_memory_when_it_is_offloaded(
    train: bool,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(train)
    config = {"offload_device": "disk", "onload_device": "cpu"}
    policy = OffloadPolicy.from_vram_config({**config, "computation_device": "cpu"})
    with offloaded(model, policy):
        for _ in range(2):
            onload(model)
            assert not any(lies_in_a_file(p) for p in model.parameters())
            run(model, torch.randn(8, 4))
            offload(model)
            assert all(lies_in_a_file(p) for p in model.parameters())


def test_a_device_with_and_without_its_index_is_one_device() -> None:
    model = linears()
    policy = OffloadPolicy(compute_device="cpu:0", limit_gb=0)
    with offloaded(model, policy):
        run(model, torch.randn(2, 32))
        assert offload_stats(model).bytes_moved == 0


@pytest.mark.gpu
def test_a_cuda_device_with_and_without_its_index_is_one_device() -> None:
    model, x = linears().to("cuda:0"), torch.randn(2, 32, device="cuda")
    want = run(copy.deepcopy(model), x)
    config = {"onload_device": "cuda", "offload_device": "cuda:0"}
    policy = OffloadPolicy.from_vram_config({**config, "computation_device": "cuda:0"})
    with offloaded(model, policy):
        assert same_bits(run(model, x), want)
        moved = offload_stats(model).bytes_moved
        assert same_bits(run(model, x), want)
        assert offload_stats(model).bytes_moved == moved
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0"}
    assert same_bits(run(model, x), want)


def test_attaching_twice_is_refused_and_wraps_nothing() -> None:
    model, x = Stack(), torch.randn(2, 32)
    before, want = Picture(model), run(copy.deepcopy(model), x)
    attach_offload_hooks(model, OffloadPolicy(store="disk", limit_gb=0))
    hooks = hooks_of(model)
    for part in (model, model.blocks[1], nn.Sequential(model)):
        with pytest.raises(RuntimeError, match="detach"):
            attach_offload_hooks(part)
    assert hooks_of(model) == hooks
    assert same_bits(run(model, x), want)
    detach(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_there_is_a_way_back(fields: dict[str, Any]) -> None:
    model = Stack()
    before = Picture(model)
    for _ in range(2):
        attach_offload_hooks(model, OffloadPolicy(**fields))
        run(model, torch.randn(2, 32, dtype=fields.get("compute_dtype")))
        detach(model)
        assert before.differences(model) == []


def test_gradients_are_refused_instead_of_being_wrong() -> None:
    model = Stack()
    with (
        offloaded(model, store="disk", limit_gb=0),
        pytest.raises(RuntimeError, match="gradient"),
    ):
        model(torch.randn(2, 32)).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())

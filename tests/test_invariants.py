"""The invariants that every other promise rests on (1, 2, 5, 8 and 9)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    load_model,
    offload,
    offload_stats,
    offloaded,
    onload,
)
from tests.process_memory import anonymous_bytes, settled_bytes
from tests.real_models import REAL_MODELS
from tests.samples import (
    GIB,
    STREAMING,
    Picture,
    Stack,
    least_limit_gb,
    linears,
    run,
    same_bits,
    seen_inside,
    weight_bytes,
)


def _input(model: nn.Module, fields: dict[str, Any]) -> torch.Tensor:
    return torch.randn(2, 32, dtype=fields.get("compute_dtype", torch.float32))


# -- 1: a parameter stays the object that it was, and rests as its master -----------


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_parameters_are_the_same_objects_at_every_moment(
    fields: dict[str, Any],
) -> None:
    model = Stack()
    objects = [id(p) for p in model.parameters()]

    def are_the_same(_: nn.Module | None = None) -> bool:
        return [id(p) for p in model.parameters()] == objects

    inside = [seen_inside(m, are_the_same) for m in model.modules()]
    with offloaded(model, **fields):
        assert are_the_same()
        for _ in range(2):
            run(model, _input(model, fields))
            assert are_the_same()
        offload(model)
        assert are_the_same()
    assert are_the_same()
    assert all(seen and all(seen) for seen in inside if seen)


NARROW: dict[str, dict[str, Any]] = {
    "narrow, unlimited": {"compute_dtype": torch.bfloat16},
    "disk, narrow, unlimited": {"store": "disk", "compute_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    "fields", [*STREAMING.values(), *NARROW.values()], ids=[*STREAMING, *NARROW]
)
def test_shape_dtype_and_value_at_rest_are_those_of_the_master(
    fields: dict[str, Any],
) -> None:
    model = Stack()
    plain = copy.deepcopy(model)
    with offloaded(model, **fields):
        for _ in range(2):
            run(model, _input(model, fields))
            for (name, mine), theirs in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                assert same_bits(mine, theirs), name


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_an_edit_of_a_parameter_at_rest_is_an_edit_of_its_master(
    fields: dict[str, Any],
) -> None:
    model = Stack()
    dtype = fields.get("compute_dtype", torch.float32)
    plain = copy.deepcopy(model)
    with offloaded(model, **fields):
        x = _input(model, fields)
        for factor in (2.0, 0.5):
            run(model, x)
            for each in (model, plain):
                for name, parameter in each.named_parameters():
                    with torch.no_grad():
                        parameter.mul_(factor)
                    if name == "scale":
                        parameter.data = parameter.data + 1
            want = run(copy.deepcopy(plain).to(dtype), x)
            assert same_bits(run(model, x), want)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert same_bits(mine, theirs)


# -- 2: what did not change is not copied back --------------------------------------


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("limit_gb", [0, None])
def test_weights_are_not_rounded_by_a_smaller_dtype_in_compute(
    store: Any, limit_gb: float | None
) -> None:
    model = Stack()
    before = Picture(model)
    with offloaded(model, store=store, compute_dtype=torch.bfloat16, limit_gb=limit_gb):
        for _ in range(3):
            run(model, torch.randn(2, 32, dtype=torch.bfloat16))
        stats = offload_stats(model)
        assert stats.peak_bytes > 0 and stats.bytes_written_back == 0
    assert before.differences(model) == []


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs the figures of Linux"
)
def test_releasing_writes_nothing_to_the_memory_map_of_a_checkpoint(
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(linears(1024, 12).state_dict(), file)
    policy = OffloadPolicy(store="disk", limit_gb=0)
    model = load_model(lambda: linears(1024, 12), file, policy)
    run(model, torch.randn(2, 1024))
    before = settled_bytes()
    for _ in range(2):
        run(model, torch.randn(2, 1024))
    assert offload_stats(model).bytes_written_back == 0
    assert anonymous_bytes() - before < weight_bytes(model) / 4


class _Counting(nn.Module):
    """Changes its own parameter in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.count = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.linear(x) + self.count


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_what_a_forward_changed_is_copied_back(
    fields: dict[str, Any], mode: Any
) -> None:
    model = nn.Sequential(_Counting(), _Counting())
    dtype = fields.get("compute_dtype", torch.float32)
    with offloaded(model, **fields):
        for times in range(1, 4):
            with mode():
                model(torch.randn(2, 8, dtype=dtype))
            assert same_bits(
                model.state_dict()["1.count"], torch.full((8,), float(times))
            )
        offload(model)
        onload(model)
        with mode():
            model(torch.randn(2, 8, dtype=dtype))
    assert same_bits(model[1].count.data, torch.full((8,), 4.0))


# -- 5: every byte is reserved first ------------------------------------------------


class _Blocks(TorchDispatchMode):
    """Counts the bytes of raw memory that are alive, as they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._live: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and result.dtype is torch.uint8:
            self._live = [e for e in self._live if not e[0].expired()]
            block = (StorageWeakRef(result.untyped_storage()), result.nbytes)
            self._live.append(block)
            self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live))
        return result


@pytest.mark.parametrize("limit", ["least", "half", "none"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "unet"])
def test_the_budget_knows_of_every_byte_that_is_taken(
    name: str, dtype: torch.dtype | None, limit: str
) -> None:
    model, inputs = REAL_MODELS[name]()
    if dtype is not None:
        inputs = {
            k: v.to(dtype) if v.dtype.is_floating_point else v
            for k, v in inputs.items()
        }
    limits = {"least": 0, "half": weight_bytes(model) / 2 / GIB, "none": None}
    with offloaded(model, store="disk", compute_dtype=dtype, limit_gb=limits[limit]):
        with _Blocks() as blocks:
            for _ in range(3):
                run(model, **inputs)
        stats = offload_stats(model)
        assert blocks.peak == stats.peak_bytes == sum(stats.peak_by_kind.values())
        if limits[limit]:
            assert stats.peak_bytes <= limits[limit] * GIB


def test_what_does_not_fit_the_budget_is_not_allocated() -> None:
    class Sideways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = linears(depth=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = torch.stack([layer.weight for layer in self.layers])
            return nn.functional.linear(x, weights.sum(0))

    model, dtype = Sideways(), torch.float64
    fields: dict[str, Any] = {"store": "disk", "compute_dtype": dtype}
    limit_gb = least_limit_gb(model, **fields)
    with offloaded(model, **fields, limit_gb=limit_gb):
        with _Blocks() as blocks, pytest.raises(BudgetExceededError, match="limit_gb"):
            run(model, torch.randn(2, 32, dtype=dtype))
        assert blocks.peak <= limit_gb * GIB


# -- 8: only plain floating tensors are cast ----------------------------------------


class _Special(nn.Parameter):
    """A parameter whose class may mean something by its dtype."""


def test_only_plain_floating_parameters_are_cast() -> None:
    class Every(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Parameter(torch.randn(4, dtype=torch.float16))
            self.plain = nn.Parameter(torch.randn(4))
            self.special = _Special(torch.randn(4))
            for dtype in (torch.int8, torch.int64, torch.uint8, torch.bool):
                name = str(dtype).removeprefix("torch.")
                value = torch.ones(4, dtype=dtype)
                setattr(self, f"as_{name}", nn.Parameter(value, requires_grad=False))
            self.complex64 = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.register_buffer("table", torch.randn(4))
            self.register_buffer("positions", torch.arange(4))

        def forward(self) -> dict[str, torch.dtype]:
            tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
            return {name: tensor.dtype for name, tensor in tensors.items()}

    model = Every()
    before = Picture(model)
    own = model()
    cast = dict.fromkeys(("short", "plain", "table"), torch.bfloat16)
    for limit_gb in (0, None):
        with offloaded(model, compute_dtype=torch.bfloat16, limit_gb=limit_gb):
            assert all(run(model) == {**own, **cast} for _ in range(3))
        assert before.differences(model) == []


# -- 9: a hook acts on the registered parameters only -------------------------------


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_functional_call_uses_what_it_is_given_and_leaves_the_rest_alone(
    fields: dict[str, Any],
) -> None:
    model, other = Stack(), Stack()
    dtype = fields.get("compute_dtype", torch.float32)
    given = {n: p.detach().clone().to(dtype) for n, p in other.named_parameters()}
    values = {name: t.clone() for name, t in given.items()}
    places = {name: t.data_ptr() for name, t in given.items()}
    before, x = Picture(model), _input(model, fields)
    want_given = run(_with_buffers_of(other, model).to(dtype), x)
    want = run(copy.deepcopy(model).to(dtype), x)
    with offloaded(model, **fields):
        for _ in range(2):
            got = run(lambda: torch.func.functional_call(model, given, (x,)))
            assert same_bits(got, want_given)
            assert same_bits(run(model, x), want)
            assert {name: t.data_ptr() for name, t in given.items()} == places
    assert all(same_bits(t, values[name]) for name, t in given.items())
    assert before.differences(model) == []


def _with_buffers_of(model: nn.Module, other: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for mine, theirs in zip(copied.buffers(), other.buffers(), strict=True):
        mine.copy_(theirs)
    return copied


@pytest.mark.parametrize("warm", [False, True])
def test_replicas_are_refused(warm: bool) -> None:
    model, x = linears(depth=2), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=0):
        if warm:
            run(model, x)
        for part in (model, model[1]):
            replica = part._replicate_for_data_parallel()
            with pytest.raises(RuntimeError, match="detach"):
                run(replica, x)
            with pytest.raises(RuntimeError, match="detach"):
                run(copy.copy(part), x)
        assert same_bits(run(model, x), want)

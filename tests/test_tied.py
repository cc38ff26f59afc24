"""Invariant 10: tied tensors have one master, move once and stay tied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    offload_plan,
    offload_stats,
    offloaded,
)
from tests.real_models import REAL_MODELS
from tests.samples import (
    STREAMING,
    Picture,
    first_output,
    linears,
    run,
    same_bits,
    weight_bytes,
)


def _tied_by_object() -> nn.Sequential:
    model = linears(depth=3)
    model[2].weight = model[0].weight
    return model


def _tied_by_storage() -> nn.Sequential:
    model = linears(depth=3)
    model[2].weight = nn.Parameter(model[0].weight.detach().T)
    return model


def _overlapping() -> nn.Sequential:
    model = linears(depth=3)
    fused = torch.randn(48, 32)
    model[0].weight = nn.Parameter(fused[:32])
    model[2].weight = nn.Parameter(fused[16:])
    return model


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
@pytest.mark.parametrize("make", [_tied_by_object, _tied_by_storage, _overlapping])
def test_tied_tensors_move_once_and_stay_tied(
    make: Any, fields: dict[str, Any]
) -> None:
    dtype = fields.get("compute_dtype", torch.float32)
    model, x = make(), torch.randn(2, 32, dtype=dtype)
    bits = [p.detach().clone().to(dtype) for p in model.parameters()]
    want = x
    for weight in (model[0].weight, model[1].weight, model[2].weight):
        want = nn.functional.linear(want, weight.detach().clone().to(dtype))
    storage = model[0].weight.untyped_storage()
    shared = min(storage.nbytes(), 2 * 32 * 32 * 4) + model[1].weight.nbytes
    with offloaded(model, **fields):
        alone = nn.functional.linear(x, model[2].weight.detach().to(dtype))
        assert torch.equal(run(model[2], x), alone)
        least = offload_plan(model).least_bytes
        for _ in range(3):
            assert torch.equal(run(model, x), want)
        assert offload_plan(model).least_bytes == least, "none was read sideways"
        assert sum(s.copy_bytes for s in offload_plan(model).layers) == shared
        if offload_plan(model).limit_bytes is None:
            assert offload_stats(model).bytes_moved == shared
        assert _are_tied(model)
    assert _are_tied(model)
    for before, after in zip(bits, model.parameters(), strict=True):
        assert same_bits(before, after.detach().to(dtype))


def _are_tied(model: nn.Sequential) -> bool:
    """Write through one name at rest and look through the other."""
    one, other = model[0].weight, model[2].weight
    kept = one.data[20, 20].clone()
    before = other.detach().clone()
    with torch.no_grad():
        one[20, 20] = 123.0
        seen = not torch.equal(other.detach(), before)
        one[20, 20] = kept
    return seen


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_the_tied_embeddings_of_real_models_stay_tied(name: str) -> None:
    model, inputs = REAL_MODELS[name]()
    names = list(dict(model.named_parameters(remove_duplicate=False)))
    tied = len(names) - len(list(model.parameters()))
    assert tied
    want = first_output(run(copy.deepcopy(model), **inputs))
    before = Picture(model)
    with offloaded(model, store="disk", limit_gb=0):
        assert same_bits(first_output(run(model, **inputs)), want)
        assert len(names) - len(list(model.parameters())) == tied
        moved = sum(layer.copy_bytes for layer in offload_plan(model).layers)
        assert moved <= weight_bytes(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
@pytest.mark.parametrize("when", ["at rest", "behind a forward", "before detach"])
@pytest.mark.parametrize("index", [0, 2])
def test_tensor_that_is_given_other_data_no_longer_shares_it(
    fields: dict[str, Any], when: str, index: int
) -> None:
    """``tensor.data = new`` unties overlapping views, as it does without hooks."""
    model = _overlapping()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 32)
    new = torch.randn(32, 32)
    reference = fields.get("compute_dtype") or x.dtype
    with offloaded(model, **fields):
        if when == "behind a forward":
            for _ in range(2):
                run(model, x.to(reference))
        model[index].weight.data = new.clone()
        twin[index].weight.data = new.clone()
        if when != "before detach":
            for _ in range(2):
                output = run(model, x.to(reference))
                assert same_bits(
                    output, run(copy.deepcopy(twin).to(reference), x.to(reference))
                )
            for one, other in zip(
                model.state_dict().values(), twin.state_dict().values(), strict=True
            ):
                assert same_bits(one, other)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(one, other)
    assert same_bits(run(model, x), run(twin, x))


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_tensors_of_two_dtypes_in_one_memory_move_as_bytes(
    fields: dict[str, Any],
) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    bits = nn.Parameter(model[0].weight.detach().view(torch.int32), requires_grad=False)
    model[0].register_parameter("bits", bits)
    x = torch.randn(2, 32)
    expected = run(copy.deepcopy(model), x)
    if "compute_dtype" in fields:
        x = x.to(torch.float64)
        with pytest.raises(RuntimeError, match="dtype"), offloaded(model, **fields):
            run(model, x)  # bytes cannot be cast, so the layer's dtypes differ
    else:
        with offloaded(model, **fields):
            for _ in range(2):
                assert same_bits(run(model, x), expected)
    assert model[0].bits.data_ptr() == model[0].weight.data_ptr()
    assert same_bits(run(model, x.float()), expected)


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_data_with_other_strides_is_used_as_it_lies(fields: dict[str, Any]) -> None:
    """Which kernel computes, and so the last bits, depends on strides."""
    model = linears(depth=3)
    model[1].weight.data = torch.randn(32, 32).T
    twin = copy.deepcopy(model)
    dtype = fields.get("compute_dtype", torch.float32)
    x = torch.randn(2, 32, dtype=dtype)
    new = torch.randn(32, 32)
    with offloaded(model, **fields):
        for _ in range(2):
            run(model, x)
        model[1].weight.data = new.clone()
        twin[1].weight.data = new.clone()
        for _ in range(2):
            assert same_bits(run(model, x), run(copy.deepcopy(twin).to(dtype), x))
    assert model[1].weight.stride() == new.stride()
    assert same_bits(run(model, x.float()), run(twin, x.float()))

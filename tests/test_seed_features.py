"""What the seed system does and its users expect to go on working."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hookoffload import (
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
)
from tests.samples import (
    GIB,
    STREAMING,
    Stack,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    seen_inside,
    weight_bytes,
)

# -- the four states ----------------------------------------------------------------


def test_each_of_the_four_states_has_its_device_and_dtype() -> None:
    config = {
        "offload_dtype": torch.float8_e4m3fn,
        "offload_device": "disk",
        "onload_dtype": torch.float16,
        "onload_device": "cpu",
        "preparing_dtype": torch.bfloat16,
        "preparing_device": "cpu",
        "computation_dtype": torch.float32,
        "computation_device": "cpu",
    }
    model = linears(depth=3)
    weight = model[1].weight
    inside = seen_inside(model[1], lambda called: called.weight.dtype)
    attach_offload_hooks(model, OffloadPolicy.from_vram_config(config))
    assert weight.dtype == torch.float8_e4m3fn and lies_in_a_file(weight)
    onload(model)
    assert weight.dtype == torch.float16 and not lies_in_a_file(weight)
    run(model, torch.randn(2, 32))
    assert inside == [torch.float32]
    prepared = offload_plan(model).resident_bytes
    assert prepared == weight_bytes(model), "two bytes an element in both states"
    assert offload_stats(model).peak_by_kind["residents"] == prepared
    offload(model)
    assert weight.dtype == torch.float8_e4m3fn and lies_in_a_file(weight)


def test_offload_and_onload_in_host_memory_can_differ_in_dtype() -> None:
    config = {
        "offload_dtype": torch.float8_e4m3fn,
        "offload_device": "cpu",
        "onload_dtype": torch.bfloat16,
        "onload_device": "cpu",
        "computation_dtype": torch.float32,
        "computation_device": "cpu",
    }
    model = linears(depth=2)
    attach_offload_hooks(model, OffloadPolicy.from_vram_config(config))
    assert model[0].weight.dtype == torch.float8_e4m3fn
    onload(model)
    assert model[0].weight.dtype == torch.bfloat16
    offload(model)
    assert model[0].weight.dtype == torch.float8_e4m3fn


def test_a_missing_dtype_is_that_of_computation_and_a_missing_device_its_device() -> (
    None
):
    policy = OffloadPolicy.from_vram_config(
        {"computation_dtype": torch.bfloat16, "computation_device": "cpu"}
    )
    stated = Placement(device="cpu", dtype=torch.bfloat16)
    assert policy.offload == policy.onload == policy.preparing == stated


@pytest.mark.parametrize("state", ["offload", "onload", "preparing"])
def test_a_missing_device_is_disk_where_the_dtype_is(state: str) -> None:
    config = {f"{s}_dtype": "disk" for s in ("offload", state)}
    policy = OffloadPolicy.from_vram_config({**config, "computation_device": "cpu"})
    assert getattr(policy, state).on_disk


@pytest.mark.parametrize("word", ["device", "dtype"])
@pytest.mark.parametrize(
    "states",
    [("offload",), ("offload", "onload"), ("offload", "onload", "preparing")],
    ids="+".join,
)
def test_the_word_disk_is_legal_in_three_states(
    states: tuple[str, ...], word: str
) -> None:
    config: dict[str, Any] = {f"{state}_{word}": "disk" for state in states}
    config["computation_device"] = "cpu"
    model, x = Stack(), torch.randn(3, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, OffloadPolicy.from_vram_config(config)):
        assert lies_in_a_file(model.blocks[0].up.weight)
        assert all(same_bits(run(model, x), want) for _ in range(3))
        waits_in_ram = not lies_in_a_file(model.blocks[0].up.weight)
        assert waits_in_ram or "onload" in states
        assert bool(offload_plan(model).resident) == (states == ("offload", "onload"))


# -- the limit ----------------------------------------------------------------------


def test_without_a_limit_every_layer_is_resident_after_its_first_use() -> None:
    model, x = Stack(), torch.randn(3, 32)
    with offloaded(model, store="disk"):
        run(model, x)
        plan = offload_plan(model)
        assert plan.limit_bytes is None
        assert len(plan.resident) == len(plan.layers)
        moved = offload_stats(model).bytes_moved
        assert moved == weight_bytes(model)
        run(model, x)
        assert offload_stats(model).bytes_moved == moved


def test_a_limit_of_zero_streams_everything_in_the_least_memory() -> None:
    model = linears(depth=6)
    with offloaded(model, store="disk", limit_gb=0):
        run(model, torch.randn(2, 32))
        one_layer = model[0].weight.nbytes
        assert not offload_plan(model).resident
        assert offload_stats(model).peak_bytes == one_layer


def test_a_limit_lets_layers_stay_up_to_it_and_no_further() -> None:
    model = linears(depth=12)
    one_layer = model[0].weight.nbytes
    limit = 6 * one_layer
    with offloaded(model, store="disk", limit_gb=limit / GIB):
        for _ in range(3):
            run(model, torch.randn(2, 32))
        plan = offload_plan(model)
        assert 2 <= len(plan.resident) < 6
        assert limit - one_layer < offload_stats(model).peak_bytes <= limit


def test_limits_are_in_gib() -> None:
    model = linears()
    with offloaded(model, limit_gb=2):
        assert offload_plan(model).limit_bytes == 2 * 2**30


# -- the forward rule ---------------------------------------------------------------


def test_a_source_of_the_right_dtype_and_device_is_used_in_place() -> None:
    model = linears(depth=3)
    at_rest = [layer.weight.data_ptr() for layer in model]
    inside = [seen_inside(m, lambda called: called.weight.data_ptr()) for m in model]
    with offloaded(model, compute_device="cpu", limit_gb=0):
        run(model, torch.randn(2, 32))
        assert [seen[0] for seen in inside] == at_rest
        assert offload_stats(model).bytes_moved == 0


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_another_source_is_used_through_a_temporary_of_computation(
    fields: dict[str, Any],
) -> None:
    model = linears(depth=3)
    dtype = fields.get("compute_dtype", torch.float32)
    with offloaded(model, **{"limit_gb": 0, **fields}):
        weight = model[1].weight
        at_rest, rests_as = weight.data_ptr(), weight.dtype
        inside = seen_inside(
            model[1], lambda called: (called.weight.dtype, called.weight.data_ptr())
        )
        run(model, torch.randn(2, 32, dtype=dtype))
        assert inside[0][0] == dtype and inside[0][1] != at_rest
        if offload_plan(model).limit_bytes is not None:
            assert weight.data_ptr() == at_rest and weight.dtype == rests_as


@pytest.mark.parametrize("at_rest", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("limit_gb", [0, None])
def test_weights_can_rest_as_fp8_and_compute_as_bf16(
    at_rest: torch.dtype, store: str, limit_gb: float | None
) -> None:
    model, x = linears(depth=3), torch.randn(2, 32, dtype=torch.bfloat16)
    want = copy.deepcopy(model)
    for parameter in want.parameters():
        parameter.data = parameter.data.to(at_rest).to(torch.bfloat16)
    fields: dict[str, Any] = {"store": store, "storage_dtype": at_rest}
    with offloaded(model, **fields, compute_dtype=torch.bfloat16, limit_gb=limit_gb):
        assert model[0].weight.dtype == at_rest
        assert all(same_bits(run(model, x), run(want, x)) for _ in range(3))

"""What the seed system does and its users expect to go on working."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
)
from tests.real_models import REAL_MODELS, first_output
from tests.samples import (
    GIB,
    STREAMING,
    Stack,
    least_limit_gb,
    lies_in_a_file,
    linears,
    private_bytes,
    run,
    same_bits,
    seen_inside,
    weight_bytes,
)

SEED_MAPS = Path(__file__).parent / "data" / "seed_module_maps.json"
READS_COUNTED = pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count reads"
)


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("the system does not count reads")


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
    with offloaded(
        model, **fields, compute_dtype=torch.bfloat16, limit_gb=limit_gb
    ):
        assert model[0].weight.dtype == at_rest
        assert all(same_bits(run(model, x), run(want, x)) for _ in range(3))


# -- module maps --------------------------------------------------------------------


def _layer_names(model: nn.Module, module_map: Any, **fields: Any) -> list[str]:
    with offloaded(model, store="disk", module_map=module_map, **fields):
        return [layer.name for layer in offload_plan(model).layers]


def test_the_first_matching_entry_of_a_map_decides() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Sequential(Special(4, 4), nn.Linear(4, 4)))
    inner = {nn.Sequential: "layer"}
    assert _layer_names(model, {Special: "atomic", **inner}) == ["0.0", "0.1"]
    outer = {"torch.nn.Module": "atomic", Special: "layer"}
    assert _layer_names(model, outer) == [""]


def test_parents_are_matched_before_children_and_not_entered() -> None:
    model = Stack(depth=2)
    names = _layer_names(
        model, {nn.Linear: "layer", type(model.blocks[0]): "atomic"}
    )
    assert names == ["", "blocks.0", "blocks.1"]


def test_the_own_tensors_of_a_block_are_a_layer_beside_its_children() -> None:
    model = Stack(depth=1)
    names = _layer_names(model, {type(model.blocks[0]): "layer"})
    assert "blocks.0" in names and "blocks.0.up" in names


def test_a_map_that_names_the_root_makes_the_whole_model_one_layer() -> None:
    model, x = Stack(), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=0, module_map={Stack: "atomic"}):
        assert [layer.name for layer in offload_plan(model).layers] == [""]
        assert same_bits(run(model, x), want)
        moved = offload_stats(model).bytes_moved
        assert moved == weight_bytes(model)


def test_a_map_may_name_classes_by_dotted_name() -> None:
    model = Stack(depth=1)
    block = f"{type(model.blocks[0]).__module__}.{type(model.blocks[0]).__qualname__}"
    assert _layer_names(model, {block: "atomic"}) == ["", "blocks.0"]


def test_a_registry_gives_a_model_the_map_of_its_class() -> None:
    model = Stack(depth=1)
    root = f"{Stack.__module__}.Stack"
    registry = {"some.other.Model": {"x.Y": "atomic"}, root: {root: "atomic"}}
    assert _layer_names(model, registry) == [""]


def test_all_83_maps_of_the_seed_system_are_accepted_at_once() -> None:
    registry = json.loads(SEED_MAPS.read_text())
    assert len(registry) == 83
    model, inputs = REAL_MODELS["llama"]()
    want = first_output(run(copy.deepcopy(model), **inputs))
    with offloaded(model, store="disk", limit_gb=0, module_map=registry):
        assert same_bits(first_output(run(model, **inputs)), want)


def test_a_map_for_an_older_package_matches_the_renamed_class() -> None:
    modeling = pytest.importorskip(
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    )
    if not hasattr(modeling, "Qwen2_5_VLRMSNorm"):
        pytest.skip("this transformers has the class under its old name")
    model = nn.Sequential(nn.Linear(4, 4), modeling.Qwen2_5_VLRMSNorm(4))
    old = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2RMSNorm"
    with offloaded(model, store="disk", module_map={old: "atomic"}) as attached:
        assert len(offload_plan(attached).layers) == 2


# -- files --------------------------------------------------------------------------


@READS_COUNTED
def test_nothing_is_read_from_a_checkpoint_before_a_layer_needs_it(
    tmp_path: Path,
) -> None:
    source = linears(width=256, depth=8)
    one_layer = source[0].weight.nbytes
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    before = _bytes_read()
    model = load_model(
        lambda: linears(width=256, depth=8),
        tmp_path / "model.safetensors",
        OffloadPolicy(store="disk", limit_gb=0),
    )
    assert _bytes_read() - before < one_layer, "no more than the header"
    run(model[0], torch.randn(2, 256))
    assert one_layer <= _bytes_read() - before < 3 * one_layer
    detach(model)


def test_of_several_files_the_later_wins_where_both_have_a_tensor(
    tmp_path: Path,
) -> None:
    source = linears(depth=2)
    state = source.state_dict()
    wrong = {"0.weight": torch.zeros(32, 32)}
    save_file({**state, **wrong}, tmp_path / "a.safetensors")
    save_file({"0.weight": state["0.weight"]}, tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    x = torch.randn(2, 32)
    policy = OffloadPolicy(store="disk", limit_gb=0)
    model = load_model(lambda: linears(depth=2), files, policy)
    assert same_bits(run(model, x), run(source, x))


def test_loading_initialises_nothing(tmp_path: Path) -> None:
    source = linears(depth=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    initialised: list[torch.device] = []

    def make() -> nn.Module:
        model = linears(depth=3)
        initialised.extend(p.device for p in model.parameters())
        return model

    model = load_model(make, tmp_path / "model.safetensors")
    assert {device.type for device in initialised} == {"meta"}
    assert all(
        same_bits(mine.weight, theirs.weight)
        for mine, theirs in zip(model, source, strict=True)
    )


# -- the root, devices, the promise -------------------------------------------------


def test_parameters_of_the_root_itself_are_managed() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 32))
            self.inner = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) @ self.table.T

    model, x = Root(), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=0):
        assert "" in [layer.name for layer in offload_plan(model).layers]
        assert lies_in_a_file(model.table)
        assert same_bits(run(model, x), want)
        assert lies_in_a_file(model.table)
        assert offload_stats(model).bytes_moved >= model.table.nbytes


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_every_kind_of_device_that_torch_knows_can_be_named(kind: str) -> None:
    policy = OffloadPolicy(compute_device=kind)
    assert policy.compute_device == torch.device(kind)


def test_a_device_that_is_not_there_is_refused_when_attaching() -> None:
    model = linears()
    with pytest.raises(ValueError, match=r"compute_device='cuda:77'.*available: .*cpu"):
        attach_offload_hooks(model, OffloadPolicy(compute_device="cuda:77"))


@pytest.mark.gpu
@pytest.mark.parametrize("limit_gb", [0, None])
def test_a_model_in_host_memory_computes_on_cuda(limit_gb: float | None) -> None:
    model, x = Stack(), torch.randn(3, 32)
    want = run(copy.deepcopy(model).cuda(), x.cuda())
    with offloaded(model, compute_device="cuda", limit_gb=limit_gb):
        assert all(same_bits(run(model, x), want) for _ in range(3))
        assert run(model, x).device.type == "cuda"


@pytest.mark.parametrize("name", REAL_MODELS)
def test_a_real_model_runs_in_a_fraction_of_its_weights(name: str) -> None:
    model, inputs = REAL_MODELS[name]()
    want = first_output(run(copy.deepcopy(model), **inputs))
    least = least_limit_gb(model, store="disk")
    assert least * GIB < weight_bytes(model) / 2
    with offloaded(model, store="disk", limit_gb=least):
        for _ in range(3):
            assert same_bits(first_output(run(model, **inputs)), want)
        assert offload_stats(model).peak_bytes <= least * GIB


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs the figures of Linux"
)
def test_weights_of_twenty_times_the_limit_never_lie_in_memory(tmp_path: Path) -> None:
    # 40 GB in 2 GB, at a scale of 1 : 320.
    width, depth = 1024, 32
    file = tmp_path / "model.safetensors"
    save_file(
        {f"{i}.weight": torch.randn(width, width) / 32 for i in range(depth)}, file
    )
    limit = weight_bytes(nn.Linear(width, width, bias=False)) * depth // 20
    limit_gb = limit / GIB
    before = private_bytes()
    model = load_model(
        lambda: linears(width, depth),
        file,
        OffloadPolicy(store="disk", limit_gb=limit_gb),
    )
    taken = [seen_inside(layer, lambda _: private_bytes() - before) for layer in model]
    for _ in range(2):
        run(model, torch.randn(1, width))
    total = weight_bytes(model)
    assert offload_stats(model).peak_bytes <= limit
    assert max(max(seen) for seen in taken) < limit + 24 * 2**20 < total / 4

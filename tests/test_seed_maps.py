"""The seed system's module maps, on whole models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
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
    Stack,
    first_output,
    run,
    same_bits,
    weight_bytes,
)

SEED_MAPS = Path(__file__).parent / "data" / "seed_module_maps.json"


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
    assert _layer_names(model, outer) == ["Sequential"]


def test_parents_are_matched_before_children_and_not_entered() -> None:
    model = Stack(depth=2)
    names = _layer_names(model, {nn.Linear: "layer", type(model.blocks[0]): "atomic"})
    assert names == ["Stack", "blocks.0", "blocks.1"]


def test_the_own_tensors_of_a_block_are_a_layer_beside_its_children() -> None:
    model = Stack(depth=1)
    names = _layer_names(model, {type(model.blocks[0]): "layer"})
    assert "blocks.0" in names and "blocks.0.up" in names


def test_a_map_that_names_the_root_makes_the_whole_model_one_layer() -> None:
    model, x = Stack(), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=0, module_map={Stack: "atomic"}):
        assert [layer.name for layer in offload_plan(model).layers] == ["Stack"]
        assert same_bits(run(model, x), want)
        moved = offload_stats(model).bytes_moved
        assert moved == weight_bytes(model)


def test_a_map_may_name_classes_by_dotted_name() -> None:
    model = Stack(depth=1)
    block = f"{type(model.blocks[0]).__module__}.{type(model.blocks[0]).__qualname__}"
    assert _layer_names(model, {block: "atomic"}) == ["Stack", "blocks.0"]


def test_a_registry_gives_a_model_the_map_of_its_class() -> None:
    model = Stack(depth=1)
    root = f"{Stack.__module__}.Stack"
    registry = {"some.other.Model": {"x.Y": "atomic"}, root: {root: "atomic"}}
    assert _layer_names(model, registry) == ["Stack"]


def test_all_83_maps_of_the_seed_system_are_accepted_at_once() -> None:
    registry = json.loads(SEED_MAPS.read_text())
    assert len(registry) == 83
    model, inputs = REAL_MODELS["llama"]()
    want = first_output(run(copy.deepcopy(model), **inputs))
    with offloaded(model, store="disk", limit_gb=0, module_map=registry):
        assert same_bits(first_output(run(model, **inputs)), want)


def test_a_map_for_an_older_package_matches_the_renamed_class() -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    if not hasattr(modeling, "Qwen2_5_VLRMSNorm"):
        pytest.skip("this transformers has the class under its old name")
    model = nn.Sequential(nn.Linear(4, 4), modeling.Qwen2_5_VLRMSNorm(4))
    old = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2RMSNorm"
    with offloaded(model, store="disk", module_map={old: "atomic"}) as attached:
        assert len(offload_plan(attached).layers) == 2

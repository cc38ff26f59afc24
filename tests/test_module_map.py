"""Module maps: what is accepted, and what matches what."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import pytest
from torch import nn

from hookoffload.module_map import ModuleMap

SEED_MAPS = json.loads(
    (Path(__file__).parent / "data" / "seed_module_maps.json").read_text("utf-8")
)
QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"


class Block(nn.Module):
    pass


class SpecialBlock(Block):
    class Norm(nn.Module):
        pass


class Model(nn.Module):
    pass


class PrunedModel(Model):
    pass


class AutoWrappedLinear:
    """Stands for the seed system's class of that name."""


def a_class(module: str, name: str) -> type[nn.Module]:
    """A module class that says it comes from a package that is not here."""
    return type(name, (nn.Module,), {"__module__": module, "__qualname__": name})


def own_name(suffix: str) -> str:
    return f"{__name__}.{suffix}"


def test_empty_map_matches_nothing() -> None:
    assert ModuleMap(None).kind_of(nn.Linear(2, 2)) is None
    assert len(ModuleMap({})) == 0


def test_class_key_matches_subclasses_too() -> None:
    module_map = ModuleMap({Block: "atomic"})
    assert module_map.kind_of(Block()) == "atomic"
    assert module_map.kind_of(SpecialBlock()) == "atomic"
    assert module_map.kind_of(nn.Linear(2, 2)) is None


def test_dotted_name_matches_the_class_and_its_subclasses() -> None:
    module_map = ModuleMap({own_name("Block"): "layer"})
    assert module_map.kind_of(Block()) == "layer"
    assert module_map.kind_of(SpecialBlock()) == "layer"
    assert module_map.kind_of(nn.ReLU()) is None


def test_dotted_name_of_a_nested_class_matches() -> None:
    module_map = ModuleMap({own_name("SpecialBlock.Norm"): "layer"})
    assert module_map.kind_of(SpecialBlock.Norm()) == "layer"


def test_dotted_name_matches_where_the_class_is_exported_again() -> None:
    assert nn.Linear.__module__ == "torch.nn.modules.linear"
    module_map = ModuleMap({"torch.nn.Linear": "atomic"})
    assert module_map.kind_of(nn.Linear(2, 2)) == "atomic"
    assert module_map.kind_of(nn.LayerNorm(2)) is None


def test_looking_up_a_name_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    lazy = types.ModuleType("lazy_package")
    lazy.__getattr__ = asked.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_package", lazy)
    before = set(sys.modules)
    module_map = ModuleMap(
        {"lazy_package.Block": "layer", "xml.dom.pulldom.Block": "layer"}
    )
    assert module_map.kind_of(Block()) is None
    assert asked == []
    assert set(sys.modules) == before


def test_first_match_in_the_maps_order_wins() -> None:
    name = own_name("SpecialBlock")
    assert ModuleMap({Block: "layer", name: "atomic"}).kind_of(SpecialBlock()) == (
        "layer"
    )
    assert ModuleMap({name: "atomic", Block: "layer"}).kind_of(SpecialBlock()) == (
        "atomic"
    )


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("layer", "layer"),
        ("atomic", "atomic"),
        ("linear", "atomic"),
        ("module", "atomic"),
        ("nonrecurse", "layer"),
        ("diffsynth.core.vram.layers.AutoWrappedLinear", "atomic"),
        ("diffsynth.core.vram.layers.AutoWrappedModule", "atomic"),
        ("diffsynth.core.vram.layers.AutoWrappedNonRecurseModule", "layer"),
        (AutoWrappedLinear, "atomic"),
    ],
)
def test_seed_systems_words_are_kinds(word: object, kind: str) -> None:
    assert ModuleMap({nn.Linear: word}).kind_of(nn.Linear(2, 2)) == kind


@pytest.mark.parametrize("kind", ["leaf", "Layer", "", None, 1, nn.Linear])
def test_unknown_kind_is_refused_with_the_key_and_the_legal_kinds(kind: object) -> None:
    with pytest.raises(ValueError) as caught:
        ModuleMap({"torch.nn.Linear": kind})
    message = str(caught.value)
    assert "'torch.nn.Linear'" in message
    assert repr(kind) in message
    for word in ("'layer'", "'atomic'", "linear", "module", "nonrecurse"):
        assert word in message


@pytest.mark.parametrize("key", [1, None, int, nn.ReLU(), nn.functional.relu])
def test_key_that_is_neither_module_class_nor_string_is_refused(key: object) -> None:
    with pytest.raises(ValueError, match="neither a subclass") as caught:
        ModuleMap({key: "layer"})
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize("source", ["torch.nn.Linear", [nn.Linear], 1])
def test_map_that_is_no_mapping_is_refused(source: object) -> None:
    with pytest.raises(ValueError, match="not a mapping"):
        ModuleMap(source)  # type: ignore[arg-type]


def test_registry_mixed_with_kinds_is_refused_naming_both_keys() -> None:
    with pytest.raises(ValueError) as caught:
        ModuleMap({own_name("Model"): {nn.Linear: "layer"}, nn.Conv2d: "layer"})
    assert own_name("Model") in str(caught.value)
    assert "Conv2d" in str(caught.value)


def test_registry_inside_a_registry_is_refused() -> None:
    with pytest.raises(ValueError, match="inside a registry"):
        ModuleMap({"a.Model": {"b.Model": {nn.Linear: "layer"}}})


def test_error_inside_a_registry_names_the_model_too() -> None:
    with pytest.raises(ValueError, match=r"a\.Model.*'torch\.nn\.Linear'"):
        ModuleMap({"a.Model": {"torch.nn.Linear": "leaf"}})


@pytest.mark.parametrize("key", [Model, f"{__name__}.Model"])
def test_registry_gives_the_map_of_the_models_class(key: object) -> None:
    registry = ModuleMap({"other.Model": {Block: "layer"}, key: {Block: "atomic"}})
    assert registry.is_registry
    module_map = registry.for_model(Model())
    assert not module_map.is_registry
    assert module_map.kind_of(Block()) == "atomic"


def test_registry_prefers_the_models_own_class_to_its_base() -> None:
    registry = ModuleMap(
        {Model: {Block: "layer"}, own_name("PrunedModel"): {Block: "atomic"}}
    )
    assert registry.for_model(PrunedModel()).kind_of(Block()) == "atomic"
    assert registry.for_model(Model()).kind_of(Block()) == "layer"


def test_registry_gives_a_subclass_the_map_of_its_base() -> None:
    registry = ModuleMap({Model: {Block: "layer"}})
    assert registry.for_model(PrunedModel()).kind_of(Block()) == "layer"


def test_registry_without_the_model_is_empty_and_warns_with_near_names(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = ModuleMap(
        {"elsewhere.Model": {Block: "layer"}, "elsewhere.Unlike": {Block: "layer"}}
    )
    with caplog.at_level(logging.WARNING, logger="hookoffload"):
        assert len(registry.for_model(Model())) == 0
    (record,) = caplog.records
    assert own_name("Model") in record.getMessage()
    assert "elsewhere.Model" in record.getMessage()
    assert "elsewhere.Unlike" not in record.getMessage()


def test_flat_map_is_the_same_for_every_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module_map = ModuleMap({Block: "layer"})
    assert module_map.for_model(Model()) == module_map
    assert not caplog.records


def test_class_that_gets_imported_later_matches_for_the_next_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module_map = ModuleMap({"exported_later.Block": "layer"})
    assert module_map.kind_of(Block()) is None
    exporting = types.ModuleType("exported_later")
    exporting.Block = Block  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exported_later", exporting)
    assert module_map.for_model(Model()).kind_of(Block()) == "layer"


def test_asking_a_registry_for_a_kind_is_misuse() -> None:
    registry = ModuleMap({Model: {Block: "layer"}})
    with pytest.raises(RuntimeError, match=r"kind_of.*for_model"):
        registry.kind_of(Block())
    with pytest.raises(RuntimeError, match=r"unmatched.*for_model"):
        registry.unmatched([Block()])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Qwen2RMSNorm", "Qwen2_5_VLRMSNorm"),
        ("Qwen2_5_VisionRotaryEmbedding", "Qwen2_5_VLVisionRotaryEmbedding"),
    ],
)
def test_renamed_class_matches_under_either_name(old: str, new: str) -> None:
    for written in (old, new):
        module_map = ModuleMap({f"{QWEN}.{written}": "atomic"})
        for present in (old, new):
            assert module_map.kind_of(a_class(QWEN, present)()) == "atomic"
        elsewhere = a_class("transformers.models.other", written)
        assert module_map.kind_of(elsewhere()) is None


def test_unmatched_names_the_keys_and_near_classes_that_occur() -> None:
    module_map = ModuleMap(
        {
            "torch.nn.Linaer": "layer",
            nn.LSTM: "atomic",
            nn.ReLU: "layer",
            "wrong.package.Block": "atomic",
        }
    )
    modules = [nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(), Block()]
    assert module_map.unmatched(modules) == [
        ("torch.nn.Linaer", ["torch.nn.modules.linear.Linear"]),
        ("torch.nn.modules.rnn.LSTM", []),
        ("wrong.package.Block", [own_name("Block")]),
    ]


def test_unmatched_gives_at_most_three_near_names() -> None:
    classes = [a_class(f"package{index}", "Block") for index in range(5)]
    ((_, near),) = ModuleMap({"wrong.Block": "layer"}).unmatched(
        cls() for cls in classes
    )
    assert near == ["package0.Block", "package1.Block", "package2.Block"]


def test_key_hidden_by_an_earlier_one_is_not_unmatched() -> None:
    module_map = ModuleMap({Block: "layer", own_name("SpecialBlock"): "atomic"})
    assert module_map.unmatched([SpecialBlock()]) == []


def test_maps_with_the_same_entries_in_the_same_order_are_equal() -> None:
    one = ModuleMap({Block: "layer", nn.ReLU: "atomic"})
    assert one == ModuleMap({Block: "nonrecurse", nn.ReLU: "module"})
    assert hash(one) == hash(ModuleMap(one))
    assert one != ModuleMap({nn.ReLU: "atomic", Block: "layer"})
    assert one != {Block: "layer", nn.ReLU: "atomic"}
    registry = ModuleMap({Model: {Block: "layer"}})
    assert registry == ModuleMap(registry) != ModuleMap({PrunedModel: {Block: "layer"}})


def test_map_does_not_follow_later_changes_of_its_source() -> None:
    source = {Block: "layer"}
    module_map = ModuleMap(source)
    source[Block] = "atomic"
    assert module_map.kind_of(Block()) == "layer"


def test_there_are_83_seed_maps() -> None:
    assert len(SEED_MAPS) == 83
    assert len(ModuleMap(SEED_MAPS)) == 83


@pytest.mark.parametrize("model_name", SEED_MAPS)
def test_seed_map_gives_each_of_its_classes_its_kind(model_name: str) -> None:
    module_map = ModuleMap(SEED_MAPS).for_model(a_class(*model_name.rsplit(".", 1))())
    kinds = {"linear": "atomic", "module": "atomic", "nonrecurse": "layer"}
    entries = SEED_MAPS[model_name]
    assert len(module_map) == len(entries)
    for name, word in entries.items():
        layer = a_class(*name.rsplit(".", 1))()
        assert module_map.kind_of(layer) == kinds[word], name

"""Each of the seed system's 83 maps, on what installed packages have of its classes.

The model classes are the seed system's own. A stand-in with the name of each holds the
layers that its map names; and where the model is a text or image encoder of
transformers in other clothes, its map is tried on that.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import offload_plan, offloaded
from hookoffload.module_map import ModuleMap
from tests.samples import run, same_bits
from tests.sweep.recipe import Recipe, seed_everything
from tests.sweep.trial import Place, run_trial

MAPS: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "data" / "seed_module_maps.json").read_text()
)

# One of each layer that maps name, small enough to make, and an input for it.
_LAYERS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "torch.nn.Conv1d": ((4, 4, 3), (1, 4, 8)),
    "torch.nn.Conv2d": ((4, 4, 3), (1, 4, 8, 8)),
    "torch.nn.Conv3d": ((4, 4, 3), (1, 4, 4, 4, 4)),
    "torch.nn.ConvTranspose1d": ((4, 4, 3), (1, 4, 8)),
    "torch.nn.Dropout": ((), (2, 8)),
    "torch.nn.Embedding": ((8, 8), (2, 8)),
    "torch.nn.GroupNorm": ((2, 4), (1, 4, 8)),
    "torch.nn.LayerNorm": ((8,), (2, 8)),
    "torch.nn.Linear": ((8, 8), (2, 8)),
    "torch.nn.MultiheadAttention": ((8, 2), (2, 3, 8)),
    "torch.nn.RMSNorm": ((8,), (2, 8)),
    "torch.nn.SiLU": ((), (2, 8)),
}


class _AllLayers(nn.Module):
    """Runs each layer on an input of its own."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.layers = nn.ModuleList(self._made(name) for name in names)

    @staticmethod
    def _made(name: str) -> nn.Module:
        layer: nn.Module = getattr(nn, name.rpartition(".")[2])(*_LAYERS[name][0])
        return layer.eval()

    def forward(self) -> list[torch.Tensor]:
        torch.manual_seed(1)
        return [
            self._called(layer, torch.rand(_LAYERS[name][1]))
            for name, layer in zip(self.names, self.layers, strict=True)
        ]

    @staticmethod
    def _called(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Embedding):
            return layer((x * 8).long())
        if isinstance(layer, nn.MultiheadAttention):
            return layer(x, x, x)[0]
        return layer(x)


def _stand_in(name: str) -> nn.Module:
    """Make a model whose class has the dotted name of an entry."""
    module, _, kind = name.rpartition(".")
    root = type(kind, (_AllLayers,), {"__module__": module})
    return root([layer for layer in MAPS[name] if layer in _LAYERS])


@pytest.mark.parametrize("entry", MAPS)
def test_a_model_that_a_map_is_for_runs_with_the_layers_that_it_names(
    entry: str,
) -> None:
    model = _stand_in(entry)
    want = run(model)
    owners = {
        f"layers.{index}"
        for index, layer in enumerate(model.layers)
        if any(True for _ in layer.parameters())
    }
    if not owners:
        pytest.skip("it names no layer that is installed and has weights")
    policy = {"compute_device": "cpu", "store": "disk", "limit_gb": 0}
    with offloaded(model, module_map=MAPS, **policy):
        assert {layer.name for layer in offload_plan(model).layers} == owners
        for _ in range(2):
            assert all(map(same_bits, run(model), want))


# What the seed system's encoders are made of, in transformers.
_SEED = "diffsynth.models"
_IN_TRANSFORMERS = {
    f"{_SEED}.ace_step_text_encoder.AceStepTextEncoder": "Qwen3Model",
    f"{_SEED}.dinov3_image_encoder.DINOv3ImageEncoder": "DINOv3ViTModel",
    f"{_SEED}.ernie_image_text_encoder.ErnieImageTextEncoder": "Ministral3Model",
    f"{_SEED}.flux2_text_encoder.Flux2TextEncoder": "MistralModel",
    f"{_SEED}.flux_ipadapter.SiglipVisionModelSO400M": "SiglipVisionModel",
    f"{_SEED}.flux_text_encoder_t5.FluxTextEncoderT5": "T5EncoderModel",
    f"{_SEED}.ideogram4_text_encoder.Ideogram4TextEncoder": "Qwen3VLTextModel",
    f"{_SEED}.joyai_image_text_encoder.JoyAIImageTextEncoder": "Qwen3VLModel",
    f"{_SEED}.krea2_text_encoder.Krea2TextEncoder": "Qwen3VLModel",
    f"{_SEED}.ltx2_text_encoder.LTX2TextEncoder": "Gemma3Model",
    f"{_SEED}.minimax_h3_text_encoder.MiniMaxH3TextEncoder": "Qwen3VLModel",
    f"{_SEED}.minimax_music3_text_encoder.MiniMaxMusic3TextEncoder": "Qwen3Model",
    f"{_SEED}.qwen_image_text_encoder.QwenImageTextEncoder": "Qwen2_5_VLModel",
    f"{_SEED}.siglip2_image_encoder.Siglip2ImageEncoder": "SiglipVisionModel",
    f"{_SEED}.siglip2_image_encoder.Siglip2ImageEncoder428M": "Siglip2VisionModel",
    f"{_SEED}.z_image_text_encoder.ZImageTextEncoder": "Qwen3Model",
}


@functools.cache
def _recipe(name: str) -> Recipe:
    if name == "Siglip2VisionModel":
        return _siglip2()
    return importlib.import_module("tests.sweep.transformer_models").recipe(name)


def _siglip2() -> Recipe:
    """Make one by hand: its inputs are patches, of images of any shape."""
    transformers = importlib.import_module("transformers")
    config = transformers.Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_patches=16,
        patch_size=4,
    )

    def build() -> nn.Module:
        seed_everything()
        model: nn.Module = transformers.Siglip2VisionModel(config)
        return model.eval()

    inputs = {
        "pixel_values": torch.rand(1, 16, 3 * 4 * 4),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }
    return Recipe(build=build, inputs=inputs)


@pytest.mark.parametrize("entry", _IN_TRANSFORMERS)
def test_a_map_for_an_encoder_of_transformers_fits_it(entry: str) -> None:
    pytest.importorskip("transformers")
    name = _IN_TRANSFORMERS[entry]
    recipe = _recipe(name)
    matched = ModuleMap(MAPS[entry])
    kinds = {matched.kind_of(module) for module in recipe.build().modules()}
    assert "atomic" in kinds
    result = run_trial(name, recipe, Place(module_map=MAPS[entry]))
    assert result.outcome == "equal", result.reason
    assert result.moved > 0

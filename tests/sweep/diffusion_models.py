"""Recipes for the classes of diffusers."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .overrides import DIFFUSION_INPUTS, DIFFUSION_VALUES
from .recipe import (
    CannotBeBuiltError,
    Recipe,
    check_small,
    give_values,
    seed_everything,
)

_HEADS = 2
_TOKENS = 8
_MOST_TRIES = 400
_MOST_SECONDS = 20
_LAYERS = re.compile(
    r"^num_layers$|num_(\w+_)?(layers|blocks)$|^n_(\w+_)?layers$|^nlayers$|depths?$"
    r"|layers_per_block$|_layers$|num_mmdit_layers|num_res_blocks|^num_layers"
)
_NO_LAYERS = re.compile(r"dual_attention|injection|skip|temporal_up|temporal_down")
_WIDTHS = re.compile(
    r"dim$|_dim(_t5|_out)?$|hidden(_size|_dim)?$|channels$|_size_per|ffn|intermediate"
    r"|caption_projection|width|crossattn_proj"
)
_NO_WIDTHS = re.compile(
    r"head_dim|rope|freq|axes|latent_channels|z_dim|lora|num_|head$|heads$|scale|^dim_"
)
_BASES = ("base_dim", "decoder_base_dim", "base_channels", "ch")
_TEXT = re.compile(
    r"joint_attention_dim|cross_attention_dim|caption_channels|text_embed_dim|text_dim"
    r"|cap_feat_dim|context_in_dim|text_hidden_dim|encoder_hidden_dim|txt_hidden"
    r"|in_text_dim|encoder_hidden_states_channels|condition_dim|text_states_dim|llm"
    r"|encoder_hid_dim|text_encoder_dim|crossattn_proj_in|text_feature_dim|hidden_size"
)


def class_names() -> list[str]:
    """Return the names of all model classes that the library exports."""
    import diffusers

    return sorted(
        name
        for name in dir(diffusers)
        if isinstance(cls := getattr(diffusers, name, None), type)
        and issubclass(cls, diffusers.ModelMixin)
        and cls is not diffusers.ModelMixin
    )


def recipe(name: str) -> Recipe:
    """Find small arguments and inputs for a class.

    Args:
        name: of a class in diffusers.

    Raises:
        CannotBeBuiltError: None were found; the message has the reasons.
    """
    import diffusers

    cls = getattr(diffusers, name)
    reasons: list[str] = []
    deadline = time.monotonic() + _MOST_SECONDS
    for shrink in (True, False):
        seed_everything()
        try:
            build = _builder(cls, shrink)
            check_small(build)
            model = build()
        except Exception as error:
            reasons.append(f"build: {_said(error)}")
            continue
        for tries, inputs in enumerate(_candidates(name, model)):
            if tries > _MOST_TRIES or time.monotonic() > deadline:
                break
            seed_everything()
            try:
                with torch.no_grad():
                    model(**copy.deepcopy(inputs))
            except Exception as error:
                shapes = {k: _shape(v) for k, v in inputs.items()}
                reasons.append(f"{shapes}: {_said(error)}")
                continue
            return Recipe(build=build, inputs=inputs)
    raise CannotBeBuiltError(" | ".join(dict.fromkeys(reasons)))


def _builder(cls: type[nn.Module], shrink: bool) -> Callable[[], nn.Module]:
    values = {
        name: p.default
        for name, p in inspect.signature(cls.__init__).parameters.items()
        if p.default is not p.empty
    }
    if shrink:
        values = _small(values)
    values |= DIFFUSION_VALUES.get(cls.__name__, {})

    def build() -> nn.Module:
        seed_everything()
        made = {
            key: value() if callable(value) else copy.deepcopy(value)
            for key, value in values.items()
        }
        model = cls(**made).eval()
        if all(p.device.type != "meta" for p in model.parameters()):
            give_values(model)
        return model

    return build


def _small(values: dict[str, Any]) -> dict[str, Any]:
    """Shrink a class's default arguments; what is heads times width stays so."""
    heads = next(
        (
            values[k]
            for k in ("num_attention_heads", "num_heads", "n_heads")
            if k in values
        ),
        None,
    )
    width = values.get("attention_head_dim")
    inner = heads * width if isinstance(heads, int) and isinstance(width, int) else None
    small: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | list | tuple):
            small[key] = value
        elif isinstance(value, list | tuple):
            small[key] = _small_sequence(key, value)
        elif key in ("num_attention_heads", "num_heads", "n_heads"):
            small[key] = min(value, _HEADS)
        elif key in ("num_key_value_heads", "n_kv_heads", "num_kv_heads"):
            small[key] = min(
                value, 1 if isinstance(heads, int) and value < heads else 2
            )
        elif _LAYERS.search(key) and not _NO_LAYERS.search(key):
            small[key] = min(value, 2)
        elif inner and value >= inner and value % inner == 0:
            small[key] = value // heads * min(heads, _HEADS)
        elif key == "norm_num_groups":
            small[key] = math.gcd(value, 8)
        elif _WIDTHS.search(key) and not _NO_WIDTHS.search(key) and value >= 128:
            small[key] = value // 16 if value % 16 == 0 else value
        elif key in _BASES:
            small[key] = min(value, 16)
        elif key == "vocab_size":
            small[key] = min(value, 128)
        else:
            small[key] = value
    return small


def _small_sequence(key: str, value: Any) -> Any:
    ints = [v for v in value if isinstance(v, int) and not isinstance(v, bool)]
    if len(ints) != len(value) or not ints:
        return value
    if "channels" in key and min(ints) >= 32:
        return type(value)(v * 32 // min(ints) for v in ints)
    if _LAYERS.search(key) and not _NO_LAYERS.search(key):
        return type(value)(min(v, 1) for v in ints)
    return value


def _candidates(name: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    if name in DIFFUSION_INPUTS:
        yield DIFFUSION_INPUTS[name](model.config)
        return
    parameters = inspect.signature(model.forward).parameters
    variants: dict[str, list[Any]] = {}
    for key, p in parameters.items():
        needed = p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        if key == "added_cond_kwargs" and "PixArt" not in name:
            continue
        if not needed and key not in _WELCOME:
            continue
        made = _variants(key, model.config)
        if not made and not needed:
            continue
        variants[key] = made or [torch.randn(1, _TOKENS, 32)]
    if "guidance" in parameters and model.config.get("guidance_embeds"):
        variants["guidance"] = [torch.tensor([3.0])]
    keys = list(variants)
    for values in itertools.product(*variants.values()):
        inputs = dict(zip(keys, values, strict=True))
        if "img_ids" in inputs:
            rows = inputs["hidden_states"]
            if rows.dim() != 3:
                continue
            inputs["img_ids"] = inputs["img_ids"][: rows.shape[1]]
        yield inputs


_WELCOME = (
    *("encoder_hidden_states", "timestep", "pooled_projections", "class_labels"),
    *("encoder_attention_mask", "encoder_hidden_states_mask", "added_cond_kwargs"),
    *("img_ids", "txt_ids", "img_shapes", "attention_mask", "num_frames", "height"),
    *("width", "encoder_hidden_states_image", "image_embeds"),
)


def _variants(key: str, config: Any) -> list[Any]:
    channels = _first(config, "in_channels", "in_dim", "in_visual_dim", default=4)
    channels = channels if isinstance(channels, int) else 4
    match key:
        case "hidden_states" | "x" | "latents" | "z" | "input":
            return _latents(config, channels)
        case "sample":
            return _pixels(config, channels)
        case "timestep" | "t" | "timesteps" | "r_timestep":
            return [torch.tensor([7]), torch.tensor([0.5]), torch.tensor([[0.5, 0.2]])]
        case "original_size" | "target_size":
            return [torch.tensor([[32.0, 32.0]])]
        case "crop_coords":
            return [torch.tensor([[0.0, 0.0]])]
        case "added_cond_kwargs":
            return [{"resolution": None, "aspect_ratio": None}]
        case "encoder_hidden_states" | "cap_feats" | "text_hidden_states":
            return _texts(config)
        case "encoder_attention_mask" | "encoder_hidden_states_mask":
            return [torch.ones(1, _TOKENS, dtype=torch.bool)]
        case "attention_mask":
            return []
        case "pooled_projections":
            width = _first(config, "pooled_projection_dim", "pooled_dim", default=None)
            return [torch.randn(1, width)] if isinstance(width, int) else []
        case "img_ids":
            grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
            ids = torch.cat([torch.zeros(16, 1), grid], dim=1)
            return [ids, torch.cat([ids, torch.zeros(16, 1)], dim=1)]
        case "txt_ids":
            return [torch.zeros(_TOKENS, 3), torch.zeros(_TOKENS, 4)]
        case "img_shapes":
            return [[(1, 4, 4)], [[(1, 4, 4)]]]
        case "class_labels":
            return [torch.tensor([1])] if config.get("num_embeds_ada_norm") else []
        case "controlnet_cond":
            return [
                torch.randn(1, 3, 256, 256),
                torch.randn(1, channels, 8, 8),
                torch.randn(1, 16, channels),
                torch.randn(1, 3, 64, 64),
            ]
        case "conditioning_scale":
            return [1.0]
        case "num_frames":
            return [1]
        case "height" | "width":
            return [4]
        case "encoder_hidden_states_image":
            return []
        case "input_ids":
            return [torch.arange(_TOKENS)[None]]
        case "position_ids":
            return [torch.arange(_TOKENS)[None]]
    return []


def _latents(config: Any, channels: int) -> list[torch.Tensor]:
    width = config.get("hidden_size")
    return [
        torch.randn(1, channels, 8, 8),
        torch.randn(1, channels, 2, 8, 8),
        torch.randn(1, 2, channels, 8, 8),
        torch.randn(1, 16, channels),
        torch.randn(1, channels, 16),
        torch.randn(1, channels, 32, 32),
        torch.randn(1, 16, channels * 4),
        torch.randn(1, channels, 3, 16, 16),
        *([torch.randn(1, width)] if isinstance(width, int) else []),
    ]


def _pixels(config: Any, channels: int) -> list[torch.Tensor]:
    edge = config.get("sample_size") or 32
    edge = min(edge, 64) if isinstance(edge, int) else 32
    return [
        torch.randn(1, channels, 32, 32),
        torch.randn(1, channels, 5, 32, 32),
        torch.randn(1, 2, channels, 32, 32),
        torch.randn(1, channels, edge, edge),
        torch.randn(1, channels, 9, 64, 64),
        torch.randn(1, channels, 4096),
        torch.randn(1, 2, 4096),
        torch.randn(1, 3, 32, 32),
        torch.randn(1, 3, 9, 32, 32),
    ]


def _texts(config: Any) -> list[torch.Tensor]:
    widths: dict[int, None] = {}
    for key, value in config.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if _TEXT.search(key) and isinstance(one, int) and one > 1:
                widths[one] = None
    return [torch.randn(1, _TOKENS, width) for width in widths]


def _first(config: Any, *keys: str, default: Any) -> Any:
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return default


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

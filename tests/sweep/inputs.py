"""Inputs for a transformers model, from its forward's signature and its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

TOKENS = 12
Inputs = dict[str, Any]


class Facts:
    """Looks figures up in a config and in those inside it.

    Args:
        config: a transformers config.
    """

    def __init__(self, config: Any) -> None:
        self._configs = [config]
        for key in ("vision_config", "audio_config", "backbone_config"):
            self._add(getattr(config, key, None))
        for value in list(vars(config).values()):
            self._add(value)

    def _add(self, value: Any) -> None:
        if hasattr(value, "to_dict") and not any(value is c for c in self._configs):
            self._configs.append(value)
            for inner in vars(value).values():
                self._add(inner)

    def find(self, *keys: str, default: Any = None) -> Any:
        """Return the first of these attributes that some config has."""
        for config in self._configs:
            for key in keys:
                value = getattr(config, key, None)
                if value is not None:
                    return value
        return default

    @property
    def edge(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.find("image_size", "img_size", "input_size", default=64)
        if isinstance(size, dict):
            size = list(size.values())
        if isinstance(size, list | tuple):
            return int(size[0]), int(size[-1])
        return (int(size), int(size)) if isinstance(size, int) else (64, 64)

    @property
    def channels(self) -> int:
        found = self.find("num_channels", "in_channels", "in_chans", default=3)
        return found if isinstance(found, int) and found < 32 else 3


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs to try in turn, those that use most of the model first.

    Args:
        model: a transformers model.
    """
    parameters = inspect.signature(model.forward).parameters
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    facts = Facts(model.config)
    known = {name: variants for name in named if (variants := _variants(name, facts))}
    main = getattr(model, "main_input_name", "input_ids")
    needed = {name for name, p in named.items() if p.default is p.empty}
    rich = [name for name in known if name in needed or name == main]
    rich += [name for name in known if name in _WELCOME and name not in rich]
    plain = [name for name in rich if name in needed or name == main or _is_text(name)]
    vision = [n for n in rich if not _is_text(n)]
    modes = [rich]
    if "pixel_values" in rich and "input_features" in rich:
        modes.append([n for n in rich if "audio" not in n and "feature" not in n])
    modes += [plain, vision, [n for n in plain if n in needed or n == main]]
    seen: list[list[str]] = []
    for names in modes:
        if not names or names in seen:
            continue
        seen.append(names)
        count = max(len(known[name]) for name in names)
        for i in range(count):
            inputs = {n: known[n][min(i, len(known[n]) - 1)] for n in names}
            if "input_ids" in inputs:
                yield from _with_placeholders(model, facts, inputs)
            yield inputs


_WELCOME = (
    *("input_ids", "pixel_values", "decoder_input_ids", "input_features"),
    *("bbox", "image_grid_thw", "pixel_attention_mask", "image_sizes"),
    *("feature_attention_mask", "mm_token_type_ids", "visual_embeds"),
    *("attention_mask", "past_values", "input_values", "image_position_ids"),
    *("future_values", "future_time_features", "past_time_features"),
    *("past_observed_mask", "spatial_shapes", "audio_feature_lengths"),
    *("pixel_position_ids", "input_features_mask", "input_points"),
    *("visual_feats", "visual_pos", "actions", "rewards", "returns_to_go"),
    *("timesteps", "task_inputs"),
)


def _is_text(name: str) -> bool:
    return name in ("input_ids", "decoder_input_ids", "attention_mask", "bbox")


def _with_placeholders(
    model: nn.Module, facts: Facts, inputs: Inputs
) -> Iterator[Inputs]:
    """Put as many image and audio tokens into the text as the towers give."""
    for method, source, marks in (
        (
            "get_image_features",
            "pixel_values",
            ("image_token_id", "image_token_index", "media_token_id", "im_patch_id"),
        ),
        (
            "get_audio_features",
            "input_features",
            ("audio_token_id", "audio_token_index", "audio_placeholder_id"),
        ),
    ):
        token = facts.find(*marks)
        if source not in inputs or token is None:
            continue
        get = getattr(model, method, None) or getattr(
            getattr(model, "model", None), method, None
        )
        if get is None:
            continue
        accepted = inspect.signature(get).parameters
        with torch.no_grad():
            try:
                found = get(**{k: v for k, v in inputs.items() if k in accepted})
            except Exception:  # another shape is tried next
                return
        count = _rows(found)
        if not count:
            continue
        ids = inputs["input_ids"]
        marks_ids = torch.full((1, count), int(token))
        text = torch.cat([ids[:, :2], marks_ids, ids[:, 2:]], dim=1)
        inputs = {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (text == token).long()
        yield inputs


def _rows(found: Any) -> int:
    """Return how many feature vectors are in what a tower gave."""
    found = (
        getattr(found, "pooler_output", None)
        if hasattr(found, "pooler_output")
        else found
    )
    if isinstance(found, torch.Tensor):
        return found.numel() // found.shape[-1]
    if isinstance(found, list | tuple):
        return sum(_rows(one) for one in found)
    return 0


def _variants(name: str, facts: Facts) -> list[Any]:
    """Return values to try in turn for a parameter; none if its name says nothing."""
    maker = _MAKERS.get(name)
    if maker is None:
        return []
    return list(maker(facts))


def tokens(facts: Facts, count: int = TOKENS) -> torch.Tensor:
    """Return one row of tokens that ends as a text does."""
    vocabulary = facts.find("vocab_size", "text_vocab_size", default=99)
    high = min(vocabulary if isinstance(vocabulary, int) else 99, 99)
    ids = torch.randint(5 if high > 8 else 0, high, (1, count))
    eos = facts.find("eos_token_id")
    if isinstance(eos, int) and eos < high:
        ids[ids == eos] = eos + 1 if eos + 1 < high else eos - 1
        ids[:, -1] = eos
    return ids


def _pixels(facts: Facts) -> list[torch.Tensor]:
    channels, (height, width) = facts.channels, facts.edge
    frames = facts.find("num_frames", default=4)
    frames = frames if isinstance(frames, int) else 4
    patch = facts.find("patch_size", default=16)
    patch = patch if isinstance(patch, int) else 16
    depth = facts.find("temporal_patch_size", default=1)
    merge = _merge(facts)
    image = torch.randn(1, channels, height, width)
    flat = torch.randn((2 * merge) ** 2, channels * depth * patch * patch)
    values = [
        image,
        flat,
        image[:, None].repeat(1, 2, 1, 1, 1),
        torch.randn(1, frames, channels, height, width),
        flat[None],
        torch.randn(1, channels, frames, height, width),
        torch.randn(1, channels, 64, 64),
        torch.randn(1, channels, 224, 224),
        image[None, :, None].repeat(1, 1, 2, 1, 1, 1),
    ]
    if facts.find("_video_first", default=False):
        values.reverse()
    return values


def _merge(facts: Facts) -> int:
    merge = facts.find("spatial_merge_size", "merge_size", default=2)
    return merge if isinstance(merge, int) else 2


def _grid(facts: Facts) -> list[torch.Tensor]:
    merge = _merge(facts)
    return [torch.tensor([[1, 2 * merge, 2 * merge]])]


def _features(facts: Facts) -> list[torch.Tensor]:
    mels = facts.find(
        *("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels"),
        *("feature_projection_input_dim", "input_dim", "num_mel_bins", "mel_bins"),
        default=80,
    )
    mels = mels if isinstance(mels, int) else 80
    positions = facts.find("max_source_positions", default=50)
    positions = positions if isinstance(positions, int) else 50
    return [
        torch.randn(1, mels, 2 * positions),
        torch.randn(1, 64, mels),
        torch.randn(1, mels, 64),
        torch.randn(1, 1, 64, mels),
        torch.randn(1, mels, 3000),
        torch.randn(1, 160, mels * 2),
        torch.randn(1, 3200),
        torch.randn(1, 1, 3200),
    ]


def _waves(facts: Facts) -> list[torch.Tensor]:
    mels = facts.find("num_mel_bins", default=80)
    length = facts.find("max_length", default=64)
    length = length if isinstance(length, int) else 64
    channels = facts.find("audio_channels", default=1)
    return [
        torch.randn(1, 4000),
        torch.randn(1, channels if isinstance(channels, int) else 1, 4000),
        torch.randn(1, length, mels),
        torch.randn(1, 1, 16000),
        torch.randn(1, 1, 200, 128),
        *(tokens(facts)[:, :8],),
    ]


def _series(facts: Facts) -> list[torch.Tensor]:
    length = facts.find("context_length", default=64)
    lags = facts.find("lags_sequence", default=[])
    longer = length + (max(lags) if lags else 0)
    width = facts.find("num_input_channels", "input_size", default=1)
    width = width if isinstance(width, int) else 1
    values = [torch.randn(1, longer), torch.randn(1, length, width)]
    if width > 1:
        values.reverse()
    return values


def _time_features(length_key: str) -> Any:
    def make(facts: Facts) -> list[torch.Tensor]:
        length = facts.find(length_key, default=None)
        if not isinstance(length, int):
            return []
        if length_key == "context_length":
            length += max(facts.find("lags_sequence", default=[0]))
        count = facts.find("num_time_features", default=0)
        return [torch.randn(1, length, max(count, 1))]

    return make


def _hidden(facts: Facts) -> list[torch.Tensor]:
    width = facts.find("hidden_size", "d_model", "n_embd", default=64)
    values = [torch.randn(1, TOKENS, width)] if isinstance(width, int) else []
    return values + [p for p in _pixels(facts) if p.dim() == 2]


def _feature_masks(facts: Facts) -> list[torch.Tensor]:
    """Return a mask for each of the `_features`, along its time."""
    masks = []
    for features in _features(facts):
        time = features.shape[1] if features.shape[1] in (64, 160) else None
        length = time or features.shape[-1]
        masks.append(torch.ones(1, length, dtype=torch.bool))
    return masks


def _codebooks(facts: Facts) -> torch.Tensor:
    count = facts.find("num_codebooks", default=4)
    return torch.randint(5, 60, (count if isinstance(count, int) else 4, 6))


def _trajectory(width: str) -> Any:
    return lambda facts: torch.randn(1, 5, facts.find(width, default=1))


def _one(make: Any) -> Any:
    return lambda facts: [make(facts)]


_MAKERS: dict[str, Any] = {
    "input_ids": lambda f: [
        tokens(f),
        *([_codebooks(f)] if f.find("num_codebooks") else []),
    ],
    "decoder_input_ids": lambda f: [tokens(f)[:, :6], _codebooks(f)],
    "attention_mask": lambda f: [],
    "pixel_values": _pixels,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "input_features": _features,
    "input_values": _waves,
    "past_values": _series,
    "past_time_features": _time_features("context_length"),
    "past_observed_mask": _one(lambda f: torch.ones_like(_series(f)[0])),
    "future_values": _one(
        lambda f: torch.randn(1, f.find("prediction_length", default=8))
    ),
    "future_time_features": _time_features("prediction_length"),
    "inputs_embeds": _hidden,
    "hidden_states": _hidden,
    "encoder_hidden_states": _hidden,
    "bbox": _one(lambda f: torch.tensor([[[1, 2, 5, 8]] * TOKENS])),
    "spectrogram": _one(
        lambda f: torch.randn(1, 20, f.find("model_in_dim", "num_mel_bins", default=80))
    ),
    "mm_token_type_ids": _one(lambda f: torch.zeros(1, TOKENS, dtype=torch.long)),
    "input_features_mask": _feature_masks,
    "feature_attention_mask": _feature_masks,
    "inputs": lambda f: [
        torch.randn(1, TOKENS, f.find("d_model", "hidden_size", default=64)),
        tokens(f),
    ],
    "latents": lambda f: [
        torch.randn(1, f.find("hidden_size", default=64), 8),
        torch.randn(1, 8, f.find("hidden_size", default=64)),
    ],
    "states": _one(_trajectory("state_dim")),
    "actions": _one(_trajectory("act_dim")),
    "rewards": _one(lambda f: torch.randn(1, 5, 1)),
    "returns_to_go": _one(lambda f: torch.randn(1, 5, 1)),
    "timesteps": _one(lambda f: torch.arange(5)[None]),
    "task_inputs": _one(lambda f: torch.randint(0, 90, (1, 77))),
    "query_embeds": _hidden,
    "pixel_mask": lambda f: [],
    "image_embeds_position_mask": _one(
        lambda f: torch.arange(TOKENS + 64)[None] >= TOKENS
    ),
    "visual_feats": _one(lambda f: torch.randn(1, 5, f.find("visual_feat_dim"))),
    "visual_pos": _one(lambda f: torch.rand(1, 5, f.find("visual_pos_dim"))),
    "image_sizes": _one(lambda f: torch.tensor([list(f.edge)])),
    "qformer_input_ids": _one(tokens),
}

"""Configs of published size -> configs of a few hundred KiB, by rules about names."""

from __future__ import annotations

import re
from typing import Any

from .overrides import FILLED

VOCABULARY = 128
_FIRST_SPECIAL = 100
_IMAGE_PATCHES = 2

_LAYER_COUNT = re.compile(
    r"^(num_|n_|max_)?(\w+_)?(layers?|blocks?|hidden_layers)$|^(\w+_)?depth$|^num_layers"
    r"|^n_layer$|_num_layers$|^num_\w+_layers$|^num_block_repeats$"
)
_NO_LAYER_COUNT = re.compile(
    r"first|every|sparse|window|dense|feat|kernel|skip|interval|freq"
)
_LAYER_LIST = re.compile(
    r"depths?$|^(num_|n_)?(\w+_)?(layers|blocks)$|_blocks_per|num_res"
)
_WIDTH = re.compile(
    r"hidden|intermediate|(^|_)dims?($|_)|dim$|d_model|d_ff|d_kv|n_embd|n_inner|width"
    r"|(^|_)channels?(_list)?($|_)|_rank($|_)|embed(ding)?_size|ffn|inner|filters"
    r"|embed(ding)?$|units|projection|mlp_size|feature_size|stem|state_size|output_dim"
    r"|d_inner|d_head|_size_per_layer|groups|proj_size|chunk_channels|planes"
)
_NO_WIDTH = re.compile(
    r"num_|layer|heads|act(ivation)?$|dropout|prob|vocab|kernel|stride|position|eps"
    r"|scale|ratio|mult|token|_id$|_ids$|index|factor|range|type|image_size|patch_size"
    r"|window|chunk|ordering"
)
_EXPERTS = re.compile(
    r"^(moe_)?(num|n)_(\w+_)?experts$|^num_experts$|^moe_num_experts$"
)
_EXPERTS_USED = re.compile(
    r"experts_per_tok|^moe_(top)?_?k$|moe_topk|^top_k(_experts)?$"
)
_GROUPS = re.compile(r"^(n_group|topk_group)$")
_SPECIAL = re.compile(r"(token|_tok|image|audio|video|eos|bos|pad)_(id|index|idx)$")
_INDICES = re.compile(r"index(es)?$|indices$|_layers$|_ids$|feature_layer$|_idx$")
_DERIVED = ("_out_features", "_out_indices", "out_features", "stage_names")
_LENGTHS = re.compile(
    r"max_(\w+_)?(position|length|seq_len)|n_positions|context_length"
)


class Shrinker:
    """Maps the values of one config, and of those inside it, to small ones.

    Equal numbers become equal numbers, so that what had to agree still does.

    Args:
        scale: widths are divided by it.
        layers: the most layers in a row.
        image: the images' edge in patches; None leaves it.
    """

    def __init__(
        self, scale: int, layers: int = 2, image: int | None = _IMAGE_PATCHES
    ) -> None:
        self._scale = scale
        self._layers = layers
        self._image = image
        self._special: dict[int, int] = {}

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return a config's ``to_dict()`` made small."""
        length = _length_of(values)
        small = {
            key: self._value(key, value, values, length)
            for key, value in values.items()
            if key not in _DERIVED
        }
        outside = values.get("out_indices", values.get("_out_indices"))
        if outside and "num_hidden_layers" in small and "depths" not in small:
            count = max(self._layers, len(outside))
            small["num_hidden_layers"] = count
            small["out_indices"] = list(range(count - len(outside) + 1, count + 1))
        _fill(small)
        return small

    def _value(
        self, key: str, value: Any, values: dict[str, Any], length: int | None
    ) -> Any:
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if key == "per_layer_config":
            return {k: v for k, v in value.items() if int(k) < self._layers}
        if isinstance(value, dict):
            if "model_type" in value or key.endswith("_config"):
                return self.config(value)
            if key in ("rope_parameters", "rope_scaling"):
                return self.config(value)
            return value
        if isinstance(value, int):
            return self._number(key, value, values)
        if isinstance(value, list | tuple):
            return self._sequence(key, list(value), length)
        return value

    def _number(self, key: str, value: int, values: dict[str, Any]) -> int:
        if "vocab_size" in key:
            return min(value, VOCABULARY)
        if _SPECIAL.search(key):
            return self._token(value)
        if key == "image_size" or key.endswith("_image_size"):
            return self._edge(value, values)
        if key == "image_embedding_size" and self._image is not None:
            return min(value, self._image)
        if _EXPERTS.search(key):
            return min(value, 4)
        if _EXPERTS_USED.search(key):
            return min(value, 2)
        if _GROUPS.search(key):
            return min(value, 1)
        if _LENGTHS.search(key):
            return min(value, 512)
        if _is_layer_count(key):
            return min(value, self._layers)
        if _is_width(key):
            return self._width(value)
        return value

    def _sequence(self, key: str, value: list[Any], length: int | None) -> list[Any]:
        ints = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if (
            length is not None
            and "conv" not in key
            and length > self._layers
            and len(value) in (length, length + 1)
        ):
            extra = len(value) - length
            return _varied(value, self._layers + extra)
        if not ints or not value:
            return value
        if _LAYER_LIST.search(key) and max(value) < 100:
            return [min(v, 1) for v in value]
        if _SPECIAL.search(key):
            return [self._token(v) for v in value]
        if _INDICES.search(key) and min(value) >= 0 and max(value) >= self._layers:
            return list(range(self._layers))[: len(value)]
        if key == "mrope_section":
            return _sections(value, self._scale)
        if _is_width(key):
            return [self._width(v) for v in value]
        return value

    def _width(self, value: int, least: int = 64) -> int:
        if value < least or value % self._scale:
            return value
        return value // self._scale

    def _token(self, value: int) -> int:
        if value < VOCABULARY:
            return value
        return self._special.setdefault(value, _FIRST_SPECIAL + len(self._special) % 20)

    def _edge(self, value: int, values: dict[str, Any]) -> int:
        if self._image is None:
            return value
        patch = values.get("patch_size", 16)
        if not isinstance(patch, int):
            patch = 16
        return min(value, patch * self._image)


def _fill(small: dict[str, Any]) -> None:
    """Give a value to what a config leaves open, and make its parts agree."""
    for key, value in FILLED.items():
        if key in small and small[key] is None:
            small[key] = value
    heads = small.get("num_attention_heads")
    hidden = small.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int):
        if "head_dim" in small and small["head_dim"] is None:
            small["head_dim"] = max(hidden // heads, 4)
        if "num_key_value_heads" in small and small["num_key_value_heads"] is None:
            small["num_key_value_heads"] = heads
    text, vision = small.get("text_config"), small.get("vision_config")
    if (
        isinstance(text, dict)
        and isinstance(vision, dict)
        and "out_hidden_size" in vision
    ):
        vision["out_hidden_size"] = text.get("hidden_size", vision["out_hidden_size"])
    ropes = small.get("rope_parameters")
    if isinstance(ropes, dict) and "mrope_section" not in ropes:
        del small["rope_parameters"]


def _sections(value: list[int], scale: int) -> list[int]:
    """Divide the parts of a head so that they still add up."""
    ends = [round(sum(value[: i + 1]) / scale) for i in range(len(value))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _length_of(values: dict[str, Any]) -> int | None:
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"):
        if isinstance(values.get(key), int):
            return int(values[key])
    return None


def _is_layer_count(key: str) -> bool:
    return bool(_LAYER_COUNT.search(key)) and not _NO_LAYER_COUNT.search(key)


def _is_width(key: str) -> bool:
    return bool(_WIDTH.search(key)) and not _NO_WIDTH.search(key)


def _varied(value: list[Any], count: int) -> list[Any]:
    """Return a short list that still has each kind of entry, if it can."""
    kinds: list[Any] = []
    for entry in value:
        if entry not in kinds:
            kinds.append(entry)
    return (kinds + [value[-1]] * count)[:count]

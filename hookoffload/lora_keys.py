"""The keys of LoRA files: which tensors belong together, and to which layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

# <layer>.lora_A.weight, <layer>.lora_A.<adapter>.weight, <layer>.lora_down.weight, ...
_FACTOR = re.compile(
    r"(?P<layer>.+?)\."
    r"(?:(?P<down>lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)"
    r"(?:\.[^.]+)?\.weight"
)
_ALPHA = ".alpha"

# What a component of a key, closed by "$", begins with that is not plain LoRA's.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a core tensor",
    "lora_embedding_": "LoRA of an embedding",
    "lora_A": "LoRA with biases",
    "lora_B": "LoRA with biases",
    "lora_up": "LoRA with biases",
    "lora_down": "LoRA with biases",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "vera_": "VeRA",
    "diff$": "whole weights",
    "diff_b$": "whole weights",
}

# What tools write before the names of modules, and the part of a pipeline that each
# stands for; "" for wrappers, which stand for none.
_PREFIXES = {
    "base_model.model.": "",
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "transformer.": "denoiser",
    "unet.": "denoiser",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
# In kohya's keys "_" stands for "." as well.
_UNDERSCORED = re.compile(
    r"lora_(?P<part>unet|transformer|te\d?|prior_te)_(?P<layer>[^.]+)"
)

_NAMES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Two factors whose product is added to a weight.

    Attributes:
        down: first factor, ``(rank, in, ...)``.
        up: second factor, ``(out, rank, ...)``.
        alpha: the sum is scaled by ``alpha / rank``; None is the rank itself.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """How many rows the first factor has."""
        return self.down.shape[0]

    def equals(self, other: LowRank) -> bool:
        """Tell whether both add the same."""
        return (
            self.alpha == other.alpha
            and torch.equal(self.down, other.down)
            and torch.equal(self.up, other.up)
        )


def read_adapters(
    state_dict: Mapping[str, torch.Tensor],
    network_alphas: Mapping[str, float] | None = None,
) -> dict[str, LowRank]:
    """Put the tensors of a file together.

    Args:
        state_dict: a LoRA's tensors by their keys.
        network_alphas: alphas by layer, where they are not in the file.

    Returns:
        Adapters by the names of their layers, as the file writes them.

    Raises:
        ValueError: It is not a mapping of tensors, is empty, or has keys of other
            kinds of adapters or of none.

    Example:
        >>> found = read_adapters({
        ...     "unet.mid.to_q.lora_A.weight": torch.zeros(4, 8),
        ...     "unet.mid.to_q.lora_B.weight": torch.zeros(16, 4),
        ...     "unet.mid.to_q.alpha": torch.tensor(2.0),
        ... })
        >>> found["unet.mid.to_q"].rank, found["unet.mid.to_q"].alpha
        (4, 2.0)
    """
    _check_mapping(state_dict)
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    strange: list[str] = []
    for key, value in state_dict.items():
        found = _FACTOR.fullmatch(key)
        if found is not None:
            factors = downs if found["down"] else ups
            if found["layer"] in factors:
                raise ValueError(
                    f"{key}: the state dict has two adapters for {found['layer']}; "
                    "add them one after another"
                )
            factors[found["layer"]] = _checked_factor(key, value)
        elif key.endswith(_ALPHA):
            alphas[key.removesuffix(_ALPHA)] = _checked_alpha(key, value)
        else:
            strange.append(f"{key}{_kind_of(key)}")
    for key, given in (network_alphas or {}).items():
        alphas[key.removesuffix(_ALPHA)] = _checked_alpha(key, given)
    if strange:
        raise ValueError(
            "add_lora takes plain LoRA for Linear and Conv layers, and does not know "
            f"what to do with {listed(strange)}. Load such an adapter with peft, or "
            "merge it into the weights, before attach_offload_hooks"
        )
    single = [*(downs.keys() ^ ups.keys()), *(alphas.keys() - downs.keys())]
    if single:
        raise ValueError(
            "these layers lack one of lora_A (lora_down) and lora_B (lora_up): "
            + listed(sorted(set(single)))
        )
    return {
        layer: LowRank(down=down, up=ups[layer], alpha=alphas.get(layer))
        for layer, down in downs.items()
    }


def match_layers(
    layers: Iterable[str], modules: Collection[str], adaptable: Iterable[str]
) -> dict[str, str]:
    """Find the modules that a file's layers mean.

    Args:
        layers: names as the file writes them.
        modules: full names of all modules.
        adaptable: names of the modules that can have adapters, which are all that
            names with underscores instead of dots are compared with.

    Returns:
        Module names by the file's.

    Raises:
        ValueError: A layer is absent, could be one of several, or the file has parts
            for several models.

    Example:
        >>> names = ["mid_block", "mid_block.to_q"]
        >>> match_layers(["lora_unet_mid_block_to_q"], names, ["mid_block.to_q"])
        {'lora_unet_mid_block_to_q': 'mid_block.to_q'}
    """
    by_underscored: dict[str, list[str]] = {}
    for name in adaptable:
        by_underscored.setdefault(name.replace(".", "_"), []).append(name)
    matched: dict[str, str] = {}
    absent: list[str] = []
    parts: set[str] = set()
    for layer in layers:
        part, known = _find(layer, modules, by_underscored)
        parts.add(part)
        if not known:
            absent.append(layer)
        elif len(known) > 1:
            raise ValueError(
                f"{layer} could be {' or '.join(known)}. Write its key with dots, "
                f"like {known[0]}.lora_A.weight"
            )
        else:
            matched[layer] = known[0]
    parts.discard("")
    if len(parts) > 1:
        raise ValueError(
            f"the state dict has adapters for several models ({listed(sorted(parts))})."
            " Pass the keys of one of them to add_lora on each"
        )
    if absent:
        raise ValueError(
            f"{len(absent)} of the state dict's {len(absent) + len(matched)} layers "
            f"are not in the model: {listed(absent)}. Nothing was applied"
        )
    return matched


def listed(names: Iterable[str]) -> str:
    """Join names for a message, and count those beyond the first few."""
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _find(
    layer: str, modules: Collection[str], by_underscored: Mapping[str, list[str]]
) -> tuple[str, list[str]]:
    """Return the part of a pipeline that a name says, and the modules it can mean."""
    underscored = _UNDERSCORED.fullmatch(layer)
    if underscored is not None:
        return underscored["part"], by_underscored.get(underscored["layer"], [])
    part, name = "", layer
    while name not in modules:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return part, []
        part = _PREFIXES[prefix] or part
        name = name.removeprefix(prefix)
    return part, [name]


def _check_mapping(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"state_dict must map keys to tensors, and is a "
            f"{type(state_dict).__name__}; read a file with "
            "safetensors.torch.load_file(path)"
        )
    if not state_dict:
        raise ValueError("the state dict is empty: there is no LoRA to add")
    for key in state_dict:
        if not isinstance(key, str):
            raise ValueError(f"keys must be strings; {key!r} is not")


def _checked_factor(key: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{key} must be a tensor, not a {type(value).__name__}")
    if not value.dtype.is_floating_point or value.is_meta or value.dim() < 2:
        raise ValueError(
            f"{key} must be a floating-point matrix with values, and is "
            f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
        )
    return value.detach()


def _checked_alpha(key: str, value: object) -> float:
    try:
        alpha = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        alpha = float("nan")
    if not abs(alpha) < float("inf"):
        raise ValueError(f"{key} must be one finite number, and is {value!r}")
    return alpha


def _kind_of(key: str) -> str:
    for component in key.split("."):
        for marker, kind in _OTHER_KINDS.items():
            if f"{component}$".startswith(marker):
                return f" ({kind})"
    return ""

"""Weights of GGUF files; see [Note: saved forms].

A packed tensor is one array of bytes, and the file says how it is packed. Diffusers has
the parameter and the linear layer for it, which unpacks a weight whenever it computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .fp8 import wide_dtype
from .gguf_file import GgufFile
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError
from .saved_weight import SavedWeight

_MANY = 8


@dataclass
class GgufWeight(SavedWeight):
    """One parameter that a checkpoint has in a GGUF file.

    Attributes:
        packing: its name ("Q4_K").
    """

    packing: str

    def register(self) -> None:
        """See `SavedWeight`."""
        utils = _utils()
        kind = getattr(
            importlib.import_module("gguf").GGMLQuantizationType, self.packing
        )
        if kind not in utils.SUPPORTED_GGUF_QUANT_TYPES:
            raise CheckpointError(
                f"{self.name} is packed as {self.packing}, which this diffusers does "
                "not compute with. Fetch the model in another packing, or pip install "
                "-U diffusers"
            )
        wanted = self.wanted_shape()
        made = utils.GGUFParameter(self.mapped()[""], quant_type=kind)
        shape = tuple(int(size) for size in made.quant_shape)
        if wanted not in (None, shape):
            raise CheckpointError(
                f"{self.name} has {self.packing} values of shape {shape}, and the "
                f"model needs shape {wanted}. Pass the config of the model that the "
                "file was made from"
            )
        self.owner._parameters[self.key] = made


def find_gguf(
    model: nn.Module,
    locations: Mapping[str, TensorLocation],
    compute_dtype: torch.dtype | None,
) -> list[SavedWeight]:
    """Find what a checkpoint has packed in GGUF files.

    Linear layers with such weights are replaced in the model.

    Args:
        model: the model without values.
        locations: the checkpoint's tensors, under the model's names.
        compute_dtype: what they compute in; None: what the model was made in.

    Raises:
        CheckpointError: The model needs them unpacked.
        ModuleNotFoundError: diffusers is not installed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[SavedWeight] = []
    unusable = []
    any_gguf = any(isinstance(at.file, GgufFile) for at in locations.values())
    for name, location in locations.items():
        packing = packing_of(location)
        prefix, _, key = name.rpartition(".")
        owner = modules.get(prefix)
        linear = key == "weight" and isinstance(owner, nn.Linear)
        computed = not isinstance(location.file, GgufFile)
        if any_gguf and computed and linear and location.dtype is torch.uint8:
            raise CheckpointError(
                f"{name}: the state_dict_converter computes it from packed values of a "
                "GGUF file, and the result does not say how it is packed. Fetch a file "
                "that has this weight in F16 or F32, or have the converter unpack it "
                "(gguf.dequantize)"
            )
        if packing is None or owner is None or owner._parameters.get(key) is None:
            continue  # told with all names that the model does not have
        if not linear or not prefix:
            unusable.append(f"{name} ({packing})")
            continue
        assert isinstance(owner, nn.Linear), "it was asked above"
        layer = _layer(owner, compute_dtype)
        parent, _, attribute = prefix.rpartition(".")
        modules[parent].register_module(attribute, layer)
        found.append(GgufWeight(name, layer, {"": location}, {name}, packing))
    if unusable:
        more = f" and {len(unusable) - _MANY} more" if len(unusable) > _MANY else ""
        raise CheckpointError(
            f"{', '.join(unusable[:_MANY])}{more}: packed in the GGUF file, and only "
            "linear layers compute with packed weights. Unpack them with a "
            "state_dict_converter (gguf.dequantize), or fetch a file that has them in "
            "F16 or F32"
        )
    return found


def packing_of(location: TensorLocation) -> str | None:
    """Return how a tensor of a GGUF file is packed; None if it is plain."""
    file = location.file
    return file.packings.get(location.name) if isinstance(file, GgufFile) else None


def _layer(linear: nn.Linear, compute_dtype: torch.dtype | None) -> nn.Module:
    """Return diffusers' layer in place of a plain one."""
    kind: Any = _utils().GGUFLinear
    if isinstance(linear, kind):
        made: nn.Module = linear
    else:
        own = linear.weight.dtype
        with torch.device("meta"):  # it keeps a device that it is given
            made = kind(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=wide_dtype(own, compute_dtype) or own,
            )
        made.register_parameter("bias", linear.bias)
    return made.requires_grad_(False).train(linear.training)


def _utils() -> Any:
    try:
        return importlib.import_module("diffusers.quantizers.gguf.utils")
    except ImportError as error:
        raise ModuleNotFoundError(
            "computing with the packed weights of a GGUF file takes diffusers, and it "
            f"cannot be imported: {error}. pip install -U diffusers"
        ) from error

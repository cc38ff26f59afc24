"""Weights as bitsandbytes saves them; see [Note: saved forms].

A 4-bit weight is packed bytes under the parameter's own name, and beside it scales and
tables (``up.weight.absmax``) and a small tensor with the rest in JSON. An 8-bit one has
its scales in the module (``up.SCB``).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .packed import is_packed_by_bitsandbytes
from .readers import empty_in_ram, read_tensors
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError
from .saved_weight import SavedWeight

_STATE = re.compile(r"(.*)\.(quant_state\.bitsandbytes__\w+)")
# What a 4-bit weight has beside it: names in files, and where the parameter has them.
_BESIDE_4_BIT = {
    "absmax": ".quant_state.absmax",
    "quant_map": ".quant_state.code",
    "nested_absmax": ".quant_state.state2.absmax",
    "nested_quant_map": ".quant_state.state2.code",
}
_ROWS = 0  # the only order in which 8-bit weights are saved today


@dataclass
class BitsAndBytesWeight(SavedWeight):
    """One parameter that a checkpoint has in the form of bitsandbytes.

    Attributes:
        bits: 4 or 8.
        notes: tensors that are read now, by their names in the form.
    """

    bits: int
    notes: dict[str, torch.Tensor]

    def register(self) -> None:
        """See `SavedWeight`."""
        tensors = self.mapped()
        make = self._made_of_4_bits if self.bits == 4 else self._made_of_8_bits
        self.owner._parameters[self.name.rpartition(".")[2]] = make(tensors)

    def _made_of_4_bits(self, tensors: dict[str, torch.Tensor]) -> nn.Parameter:
        beside = {
            name: tensors[path]
            for name, path in _BESIDE_4_BIT.items()
            if path in tensors
        }
        kind: Any = _library().nn.Params4bit
        wanted = self.wanted_shape()
        try:
            made: Any = kind.from_prequantized(
                data=tensors[""],
                quantized_stats={**beside, **self.notes},
                requires_grad=False,
                device="cpu",
                module=self.owner,
            )
        except (KeyError, ValueError, AssertionError) as error:
            raise CheckpointError(
                f"{self.name}: bitsandbytes cannot read what the checkpoint has beside "
                f"its 4-bit weight, {sorted(self.names)}: {error!r}"
            ) from error
        shape = tuple(made.quant_state.shape)
        bytes_of_4_bits = (torch.Size(shape).numel() + 1) // 2
        if wanted not in (None, shape) or made.nbytes != bytes_of_4_bits:
            raise CheckpointError(
                f"{self.name} has 4-bit values of shape {shape} in {made.nbytes} "
                f"bytes, and the model needs shape {wanted}. Pass the config that the "
                "checkpoint was saved with"
            )
        parameter: nn.Parameter = made
        return parameter

    def _made_of_8_bits(self, tensors: dict[str, torch.Tensor]) -> nn.Parameter:
        order = self.notes.get("weight_format")
        if order is not None and int(order) != _ROWS:
            raise CheckpointError(
                f"{self.name}: its 8-bit values are saved in order {int(order)}, and "
                "bitsandbytes reads only rows (0) today. Save it anew"
            )
        packed, scales = tensors[""], tensors[".SCB"]
        wanted = self.wanted_shape()
        shape = tuple(packed.shape)
        if wanted not in (None, shape) or tuple(scales.shape) != shape[:1]:
            raise CheckpointError(
                f"{self.name} has 8-bit values of shape {shape} and "
                f"{tuple(scales.shape)} scales, and the model needs shape {wanted}. "
                "Pass the config that the checkpoint was saved with"
            )
        kind: Any = _library().nn.Int8Params
        made: nn.Parameter = kind(
            packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales
        )
        return made


def find_bitsandbytes(
    model: nn.Module, locations: Mapping[str, TensorLocation]
) -> list[SavedWeight]:
    """Find what a checkpoint has in a form of bitsandbytes.

    Plain linear layers that are to compute with it are replaced in the model.

    Args:
        model: the model without values.
        locations: the checkpoint's tensors, under the model's names.

    Raises:
        CheckpointError: It does not fit the model.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    found = [
        weight
        for name in locations
        for weight in (_of_4_bits(name, locations), _of_8_bits(name, locations))
        if weight is not None
    ]
    modules = dict(model.named_modules(remove_duplicate=False))
    settings = _settings(model)
    kept: list[SavedWeight] = []
    for name, bits, parts, notes, names in found:
        prefix = name.rpartition(".")[0]
        owner = modules.get(prefix)
        if owner is not None and type(owner) is nn.Linear and prefix:
            owner = _replacement(owner, name, bits, settings)
            parent, _, key = prefix.rpartition(".")
            modules[parent].register_module(key, owner)
        held = None if owner is None else owner._parameters.get("weight")
        if owner is None or held is None or not is_packed_by_bitsandbytes(held):
            continue  # told with all names that the model does not have
        kept.append(BitsAndBytesWeight(name, owner, parts, names, bits, _read(notes)))
    return kept


_Found = tuple[str, int, dict[str, TensorLocation], dict[str, TensorLocation], set[str]]


def _of_4_bits(name: str, locations: Mapping[str, TensorLocation]) -> _Found | None:
    match = _STATE.fullmatch(name)
    if match is None or match[1] not in locations:
        return None
    parts = {"": locations[match[1]]}
    names = {name, match[1]}
    for key, path in _BESIDE_4_BIT.items():
        beside = f"{match[1]}.{key}"
        if beside in locations:
            parts[path] = locations[beside]
            names.add(beside)
    return match[1], 4, parts, {match[2]: locations[name]}, names


def _of_8_bits(name: str, locations: Mapping[str, TensorLocation]) -> _Found | None:
    prefix, _, key = name.rpartition(".")
    weight = f"{prefix}.weight" if prefix else "weight"
    if key != "SCB" or weight not in locations:
        return None
    if locations[weight].dtype is not torch.int8:
        return None
    parts = {"": locations[weight], ".SCB": locations[name]}
    order = f"{weight}_format"
    notes = {"weight_format": locations[order]} if order in locations else {}
    return weight, 8, parts, notes, {name, weight, *(notes and {order})}


def _read(notes: Mapping[str, TensorLocation]) -> dict[str, torch.Tensor]:
    made = {key: empty_in_ram(at.shape, at.dtype) for key, at in notes.items()}
    read_tensors([(at, made[key]) for key, at in notes.items()])
    return made


def _settings(model: nn.Module) -> Mapping[str, Any]:
    """Return what a model of transformers or diffusers says about its quantisation."""
    config: Any = getattr(model, "config", None)
    about = getattr(config, "quantization_config", None)
    if about is None and isinstance(config, Mapping):
        about = config.get("quantization_config")
    if about is not None and not isinstance(about, Mapping):
        about = about.to_dict()
    return about or {}


def _replacement(
    linear: nn.Linear, name: str, bits: int, settings: Mapping[str, Any]
) -> nn.Module:
    """Return the layer that computes with packed weights, in place of a plain one."""
    library = _library()
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    made: nn.Module
    if bits == 4:
        dtype = settings.get("bnb_4bit_compute_dtype")
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        made = library.nn.Linear4bit(*shape, compute_dtype=dtype, device="meta")
        # Else the first forward on some CPUs packs the weight anew.
        made.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    elif "llm_int8_threshold" in settings:
        made = library.nn.Linear8bitLt(
            *shape,
            has_fp16_weights=False,
            threshold=settings["llm_int8_threshold"],
            device="meta",
        )
    else:
        raise CheckpointError(
            f"{name} is saved in 8 bits by bitsandbytes, and the model has a plain "
            "Linear for it. Pass a function that makes the model with "
            "bitsandbytes.nn.Linear8bitLt(..., has_fp16_weights=False, threshold=...): "
            "the checkpoint does not say which threshold it computes with"
        )
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made.train(linear.training)


def _library() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ModuleNotFoundError(
            "the checkpoint has weights that bitsandbytes packed, and bitsandbytes "
            f"cannot be imported: {error}. pip install bitsandbytes"
        ) from error

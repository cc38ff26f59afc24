"""Weights as torchao saves them in safetensors files; see [Note: saved forms].

A weight is one tensor for each of its parts (``up._weight_qdata``), and the file's
metadata has its class and the rest of its fields in JSON, under the weight's own name.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .safetensors_file import CheckpointFile, TensorLocation
from .safetensors_header import CheckpointError
from .saved_weight import SavedWeight

_SUPPORT = "torchao.prototype.safetensors.safetensors_support"


@dataclass
class TorchaoWeight(SavedWeight):
    """One parameter that a checkpoint has in the form of torchao.

    Attributes:
        about: the JSON in the metadata.
    """

    about: str

    def register(self) -> None:
        """See `SavedWeight`."""
        tensors = self.mapped()
        unflatten: Any = _support().unflatten_tensor_state_dict
        # torchao has a dot in every name.
        name, prefix = f"of.{self.key}", f"of._{self.key}_"
        try:
            found, _ = unflatten(
                {prefix + path[1:]: tensor for path, tensor in tensors.items()},
                {name: self.about, "tensor_names": json.dumps([name])},
            )
        except Exception as error:
            raise CheckpointError(
                f"{self.name}: torchao cannot make it from {sorted(self.names)} and "
                f"the file's metadata: {error!r}"
            ) from error
        made = found.get(name)
        if made is None:
            raise CheckpointError(
                f"{self.name}: torchao needs more than {sorted(self.names)} for it: "
                f"{self.about}. Fetch the file again"
            )
        wanted, shape = self.wanted_shape(), tuple(made.shape)
        if wanted not in (None, shape):
            raise CheckpointError(
                f"{self.name} is a {type(made).__name__} of shape {shape}, and the "
                f"model needs shape {wanted}. Pass the config that the checkpoint was "
                "saved with"
            )
        self.owner._parameters[self.key] = nn.Parameter(made, requires_grad=False)


def torchao_form(
    name: str, tensor: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Return what torchao would save of a tensor, and the metadata for it.

    Args:
        name: its name.
        tensor: a wrapper.

    Returns:
        None if it is none of torchao's, or torchao has no form for it.
    """
    if type(tensor).__module__.partition(".")[0] != "torchao":
        return None
    flatten: Any = _support().flatten_tensor_state_dict
    key = name.rpartition(".")[2]
    try:
        parts, metadata = flatten({f"of.{key}": tensor})
    except ValueError:  # it knows a few classes by name
        return None
    prefix = name.removesuffix(key)
    named = {prefix + part.removeprefix("of."): value for part, value in parts.items()}
    return named, {name: metadata[f"of.{key}"]}


def find_torchao(
    model: nn.Module, locations: Mapping[str, TensorLocation]
) -> list[SavedWeight]:
    """Find what a checkpoint has in the form of torchao.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    files = {location.file for location in locations.values()}
    parts = {file: _parts_in(file) for file in files}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, TorchaoWeight] = {}
    for name, location in locations.items():
        known = parts[location.file].get(location.name)
        if known is None:
            continue
        key, part, about = known
        prefix = name.removesuffix(f"_{key}_{part}")  # converters may rename modules
        owner = None if prefix == name else modules.get(prefix.removesuffix("."))
        if owner is None or owner._parameters.get(key) is None:
            continue  # told with all names that the model does not have
        weight = prefix + key
        made = found.setdefault(weight, TorchaoWeight(weight, owner, {}, set(), about))
        made.parts[f".{part}"] = location
        made.names.add(name)
    return list(found.values())


def _parts_in(file: CheckpointFile) -> dict[str, tuple[str, str, str]]:
    """Return key, part and JSON of what a file's metadata tells, by names in it."""
    found = {}
    for name, text in file.metadata.items():
        if '"_tensor_data_names"' not in text:
            continue
        prefix, _, key = name.rpartition(".")
        try:
            for part in json.loads(text)["_tensor_data_names"]:
                found[f"{prefix}._{key}_{part}"] = (key, part, text)
        except (ValueError, TypeError, KeyError):
            continue  # not what torchao writes
    return found


def _support() -> Any:
    try:
        return importlib.import_module(_SUPPORT)
    except ImportError as error:
        raise ModuleNotFoundError(
            "the checkpoint has weights that torchao packed, and this torchao cannot "
            f"read its safetensors form: {error}. pip install -U torchao"
        ) from error

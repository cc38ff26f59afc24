"""What a checkpoint has to fill in a model, and whether it does."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .packed import Parts, parts_of
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError

_NAMES_SHOWN = 8
_PACKED_BY_QUANTO = (".weight._data", ".weight._data._data")


@dataclass
class Slot:
    """One tensor of a model, wherever it is registered.

    Attributes:
        names: its full names.
        places: the registries and keys that hold it.
        tensor: the tensor without values (or the buffer with its initial ones).
        path: where it is in a quantised one, see [Note: packed tensors].
    """

    names: list[str]
    places: list[tuple[dict[str, Any], str]]
    tensor: torch.Tensor
    path: str = ""


def slots_of(model: nn.Module, made: Container[str]) -> list[Slot]:
    """List what a checkpoint has to fill: parameters and persistent buffers.

    Tied parameters are one slot. Accelerate wraps a parameter that is assigned a
    second time in a new object over the same storage, so the storage tells.

    Args:
        model: the model without values.
        made: names of parameters that are made anew, see [Note: saved forms].
    """
    slots: dict[object, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        volatile = module._non_persistent_buffers_set
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is None or (registry is module._buffers and key in volatile):
                    continue
                if dot + key in made:
                    continue
                parts = parts_of(tensor, module) or Parts((tensor,))
                for part, path in zip(parts.tensors, parts.paths, strict=True):
                    empty = part.numel() == 0
                    same = id(part) if empty else part.untyped_storage()._cdata
                    new = Slot([], [], part, path)
                    slot = slots.setdefault((same, part.shape), new)
                    slot.names.append(dot + key + path)
                    slot.places.append((registry, key))
    return list(slots.values())


def check_fit(
    slots: list[Slot], locations: Mapping[str, TensorLocation], checkpoint: object
) -> None:
    """Raise `CheckpointError` unless a checkpoint has the tensors of a model.

    Args:
        slots: the model's.
        locations: the checkpoint's.
        checkpoint: what it is called in errors.
    """
    have = set(locations)
    known = {name for slot in slots for name in slot.names}
    missing = [s.names[0] for s in slots if not have.intersection(s.names)]
    extra = sorted(have - known)
    misshapen = [
        f"{name} has shape {locations[name].shape}, the model needs "
        f"{tuple(slot.tensor.shape)}"
        for slot in slots
        for name in slot.names
        if name in have and locations[name].shape != tuple(slot.tensor.shape)
    ]
    mistyped = [
        f"{name} is {locations[name].dtype}, the quantised model needs "
        f"{slot.tensor.dtype}"
        for slot in slots
        for name in slot.names
        if slot.path and name in have and locations[name].dtype != slot.tensor.dtype
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} that the model does not have: {_some(extra)}")
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape: {_some(misshapen)}")
    if mistyped:
        problems.append(f"{len(mistyped)} of another dtype: {_some(mistyped)}")
    if not problems:
        return
    way_out = (
        "Pass the config that the checkpoint was saved with, or a state_dict_converter "
        "that renames or drops tensors"
    )
    if any(name.endswith(_PACKED_BY_QUANTO) for name in extra):
        way_out = (
            "optimum-quanto packed it: pass a function that makes the model, and calls "
            "optimum.quanto.quantize(model, weights=...) and freeze(model) as whoever "
            "saved it did"
        )
    raise CheckpointError(
        f"{checkpoint}: the tensors are not those of the model: "
        f"{'; '.join(problems)}. {way_out}"
    )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")

"""The tensors in the inputs and outputs of a forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_DEEPEST = 8  # containers in containers; deeper ones are somebody's graph of objects


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Yield the tensors in containers and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth > _DEEPEST:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from tensors_in(item, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors_in(getattr(value, entry.name, None), depth + 1)


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return ``value`` with ``function`` applied to the tensors in its containers.

    A container in which nothing changes is returned itself; one whose type cannot be
    made anew from its parts is left as it is.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        items = [map_tensors(item, function) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        named = hasattr(type(value), "_fields")  # a namedtuple
        return type(value)(*items) if named else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Also the output classes of transformers and diffusers, which are dicts too.
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {k: map_tensors(v, function) for k, v in fields.items()}
        if any(changed[key] is not fields[key] for key in fields):
            return dataclasses.replace(value, **changed)
        return value
    if isinstance(value, dict):
        changed = {k: map_tensors(v, function) for k, v in value.items()}
        if all(changed[key] is value[key] for key in value):
            return value
        if type(value) is dict:
            return changed
        copied = value.copy()
        copied.update(changed)
        return copied
    return value

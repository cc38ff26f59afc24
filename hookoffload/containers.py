"""The tensors in the inputs and outputs of a forward."""

from __future__ import annotations

import dataclasses
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from enum import Enum
from typing import Any

import torch
from torch import nn

from .refusals import NotCopied

_DEEPEST = 8  # containers in containers; deeper ones are somebody's graph of objects

# What holds no tensor of a forward, or (modules, and what the library hangs on them)
# holds those of the model itself.
_CLOSED = (
    str,
    bytes,
    int,
    float,
    complex,
    Enum,
    type,
    types.ModuleType,
    nn.Module,
    NotCopied,
)


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


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in containers, and in the attributes of any other object."""
    return _within(value, set(), 0)


def _within(value: Any, seen: set[int], depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None and not isinstance(value, _CLOSED) and depth <= _DEEPEST:
        if id(value) in seen:
            return
        seen.add(id(value))
        for part in _parts(value):
            yield from _within(part, seen, depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | set | frozenset | deque):
        yield from tuple(value)
        return
    if isinstance(value, Mapping):
        yield from tuple(value.values())
    for name in _attributes(value):
        yield getattr(value, name, None)
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty yet
                yield cell.cell_contents


def _attributes(value: Any) -> list[str]:
    names = list(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return names


def replace_tensors(
    value: Any, function: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """Apply ``function`` to the tensors that `tensors_within` finds, in place.

    Whoever else holds one of the containers or objects sees the replacement too.

    Returns:
        ``value``, or what takes its place if it is a tensor, a tuple or a frozenset.
        What cannot be changed is left as it is.
    """
    return _replaced(value, function, set(), 0)


def _replaced(
    value: Any,
    function: Callable[[torch.Tensor], torch.Tensor],
    seen: set[int],
    depth: int,
) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if value is None or isinstance(value, _CLOSED) or depth > _DEEPEST:
        return value
    if id(value) in seen:
        return value
    seen.add(id(value))

    def renewed(part: Any) -> Any:
        return _replaced(part, function, seen, depth + 1)

    if isinstance(value, tuple | frozenset):
        items = [renewed(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        named = hasattr(type(value), "_fields")  # a namedtuple
        return type(value)(*items) if named else type(value)(items)
    if isinstance(value, set):
        for old in list(value):
            if (new := renewed(old)) is not old:
                value.remove(old)
                value.add(new)
        return value
    if isinstance(value, list | deque):
        for index, old in enumerate(value):
            if (new := renewed(old)) is not old:
                value[index] = new
        return value
    if isinstance(value, MutableMapping):
        for key, old in list(value.items()):
            if (new := renewed(old)) is not old:
                value[key] = new
    for name in _attributes(value):
        old = getattr(value, name, None)
        if (new := renewed(old)) is not old:
            # Past the guards of frozen dataclasses; what has none is left.
            with suppress(AttributeError, TypeError):
                object.__setattr__(value, name, new)
    return value

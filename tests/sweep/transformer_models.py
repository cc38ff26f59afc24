"""Recipes for the classes of transformers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .inputs import candidates
from .overrides import ARGUMENTS, VALUES
from .recipe import (
    CannotBeBuiltError,
    Recipe,
    check_small,
    give_values,
    seed_everything,
)
from .shrink import Shrinker

# Scale of widths, layers, edge of images in patches: the first that runs is taken.
_MOST_SECONDS = 12
_SIZES: tuple[tuple[int, int, int | None], ...] = (
    (16, 2, 2),
    (8, 2, 2),
    (16, 4, 4),
    (16, 2, None),
    (4, 2, 2),
    (4, 4, None),
    (2, 2, 2),
    (1, 2, 2),
    (1, 4, None),
    (32, 2, 2),
    (64, 2, 2),
)


def class_names() -> list[str]:
    """Return the names of all model classes that the library's mappings name."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for key, mapping in vars(modeling_auto).items():
        if key.endswith("_MAPPING_NAMES") and key.startswith("MODEL"):
            for value in mapping.values():
                names.update([value] if isinstance(value, str) else value)
    return sorted(names)


def base_class_names() -> list[str]:
    """Return one class for each architecture."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for value in modeling_auto.MODEL_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return sorted(names)


def recipe(name: str) -> Recipe:
    """Find a small config and inputs for a class.

    Args:
        name: of a class in transformers.

    Raises:
        CannotBeBuiltError: None was found; the message is the last reason.
    """
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise CannotBeBuiltError("transformers does not export it")
    reasons: list[str] = []
    deadline = time.monotonic() + _MOST_SECONDS
    for size in _SIZES:
        if time.monotonic() > deadline:
            reasons.append(f"none found in {_MOST_SECONDS} seconds")
            break
        seed_everything()
        try:
            build = _builder(cls, size)
            check_small(build)
            model = build()
        except Exception as error:
            reasons.append(f"{size}, build: {_said(error)}")
            if isinstance(error, ImportError):
                break
            continue
        found = _inputs_that_run(model, reasons, size, deadline)
        if found is not None:
            return Recipe(build=build, inputs=found)
    raise CannotBeBuiltError(" | ".join(reasons))


def _builder(cls: type[nn.Module], size: tuple[Any, ...]) -> Callable[[], nn.Module]:
    config_class: Any = cls.config_class
    name = config_class.__name__
    values = config_class(**ARGUMENTS.get(name, {})).to_dict()
    values = Shrinker(*size).config(values)
    for path, value in VALUES.get(name, {}).items():
        *outer, key = path.split(".")
        inside = values
        for one in outer:
            inside = inside[one]
        inside[key] = value

    def build() -> nn.Module:
        seed_everything()
        config = config_class.from_dict(copy.deepcopy(values))
        model = cls(config).eval()
        if model.device.type != "meta":
            give_values(model)
        return model

    return build


def _inputs_that_run(
    model: nn.Module, reasons: list[str], size: tuple[Any, ...], deadline: float
) -> dict[str, Any] | None:
    tried = 0
    for inputs in candidates(model):
        if time.monotonic() > deadline:
            break
        seed_everything()
        tried += 1
        try:
            with torch.no_grad():
                model(**copy.deepcopy(inputs))
        except Exception as error:
            reasons.append(f"{size}, {'+'.join(inputs)}: {_said(error)}")
            continue
        return inputs
    if not tried:
        reasons.append("no inputs are known for its forward")
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"

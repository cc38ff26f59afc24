"""What a class needs to be tried: how to build it and what to call it with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# More than this is not a small model, whatever its config says.
MOST_BYTES = 192 * 2**20


class CannotBeBuiltError(Exception):
    """A class that the sweep cannot make a small model of."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A small model and inputs that it runs with.

    Attributes:
        build: makes the model anew, the same each time.
        inputs: keyword arguments of its forward.
    """

    build: Callable[[], nn.Module]
    inputs: dict[str, Any]


def seed_everything(value: int = 0) -> None:
    """Seed each generator that a model may use."""
    random.seed(value)
    torch.manual_seed(value)
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(value)


def check_small(build: Callable[[], nn.Module]) -> None:
    """Raise unless what is built is small; nothing of size is allocated to tell.

    Args:
        build: makes the model.

    Raises:
        CannotBeBuiltError: It has more than `MOST_BYTES`.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return  # it cannot be built without values; the memory limit is left
    nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if nbytes > MOST_BYTES:
        raise CannotBeBuiltError(f"{nbytes / 2**20:.0f} MiB at its smallest")


def give_values(model: nn.Module) -> None:
    """Give every weight a random value, so that each has its part in the output.

    Many models start with gates and last layers of zeros, which would hide what the
    layers before them compute.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            if parameter.dim() == 1 and name.endswith("weight"):
                noise += 1
            parameter.copy_(noise)

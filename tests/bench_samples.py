"""Models and inputs that the bench command imports by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Stack(nn.Module):
    """Linear layers; its config.json holds its arguments."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * scale


NOT_A_CLASS = 5


def one_tensor(model: Stack) -> torch.Tensor:
    return torch.ones(1, model.layers[0].in_features)


def positional(model: Stack) -> tuple[torch.Tensor]:
    return (one_tensor(model),)


def named(model: Stack) -> dict[str, Any]:
    return {"x": one_tensor(model), "scale": 2.0}


def misfitting(model: Stack) -> dict[str, Any]:
    return {"y": one_tensor(model)}


def failing(model: Stack) -> torch.Tensor:
    raise KeyError("width")


def bfloats(model: Stack) -> torch.Tensor:
    return one_tensor(model).to(torch.bfloat16)


class Failing(nn.Module):
    """A model whose own code does not work."""

    def __init__(self, **options: object) -> None:
        raise KeyError("depth")

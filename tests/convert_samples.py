"""Converters that the convert command imports by name."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def rename_and_halve(tensors: Tensors) -> Tensors:
    """Renames one, drops the others, gives it a second name, computes one."""
    x = tensors["x"]
    return {"a.x": x, "b.x": x, "half": x / 2}


def failing(tensors: Tensors) -> Tensors:
    raise KeyError("weight")


def returning_nothing(tensors: Tensors) -> None:
    pass

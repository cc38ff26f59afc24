"""Small models that have one of everything, and what to feed them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookoffload import OffloadPolicy
from tests.snapshots import same_bits

VOCABULARY, WIDTH = 64, 48


class Block(nn.Module):
    """A residual block with a parameter and a buffer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.gain = nn.Parameter(torch.randn(width))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.relu(self.up(self.norm(x))))
        return x + self.gain * hidden + self.shift


class TinyModel(nn.Module):
    """Tokens to scores: tied weights, own parameters, buffers of several kinds."""

    def __init__(self, depth: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.statistics = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("order", torch.arange(16), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[self.order[: tokens.shape[1]]]
        for block in self.blocks:
            x = block(x)
        x = self.statistics(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


def _seed(value: int) -> None:
    """Seed the generator of the CPU, where the models are made, and no other.

    Seeding those of all devices takes longer than making a small model.
    """
    torch.default_generator.manual_seed(value)


def tiny_model(seed: int = 0, **sizes: int) -> TinyModel:
    _seed(seed)
    return TinyModel(**sizes).eval()


def tokens(seed: int = 0, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, 16), generator=generator)


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    """Return linear layers, one behind the other."""
    _seed(seed)
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairs]).eval()


def on_disk(folder: Path, **fields: Any) -> OffloadPolicy:
    """Return a policy that streams everything from disk, on any machine."""
    fields = {"limit_gb": 0, "compute_device": "cpu", **fields}
    return OffloadPolicy(store="disk", disk_dir=folder, **fields)


@torch.no_grad()
def run(model: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    return model(*inputs)


def expected(model: nn.Module, *inputs: torch.Tensor) -> Any:
    """Return what a copy of a model without hooks computes."""
    return run(copy.deepcopy(model), *inputs)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    if not same_bits(one, other):
        far = (one.to(other) - other).abs().max() if one.numel() else 0
        raise AssertionError(f"values differ by up to {far}")


def nbytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, tied ones counted once."""
    return sum(p.nbytes for p in model.parameters())

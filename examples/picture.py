"""A run under a limit, drawn: the picture of README.md.

A model of residual blocks with random weights, 0.5 GiB, runs three times under a limit
of a quarter of that, its weights on disk; `report` draws what happened.

    pip install 'hookoffload[plot]'
    python examples/picture.py run.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from hookoffload import OffloadPolicy, attach_offload_hooks, detach, report

PASSES = 3


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the two layers make of the input."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    """Runs the model and writes the picture."""
    parser = argparse.ArgumentParser(description="A run under a limit, drawn.")
    parser.add_argument("file", type=Path, help="the picture: .png, .svg or .pdf")
    parser.add_argument("--width", type=int, default=1024, help="of a block")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--limit-gb", type=float, default=0.125)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width) for _ in range(options.blocks)))
    x = torch.randn(options.tokens, options.width)
    policy = OffloadPolicy(limit_gb=options.limit_gb, store="disk", record=True)
    attach_offload_hooks(model, policy)
    with torch.no_grad():
        for _ in range(PASSES):
            model(x)
    found = report(model)
    found.plot(options.file)
    detach(model)
    print(found)


if __name__ == "__main__":
    main()

"""A diffusion transformer of Qwen-Image's dimensions: 20.4B parameters, large layers.

    pip install hookoffload diffusers
    python examples/benchmarks/dit.py --limits 2 8 20 30 60

The weights are random but the same each time, so that every method's output can be
held against the plain model's, bit for bit. `--layers 4` is enough to try things out.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import common
import torch
from subject import DTYPE, Subject, empty, normal
from torch import nn

HEAD_WIDTH = 128
IN_CHANNELS = 64
TEXT_TOKENS, TEXT_WIDTH = 64, 3584
PIXELS_PER_TOKEN = 16
# How the positions share a head's channels: frame, height, width.
ROPE = {"theta": 10000, "axes_dim": [16, 56, 56], "scale_rope": True}


class DiT(Subject):
    """diffusers' QwenImageTransformer2DModel.

    Attributes:
        layers: Blocks; Qwen-Image has 60.
        heads: Attention heads of 128 channels; Qwen-Image has 24.
    """

    name = "dit"
    default_limits = ("2", "8", "20", "30", "60")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.layers: int = options.layers
        self.heads: int = options.heads
        # The model keeps these tables as plain attributes, which nothing moves off the
        # meta device: they are made here, once for all models of this process.
        self.positions = self._diffusers().QwenEmbedRope(**ROPE)

    @staticmethod
    def _diffusers() -> Any:
        try:
            from diffusers.models.transformers import transformer_qwenimage
        except ImportError as error:
            sys.exit(
                f"this model comes from diffusers: pip install diffusers ({error})"
            )
        return transformer_qwenimage

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds what scales this model."""
        parser.add_argument("--layers", type=int, default=60, help="blocks")
        parser.add_argument("--heads", type=int, default=24, help="heads of 128")

    def skeleton(self, *, sample: bool = False) -> nn.Module:
        """Returns the model without weights, on the meta device."""
        with torch.device("meta"):
            model = self._diffusers().QwenImageTransformer2DModel(
                num_layers=1 if sample else self.layers,
                num_attention_heads=self.heads,
            )
        model.pos_embed = self.positions
        return empty(model)

    def inputs(self, resolution: int, device: torch.device) -> dict[str, Any]:
        """Returns the arguments of a forward, the same ones each time."""
        side = resolution // PIXELS_PER_TOKEN
        image = normal(self.batch, side * side, IN_CHANNELS, seed=1, device=device)
        text = normal(self.batch, TEXT_TOKENS, TEXT_WIDTH, seed=2, device=device)
        return {
            "hidden_states": image,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": None,
            "timestep": torch.full((self.batch,), 0.5, dtype=DTYPE, device=device),
            "img_shapes": [[(1, side, side)]] * self.batch,
            "return_dict": False,
        }


if __name__ == "__main__":
    sys.exit(common.main(DiT, __doc__))

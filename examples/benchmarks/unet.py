"""A UNet of SDXL's shape: 2.6B parameters in many small layers.

    pip install hookoffload diffusers
    python examples/benchmarks/unet.py

Most of its layers have less than 8 MB, so that what a method does for each layer
weighs more than the copies. The limit, unless given, is a quarter of the weights.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import common
import torch
from subject import DTYPE, Subject, empty, normal
from torch import nn

HEAD_WIDTH = 64
TEXT_TOKENS, TEXT_WIDTH = 77, 2048
POOLED_WIDTH, TIME_IDS = 1280, 6
PIXELS_PER_LATENT = 8


class UNet(Subject):
    """diffusers' UNet2DConditionModel with SDXL's configuration.

    Attributes:
        channels: Of the first level; SDXL has 320.
    """

    name = "unet"
    default_limits = ("0.25x",)

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.channels: int = options.channels
        if self.channels % HEAD_WIDTH:
            sys.exit(f"--channels must be a multiple of {HEAD_WIDTH}")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds what scales this model."""
        parser.add_argument(
            "--channels", type=int, default=320, help="of the first level"
        )

    def skeleton(self, *, sample: bool = False) -> nn.Module:
        """Returns the model without weights, on the meta device."""
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as error:
            sys.exit(
                f"this model comes from diffusers: pip install diffusers ({error})"
            )
        widths = tuple(self.channels * factor for factor in (1, 2, 4))
        with torch.device("meta"):
            model = UNet2DConditionModel(
                sample_size=128,
                block_out_channels=widths,
                down_block_types=(
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                up_block_types=(
                    "CrossAttnUpBlock2D",
                    "CrossAttnUpBlock2D",
                    "UpBlock2D",
                ),
                transformer_layers_per_block=(1, 1, 1) if sample else (1, 2, 10),
                # Despite its name, diffusers takes it for the number of heads.
                attention_head_dim=tuple(width // HEAD_WIDTH for width in widths),
                cross_attention_dim=TEXT_WIDTH,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=POOLED_WIDTH + TIME_IDS * 256,
            )
        return empty(model)

    def inputs(self, resolution: int, device: torch.device) -> dict[str, Any]:
        """Returns the arguments of a forward, the same ones each time."""
        side = resolution // PIXELS_PER_LATENT
        size = [resolution, resolution, 0, 0, resolution, resolution]
        return {
            "sample": normal(self.batch, 4, side, side, seed=1, device=device),
            "timestep": torch.tensor(500, device=device),
            "encoder_hidden_states": normal(
                self.batch, TEXT_TOKENS, TEXT_WIDTH, seed=2, device=device
            ),
            "added_cond_kwargs": {
                "text_embeds": normal(self.batch, POOLED_WIDTH, seed=3, device=device),
                "time_ids": torch.tensor([size] * self.batch, device=device).to(DTYPE),
            },
            "return_dict": False,
        }


if __name__ == "__main__":
    sys.exit(common.main(UNet, __doc__))

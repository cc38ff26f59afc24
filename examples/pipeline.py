"""A whole diffusers pipeline within one limit, of half of its size.

Without arguments a small Stable Diffusion with random weights is made. It draws a
picture twice: plain, and with text encoder, UNet and VAE attached as one, from disk on
a CPU, from RAM on a GPU. Both pictures must be the same, bit for bit.

    pip install hookoffload diffusers transformers
    python examples/pipeline.py

`--model DIR` is the folder of a real pipeline and `--limit-gb` the limit for it. A real
one is not run plain, because it may not fit; its picture goes to picture.png.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
)


def main() -> int:
    """Draws under the limit; returns 1 if the plain pipeline draws something else."""
    parser = argparse.ArgumentParser(description="A pipeline under one limit.")
    parser.add_argument("--model", metavar="DIR", help="the folder of a real pipeline")
    parser.add_argument("--prompt", default="a cat sleeps on the warm windowsill")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit-gb", type=float, help="default: half of the weights")
    options = parser.parse_args()
    diffusers_logging.set_verbosity_error()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        pipe = DiffusionPipeline.from_pretrained(
            options.model, dtype=torch.bfloat16, local_files_only=True
        )
    else:
        pipe = small_pipeline(options.prompt)
    pipe.set_progress_bar_config(disable=True)

    size = weight_bytes(pipe)
    limit_gb = options.limit_gb or size / 2 / 2**30
    store = "disk" if device == "cpu" else "cpu"
    policy = OffloadPolicy(limit_gb=limit_gb, compute_device=device, store=store)
    attach_offload_hooks(pipe, policy)
    for _ in range(2):  # the first run measures what the activations take
        picture = draw(pipe, options.prompt, options.steps)
    for name, plan in offload_plan(pipe).items():
        print(f"{name}: {plan.summary}, if no other model keeps anything")
    stats = offload_stats(pipe)
    print(f"weights {size / 2**20:.1f} MiB, limit {limit_gb * 2**10:.1f} MiB, ", end="")
    print(f"peak {stats.peak_bytes / 2**20:.1f} MiB on {device}")
    detach(pipe)
    if options.model:
        pipe.numpy_to_pil(picture)[0].save("picture.png")
        return 0

    plain = draw(pipe.to(device), options.prompt, options.steps)
    identical = bool((picture == plain).all())
    print(f"picture identical to the plain pipeline's: {identical}")
    return 0 if identical else 1


def draw(pipe: Any, prompt: str, steps: int) -> Any:
    """Returns a picture, as an array, from the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    run = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np")
    return run.images


def weight_bytes(pipe: Any) -> int:
    """Returns the bytes of all models of a pipeline."""
    found = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    return sum(p.nbytes for model in found for p in model.parameters())


def small_pipeline(prompt: str) -> StableDiffusionPipeline:
    """Makes a Stable Diffusion of some 50 MiB that knows the prompt's words."""
    torch.manual_seed(0)
    words = {word: n for n, word in enumerate(["?", *dict.fromkeys(prompt.split())])}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="?",
        pad_token="?",
        eos_token="?",
        model_max_length=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=128,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    sys.exit(main())

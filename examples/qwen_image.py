"""Qwen-Image's transformer, 40.9 GB of weights, in 2 GiB.

Without arguments a small one with random weights is made, of the same class, and runs
within a tenth of its size: from disk on a CPU, from RAM on a GPU. It must compute the
same, bit for bit, as without a limit.

    pip install hookoffload diffusers
    python examples/qwen_image.py

`--full-size` makes the real one with random weights, for 41 GB of RAM and a GPU.
`--model DIR` reads real weights: the folder `transformer` of Qwen-Image, with its
config.json. `--disk` leaves them there.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.utils import logging

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    load_model,
    offload_plan,
    offload_stats,
)

SMALL = {
    "num_layers": 12,
    # A GPU's libraries take more than the smallest model has.
    "num_attention_heads": 32 if torch.cuda.is_available() else 4,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "joint_attention_dim": 256,
}


def main() -> int:
    """Runs under the limit; returns 1 if a small one computes something else."""
    parser = argparse.ArgumentParser(description="Qwen-Image's transformer in 2 GiB.")
    parser.add_argument("--model", metavar="DIR", help="the folder of its weights")
    parser.add_argument("--full-size", action="store_true", help="random, but 41 GB")
    parser.add_argument("--disk", action="store_true", help="leave weights on disk")
    parser.add_argument("--limit-gb", type=float, help="default: 2, or a tenth")
    parser.add_argument("--size", type=int, help="pixels a side; default: 1024, or 64")
    options = parser.parse_args()
    real = bool(options.model or options.full_size)
    logging.set_verbosity_error()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = "disk" if options.disk or device == "cpu" else "cpu"
    fields: dict[str, Any] = {"compute_device": device, "store": store}
    if options.model:
        limit_gb = options.limit_gb or 2
        policy = OffloadPolicy(limit_gb=limit_gb, **fields)
        model = load_model(QwenImageTransformer2DModel, options.model, policy)
    else:
        model = random_model({} if options.full_size else SMALL)
        share = 2 if options.full_size else weight_bytes(model) / 10 / 2**30
        limit_gb = options.limit_gb or share
        attach_offload_hooks(model, OffloadPolicy(limit_gb=limit_gb, **fields))
    inputs = noise(model, options.size or (1024 if real else 64))
    for number in range(3):  # the first forward measures what the activations take
        start = time.perf_counter()
        output = denoised(model, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"forward {number + 1}: {time.perf_counter() - start:.3f} s")
    stats = offload_stats(model)
    print(offload_plan(model).summary)
    print(f"weights {weight_bytes(model) / 2**20:.1f} MiB, ", end="")
    print(f"limit {limit_gb * 2**10:.1f} MiB, ", end="")
    print(f"peak {stats.peak_bytes / 2**20:.1f} MiB on {device}")
    if real:
        return 0

    plain = detach(model).to(device)
    inputs = {name: to(value, device) for name, value in inputs.items()}
    identical = torch.equal(output, denoised(plain, inputs))
    print(f"output identical to the plain model's: {identical}")
    return 0 if identical else 1


def denoised(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Returns what one forward says of the noise."""
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, return_dict=False)[0]
    return found


def noise(model: torch.nn.Module, size: int) -> dict[str, Any]:
    """Returns inputs for a picture of so many pixels a side, and 20 tokens of text."""
    config: Any = model.config
    side = size // 16
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(torch.bfloat16)

    return {
        "hidden_states": random(side * side, config.in_channels),
        "encoder_hidden_states": random(20, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, 20, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_shapes": [[(1, side, side)]],
    }


def to(value: Any, device: str) -> Any:
    """Returns a tensor on a device, and anything else as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def random_model(config: dict[str, Any]) -> torch.nn.Module:
    """Makes the model in bf16, with weights that are drawn once and repeated."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) / 50
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part in parameter.view(-1).split(len(drawn)):
                part.copy_(drawn[: len(part)])
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    # What is computed and not loaded has no values on the meta device.
    fresh = QwenImageTransformer2DModel(**{**config, "num_layers": 0})
    model.pos_embed = fresh.pos_embed
    return model.eval()


def weight_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes of the weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    sys.exit(main())

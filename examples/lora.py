"""LoRAs come and go while a model streams.

A LoRA is added to an attached model in no time: its factors go to the compute device,
inside the limit, and the weights stay untouched wherever they rest. Without arguments a
small Flux transformer with random weights is made, and two LoRAs of the form that
diffusers saves. With both the output must be that of the same LoRAs through peft, up to
rounding; when they are cleared, that of the model before, bit for bit.

    pip install hookoffload diffusers peft
    python examples/lora.py

`--model DIR` is the folder of a real Flux transformer with its config.json, `--lora`
a file with a LoRA for it (several times for several), `--limit-gb` the limit.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    add_lora,
    attach_offload_hooks,
    clear_lora,
    detach,
    load_model,
    offload_stats,
)

LoRA = dict[str, torch.Tensor]


def main() -> int:
    """Adds and clears LoRAs; returns 1 if what comes out is not what it should be."""
    parser = argparse.ArgumentParser(description="LoRAs on a model that streams.")
    parser.add_argument("--model", metavar="DIR", help="a real Flux transformer")
    parser.add_argument("--lora", type=Path, action="append", metavar="FILE")
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--limit-gb", type=float, help="default: 2, or a third of it")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        limit_gb = options.limit_gb or 2
        policy = policy_of(device, limit_gb)
        model = load_model(FluxTransformer2DModel, options.model, policy)
    else:
        model = small_model(4 if device == "cpu" else 32)
        size = sum(parameter.nbytes for parameter in model.parameters())
        limit_gb = options.limit_gb or size / 3 / 2**30
        attach_offload_hooks(model, policy_of(device, limit_gb))
    loras = [load_file(file) for file in options.lora or ()]
    loras = loras or [random_lora(model, seed) for seed in (1, 2)]

    inputs = noise(model, device)
    before = output_of(model, inputs)
    for lora in loras:
        start = time.perf_counter()
        add_lora(model, lora, scale=options.scale)
        print(f"added {len(lora)} tensors in {time.perf_counter() - start:.3f} s")
    changed = output_of(model, inputs)
    most = (changed - before).abs().max().item()
    print(f"the output changes by up to {most:.4f}")
    clear_lora(model)
    identical = torch.equal(output_of(model, inputs), before)
    peak = offload_stats(model).peak_bytes / 2**20
    print(f"limit {limit_gb * 2**10:.1f} MiB, peak {peak:.1f} MiB on {device}")
    print(f"without them identical to before: {identical}")
    if options.model:
        return 0 if identical else 1

    plain = detach(model).to(device)
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    for number, lora in enumerate(loras):
        plain.load_lora_adapter(lora, adapter_name=f"lora{number}")
    names = [f"lora{number}" for number in range(len(loras))]
    plain.set_adapters(names, [options.scale] * len(names))
    close = torch.allclose(output_of(plain, inputs), changed, rtol=1e-3, atol=1e-4)
    print(f"with them as through peft: {close}")
    return 0 if identical and close and most > 0.01 else 1


def policy_of(device: str, limit_gb: float) -> OffloadPolicy:
    """Returns a policy that streams: from disk on a CPU, from RAM on a GPU."""
    store = "disk" if device == "cpu" else "cpu"
    return OffloadPolicy(limit_gb=limit_gb, compute_device=device, store=store)


def small_model(heads: int) -> FluxTransformer2DModel:
    """Makes a Flux transformer; of 4 heads it has some 13 MiB."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    ).eval()


def random_lora(model: nn.Module, seed: int, rank: int = 8) -> LoRA:
    """Makes a LoRA of all attention layers, with the keys that diffusers writes."""
    generator = torch.Generator().manual_seed(seed)
    lora: LoRA = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".attn." in name:
            key = f"transformer.{name}.lora"
            down = torch.randn(rank, module.in_features, generator=generator)
            up = torch.randn(module.out_features, rank, generator=generator)
            lora[f"{key}_A.weight"], lora[f"{key}_B.weight"] = down / 8, up / 8
    return lora


def noise(model: nn.Module, device: str, side: int = 8) -> dict[str, torch.Tensor]:
    """Returns inputs for a picture of so many patches a side."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    places = torch.cartesian_prod(torch.arange(1), *[torch.arange(side)] * 2)
    inputs = {
        "hidden_states": random(side * side, config.in_channels),
        "encoder_hidden_states": random(16, config.joint_attention_dim),
        "pooled_projections": random(config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "img_ids": places.to(device, dtype),
        "txt_ids": torch.zeros(16, 3, device=device, dtype=dtype),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5], device=device, dtype=dtype)
    return inputs


def output_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns what one forward says of the noise."""
    with torch.no_grad():
        output: torch.Tensor = model(**inputs, return_dict=False)[0]
    return output


if __name__ == "__main__":
    sys.exit(main())

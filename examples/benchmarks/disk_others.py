"""Other ways to run a model from its file: accelerate's, and the plain one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from disk_bench import Bench
from safetensors import safe_open
from torch import nn

from hookoffload.demo_model import DemoTransformer


def accelerate_disk_offload(bench: Bench) -> nn.Module:
    """Returns the model under accelerate's `disk_offload`, on the same file."""
    from accelerate import disk_offload

    model = _empty(bench)
    folder = bench.options.folder / "accelerate"
    folder.mkdir(exist_ok=True)
    index = {
        name: {
            "safetensors_file": str(bench.path),
            "weight_name": name,
            "dtype": bench.options.dtype,
        }
        for name, _ in model.named_parameters()
    }
    (folder / "index.json").write_text(json.dumps(index))
    disk_offload(model, folder, execution_device=bench.device)
    return model


def open_and_get(bench: Bench) -> nn.Module:
    """Returns the model with hooks that open the file, get tensors and move them."""
    model = _empty(bench)
    for name, module in model.named_modules():
        own = [key for key, weight in module._parameters.items() if weight is not None]
        if own:
            _Fetch(bench.path, f"{name}.", own, bench.device).hang_on(module)
    return model


def _empty(bench: Bench) -> DemoTransformer:
    with torch.device("meta"):
        return DemoTransformer(**asdict(bench.shape))


class _Fetch:
    """Opens the file before a forward and drops the tensors behind it."""

    def __init__(
        self, path: Path, prefix: str, names: list[str], device: torch.device
    ) -> None:
        self.path, self.prefix, self.names = path, prefix, names
        self.device = device
        self.empty: dict[str, Any] = {}

    def hang_on(self, module: nn.Module) -> None:
        """Hangs both hooks."""
        self.empty = dict(module._parameters)
        module.register_forward_pre_hook(self._fetch)
        module.register_forward_hook(self._drop)

    def _fetch(self, module: nn.Module, _: Any) -> None:
        with safe_open(self.path, framework="pt", device="cpu") as file:
            for name in self.names:
                tensor = file.get_tensor(self.prefix + name).to(self.device)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _drop(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self.empty)


WAYS = {
    "accelerate disk_offload": accelerate_disk_offload,
    "open, get tensor, to device": open_and_get,
}

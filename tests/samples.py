"""Models and looks at them that several test files share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookoffload import OffloadPolicy, offload, offload_plan, offloaded

GIB = 2**30

# Each of these has layers that really pass through the window on a CPU.
STREAMING: dict[str, dict[str, Any]] = {
    "disk, least": {"store": "disk", "limit_gb": 0},
    "disk, unlimited": {"store": "disk"},
    "disk, poisoned": {"store": "disk", "limit_gb": 0, "debug": True},
    "cast to float64": {"compute_dtype": torch.float64, "limit_gb": 0},
    "disk, cast to float64": {
        "store": "disk",
        "compute_dtype": torch.float64,
        "limit_gb": 0,
    },
}


class Block(nn.Module):
    """A block with a parameter of its own beside its children."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks, and a parameter and a buffer that belong to the root."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale + self.shift


def linears(width: int = 32, depth: int = 6) -> nn.Sequential:
    """Equal layers in a row, without biases: easy to count."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a model without gradients."""
    with torch.no_grad():
        return model(*args, **kwargs)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, each once."""
    return sum(p.nbytes for p in model.parameters())


def least_limit_gb(model: nn.Module, **fields: Any) -> float:
    """Return the smallest limit in GiB that a model runs with."""
    with offloaded(model, OffloadPolicy(**fields, limit_gb=0)):
        return offload_plan(model).least_bytes / GIB


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare shape, dtype and every bit, also those of NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_as_bytes(one), _as_bytes(other))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def hooks_of(model: nn.Module) -> int:
    """Count all hooks of all kinds that hang on a model's modules."""
    return sum(
        len(registry)
        for module in model.modules()
        for key, registry in vars(module).items()
        if key.endswith("_hooks") and isinstance(registry, dict)
    )


class Picture:
    """What a model was, to compare with what it is.

    Args:
        model: the model, which the picture keeps no bytes of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks = hooks_of(model)
        self._attributes = {n: set(vars(m)) for n, m in model.named_modules()}
        self._training = {n: m.training for n, m in model.named_modules()}
        self._tensors = {
            name: (
                tensor,
                tensor.detach().clone(),
                tensor.device,
                tensor.stride(),
                tensor.requires_grad,
            )
            for name, tensor in _named_tensors(model).items()
        }

    def differences(self, model: nn.Module) -> list[str]:
        """Tell in words what is not as it was."""
        found = []
        if hooks_of(model) != self._hooks:
            found.append(f"{hooks_of(model)} hooks, not {self._hooks}")
        for name, module in model.named_modules():
            if set(vars(module)) != self._attributes.get(name):
                found.append(f"{name}: other attributes")
            if module.training != self._training[name]:
                found.append(f"{name}: training flipped")
        now = _named_tensors(model)
        if list(now) != list(self._tensors):
            found.append(f"other names: {list(now)}")
        for name, (tensor, value, device, stride, learns) in self._tensors.items():
            if now.get(name) is not tensor:
                found.append(f"{name}: another object")
            if tensor.device != device or tensor.stride() != stride:
                found.append(f"{name}: moved to {tensor.device}, {tensor.stride()}")
            if tensor.requires_grad != learns:
                found.append(f"{name}: requires_grad flipped")
            if not same_bits(tensor, value):
                found.append(f"{name}: another value")
        return found


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_runs_alike(
    model: nn.Module, x: torch.Tensor, fields: dict[str, Any]
) -> None:
    """Compare an attached model with the plain one, bit for bit.

    Args:
        model: returns a tensor, or a sequence that begins with one.
        x: its input; cast to the computation dtype if it is floating.
        fields: of the policy.
    """
    dtype = fields.get("compute_dtype", torch.float32)
    x = x.to(dtype) if x.is_floating_point() else x
    before = Picture(model)
    want = first_output(run(copy.deepcopy(model).to(dtype), x))
    with offloaded(model, **fields):
        for _ in range(3):
            assert same_bits(first_output(run(model, x)), want)
        offload(model)
        assert same_bits(first_output(run(model, x)), want)
    assert before.differences(model) == []


def first_output(output: Any) -> torch.Tensor:
    """Return the tensor that a model is run for."""
    value = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(value, torch.Tensor)
    return value


def seen_inside(
    module: nn.Module, look: Callable[[nn.Module], Any], *, prepend: bool = False
) -> list[Any]:
    """Note what ``look`` returns inside each forward of a module.

    Returns:
        A list that grows by one with each forward.
    """
    seen: list[Any] = []
    module.register_forward_pre_hook(
        lambda called, _: seen.append(look(called)), prepend=prepend
    )
    return seen


def lies_in_a_file(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's bytes are a memory map of a safetensors file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return len(rest) == 5 and ".safetensors" in rest[4]
    return False

"""Small models with quantised weights of every kind that the libraries make."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WIDTH = 256


class Coded(torch.Tensor):
    """A float tensor that is kept as 8-bit integers and a scale."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, scale: torch.Tensor, device: Any = None
    ) -> Coded:
        made = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scale.dtype, device=device or codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Coded:
        scale = tensor.detach().abs().amax(-1, keepdim=True) / 127
        return cls((tensor.detach() / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Any], context: None, size: Any, stride: Any
    ) -> Coded:
        return cls(parts["codes"], parts["scale"])

    def value(self) -> torch.Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0]
        if func is torch.ops.aten.copy_.default:
            first.codes.copy_(args[1].codes)
            first.scale.copy_(args[1].scale)
            return first
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(first.codes), func(first.scale))
        if func is torch.ops.aten._to_copy.default and kwargs.get("device"):
            device = kwargs["device"]
            return cls(first.codes.to(device), first.scale.to(device))
        plain = [a.value() if isinstance(a, Coded) else a for a in args]
        return func(*plain, **kwargs)


def linears(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Make what is quantised; the biases and the norm stay as they are."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH, dtype=dtype),
        nn.LayerNorm(WIDTH, dtype=dtype),
        nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype),
        nn.GELU(),
        nn.Linear(2 * WIDTH, WIDTH, dtype=dtype),
    ).eval()


def rows(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(3, WIDTH, dtype=dtype)


def _replace_linears(
    model: nn.Sequential, make: Callable[[nn.Linear], nn.Module]
) -> nn.Sequential:
    for index, module in enumerate(model):
        if isinstance(module, nn.Linear):
            model[index] = make(module)
    return model.eval()


def coded(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    def code(module: nn.Linear) -> nn.Module:
        weight = Coded.of(module.weight)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    return _replace_linears(linears(dtype), code)


def _there(model: nn.Sequential, device: str) -> nn.Sequential:
    # One without values cannot go anywhere.
    return model if device == "cpu" else model.to(device)


def torchao(config: str, *args: Any, device: str = "cpu", **kwargs: Any) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = _there(linears(), device)
    quantization.quantize_(model, getattr(quantization, config)(*args, **kwargs))
    return model


def torchao_cpu_int4() -> nn.Module:
    """Pack 4 bits as the kernels of the CPU want them."""
    library = pytest.importorskip("torchao.prototype.quantization.int4")

    def packed(module: nn.Linear) -> nn.Module:
        weight = library.Int4OpaqueTensor.from_hp(module.weight.detach(), [1, 64])
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    return _replace_linears(linears(), packed)


def quanto(
    qtype: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    model = _there(linears(dtype), device)
    library.quantize(model, weights=getattr(library, qtype))
    library.freeze(model)
    return model


def bitsandbytes_4bit(
    quant_type: str, *, device: str = "cpu", **kwargs: Any
) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")

    def replaced(module: nn.Linear) -> nn.Module:
        made = library.nn.Linear4bit(
            module.in_features,
            module.out_features,
            compute_dtype=torch.bfloat16,
            quant_type=quant_type,
            **kwargs,
        )
        made.load_state_dict(module.state_dict())
        made.support_avx512bf16_for_cpu = False
        return made

    return _replace_linears(linears(), replaced).to(device)


def bitsandbytes_8bit(device: str = "cpu") -> nn.Module:
    library = pytest.importorskip("bitsandbytes")

    def replaced(module: nn.Linear) -> nn.Module:
        made = library.nn.Linear8bitLt(
            module.in_features, module.out_features, has_fp16_weights=False
        )
        made.load_state_dict(module.state_dict())
        return made

    return _replace_linears(linears(), replaced).to(device)


def gguf(kind: str, device: str = "cpu") -> nn.Module:
    library = pytest.importorskip("gguf")
    utils = importlib.import_module("diffusers.quantizers.gguf.utils")
    quant_type = getattr(library.GGMLQuantizationType, kind)

    def replaced(module: nn.Linear) -> nn.Module:
        made = utils.GGUFLinear(
            module.in_features,
            module.out_features,
            bias=True,
            compute_dtype=torch.bfloat16,
        )
        values = module.weight.detach().float().numpy()
        packed = torch.from_numpy(library.quants.quantize(values, quant_type).copy())
        made.weight = utils.GGUFParameter(packed, quant_type=quant_type)
        made.bias = module.bias
        return made

    return _replace_linears(linears(), replaced).to(device)


# Skips the test where the library is not installed.
KINDS: dict[str, Callable[..., nn.Module]] = {
    "wrapper subclass": lambda device="cpu": coded().to(device),
    "torchao int8": lambda **d: torchao("Int8WeightOnlyConfig", **d),
    "torchao int4": lambda **d: torchao("IntxWeightOnlyConfig", torch.int4, **d),
    "torchao fp8": lambda **d: torchao("Float8WeightOnlyConfig", **d),
    "quanto int8": lambda **d: quanto("qint8", **d),
    "quanto int4": lambda **d: quanto("qint4", **d),
    "quanto int2": lambda **d: quanto("qint2", **d),
    "quanto fp8": lambda **d: quanto("qfloat8", **d),
    "bitsandbytes nf4": lambda **d: bitsandbytes_4bit("nf4", **d),
    "bitsandbytes fp4": lambda **d: bitsandbytes_4bit(
        "fp4", compress_statistics=False, **d
    ),
    "bitsandbytes int8": bitsandbytes_8bit,
    "gguf q8_0": lambda **d: gguf("Q8_0", **d),
    "gguf q4_0": lambda **d: gguf("Q4_0", **d),
}

# The GPU has no kernels for these.
CPU_KINDS: dict[str, Callable[..., nn.Module]] = {
    **KINDS,
    "torchao int4, for the cpu": torchao_cpu_int4,
}


def parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the plain tensors that have a model's bytes."""
    return {
        f"{prefix}.{key}, part {number}": part
        for prefix, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
        for number, part in enumerate(_parts(tensor, module))
    }


def _parts(tensor: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        names = tensor.__tensor_flatten__()[0]
        return [p for name in names for p in _parts(getattr(tensor, name), module)]
    found = [tensor, *_tensors_in(vars(tensor))]
    if tensor is module._parameters.get("weight"):
        found += _tensors_in(vars(getattr(module, "state", object)))
    return list({id(part): part for part in found}.values())


def _tensors_in(values: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for value in values.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value).__name__ == "QuantState":
            yield from _tensors_in(vars(value))


def attributes(model: nn.Module) -> dict[str, Any]:
    """Return what is registered, and what lies beside it, as identities."""
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor)
        found[name] = (id(tensor), kind, tensor.dtype, tensor.shape, tensor.device)
        found |= dict(_identities(name, tensor))
    return found


def _identities(name: str, value: Any) -> Iterator[tuple[str, int]]:
    for key, item in sorted(getattr(value, "__dict__", {}).items()):
        if isinstance(item, torch.Tensor) or type(item).__name__ == "QuantState":
            yield f"{name}.{key}", id(item)
            yield from _identities(f"{name}.{key}", item)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with the plain tensors in place of wrappers."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        found[name] = type(value)
        found |= dict(_flattened(name, value))
    return found


def _flattened(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if is_traceable_wrapper_subclass(value):
        for key in value.__tensor_flatten__()[0]:
            yield from _flattened(f"{name}.{key}", getattr(value, key))
    elif isinstance(value, torch.Tensor):
        yield f"{name}, bytes", value

"""Linear layers that compute in 8-bit floats, each row with a scale of its own.

[Note: fp8 compute]
With an 8-bit ``compute_dtype`` the weights of Linear layers are 8-bit inside their
forwards, and ``F.linear`` of one is

    x ~ qx * sx        sx: one scale for each row of the input
    w ~ qw * sw        sw: one scale for each row of the weight (each output)
    y = (qx @ qw.T) * sx * sw.T + bias                          in the input's dtype

where ``torch._scaled_mm`` multiplies 8-bit values, sums in fp32 and applies the scales.
A scale is the row's largest magnitude over the largest value of the dtype (448 for
``float8_e4m3fn``), so no value overflows and small rows keep their digits. Weights that
rest in the 8-bit dtype already are taken as they are, with scales of 1. Whatever is no
weight of a Linear computes in its own dtype.

A weight that is bound so is still the user's Parameter object. Its ``.data`` is the
8-bit value, and for that long its class is `Fp8Weight`, whose ``__torch_function__`` is
what multiplies. So it does not matter who reads the weight: its own module, one around
it (``F.linear(x, self.child.weight)``), or a subclass of Linear with a forward of its
own; what is no ``F.linear`` gets the value that the 8 bits and the scale stand for, and
``weight.dtype`` is the dtype of that. No module is replaced, and no mode of PyTorch is
on, which code inside and around the forward would have to go through. ``.data`` alone
could not do it: a plain tensor has no place for a scale. At rest the class is
``Parameter`` again; so such a weight never stays bound between passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .alignment import align
from .compiling import outside_graphs
from .containers import map_tensors
from .torch_calls import METADATA, VIEWS, name_of, property_of, writes

logger = logging.getLogger(__name__)

# What `torch._scaled_mm` wants both sides of a weight to be a multiple of.
_TILE = 16
# Below, a row counts as one of zeros: fp32 has digits left for its scale.
_LEAST = 1e-12
# Rows are brought to fp32 in parts of so many elements: of a weight, in memory that the
# budget knows of; of an input, in memory that counts as an activation.
_WEIGHT_PART = 2**21
_INPUT_PART = 2**24
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


class Scaled(NamedTuple):
    """What an 8-bit weight stands for.

    Attributes:
        name: full name of the weight.
        scale: one number for each row, fp32.
        wide: the dtype that it stands for.
    """

    name: str
    scale: torch.Tensor
    wide: torch.dtype


class Fp8Weight(nn.Parameter):
    """A Linear's weight while it is bound as 8-bit floats, see [Note: fp8 compute]."""

    hookoffload_scaled: Scaled

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Multiply, or have the call see the value that the weight stands for."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # no graph may hold such a weight
            return outside_graphs(_call)(func, args, kwargs)
        return _call(func, args, kwargs)


def _call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a torch function that was given 8-bit weights."""
    if func is functional.linear:
        return _linear(*args, **kwargs)
    name = name_of(func)
    if name == "__get__" and property_of(func) == "dtype":
        return args[0].hookoffload_scaled.wide
    target = kwargs.get("out", args[0] if args and writes(func) else None)
    if type(target) is Fp8Weight:
        raise RuntimeError(
            f"{target.hookoffload_scaled.name} computes in fp8 and cannot be "
            f"written to inside a forward ({name}). Write to it between two "
            "forwards, or leave the 8-bit compute_dtype out"
        )
    if name == "__get__":
        as_it_is = property_of(func) not in VIEWS
    else:
        as_it_is = name in METADATA or name in ("__set__", "__delete__")
    if as_it_is:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    args, kwargs = map_tensors((args, kwargs), _value_of)
    return func(*args, **kwargs)


def put_on(weight: torch.Tensor, scaled: Scaled) -> None:
    """Have a Parameter whose data are 8-bit floats stand for what they mean."""
    bound: Any = weight
    bound.hookoffload_scaled = scaled
    bound.__class__ = Fp8Weight


def take_off(weight: torch.Tensor) -> None:
    """Undo `put_on`, if it was done."""
    if type(weight) is Fp8Weight:
        plain: Any = weight
        plain.__class__ = nn.Parameter
        del plain.hookoffload_scaled


def _value_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the value that an 8-bit weight stands for; others are themselves."""
    if type(tensor) is not Fp8Weight:
        return tensor
    scaled = tensor.hookoffload_scaled
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.to(scaled.wide).mul_(scaled.scale.unsqueeze(1))


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply an input by an 8-bit weight."""
    dtype = _output_dtype(input)
    if type(weight) is not Fp8Weight or dtype is None:
        return functional.linear(*(map_tensors((input, weight, bias), _value_of)))
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        # It has said its dtype, and must not reach into the product.
        with torch.autocast(kind, enabled=False):
            return _multiplied(input, weight, bias, dtype)
    return _multiplied(input, weight, bias, dtype)


def _multiplied(
    input: torch.Tensor,
    weight: Fp8Weight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    scaled = weight.hookoffload_scaled
    with torch._C.DisableTorchFunctionSubclass():
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, weight, bias)
        ):
            raise RuntimeError(
                f"{scaled.name} computes in fp8, which has no backward. Call the model "
                "under torch.no_grad() or torch.inference_mode(). To train, "
                "detach(model), or attach without an 8-bit compute_dtype"
            )
        rows = input.reshape(-1, input.shape[-1])
        output = _product(rows, weight, scaled.scale, bias, dtype)
        return output.view(*input.shape[:-1], output.shape[-1])


def _output_dtype(input: Any) -> torch.dtype | None:
    """Return the dtype of an 8-bit product of an input, None if there can be none."""
    if type(input) not in (torch.Tensor, nn.Parameter) or not input.dim():
        return None
    dtype = input.dtype
    kind = input.device.type
    if dtype in _OUTPUTS and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype in _OUTPUTS and input.numel() else None


def _product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``rows @ weight.T + bias``, the product in 8 bits."""
    values = torch.empty(rows.shape, dtype=weight.dtype, device=rows.device)
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    part = min(len(rows), max(_INPUT_PART // rows.shape[1], 1))
    work = torch.empty(part * rows.shape[1], dtype=torch.float32, device=rows.device)
    quantise(rows, values, scale, work)
    # Where the device's kernels write bf16 only, that is exact enough for 8-bit inputs.
    made = (
        dtype if why_not_on(rows.device, weight.dtype, dtype) is None else _OUTPUTS[0]
    )
    fused = bias.to(made) if bias is not None and made == dtype else None
    output = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scale.unsqueeze(1),
        scale_b=weight_scale.unsqueeze(0),
        bias=fused,
        out_dtype=made,
    ).to(dtype)
    if bias is not None and fused is None:
        output += bias.to(dtype)
    return output


def quantise(
    source: torch.Tensor,
    target: torch.Tensor,
    scale: torch.Tensor,
    work: torch.Tensor | None,
) -> None:
    """Bring rows to 8-bit floats and their scales; takes no memory.

    Args:
        source: floats, of shape (rows, columns).
        target: the values, of the same shape; if it has the dtype of the source, that
            is copied as it is, and all scales are 1.
        scale: the scales, fp32.
        work: fp32, for a row at least; more is faster. Not needed for a copy.
    """
    if source.dtype == target.dtype:
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)
        scale.fill_(1)
        return
    assert work is not None, "casts need room"
    largest = torch.finfo(target.dtype).max
    columns = source.shape[1]
    step = work.numel() // columns
    for first in range(0, len(source), step):
        part = slice(first, first + step)
        rows = source[part]
        wide = work[: rows.numel()].view(rows.shape)
        wide.copy_(rows)
        torch.linalg.vector_norm(wide, float("inf"), dim=1, out=scale[part])
        scale[part].clamp_(min=_LEAST).div_(largest)
        target[part].copy_(wide.div_(scale[part].unsqueeze(1)))


def scale_bytes(rows: int) -> int:
    """Return what the scales of a weight take."""
    return align(rows * torch.float32.itemsize)


def work_bytes(rows: int, columns: int) -> int:
    """Return what `quantise` works in for a weight."""
    part = min(rows, max(_WEIGHT_PART // columns, 1))
    return align(part * columns * torch.float32.itemsize)


# -- who computes so ----------------------------------------------------------------


def is_fp8(dtype: torch.dtype | None) -> bool:
    """Tell whether Linear layers multiply in 8 bits with this compute dtype."""
    return dtype is not None and dtype.itemsize == 1


def wide_dtype(own: torch.dtype, compute: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype in which all but Linear weights compute; None is their own.

    Args:
        own: that of the tensor.
        compute: that of the policy.
    """
    if not is_fp8(compute):
        return compute
    # Norms, convolutions and the like have no kernels for 8 bits.
    return torch.bfloat16 if own.is_floating_point and own.itemsize == 1 else None


def why_not(
    weight: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why a Linear's weight cannot be multiplied in 8 bits; None if it can.

    Args:
        weight: the weight.
        device: where it computes.
        dtype: the 8-bit dtype.
    """
    rows, columns = weight.shape
    if rows % _TILE or columns % _TILE:
        return f"{rows} x {columns} is no multiple of {_TILE} on both sides"
    if weight.dtype.itemsize > torch.float32.itemsize:
        return f"{weight.dtype} asks for more digits"
    if not weight.is_contiguous():
        return "its rows are not contiguous"
    return why_not_on(device, dtype, _OUTPUTS[0])


@lru_cache(maxsize=64)
def why_not_on(
    device: torch.device, dtype: torch.dtype, output: torch.dtype
) -> str | None:
    """Return why a device does not multiply in 8 bits; None if it does, or is not here.

    A small product is tried, in all the ways that are used: which kernels there are
    depends on the device, its generation and the release of PyTorch.

    Args:
        device: where to compute.
        dtype: of both factors.
        output: of the product.
    """
    if device.type != "cpu" and not _is_here(device):
        return None  # a plan for another machine
    try:
        with torch.inference_mode(False), torch.no_grad():
            ones = torch.ones(_TILE, _TILE, device=device).to(dtype)
            scale = torch.ones(_TILE, 1, device=device)
            bias = torch.ones(_TILE, dtype=output, device=device)
            torch._scaled_mm(
                ones,
                ones.t(),
                scale_a=scale,
                scale_b=scale.t(),
                bias=bias,
                out_dtype=output,
            )
    except (RuntimeError, ValueError) as error:  # with "not implemented"
        return str(error).partition("\n")[0].partition(". ")[0]
    return None


def _is_here(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    available = torch.accelerator.is_available()
    return available and accelerator is not None and accelerator.type == device.type

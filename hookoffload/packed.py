"""Registered tensors whose bytes lie in other tensors: quantised weights.

[Note: packed tensors]
A quantised weight is registered as one parameter, while what has to move are several
plain tensors: packed integers, scales, zero points. These *parts* get the masters. They
stay the objects that they are, as every tensor does (see [Note: in-place moves]), so
whoever holds the weight holds the same one. Their dtype says nothing about values: a
part is never cast. There are two kinds:

* Wrapper subclasses (torchao, optimum-quanto) have no bytes of their own, and name what
  has them in ``__tensor_flatten__``; that can be wrappers again. A wrapper also says a
  device, which `Wrapper` makes follow that of its parts.
* Parameters of bitsandbytes and GGUF have packed bytes of their own, and may have plain
  tensors in attributes. No protocol lists these, so their names are below.

Other subclasses are refused: half of one would stay where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from .codec import is_movable

# What holds tensors beside a parameter's own bytes, by dotted class name.
_BESIDE: dict[str, tuple[str, ...]] = {
    "bitsandbytes.nn.modules.Int8Params": ("CB", "SCB"),
    "bitsandbytes.nn.modules.Params4bit": ("quant_state",),
    "diffusers.quantizers.gguf.utils.GGUFParameter": (),
}
_LINEAR_8BIT = "bitsandbytes.nn.modules.Linear8bitLt"
_LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"

# Formats of torchao that are laid out for the kernels of some kinds of device. Their
# classes copy the bytes to any other, and fail in the forward.
_COMPUTE_ON: dict[str, tuple[str, ...]] = {
    "Int4OpaqueTensor": ("cpu",),
    "Int4PlainInt32Tensor": ("xpu", "npu"),
    "Int4PreshuffledTensor": ("cuda",),
    "Int4TilePackedTo4dTensor": ("cuda",),
}

_PLAIN = (torch.Tensor, nn.Parameter)


class Parts(NamedTuple):
    """What has to move of one registered tensor.

    Attributes:
        tensors: plain tensors, the tensor itself if it is one; the bulk comes first.
        paths: where each is found in the tensor (".scale"); "" is the tensor itself.
        wrappers: what says a device that must follow theirs, inner ones first.
    """

    tensors: tuple[torch.Tensor, ...]
    paths: tuple[str, ...] = ("",)
    wrappers: tuple[Wrapper, ...] = ()


class Wrapper:
    """A tensor subclass without bytes, which says the device that its parts are on.

    Args:
        tensor: the tensor.
        names: the attributes that hold its parts.
    """

    __slots__ = ("_faces", "_names", "_tensor")

    def __init__(self, tensor: torch.Tensor, names: list[str]) -> None:
        self._tensor = tensor
        self._names = names
        self._faces: dict[torch.device, torch.Tensor] = {}

    def follow(self, device: torch.device) -> None:
        """Say ``device``, as soon as all parts are there."""
        tensor = self._tensor
        with torch._C.DisableTorchFunctionSubclass():
            if tensor.device == device:
                return
            if any(getattr(tensor, name).device != device for name in self._names):
                return
            with torch.inference_mode(False):  # inside it the class would be asked
                face = self._faces.get(device)
                if face is None:
                    face = self._faces[device] = _face_of(tensor, device)
                tensor.data = face  # what is in attributes stays


def _face_of(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return what a wrapper looks like on a device, without any parts.

    The class itself is not asked: it may refuse parts that are only at rest there.
    """
    face: torch.Tensor = torch.Tensor._make_wrapper_subclass(
        type(tensor),
        tensor.size(),
        strides=tensor.stride(),
        storage_offset=tensor.storage_offset(),
        dtype=tensor.dtype,
        layout=tensor.layout,
        device=device,
    )
    return face


def with_parts(
    tensor: torch.Tensor, parts: Mapping[str, torch.Tensor], path: str = ""
) -> torch.Tensor:
    """Return a wrapper like ``tensor`` with other plain tensors at the paths inside."""
    if not is_wrapper(tensor):
        return parts[path]
    kind: Any = type(tensor)
    names, context = kind.__tensor_flatten__(tensor)
    inner = {n: with_parts(getattr(tensor, n), parts, f"{path}.{n}") for n in names}
    size, stride = tensor.size(), tensor.stride()
    made: torch.Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
    return made


def parts_of(tensor: torch.Tensor, owner: nn.Module | None = None) -> Parts | None:
    """Return what has to move of a tensor; None if nobody knows.

    Args:
        tensor: registered in a module.
        owner: the module, which may keep a part of what the tensor is made of.
    """
    if type(tensor) in _PLAIN and is_movable(tensor):
        return Parts((tensor,))
    if is_wrapper(tensor):
        return _wrapped(tensor)
    kinds = _class_names(tensor) & _BESIDE.keys()
    if not kinds:
        return Parts((tensor,)) if is_movable(tensor) else None
    found = [("", tensor)]
    for name in (name for kind in kinds for name in _BESIDE[kind]):
        found += _tensors_in(getattr(tensor, name, None), f".{name}")
    if _LINEAR_8BIT in _class_names(owner) and tensor.dtype is torch.int8:
        # Its first forward moves them there.
        state: Any = getattr(owner, "state", None)
        for name in ("CB", "SCB"):
            found += _tensors_in(getattr(state, name), f".{name}")
    tensors = {id(part): (path, part) for path, part in reversed(found)}
    paths, parts = zip(*reversed(tensors.values()), strict=True)
    return Parts(parts, paths)


def is_packed_by_bitsandbytes(tensor: torch.Tensor) -> bool:
    """Tell whether a parameter is of a class of bitsandbytes."""
    return any(name.startswith("bitsandbytes.") for name in _class_names(tensor))


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a subclass that lists its parts.

    PyTorch's own (DTensor, nested and fake tensors) are no weights in memory.
    """
    kind = type(tensor)
    listed = hasattr(kind, "__tensor_flatten__") and hasattr(
        kind, "__tensor_unflatten__"
    )
    return listed and not kind.__module__.startswith("torch.")


def _wrapped(tensor: torch.Tensor) -> Parts | None:
    kind: Any = type(tensor)
    names: list[str] = list(kind.__tensor_flatten__(tensor)[0])
    tensors: list[torch.Tensor] = []
    paths: list[str] = []
    wrappers: list[Wrapper] = []
    for name in names:
        part = getattr(tensor, name)
        if not isinstance(part, torch.Tensor) or getattr(tensor, name) is not part:
            return None  # made anew at each look: there is no object to move
        inner = parts_of(part)
        if inner is None:
            return None
        tensors += inner.tensors
        paths += (f".{name}{path}" for path in inner.paths)
        wrappers += inner.wrappers
    return Parts(tuple(tensors), tuple(paths), (*wrappers, Wrapper(tensor, names)))


def bytes_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that have a tensor's bytes: itself, or a wrapper's parts."""
    if type(tensor) in _PLAIN or not is_wrapper(tensor):
        return (tensor,)
    parts = _wrapped(tensor)
    return (tensor,) if parts is None else parts.tensors


def gives_other_data(owner: nn.Module) -> bool:
    """Tell whether a module's forward does ``parameter.data = other`` by itself.

    Those of bitsandbytes give their bias the dtype of the input.
    """
    return not {_LINEAR_8BIT, _LINEAR_4BIT}.isdisjoint(_class_names(owner))


def _tensors_in(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor, or those in an object's attributes and in theirs, with paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    else:
        for name, part in getattr(value, "__dict__", {}).items():
            yield from _tensors_in(part, f"{path}.{name}")


def _class_names(value: object) -> frozenset[str]:
    kind: Any = type(value)
    return _names_of(kind)


@lru_cache(maxsize=1024)  # asked about each tensor and its owner
def _names_of(kind: type) -> frozenset[str]:
    return frozenset(f"{c.__module__}.{c.__qualname__}" for c in kind.__mro__)


def check_4_bit_linear(
    name: str, tensor: torch.Tensor, owner: nn.Module, device: torch.device
) -> None:
    """Refuse a weight of bitsandbytes that its first forward packs anew.

    Raises:
        ValueError: It does so on this CPU, or has done it.
    """
    if _LINEAR_4BIT not in _class_names(owner):
        return
    state = getattr(tensor, "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", False)
    packs = device.type == "cpu" and getattr(owner, "support_avx512bf16_for_cpu", False)
    if packed or packs:
        raise ValueError(
            f"{name}: bitsandbytes packs 4-bit weights anew for this CPU in their "
            "first forward, behind which they could not be moved. Set "
            "support_avx512bf16_for_cpu = False on every Linear4bit before the "
            "model runs for the first time"
        )


def check_kernels(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Refuse a format of torchao that a device has no kernels for.

    Raises:
        ValueError: It is in such a format.
    """
    kind = type(tensor)
    kinds = _COMPUTE_ON.get(kind.__name__)
    ours = kinds is not None and kind.__module__.partition(".")[0] == "torchao"
    if kinds is None or not ours or device.type in kinds:
        return
    raise ValueError(
        f"{name} is a {kind.__name__}, torchao's format for {' and '.join(kinds)}, "
        f"and is to compute on {device.type}, which has no kernel for it. Quantise "
        f"the model on {device.type}, in a format for it (Int4WeightOnlyConfig("
        'int4_packing_format=...) of torchao; "tile_packed_to_4d" is for cuda)'
    )


class Repacked(NamedTuple):
    """What the class of a wrapper makes of it on another kind of device.

    Attributes:
        how: in words that follow the class's name.
        optional: whether the wrapper computes there as it is, too.
    """

    how: str
    optional: bool = False


def repacked_on(tensor: torch.Tensor, device: torch.device) -> Repacked | None:
    """Return what becomes of a wrapper on a device; None if its bytes are copied.

    Its class moves a copy of it, to show what it does. A base class that is packed for
    any device may make one of its subclasses of it, which are packed for that device.
    """
    if tensor.device.type == device.type:
        return None
    try:
        moved = tensor.detach().to(device)
    except Exception as error:
        return Repacked(f"which refuses to go there: {error}")
    kind = type(tensor)
    if type(moved) is kind and _same_parts(moved, tensor):
        return None
    if type(moved) is not kind and issubclass(type(moved), kind):
        how = f"which .to() would make a {type(moved).__name__}"
        return Repacked(how, optional=_is_made_on(tensor, device))
    return Repacked("which packs its bytes otherwise there")


def _is_made_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Tell whether a wrapper's class takes its parts on a device."""
    parts = parts_of(tensor)
    assert parts is not None, "it was found to have some"
    there = zip(parts.paths, (part.to(device) for part in parts.tensors), strict=True)
    try:
        made = with_parts(tensor.detach(), dict(there))
    except Exception:
        return False
    return type(made) is type(tensor)


def _same_parts(one: torch.Tensor, other: torch.Tensor) -> bool:
    pairs = zip(bytes_of(one), bytes_of(other), strict=False)
    return len(bytes_of(one)) == len(bytes_of(other)) and all(
        a.dtype == b.dtype
        and a.stride() == b.stride()
        and torch.equal(_bits(a).to(b.device), _bits(b))
        for a, b in pairs
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)

"""Model -> its tensor objects, and which of them share bytes.

Everything here only reads the model.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .adapter_layers import modules_that_merge
from .codec import is_castable
from .packed import (
    Wrapper,
    check_4_bit_linear,
    check_kernels,
    gives_other_data,
    is_wrapper,
    parts_of,
    repacked_on,
)

logger = logging.getLogger(__name__)


@dataclass
class ManagedTensor:
    """One tensor object of the model: a parameter, a buffer, or a part of one.

    Attributes:
        name: its first full name in the model; the others are in ``aliases``. Parts
            have the name of what they are a part of.
        tensor: the object that the user holds; only its ``.data`` ever changes.
        is_buffer: registered as a buffer, or to be treated like one.
        aliases: further full names of the same object (tied weights).
        persistent: False for a buffer that ``state_dict`` leaves out.
        holders: what is registered: the tensor itself, or the packed tensors that it
            is a part of.
        wrappers: those of them whose device follows its own.
        path: where a part is found in its wrapper, which makes its name whole.
        castable: whether it may change its dtype.
        stays: False if its module's forward gives it other data.
        merges: whether adapters may be added to it, or belong to what they are added
            to, between two forwards.
        multiplies: whether it is the weight of Linear layers and nothing else.
    """

    name: str
    tensor: torch.Tensor
    is_buffer: bool
    aliases: list[str] = field(default_factory=list)
    persistent: bool = True
    holders: list[torch.Tensor] = field(default_factory=list)
    wrappers: tuple[Wrapper, ...] = ()
    path: str = ""
    castable: bool = False
    stays: bool = True
    merges: bool = False
    multiplies: bool = False


@dataclass(eq=False)
class TensorGroup:
    """Tensors whose bytes overlap in one storage: one master, moved once.

    Attributes:
        members: the tensors; nearly always one.
        low: first byte in the storage that they share.
        high: one past their last byte.
    """

    members: list[ManagedTensor]
    low: int
    high: int

    @property
    def name(self) -> str:
        """Full name of the first member."""
        return self.members[0].name

    @property
    def is_buffer(self) -> bool:
        """Whether no member is a parameter."""
        return all(member.is_buffer for member in self.members)


def group_tensors(
    model: nn.Module,
) -> tuple[list[ManagedTensor], list[TensorGroup]]:
    """List a model's tensor objects, and group those whose bytes overlap."""
    found: dict[int, ManagedTensor] = {}
    merging = modules_that_merge(model)
    for name, module, registered, is_buffer in _registered(model):
        key = name.rpartition(".")[2]
        kept = not is_buffer or key not in module._non_persistent_buffers_set
        parts = parts_of(registered, module)
        if parts is None:
            continue  # refused by `check_tensors`, with its name
        for tensor, path in zip(parts.tensors, parts.paths, strict=True):
            new = ManagedTensor(name, tensor, is_buffer, persistent=kept, path=path)
            new.holders.append(registered)
            new.wrappers = parts.wrappers
            new.castable = tensor is registered and is_castable(tensor)
            new.stays = not gives_other_data(module)
            new.merges = id(module) in merging
            new.multiplies = key == "weight" and isinstance(module, nn.Linear)
            # A number of bitsandbytes: no layer copies it, no file is made for it.
            new.is_buffer |= bool(path) and not parts.wrappers and tensor.ndim == 0
            _add(found, new)
    tensors = list(found.values())
    return tensors, _overlapping(tensors)


def _registered(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, torch.Tensor, bool]]:
    """Yield name, owner and tensor of each registration, and whether as a buffer."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + key, module, parameter, False
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + key, module, buffer, True


# Tables that several packed tensors read, as those of 4-bit floats, are far smaller.
_SHARED_TABLE_BYTES = 2**16


def _add(found: dict[int, ManagedTensor], new: ManagedTensor) -> None:
    known = found.setdefault(id(new.tensor), new)
    if known is new:
        return
    known.aliases.append(new.name)
    known.persistent |= new.persistent
    known.is_buffer &= new.is_buffer
    known.multiplies &= new.multiplies
    known.merges |= new.merges
    if known.holders[0] is not new.holders[0]:
        known.holders += new.holders
        known.wrappers += new.wrappers
        # In one of their layers, it would bring that layer along with every other.
        known.is_buffer |= new.tensor.nbytes <= _SHARED_TABLE_BYTES


def _overlapping(tensors: list[ManagedTensor]) -> list[TensorGroup]:
    by_storage: dict[object, list[TensorGroup]] = defaultdict(list)
    for managed in tensors:
        tensor = managed.tensor
        low, high = span(tensor)
        key: object = id(managed) if high == low else tensor.untyped_storage()._cdata
        by_storage[key].append(TensorGroup([managed], low, high))
    groups = []
    for candidates in by_storage.values():
        candidates.sort(key=lambda g: (g.low, g.high))
        merged = [candidates[0]]
        for group in candidates[1:]:
            if group.low < merged[-1].high:
                merged[-1].members += group.members
                merged[-1].high = max(merged[-1].high, group.high)
            else:
                merged.append(group)
        groups += merged
    return groups


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the range of bytes that a strided tensor covers in its storage."""
    low = int(tensor.storage_offset()) * tensor.itemsize
    if tensor.numel() == 0:
        return low, low
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return low, low + (last + 1) * tensor.itemsize


def check_tensors(model: nn.Module, *, values: bool = True) -> None:
    """Raise `ValueError` for tensors that cannot be moved, and if there are none.

    Args:
        model: the model.
        values: False if they need none: a plan takes models on the meta device.
    """
    any_tensor = False
    for name, module, registered, _ in _registered(model):
        any_tensor = True
        parts = parts_of(registered, module)
        if torch.nn.parameter.is_lazy(registered):
            raise ValueError(
                f"{name} is not initialised yet (a lazy module); run the model once "
                "before attaching"
            )
        if parts is None:
            raise ValueError(
                f"{name} is a {type(registered).__name__} with layout "
                f"{registered.layout}, and it is not known where its bytes lie. Plain "
                "tensors can be offloaded, and those that torchao, optimum-quanto, "
                "bitsandbytes and GGUF pack. Dequantise it, give its class "
                "__tensor_flatten__ and __tensor_unflatten__ as PyTorch describes "
                "them, or leave its module out of the model that you attach"
            )
        for tensor in parts.tensors:
            if values or not tensor.is_meta:
                _check_values(name, tensor)
    if not any_tensor:
        raise ValueError(
            f"{type(model).__name__} has no parameters and no buffers: there is "
            "nothing to offload"
        )


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no values. Give them with "
            "load_model(model_class, checkpoint, policy=...), which also attaches; "
            "if it was moved there while attached, detach(model) first"
        )
    if tensor.is_inference():
        raise ValueError(
            f"{name} was made under torch.inference_mode() and cannot be given "
            "other memory. Make (or load) the model outside of it; running it "
            "inside is fine"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{name} is a lazy conjugate or negative of what its memory holds (as of "
            "Tensor.conj), and its bytes alone do not say so. Register "
            "tensor.resolve_conj().resolve_neg() instead"
        )


def check_packed(
    model: nn.Module, device: torch.device, known: Container[int] = ()
) -> None:
    """Raise `ValueError` for what is packed for another device than the given one.

    What is packed for any is only told to have a faster packing there.

    Args:
        model: the model.
        device: where it is to compute.
        known: ids of tensors that were looked at before, and may rest elsewhere now.
    """
    for name, module, tensor, _ in _registered(model):
        check_4_bit_linear(name, tensor, module, device)
        check_kernels(name, tensor, device)
    for name, tensor in _one_of_each_wrapper(model, known):
        repacked = repacked_on(tensor, device)
        if repacked is None:
            continue
        what = (
            f"{name} is a {type(tensor).__name__} on {tensor.device.type} and is "
            f"to compute on {device.type}, {repacked.how}"
        )
        if not repacked.optional:
            raise ValueError(
                f"{what}. Quantise the model on {device.type}, and attach it as it "
                "is then"
            )
        logger.warning(
            "%s. It computes there as it is, and results may differ in the last bits "
            "from those of a model that was quantised on %s or moved there",
            what,
            device.type,
        )


def unreadable_at_rest(model: nn.Module) -> str | None:
    """Return a description of a tensor whose class cannot read its bytes in RAM."""
    for name, tensor in _one_of_each_wrapper(model, ()):
        repacked = repacked_on(tensor, torch.device("cpu"))
        if repacked is not None and not repacked.optional:
            return f"{name}, a {type(tensor).__name__} packed for {tensor.device.type}"
    return None


def _one_of_each_wrapper(
    model: nn.Module, known: Container[int]
) -> list[tuple[str, torch.Tensor]]:
    """List the smallest wrapper of each class and kind of device."""
    found: dict[tuple[type, str], tuple[str, torch.Tensor]] = {}
    for name, _, tensor, _ in _registered(model):
        if type(tensor) in (torch.Tensor, nn.Parameter) or id(tensor) in known:
            continue
        if not is_wrapper(tensor):
            continue
        first = found.setdefault((type(tensor), tensor.device.type), (name, tensor))
        if tensor.numel() < first[1].numel():
            found[type(tensor), tensor.device.type] = name, tensor
    return list(found.values())


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that have the bytes of what is registered, and its names."""
    for name, module, registered, _ in _registered(model):
        parts = parts_of(registered, module)
        for tensor in (registered,) if parts is None else parts.tensors:
            yield name, tensor

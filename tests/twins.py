"""A model with offload hooks and its reference, driven through the same actions."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    offload_stats,
)
from tests.model_trees import Printed, Spec, build
from tests.tree_modules import unpack

Device = Literal["cpu", "disk"]


@dataclass(frozen=True, repr=False)
class PolicySpec(Printed):
    """A policy that prints as the code that makes it.

    Attributes:
        offload: Where layers rest.
        onload: Where they wait.
        offload_dtype: Name of the dtype at rest; "" is each tensor's own.
        onload_dtype: Name of the dtype while waiting; "" is that at rest.
        compute_dtype: Name of the computation dtype; "" is each tensor's own.
        short: Say it with the short fields as far as they can.
        residents: "default", "none" (preparing on disk), or "cast" (in the computation
            dtype).
        limit: None, 0, or a number from 0 (the least) to 1 (more than everything) as a
            string that `float` reads.
        module_map: Pairs of a class's dotted name and a kind.
        debug: As the policy's.
    """

    offload: Device = "cpu"
    onload: Device = "cpu"
    offload_dtype: str = ""
    onload_dtype: str = ""
    compute_dtype: str = ""
    short: bool = False
    residents: str = "default"
    limit: str | int | None = None
    module_map: tuple[tuple[str, str], ...] = ()
    debug: bool = False

    def make(self, limit_gb: float | None, folder: Path) -> OffloadPolicy:
        """Makes the policy."""
        fields: dict[str, Any] = {
            "limit_gb": limit_gb,
            "module_map": dict(self.module_map),
            "debug": self.debug,
            "compute_device": "cpu",
        }
        if self.offload == "disk":
            fields["disk_dir"] = folder
        rest, wait = _dtype(self.offload_dtype), _dtype(self.onload_dtype)
        compute = _dtype(self.compute_dtype)
        if self.short and self.offload == self.onload and not self.onload_dtype:
            fields |= {
                "store": self.offload,
                "storage_dtype": rest,
                "compute_dtype": compute,
            }
        else:
            fields["offload"] = Placement(device=self.offload, dtype=rest)
            fields["onload"] = Placement(device=self.onload, dtype=wait)
            fields["computation"] = Placement(device="cpu", dtype=compute)
        if self.residents == "none":
            fields["preparing"] = Placement(device="disk")
        elif self.residents == "cast":
            fields["preparing"] = Placement(device="cpu", dtype=compute)
        return OffloadPolicy(**fields)

    @property
    def casts(self) -> bool:
        """Whether any tensor has another dtype at rest, while waiting or computing."""
        return bool(self.offload_dtype or self.onload_dtype or self.compute_dtype)

    def at_rest(self, own: torch.dtype) -> torch.dtype:
        """Returns the dtype of a resting parameter."""
        if self.offload == self.onload == "cpu":
            return self.waiting(own)
        return _dtype(self.offload_dtype) or own

    def waiting(self, own: torch.dtype) -> torch.dtype:
        """Returns the dtype of a waiting parameter."""
        return _dtype(self.onload_dtype) or _dtype(self.offload_dtype) or own

    def computing(self, own: torch.dtype) -> torch.dtype:
        """Returns the dtype in which a tensor computes."""
        return _dtype(self.compute_dtype) or own


def _dtype(name: str) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns each parameter and buffer once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def cast_tied(
    model: nn.Module, dtype_of: Callable[[Tensor], torch.dtype]
) -> None:
    """Casts a model's plain floating tensors; those that share memory go on sharing."""
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors_of(model).values():
        if tensor.dtype.is_floating_point:
            groups.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    for group in groups.values():
        (dtype,) = {dtype_of(tensor) for tensor in group}
        (own,) = {tensor.dtype for tensor in group}
        if dtype == own:
            continue
        storage = group[0].untyped_storage()
        flat = torch.empty(0, dtype=own).set_(storage)  # type: ignore[call-overload]
        flat = flat.to(dtype)
        for tensor in group:
            place = (tensor.shape, tensor.stride(), tensor.storage_offset())
            tensor.data = flat.as_strided(*place)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors have the same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat, flat_other = (
        t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        for t in (one, other)
    )
    return torch.equal(flat, flat_other)


def assert_same_output(one: Any, other: Any, what: str) -> None:
    """Compares what two forwards returned: containers, tensors, bits."""
    assert type(one) is type(other) or (
        isinstance(one, Tensor) and isinstance(other, Tensor)
    ), f"{what}: {type(one).__name__} instead of {type(other).__name__}"
    (x, more), (expected, expected_more) = unpack(one), unpack(other)
    assert len(more) == len(expected_more), what
    pairs = zip([x, *more], [expected, *expected_more], strict=True)
    for index, (value, reference) in enumerate(pairs):
        assert same_bits(value, reference), (
            f"{what}: output {index} is\n{value}\ninstead of\n{reference}"
        )


class Traces:
    """What a model and the process look like before attach, to be found again after.

    Args:
        model: not attached.
        folder: where files may be written; empty.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._hooks = _hooks(model)
        self._keys = _keys(model)
        self._threads = set(threading.enumerate())
        self.note_tensors()

    def note_tensors(self) -> None:
        """Takes the tensors of this moment for the ones to be found again."""
        self._objects = _objects(self._model)
        self._facts = {id(t): _facts(t) for _, t in self._objects}
        tensors = list(tensors_of(self._model).items())
        self._ties = {
            (one, other): pair[1].data_ptr() - pair[0].data_ptr()
            for i, (one, first) in enumerate(tensors)
            for other, second in tensors[i + 1 :]
            if first.untyped_storage()._cdata == second.untyped_storage()._cdata
            and _overlap(*(pair := (first, second)))
        }

    def assert_objects(self) -> None:
        """Checks that every parameter and buffer is the object that it was."""
        now = _objects(self._model)
        assert [name for name, _ in now] == [name for name, _ in self._objects]
        for (name, tensor), (_, before) in zip(now, self._objects, strict=True):
            assert tensor is before, f"{name} is another object"

    def assert_none_left(self) -> None:
        """Checks that nothing is left of an attachment but the values."""
        self.assert_objects()
        for name, tensor in self._objects:
            assert _facts(tensor) == self._facts[id(tensor)], name
        tensors = tensors_of(self._model)
        for (one, other), distance in self._ties.items():
            now = tensors[other].data_ptr() - tensors[one].data_ptr()
            assert now == distance, f"{one} and {other} are not tied any more"
        assert _hooks(self._model) == self._hooks
        assert _keys(self._model) == self._keys
        assert set(threading.enumerate()) <= self._threads
        assert not torch.overrides._get_current_function_mode_stack()
        assert not list(self._folder.iterdir())


def _objects(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return (
        type(tensor),
        tensor.device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.requires_grad,
        tensor.is_leaf,
        tensor.grad is None,
    )


def _overlap(one: Tensor, other: Tensor) -> bool:
    def span(tensor: Tensor) -> tuple[int, int]:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * step for size, step in steps)
        begin = tensor.data_ptr()
        end = begin + (last + 1) * tensor.itemsize
        return begin, end if tensor.numel() else begin

    (begin, end), (other_begin, other_end) = span(one), span(other)
    return begin < other_end and other_begin < end


def _hooks(model: nn.Module) -> list[Any]:
    """Returns every hook of every module, and PyTorch's global ones."""
    found: list[Any] = []
    places = [(name, vars(module)) for name, module in model.named_modules()]
    for name, attributes in [*places, ("every module", vars(torch_module))]:
        for key, value in attributes.items():
            if "hooks" in key and isinstance(value, dict | set):
                items = value.items() if isinstance(value, dict) else value
                found.append((name, key, list(items)))
    return found


def _keys(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}

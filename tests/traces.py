"""What is compared: bits, outputs, and all that an attachment could leave behind."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tests.tree_modules import unpack


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns each parameter and buffer once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


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
        self._objects: list[tuple[str, Tensor]] = []
        self._facts: dict[int, tuple[Any, ...]] = {}
        self.note_tensors()
        tensors = list({id(t): t for _, t in self._objects}.values())
        self._ties = [
            (one, other, other.data_ptr() - one.data_ptr())
            for one, other in itertools.combinations(tensors, 2)
            if _overlap(one, other)
        ]

    def note_untied(self, tensor: Tensor) -> None:
        """Takes a tensor, which was given other data, for one that shares none.

        It keeps the strides of that data.
        """
        facts = list(self._facts[id(tensor)])
        facts[_STRIDE] = tensor.stride()
        self._facts[id(tensor)] = tuple(facts)
        self._ties = [
            tie for tie in self._ties if tie[0] is not tensor and tie[1] is not tensor
        ]

    def note_tensors(self) -> None:
        """Takes the tensors of this moment for the ones to be found again."""
        now = _objects(self._model)
        # Those before are alive until here, so an id stands for one tensor.
        self._facts = {
            id(tensor): self._facts.get(id(tensor)) or _facts(tensor)
            for _, tensor in now
        }
        self._objects = now

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
        present = {id(tensor) for _, tensor in self._objects}
        for one, other, distance in self._ties:
            if {id(one), id(other)} <= present:
                assert other.data_ptr() - one.data_ptr() == distance, "untied"
        before = {(name, key): items for name, key, items in self._hooks}
        now = _hooks(self._model)
        left = [
            (name, key, item)
            for name, key, items in now
            for item in items
            if item not in before.get((name, key), ())
        ]
        assert not left, f"hooks: {left}"
        # Global ones of models that others forgot to detach may have gone meanwhile.
        own = [
            [one for one in found if one[0] != _EVERY] for found in (now, self._hooks)
        ]
        assert own[0] == own[1], "hooks in another order"
        assert _keys(self._model) == self._keys, "attributes"
        threads = set(threading.enumerate()) - self._threads
        assert not threads, f"threads: {threads}"
        modes = torch.overrides._get_current_function_mode_stack()
        assert not modes, f"function modes: {modes}"
        files = list(self._folder.iterdir())
        assert not files, f"files: {files}"


def _objects(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


_STRIDE = 4  # its place in these:


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


_EVERY = "every module"


def _hooks(model: nn.Module) -> list[Any]:
    """Returns every hook of every module, and PyTorch's global ones."""
    found: list[Any] = []
    places = [(name, vars(module)) for name, module in model.named_modules()]
    for name, attributes in [*places, (_EVERY, vars(torch_module))]:
        for key, value in attributes.items():
            if "hooks" in key and isinstance(value, dict | set):
                items = value.items() if isinstance(value, dict) else value
                found.append((name, key, list(items)))
    return found


def _keys(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}

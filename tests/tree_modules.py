"""Modules of which random trees are made; each forward is steered from outside.

Every module takes ``(x, ids, control)``, x of shape (batch, 4), and returns x, in one
of several containers if there are further outputs. A `Control` steers one forward:
which modules run how often, and where an exception is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tests.model_trees import Own, Spec

WIDTH = 4
VOCABULARY = 6


class Boom(Exception):
    """Raised in the middle of a forward."""


class Stop(KeyboardInterrupt):
    """Ctrl-C in the middle of a forward."""


class Control:
    """Steers one forward.

    Args:
        skip: Numbers of the modules that are not called.
        repeat: Numbers of the modules that are called twice.
        fail: The step at which to raise, counted over the whole forward; 0 for never.
        error: What to raise.
        compute: The dtype in which every module computes; None is its own.
    """

    def __init__(
        self,
        *,
        skip: Collection[int] = (),
        repeat: Collection[int] = (),
        fail: int = 0,
        error: type[BaseException] = Boom,
        compute: torch.dtype | None = None,
    ) -> None:
        self._skip = skip
        self._repeat = repeat
        self._fail = fail
        self._error = error
        self._steps = 0
        self.compute = compute

    def step(self) -> None:
        """Raises if this is the step at which to raise."""
        self._steps += 1
        if self._steps == self._fail:
            raise self._error(f"step {self._steps}")

    def times(self, number: int) -> int:
        """Returns how often to call a module."""
        if number in self._skip:
            return 0
        return 2 if number in self._repeat else 1


@dataclass
class Pair:
    x: Tensor
    more: Any


class NamedPair(NamedTuple):
    x: Tensor
    more: Any


PACKS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "tuple": lambda x, more: (x, tuple(more)),
    "tensor": lambda x, more: x,
    "list": lambda x, more: [x, more],
    "dict": lambda x, more: {"x": x, "more": {str(i): t for i, t in enumerate(more)}},
    "dataclass": Pair,
    "namedtuple": lambda x, more: NamedPair(x, more),
}


def unpack(output: Any) -> tuple[Tensor, list[Tensor]]:
    """Returns x and the further outputs of any module of a tree."""
    if isinstance(output, Tensor):
        return output, []
    if isinstance(output, dict):
        x, more = output["x"], output["more"]
    elif isinstance(output, Pair):
        x, more = output.x, output.more
    else:
        x, more = output
    return x, list(more.values() if isinstance(more, dict) else more)


class Node(nn.Module):
    """A module of a tree: `compute` between two steps at which it may fail."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__()
        self.variant = spec.variant
        self.number = number
        self.own_dtype = getattr(torch, spec.dtype)
        self.control: Control | None = None

    def forward(self, x: Tensor, ids: Tensor, control: Control) -> Any:
        control.step()
        self.control = control
        h = x.to(control.compute or self.own_dtype)
        output = self.compute(h, ids)
        control.step()
        y, more = unpack(output)
        y = (x + y.to(x.dtype) * 0.5).clamp(-4, 4)
        return (y, more) if more else y

    def compute(self, h: Tensor, ids: Tensor) -> Any:
        raise NotImplementedError


class Linear(Node):
    """nn.Linear; variant "bare" has no bias."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        self.inner = nn.Linear(WIDTH, WIDTH, bias=spec.variant != "bare")

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        return self.inner(h)  # type: ignore[no-any-return]

    def add_user_hook(self, hook: str) -> None:
        if hook == "pre":
            self.inner.register_forward_pre_hook(_add_corner)
        elif hook == "post":
            self.inner.register_forward_hook(_add_row)
        else:
            self.inner.register_forward_pre_hook(self._bomb)

    def _bomb(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert self.control is not None
        self.control.step()


def _add_corner(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + module.weight[0, 0], *args[1:])


def _add_row(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.weight[0]


class Conv(Node):
    """nn.Conv1d; with variant "2d" nn.Conv2d, channels last."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        if spec.variant == "2d":
            conv = nn.Conv2d(2, 2, 3, padding=1)
            self.inner: nn.Module = conv.to(memory_format=torch.channels_last)
        else:
            self.inner = nn.Conv1d(1, 1, 3, padding=1)

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        shape = (-1, 2, 2, 1) if self.variant == "2d" else (-1, 1, WIDTH)
        return self.inner(h.view(shape)).reshape(h.shape)  # type: ignore[no-any-return]


class Embedding(Node):
    """nn.Embedding; variants "padding_idx", "max_norm" and "large" (a MiB and more)."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        self.spread = 2**15 if spec.variant == "large" else 1
        self.inner = nn.Embedding(
            VOCABULARY * self.spread,
            WIDTH,
            padding_idx=1 if spec.variant == "padding_idx" else None,
            max_norm=0.5 if spec.variant == "max_norm" else None,
        )

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        return self.inner(ids * self.spread)  # type: ignore[no-any-return]


class Norm(Node):
    """Layer norm, or batch norm."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        batch = spec.kind == "batchnorm"
        self.inner = nn.BatchNorm1d(WIDTH) if batch else nn.LayerNorm(WIDTH)

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        return self.inner(h)  # type: ignore[no-any-return]


class Attention(Node):
    """nn.MultiheadAttention; variant "encoder" is nn.TransformerEncoderLayer."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        if spec.variant == "encoder":
            self.inner: nn.Module = nn.TransformerEncoderLayer(
                WIDTH, 2, WIDTH, batch_first=True
            )
        else:
            self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def compute(self, h: Tensor, ids: Tensor) -> Any:
        h = h[None]
        if self.variant == "encoder":
            return self.inner(h)[0]
        y, weights = self.inner(h, h, h)
        return y[0], [weights]


class Recurrent(Node):
    """nn.GRU; with variant "lstm" a bidirectional nn.LSTM with projections."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        if spec.variant == "lstm":
            self.inner: nn.RNNBase = nn.LSTM(
                WIDTH, WIDTH, proj_size=2, bidirectional=True, batch_first=True
            )
        else:
            self.inner = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        return self.inner(h[None])[0][0]  # type: ignore[no-any-return]


class Listed(Node):
    """Reads the parameters of an nn.ParameterList, or with "dict" a ParameterDict."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        rows = [nn.Parameter(torch.ones(WIDTH)) for _ in range(2)]
        self.scale = nn.ParameterList(rows)
        if spec.variant == "dict":
            self.scale = nn.ParameterDict({f"row{i}": r for i, r in enumerate(rows)})

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        for row in self.scale.values() if self.variant == "dict" else self.scale:
            h = h * row
        return h


class Sideways(Node):
    """Reads a child's weight without calling it; variants beyond.

    "alias" also returns a part of the weight, "dtype" asks the child for its dtype,
    "late" calls the child after it read its weight, "far" reads the weight of a linear
    that lies elsewhere in the tree, if there is one before this module.
    """

    def __init__(self, spec: Spec, number: int, linears: list[nn.Linear]) -> None:
        super().__init__(spec, number)
        self.child = nn.Linear(WIDTH, WIDTH)
        # A tuple, so that it is not registered here as well.
        self.far = (linears[spec.target % len(linears)],) if linears else ()

    def compute(self, h: Tensor, ids: Tensor) -> Any:
        child = self.child
        if self.variant == "far" and self.far:
            return functional.linear(h, self.far[0].weight.to(h.dtype))
        if self.variant == "dtype":
            h = h.to(child.weight.dtype)
        y = functional.linear(h, child.weight, bias=child.bias)
        if self.variant == "late":
            y = y + child(h)
        return (y, [child.weight[:2]]) if self.variant == "alias" else y


class Table(Node):
    """Returns rows of its table, and the table: "", "slice", "whole", "turned"."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        self.table = nn.Parameter(torch.ones(VOCABULARY, WIDTH))

    def compute(self, h: Tensor, ids: Tensor) -> Any:
        table = self.table
        more = {"slice": table[:2], "whole": table, "turned": table.t()}
        rows = table[ids]
        return (rows, [more[self.variant]]) if self.variant else rows


class Dropout(Node):
    """nn.Dropout: a module without tensors."""

    def __init__(self, spec: Spec, number: int) -> None:
        super().__init__(spec, number)
        self.inner = nn.Dropout(0.5)

    def compute(self, h: Tensor, ids: Tensor) -> Tensor:
        return self.inner(h)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Own tensors and children; variant "dict" holds them in an nn.ModuleDict."""

    def __init__(self, spec: Spec, number: int, children: list[nn.Module]) -> None:
        super().__init__()
        self.number = number
        self.own = spec.own
        self.pack = spec.pack
        self.numbers = [getattr(child, "number", 0) for child in children]
        for i, own in enumerate(spec.own):
            value = own_value(own)
            if own.kind == "parameter":
                plain = value.dtype.is_floating_point and not own.write
                value = nn.Parameter(value, requires_grad=plain and not spec.frozen)
                self.register_parameter(f"own{i}", value)
            else:
                self.register_buffer(f"own{i}", value, persistent=own.kind == "buffer")
        self.parts = nn.ModuleList(children)
        if spec.variant == "dict":
            self.parts = nn.ModuleDict({f"part{i}": c for i, c in enumerate(children)})

    def forward(self, x: Tensor, ids: Tensor, control: Control) -> Any:
        control.step()
        for i, own in enumerate(self.own):
            x = self._use(i, own, x)
        more: list[Tensor] = []
        parts = self.parts
        modules = parts.values() if isinstance(parts, nn.ModuleDict) else parts
        for number, module in zip(self.numbers, modules, strict=True):
            for _ in range(control.times(number)):
                x, found = unpack(module(x, ids, control=control))
                more += found
        control.step()
        return PACKS[self.pack](x, more)

    def _use(self, index: int, own: Own, x: Tensor) -> Tensor:
        tensor: Tensor = getattr(self, f"own{index}")
        if own.write == "replace":
            setattr(self, f"own{index}", tensor + 1)
        elif own.write:
            with torch.no_grad():
                tensor.add_(1)
        value = (tensor.real if tensor.is_complex() else tensor).to(x.dtype)
        if own.shape != "row":
            value = value.sum()
        return (x + value * 0.25).clamp(-4, 4)


def own_value(own: Own) -> Tensor:
    """Returns the first value of a block's own tensor."""
    dtype = getattr(torch, own.dtype)
    shapes = {"scalar": (), "empty": (0, WIDTH), "steps": (2 * WIDTH,)}
    shape = shapes.get(own.shape, (WIDTH, 2) if own.shape == "columns" else (WIDTH,))
    value = (torch.rand(shape) * 3).to(dtype)
    if own.shape == "columns":
        return value.t()
    if own.shape == "steps":
        return value[::2]
    return value[:1].expand(3, 1) if own.shape == "expanded" else value

"""Random module trees: specs that print as the code that makes them, and strategies.

A `Spec` describes a tree of the modules in `tests.tree_modules`; `build(spec)` makes
it, with the same bits each time, so that two builds are a model and its reference.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from tests import tree_modules as modules

FLOATS = ("float32", "bfloat16", "float16", "float64")
_KINDS: dict[str, Any] = {
    "linear": modules.Linear,
    "conv": modules.Conv,
    "embedding": modules.Embedding,
    "layernorm": modules.Norm,
    "batchnorm": modules.Norm,
    "attention": modules.Attention,
    "recurrent": modules.Recurrent,
    "listed": modules.Listed,
    "sideways": modules.Sideways,
    "table": modules.Table,
    "dropout": modules.Dropout,
}


class Printed:
    """A frozen dataclass whose repr is the shortest call that makes it again."""

    def __repr__(self) -> str:
        said = [
            f"{entry.name}={getattr(self, entry.name)!r}"
            for entry in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, entry.name) != entry.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Own(Printed):
    """A tensor that a block owns itself.

    Attributes:
        kind: "parameter", "buffer", or "hidden" (a buffer that is not persistent).
        dtype: Name of a dtype.
        shape: "row", "scalar", "empty", "columns" (transposed), "steps" (every second
            element of a larger one), "expanded" (stride 0).
        write: What a forward does to it: "" (nothing), "in place" or "replace".
    """

    kind: str
    dtype: str = "float32"
    shape: str = "row"
    write: str = ""


@dataclass(frozen=True, repr=False)
class Spec(Printed):
    """One module of a tree.

    Attributes:
        kind: "block", "shared" (an earlier module once more), or what `_KINDS` names.
        dtype: Name of the dtype of its parameters.
        variant: A variant of the kind; see its class.
        layout: How a linear's weight lies: "", "turned", "steps" (every second row of
            a larger one), "roomy" (the beginning of a larger one) or "bits" (it shares
            its memory with a parameter of integers).
        norm: On the weight of a linear or conv: "", "hook" (old-style weight norm), or
            a parametrization: "weight", "spectral", "halved".
        tie: How a linear's weight is tied to that of an earlier linear: "", "same"
            object, "view" of its storage, or a "shifted" view that overlaps it.
        hook: A user's hook on a linear: "", "pre", "post" or "bomb" (may raise).
        frozen: Its parameters do not require grad.
        target: Which earlier module it is shared with or tied to, modulo their number.
        pack: How a block returns its outputs.
        own: A block's own tensors.
        children: A block's children.
    """

    kind: str
    dtype: str = "float32"
    variant: str = ""
    layout: str = ""
    norm: str = ""
    tie: str = ""
    hook: str = ""
    frozen: bool = False
    target: int = 0
    pack: str = "tuple"
    own: tuple[Own, ...] = ()
    children: tuple[Spec, ...] = ()

    def walk(self) -> list[Spec]:
        """Returns this spec and all below it."""
        return [self, *(found for child in self.children for found in child.walk())]

    @property
    def writes(self) -> set[str]:
        """What forwards write to: "parameters", "buffers", "objects" (replaced)."""
        found = set()
        for spec in self.walk():
            if spec.kind == "embedding" and "max_norm" in spec.variant:
                found.add("parameters")
            if spec.kind == "batchnorm" or spec.norm == "spectral":
                found.add("buffers")
            for own in spec.own:
                if own.write == "replace":
                    found.add("objects")
                elif own.write:
                    found.add("parameters" if own.kind == "parameter" else "buffers")
        return found

    @property
    def has_tensors(self) -> bool:
        """Whether there is anything to attach to."""
        empty = ("block", "dropout", "shared")
        return any(spec.own or spec.kind not in empty for spec in self.walk())

    @property
    def reads_sideways(self) -> bool:
        """Whether a forward reads tensors of modules that it does not call."""
        return any(spec.kind == "sideways" for spec in self.walk())


def build(spec: Spec) -> nn.Module:
    """Makes the model that a spec describes, the same bits each time."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # old-style weight norm
        torch.manual_seed(1)
        return _Builder().make(spec)


class _Builder:
    """The modules of one tree made so far, for those that refer to earlier ones."""

    def __init__(self) -> None:
        self._count = 0
        self._done: list[nn.Module] = []
        self._linears: list[modules.Linear] = []

    def make(self, spec: Spec) -> nn.Module:
        if spec.kind == "shared":
            if self._done:
                return self._done[spec.target % len(self._done)]
            spec = Spec("linear")
        number = self._count
        self._count += 1
        if spec.kind == "block":
            children = [self.make(child) for child in spec.children]
            module: nn.Module = modules.Block(spec, number, children)
        elif spec.kind == "sideways":
            module = modules.Sideways(spec, number, self._plain_linears())
            self._finish(module, spec)
        else:
            module = _KINDS[spec.kind](spec, number)
            self._finish(module, spec)
        self._done.append(module)
        if isinstance(module, modules.Linear):
            self._linears.append(module)
        return module

    def _plain_linears(self) -> list[nn.Linear]:
        linears = [linear.inner for linear in self._linears]
        return [linear for linear in linears if "weight" in linear._parameters]

    def _finish(self, module: nn.Module, spec: Spec) -> None:
        module.to(getattr(torch, spec.dtype))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        if isinstance(module, modules.Linear):
            self._lay_out(module.inner, spec)
        if spec.norm:
            _normalise(module.inner, spec.norm)  # type: ignore[arg-type]
        if isinstance(module, modules.Linear) and spec.hook:
            module.add_user_hook(spec.hook)
        for parameter in module.parameters():
            if parameter.dtype.is_floating_point:
                parameter.requires_grad_(not spec.frozen)

    def _lay_out(self, linear: nn.Linear, spec: Spec) -> None:
        earlier = [
            other
            for other in self._plain_linears()
            if other.weight.dtype == linear.weight.dtype
        ]
        if spec.tie and earlier:
            linear.weight = _tied(earlier[spec.target % len(earlier)].weight, spec.tie)
            return
        rows = len(linear.weight)
        if spec.layout == "turned":
            linear.weight = nn.Parameter(linear.weight.detach().t())
        elif spec.layout == "bits":
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
            bits = linear.weight.detach().view(integers[linear.weight.itemsize])
            linear.bits = nn.Parameter(bits, requires_grad=False)
        elif spec.layout:
            room = linear.weight.detach().repeat(2, 1)
            step = 2 if spec.layout == "steps" else 1
            linear.weight = nn.Parameter(room[: rows * step : step])


def _tied(weight: nn.Parameter, tie: str) -> nn.Parameter:
    if tie == "same":
        return weight
    data = weight.detach()
    last = data.storage_offset() + sum(
        (size - 1) * step for size, step in zip(data.shape, data.stride(), strict=True)
    )
    room = data.untyped_storage().nbytes() // data.itemsize - last - 1
    if tie == "shifted" and room >= 8:
        offset = data.storage_offset() + 8
        return nn.Parameter(data.as_strided(data.shape, data.stride(), offset))
    return nn.Parameter(data.t())


class _Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _normalise(module: nn.Module, norm: str) -> None:
    if norm == "hook":
        weight_norm(module)
    elif norm == "weight":
        parametrizations.weight_norm(module)
    elif norm == "spectral":
        parametrizations.spectral_norm(module)
    else:
        parametrize.register_parametrization(module, "weight", _Halved())


@functools.lru_cache
def specs(
    *,
    writes: frozenset[str] = frozenset({"parameters", "buffers", "objects"}),
    narrow_buffers_change: bool = True,
    bits: bool = True,
    depth: int = 3,
) -> st.SearchStrategy[Spec]:
    """Draws trees.

    Args:
        writes: What forwards may write to: "parameters", "buffers", "objects".
        narrow_buffers_change: Whether buffers that forwards write to may be narrower
            than float32.
        bits: Whether parameters of different dtypes may share their memory; then none
            of them is ever cast.
        depth: The most blocks that lie inside one another.
    """
    kinds = [
        [
            spec
            for spec in kind
            if spec.writes <= writes and (bits or spec.layout != "bits")
        ]
        for kind in _leaves("float32" if not narrow_buffers_change else "")
    ]
    # A choice among kinds first: as a plain union, blocks would be one kind in many.
    leaves = st.sampled_from([kind for kind in kinds if kind]).flatmap(st.sampled_from)
    owned = [
        own
        for own in _owned()
        if Spec("block", own=(own,)).writes <= writes
        and (narrow_buffers_change or not own.write or own.dtype not in FLOATS[1:3])
    ]
    tree = leaves
    for level in range(depth):
        nodes = st.one_of(leaves, leaves, leaves, tree) if level else leaves
        tree = _blocks(nodes, st.sampled_from(owned))
    return tree.filter(lambda spec: spec.has_tensors)


def _blocks(
    children: st.SearchStrategy[Spec], owned: st.SearchStrategy[Own]
) -> st.SearchStrategy[Spec]:
    looks = [
        Spec("block", variant=variant, frozen=frozen, pack=pack)
        for frozen in (False, True)
        for variant in ("", "dict")
        for pack in modules.PACKS
    ]
    return st.builds(
        lambda look, own, children: dataclasses.replace(
            look, own=tuple(own), children=tuple(children)
        ),
        st.sampled_from(looks),
        st.lists(owned, max_size=3),
        st.lists(children, min_size=1, max_size=5),
    )


def _owned() -> list[Own]:
    return [
        Own(kind, dtype, shape, write)
        for write in ("", "in place", "replace")
        for shape in ("row", "scalar", "empty", "columns", "steps", "expanded")
        for kind in ("parameter", "buffer", "hidden")
        for dtype in (*FLOATS, "int64", "uint8", "bool", "complex64")
        if not (write and (dtype == "bool" or shape == "expanded"))
        and not (write == "replace" and kind == "parameter")
    ]


def _leaves(changing_dtype: str) -> list[list[Spec]]:
    """Lists the leaves, one list a kind.

    Args:
        changing_dtype: The only dtype for modules that change their buffers; "" allows
            all.
    """

    def leaf(kind: str, **choices: Sequence[Any]) -> list[Spec]:
        choices = {"dtype": FLOATS, **choices, "frozen": (False, True)}
        combined = itertools.product(*choices.values())
        return [Spec(kind, **dict(zip(choices, c, strict=True))) for c in combined]

    hooks = ["", "pre", "post", "bomb"]
    norms = ["hook", "weight", "halved"]
    targets = range(4)
    changing = [changing_dtype] if changing_dtype else FLOATS
    return [
        leaf("linear", variant=["", "bare"], hook=hooks),
        leaf("linear", layout=["turned", "steps", "roomy", "bits"]),
        leaf("linear", tie=["same", "view", "shifted"], target=targets),
        leaf("linear", norm=norms, hook=["", "post"]),
        leaf("linear", norm=["spectral"], dtype=["float32"]),
        leaf("conv", variant=["", "2d"], norm=["", *norms]),
        leaf("embedding", variant=["", "padding_idx", "large", "max_norm"]),
        leaf("layernorm"),
        leaf("batchnorm", dtype=changing),
        leaf("attention"),
        leaf("attention", variant=["encoder"], dtype=FLOATS[:2]),
        leaf("recurrent", variant=["", "lstm"]),
        leaf("listed", variant=["", "dict"]),
        leaf("sideways", variant=["", "alias", "dtype", "late", "far"]),
        leaf("table", variant=["", "slice", "whole", "turned"]),
        leaf("dropout", dtype=FLOATS[:1]),
        [Spec("shared", target=target) for target in targets],
    ]

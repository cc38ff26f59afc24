"""What a forward hands out or keeps stays right when the weights behind it are gone."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from hookoffload import OffloadPolicy, attach_offload_hooks, detach, offloaded
from hookoffload.containers import replace_tensors, tensors_within
from tests.small_models import assert_same, on_disk, run

WIDTH = 32


class Plain:
    """An object that no library knows."""

    def __init__(self, x: torch.Tensor, row: torch.Tensor) -> None:
        self.x, self.row = x, row


class Slotted:
    __slots__ = ("__dict__", "row", "x")

    def __init__(self, x: torch.Tensor, row: torch.Tensor) -> None:
        self.x, self.row = x, row


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    row: torch.Tensor


class Named(NamedTuple):
    x: torch.Tensor
    row: torch.Tensor


class Nested:
    def __init__(self, x: torch.Tensor, row: torch.Tensor) -> None:
        self.inner = {"parts": [Plain(x, row)]}
        self.itself = self  # graphs of objects have circles

    @property
    def x(self) -> torch.Tensor:
        return self.inner["parts"][0].x

    @property
    def row(self) -> torch.Tensor:
        return self.inner["parts"][0].row


class InSets:
    def __init__(self, x: torch.Tensor, row: torch.Tensor) -> None:
        self.outer, self.inner = frozenset([x]), {row}

    @property
    def x(self) -> torch.Tensor:
        return next(iter(self.outer))

    @property
    def row(self) -> torch.Tensor:
        return next(iter(self.inner))


class InDeque:
    def __init__(self, x: torch.Tensor, row: torch.Tensor) -> None:
        self.items = deque([x, row])

    @property
    def x(self) -> torch.Tensor:
        return self.items[0]

    @property
    def row(self) -> torch.Tensor:
        return self.items[1]


KINDS = [Plain, Slotted, Frozen, Named, Nested, InSets, InDeque]


class HandsOut(nn.Module):
    """Its first layer returns a view of its weight; the others overwrite the window."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.rest = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.first(x)
        y = out.x
        for layer in self.rest:
            y = layer(y)
        return y + out.row


class Returning(nn.Linear):
    def __init__(self, kind: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__(WIDTH, WIDTH)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        return self.kind(super().forward(x), self.weight[0])


def _assert_right(model: nn.Module, folder: Path, passes: int = 4) -> None:
    reference = copy.deepcopy(model)
    x = torch.randn(3, WIDTH)
    expected = run(reference, x)
    with offloaded(model, on_disk(folder)):
        for _ in range(passes):
            assert_same(run(model, x), expected)
    assert_same(run(model, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_view_of_a_weight_in_whatever_is_returned_keeps_its_bytes(
    tmp_path: Path, kind: Any
) -> None:
    torch.manual_seed(0)
    _assert_right(HandsOut(Returning(kind)), tmp_path)


class Remembers(nn.Linear):
    """Keeps a transposed view of its weight, as caches of prepared weights do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "kept"):
            self.kept = {"row": self.weight[0]}
        return super().forward(x)


class ReadsWhatWasKept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Remembers(WIDTH, WIDTH)
        self.rest = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(x)) + self.first.kept["row"]


def test_view_that_a_module_keeps_of_its_weight_keeps_its_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _assert_right(ReadsWhatWasKept(), tmp_path)


class CachesBySize(nn.Linear):
    """Keeps a view for each size that it meets, also in later forwards."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        self.cache: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) not in self.cache:
            self.cache[len(x)] = self.weight.t()
        return x @ self.cache[len(x)]


def test_view_that_is_kept_in_a_later_forward_keeps_its_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(CachesBySize() for _ in range(5)))
    plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(5)))
    plain.load_state_dict(model.state_dict())
    inputs = [torch.randn(n, WIDTH) for n in (1, 2, 3)]
    expected = [run(plain, x) for x in inputs]
    with offloaded(model, on_disk(tmp_path)):
        for _ in range(2):
            for x, wanted in zip(inputs, expected, strict=True):
                assert_same(run(model, x), wanted)
    for x, wanted in zip(inputs, expected, strict=True):
        assert_same(run(model, x), wanted)


class Appends(nn.Linear):
    def forward(self, x: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
        rows.append(self.weight[0])
        return super().forward(x)


class ReadsWhatWasAppended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Appends(WIDTH, WIDTH)
        self.rest = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        return self.rest(self.first(x, rows=rows)) + rows[0]


@pytest.mark.parametrize("first", [(), ("a", 1), (None,), (0, 0)])
def test_view_that_takes_the_place_of_another_tuple_keeps_its_bytes(
    tmp_path: Path, first: tuple[object, ...]
) -> None:
    forwards = [0]

    class Keeping(nn.Linear):
        kept: tuple[Any, ...]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if forwards[0] == 2:
                self.kept = (self.weight[0],)
            return super().forward(x)

    model = nn.Sequential(*(Keeping(WIDTH, WIDTH) for _ in range(6)))
    for part in model:
        part.kept = first
    wanted = [part.weight[0].detach().clone() for part in model]
    with offloaded(model, on_disk(tmp_path)):
        for forwards[0] in (1, 2, 3):
            run(model, torch.zeros(2, WIDTH))
        for part, row in zip(model, wanted, strict=True):
            assert_same(part.kept[0].detach(), row)


def test_view_put_into_a_list_among_the_inputs_keeps_its_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _assert_right(ReadsWhatWasAppended(), tmp_path)


def test_parameters_that_a_module_keeps_in_a_list_stay_the_same_objects(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.GRU(4, 4), nn.Identity())
    flat = list(model[0]._flat_weights)
    with offloaded(model, on_disk(tmp_path)):
        run(model, torch.randn(2, 4))
    assert all(a is b for a, b in zip(model[0]._flat_weights, flat, strict=True))


def test_view_that_cannot_be_replaced_is_refused_by_name(tmp_path: Path) -> None:
    def hidden(x: torch.Tensor, row: torch.Tensor) -> Any:
        return lambda: (x, row)

    model = HandsOut(Returning(hidden))
    attach_offload_hooks(model, on_disk(tmp_path))
    with pytest.raises(RuntimeError, match=r"first returns .* function .* clone\(\)"):
        run(model, torch.randn(3, WIDTH))
    detach(model)


def test_tensors_of_an_object_are_found_and_replaced_in_place() -> None:
    one, other = torch.zeros(2), torch.ones(2)
    value = Nested(one, other)
    assert {id(t) for t in tensors_within(value)} == {id(one), id(other)}
    same = replace_tensors(value, lambda t: t + 1)
    assert same is value
    assert torch.equal(value.x, one + 1) and torch.equal(value.row, other + 1)


def test_modules_in_an_output_are_left_alone() -> None:
    layer = nn.Linear(2, 2)
    assert not list(tensors_within({"layer": layer, "kind": nn.Linear}))


def test_attached_model_can_be_vmapped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = torch.vmap(model)(x)
        with offloaded(model, on_disk(tmp_path)):
            for _ in range(3):
                torch.testing.assert_close(torch.vmap(model)(x), expected)


def _grad(model: nn.Module, x: torch.Tensor) -> None:
    torch.func.grad(lambda y: model(y).sum())(x)


def _jvp(model: nn.Module, x: torch.Tensor) -> None:
    torch.func.jvp(model, (x,), (x,))


@pytest.mark.parametrize("transform", [_grad, _jvp])
def test_derivative_of_an_attached_model_is_refused(
    tmp_path: Path, transform: Callable[[nn.Module, torch.Tensor], None]
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    expected = run(model, x)
    with offloaded(model, on_disk(tmp_path)):
        with pytest.raises(RuntimeError, match=r"Call detach\(model\) first"):
            transform(model, x)
        assert_same(run(model, x), expected)


def test_export_of_an_attached_model_is_refused_naming_detach(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected = run(model, x)
    with offloaded(model, on_disk(tmp_path)):
        with pytest.raises(RuntimeError, match=r"Call detach\(model\) first"):
            torch.export.export(model, (x,), strict=False)
        assert_same(run(model, x), expected)


def test_model_that_ctrl_c_left_attached_is_not_kept_by_its_guard(
    tmp_path: Path,
) -> None:
    """The hook that watches for saved tensors stays in the thread, and does nothing."""

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner(x)
            raise KeyboardInterrupt

    model = Interrupted()
    attach_offload_hooks(model, on_disk(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(model, torch.zeros(1, 4))
    detach(model)
    y = torch.ones(2, requires_grad=True)
    (y * y).sum().backward()
    assert torch.equal(y.grad, 2 * torch.ones(2))
    torch.func.grad(lambda z: (z * z).sum())(torch.ones(2))


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="torch 2.6 does not tell which hooks are on its stack",
)
def test_guard_that_ctrl_c_left_takes_no_hooks_of_the_program_along(
    tmp_path: Path,
) -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.stop = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.stop:
                raise KeyboardInterrupt
            return self.inner(x)

    model = Stops()
    attach_offload_hooks(model, on_disk(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(model, torch.zeros(1, 4))
    model.stop = False
    packed = []
    y = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda t: t):
        run(model, torch.zeros(1, 4))
        y * y
    assert len(packed) == 2
    detach(model)
    torch.func.grad(lambda z: (z * z).sum())(torch.ones(2))


def test_policy_that_streams_nothing_hands_out_views_as_they_are() -> None:
    model = HandsOut(Returning(Plain))
    attach_offload_hooks(model, OffloadPolicy(compute_device="cpu"))
    out = run(model.first, torch.zeros(1, WIDTH))
    assert out.row.data_ptr() == model.first.weight.data_ptr()
    detach(model)

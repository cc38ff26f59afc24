"""Many small layers inside one module move as one, once they were seen to run in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    attach_offload_hooks,
    bundles,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    rebuilding,
    set_limit,
)
from hookoffload.state_hooks import session_of
from tests.interrupts import interrupted_at
from tests.samples import Picture, lies_in_a_file, run, same_bits

WIDTH, DEPTH = 16, 30
LAYER = 1536  # bytes of a Linear in the window
BLOCK = 4 * LAYER
GIB = 2**30
X = torch.randn(2, WIDTH)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.skipped: set[int] = set()
        self.before: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number not in self.skipped:
                x = torch.tanh(layer(x))
        return x


class _Model(nn.Module):
    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(depth))
        self.around = True  # call the blocks, not only what is in them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.around else block.forward(x)
        return x


def _model(depth: int = DEPTH) -> _Model:
    torch.default_generator.manual_seed(0)
    return _Model(depth).eval()


def _policy(layers: float, **fields: Any) -> OffloadPolicy:
    fields = {"store": "disk", "compute_device": "cpu", **fields}
    return OffloadPolicy(limit_gb=layers * LAYER / GIB, **fields)


def _names(model: nn.Module) -> list[str]:
    return [layer.name for layer in offload_plan(model).layers]


def _hooks_of(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_pre_hooks), len(module._forward_hooks)


BLOCKS = [f"blocks.{i}" for i in range(DEPTH)]
SINGLE = [f"blocks.{i}.layers.{j}" for i in range(DEPTH) for j in range(4)]


def _moved(model: nn.Module, x: torch.Tensor = X) -> int:
    before = offload_stats(model).bytes_moved
    run(model, x)
    return offload_stats(model).bytes_moved - before


def test_layers_seen_inside_a_module_become_one_layer_behind_the_first_pass() -> None:
    model = _model()
    want, before = run(model, X), Picture(model)
    with offloaded(model, _policy(70)):
        assert _names(model) == SINGLE
        assert same_bits(run(model, X), want)
        assert _names(model) == BLOCKS
        for _ in range(3):
            assert same_bits(run(model, X), want)
        stats = offload_stats(model)
        assert stats.peak_bytes <= 70 * LAYER
    assert before.differences(model) == []


def test_a_steady_pass_moves_what_the_plan_says_and_misses_nothing() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        for _ in range(3):
            run(model, X)
        misses = offload_stats(model).misses
        assert _moved(model) == offload_plan(model).pass_bytes
        assert offload_stats(model).misses == misses


def test_inside_a_bundle_one_hook_is_left_that_looks() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        run(model, X)
        run(model, X)
        streamed = next(i for i in offload_plan(model).streamed)
        block = model.blocks[streamed]
        assert _hooks_of(block) == (1, 1)
        assert [_hooks_of(layer) for layer in block.layers] == [(1, 0)] * 4


@pytest.mark.parametrize("layers", [6, 40])
def test_what_is_not_small_beside_the_limit_stays_divided(layers: int) -> None:
    model = _model()
    with offloaded(model, _policy(layers)):
        run(model, X)
        run(model, X)
        assert _names(model) == SINGLE


def test_a_model_that_fits_is_left_as_it_is() -> None:
    model = _model()
    with offloaded(model, _policy(1000)):
        run(model, X)
        assert _names(model) == SINGLE


def test_as_little_as_possible_bundles_nothing() -> None:
    model = _model()
    with offloaded(model, _policy(0)):
        run(model, X)
        run(model, X)
        assert _names(model) == SINGLE


def test_a_few_layers_less_are_not_worth_it() -> None:
    model = _model(4)
    for block in model.blocks:
        block.layers.append(nn.Linear(WIDTH, 8 * WIDTH))
        block.skipped.add(4)
    with offloaded(model, _policy(18)):
        run(model, X)
        assert len(_names(model)) == 20


def test_modules_whose_children_are_called_around_them_are_no_bundles() -> None:
    model = _model()
    model.around = False
    want = run(model, X)
    with offloaded(model, _policy(70)):
        assert same_bits(run(model, X), want)
        assert _names(model) == SINGLE


def test_a_bundle_that_is_called_around_later_is_right_and_divided_again() -> None:
    model = _model()
    want = run(model, X)
    with offloaded(model, _policy(70)):
        run(model, X)
        run(model, X)
        assert _names(model) == BLOCKS
        model.around = False
        for _ in range(3):
            assert same_bits(run(model, X), want)
        assert _names(model) == SINGLE
        assert _moved(model) == offload_plan(model).pass_bytes


def test_a_layer_inside_can_be_called_by_itself() -> None:
    model = _model()
    layer = model.blocks[7].layers[2]
    alone, want = run(layer, X), run(model, X)
    with offloaded(model, _policy(70)):
        for _ in range(3):
            assert same_bits(run(model, X), want)
            assert same_bits(run(layer, X), alone)
        assert _names(model) == BLOCKS


def test_a_bundle_of_which_little_is_used_is_divided() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        run(model, X)
        assert _names(model)[3] == "blocks.3"
        model.blocks[3].skipped = {0, 2, 3}
        want = run(model, X)
        assert _names(model)[3:7] == SINGLE[12:16]
        assert same_bits(run(model, X), want)
    assert same_bits(run(model, X), want)


@pytest.mark.parametrize(("extra", "is_bundle"), [(WIDTH, False), (1, True)])
def test_what_is_never_asked_for_comes_along_only_if_it_is_little(
    extra: int, is_bundle: bool
) -> None:
    model = _model()
    model.blocks[5].layers.append(nn.Linear(WIDTH, extra))
    model.blocks[5].skipped = {4}
    want = run(model, X)
    with offloaded(model, _policy(80)):
        for _ in range(4):
            assert same_bits(run(model, X), want)
        assert ("blocks.5" in _names(model)) == is_bundle
        assert "blocks.6" in _names(model)


def test_a_smaller_limit_divides_and_a_larger_one_bundles() -> None:
    model = _model()
    want = run(model, X)
    with offloaded(model, _policy(70)):
        run(model, X)
        set_limit(model, 2 * LAYER / GIB)  # less than a bundle
        assert _names(model) == SINGLE
        assert same_bits(run(model, X), want)
        assert offload_stats(model).peak_bytes <= 70 * LAYER
        set_limit(model, 70 * LAYER / GIB)
        assert _names(model) == BLOCKS
        assert same_bits(run(model, X), want)


def test_a_limit_that_cannot_work_leaves_the_bundles() -> None:
    model = _model()
    want = run(model, X)
    with offloaded(model, _policy(70)):
        run(model, X)
        with pytest.raises(RuntimeError, match="below the least"):
            set_limit(model, 0.5 * LAYER / GIB)
        assert _names(model) == BLOCKS
        assert same_bits(run(model, X), want)


def test_a_weight_that_is_used_outside_too_keeps_its_module_divided() -> None:
    model = _model()
    model.blocks[20].layers[3].weight = model.blocks[0].layers[0].weight
    want = run(model, X)
    with offloaded(model, _policy(70)):
        for _ in range(3):
            assert same_bits(run(model, X), want)
        names = _names(model)
        assert "blocks.1" in names
        assert "blocks.0" not in names and "blocks.20" not in names


class _Looking(_Block):
    """Adds rows of a table to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2**14 + 1, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.table(torch.tensor([5, 2**14])))


def test_a_table_of_which_rows_are_looked_up_is_never_brought_in_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundles, "BUNDLE_SHARE", 1)
    model = _model()
    model.blocks[4] = _Looking()
    want = run(model, X)
    with offloaded(model, _policy(800)):
        for _ in range(3):
            assert same_bits(run(model, X), want)
        assert _moved(model) < 2**20
        assert "blocks.4" not in _names(model)


class _Keeping(nn.Linear):
    """Keeps a view of its weight from call to call."""

    kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.weight[0]
        return super().forward(x)


def test_a_view_kept_by_a_module_inside_is_copied() -> None:
    model = _model()
    for block in model.blocks:
        block.layers[1] = _Keeping(WIDTH, WIDTH)
    keeping = [block.layers[1] for block in model.blocks]
    want = [layer.weight[0].detach().clone() for layer in keeping]
    with offloaded(model, _policy(70, debug=True)):
        for _ in range(4):
            run(model, X)
            kept = [layer.__dict__["kept"] for layer in keeping]
            assert all(map(same_bits, kept, want))


class _Showing(_Block):
    """Returns rows of a weight of a layer inside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        return self.layers[2].weight[:2]


def test_what_a_bundle_returns_of_its_weights_is_a_copy() -> None:
    got: list[torch.Tensor] = []

    class Noting(_Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            got.clear()
            for block in self.blocks:
                got.append(block(x))
            return got[-1]

    torch.default_generator.manual_seed(0)
    model = Noting()
    for number in range(DEPTH):
        model.blocks[number] = _Showing()
    want = [block.layers[2].weight[:2].detach().clone() for block in model.blocks]
    with offloaded(model, _policy(70, debug=True)):
        for _ in range(4):
            run(model, X)
            assert all(map(same_bits, got, want))
        assert _names(model) == BLOCKS


def test_writes_inside_a_bundle_reach_the_weights() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        run(model, X)
        run(model, X)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        want = run(model, X)
        assert same_bits(run(model, X), want)
    assert same_bits(run(model, X), want)


def test_an_interrupt_inside_a_bundle_leaves_a_model_that_works() -> None:
    model = _model()
    want, before = run(model, X), Picture(model)
    attach_offload_hooks(model, _policy(70))
    run(model, X)
    run(model, X)
    streamed = next(i for i in offload_plan(model).streamed)
    with interrupted_at(model.blocks[streamed].layers[2]):
        run(model, X)
    assert same_bits(run(model, X), want)
    detach(model)
    assert before.differences(model) == []


def test_an_exception_inside_a_bundle_releases_it() -> None:
    model = _model()
    want = run(model, X)
    with offloaded(model, _policy(70)):
        run(model, X)
        run(model, X)
        with pytest.raises(RuntimeError):
            run(model, torch.randn(2, WIDTH + 1))
        for _ in range(3):
            assert same_bits(run(model, X), want)
        session = session_of(model)
        assert session is not None
        assert all(layer.bound == 0 for layer in session.layers)


def test_a_limit_that_bundles_do_not_keep_is_kept_when_called_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundles, "BUNDLE_SHARE", 1)
    model = _model()
    want = run(model, X)
    with offloaded(model, _policy(6)):
        run(model, X)
        assert _names(model) == BLOCKS
        session = session_of(model)
        assert session is not None
        taken = 3 * LAYER  # somebody takes it in the middle of a pass

        def take(*_: object) -> None:
            session.budget.reserve("other", taken)

        handle = model.blocks[0].register_forward_pre_hook(take)
        with pytest.raises(BudgetExceededError):
            run(model, X)
        handle.remove()
        assert same_bits(run(model, X), want)
        assert _names(model) == SINGLE


def test_replaced_parameters_are_taken_in() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        run(model, X)
        run(model, X)
        model.blocks[2].layers[0] = nn.Linear(WIDTH, WIDTH)
        want = run(model, X)
        run(model, X)
        assert _names(model) == BLOCKS
        assert same_bits(run(model, X), want)
    assert same_bits(run(model, X), want)


class _Rows(nn.Module):
    """Hands out a view of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self) -> torch.Tensor:
        return self.weight[0]


class _Shifted(_Block):
    def __init__(self) -> None:
        super().__init__()
        self.rows = _Rows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift: torch.Tensor = self.rows()
        return super().forward(x) + shift


def test_outputs_that_are_views_of_weights_are_seen_as_without_bundles() -> None:
    model = _model(0)
    model.blocks.extend(_Shifted() for _ in range(DEPTH))
    seen: list[torch.Tensor] = []
    with offloaded(model, _policy(100)):
        for block in model.blocks:
            block.rows.register_forward_hook(lambda *call: seen.append(call[-1]))
        for _ in range(3):
            seen.clear()
            run(model, X)
    want = [block.rows.weight[0] for block in model.blocks]
    assert all(map(same_bits, seen, want))


@pytest.mark.parametrize("part_first", [False, True])
def test_an_interrupt_while_bundles_are_divided_heals(
    part_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "BUNDLE_SHARE", 4)
    model = _model()
    model.blocks[0].register_buffer("unused", torch.randn(WIDTH))
    x = X.double()
    with offloaded(copy.deepcopy(model).double(), limit_gb=None) as other:
        want, alone = run(other, x), run(other.blocks[3], x)
    before = Picture(model)
    fields = {"store": None, "compute_dtype": torch.float64}
    with offloaded(model, _policy(70, **fields)):
        run(model, x)
        assert _names(model) == BLOCKS
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(rebuilding, "partition", _interrupted)
            set_limit(model, 10 * LAYER / GIB)
        if part_first:
            assert same_bits(run(model.blocks[3], x), alone)
        for _ in range(2):
            assert same_bits(run(model, x), want)
    assert before.differences(model) == []


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_layers_that_came_before_another_limit_go_to_disk_as_others_do() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        run(model, X)
        assert _names(model) == BLOCKS
        model.blocks.append(_Block())
        set_limit(model, 10 * LAYER / GIB)
        offload(model)
        assert all(map(lies_in_a_file, model.blocks.parameters()))


def test_a_larger_limit_lets_layers_in_that_the_one_before_refuses() -> None:
    model = _model()
    with offloaded(model, _policy(70)):
        run(model, X)
        model.blocks.append(nn.Linear(WIDTH, 100 * WIDTH))
        model.blocks.append(nn.Linear(100 * WIDTH, WIDTH))
        with pytest.raises(BudgetExceededError):
            set_limit(model, 69 * LAYER / GIB)
        set_limit(model, 400 * LAYER / GIB)
        got = run(model, X)
        offload(model)
        assert all(map(lies_in_a_file, model.blocks.parameters()))
    assert same_bits(got, run(model, X))


def test_a_bundle_with_cast_buffers_of_its_own_has_one_pair_of_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bundles, "BUNDLE_SHARE", 4)
    model = _model()
    for block in model.blocks:
        block.register_buffer("unused", torch.randn(WIDTH))
    with offloaded(model, _policy(70, store=None, compute_dtype=torch.float64)):
        run(model, X.double())
        assert _names(model) == BLOCKS
        assert {_hooks_of(block) for block in model.blocks} == {(1, 1)}

"""Invariant 7: calls are counted, however they nest, repeat, share or end."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    set_limit,
)
from hookoffload.state_hooks import session_of
from tests.interrupts import interrupted_at
from tests.samples import (
    STREAMING,
    Picture,
    Stack,
    assert_runs_alike,
    hooks_of,
    linears,
    run,
    same_bits,
    seen_inside,
)

ALL = pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)


# -- nesting ------------------------------------------------------------------------


class _Nest(nn.Module):
    """Uses its own parameter before and after its child runs."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(16, 16))
        self.child = _Nest(depth - 1) if depth else nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x @ self.own) @ self.own


@ALL
def test_a_parameter_is_there_before_and_after_its_children_run(
    fields: dict[str, Any],
) -> None:
    assert_runs_alike(_Nest(4), torch.randn(2, 16), fields)


def test_all_parameters_of_a_nest_are_bound_at_once_and_counted_in_the_limit() -> None:
    model = _Nest(4)
    with offloaded(model, store="disk", limit_gb=0):
        run(model, torch.randn(2, 16))
        plan = offload_plan(model)
        own = [layer.stream_bytes for layer in plan.layers if layer.held]
        assert len(own) == 5 and plan.stack_bytes == sum(own)


# -- re-entry -----------------------------------------------------------------------


class _Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.own = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: torch.Tensor, times: int = 3) -> torch.Tensor:
        x = self.linear(x) @ self.own
        if times:
            x = self(x, times - 1)
        return x @ self.own


@ALL
@pytest.mark.parametrize("as_root", [True, False])
def test_a_module_may_call_itself(as_root: bool, fields: dict[str, Any]) -> None:
    model = _Recursive() if as_root else nn.Sequential(_Recursive(), _Recursive())
    assert_runs_alike(model, torch.randn(2, 16), fields)


@ALL
def test_a_hook_may_call_the_module_that_it_hangs_on(fields: dict[str, Any]) -> None:
    model = linears(depth=3)
    inside = []

    def call_again(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not inside:
            inside.append(module)
            try:
                assert same_bits(module(*args), output)
            finally:
                inside.clear()

    with offloaded(model, **fields):
        x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
        want = run(model, x)
        model[1].register_forward_hook(call_again)
        model[2].register_forward_hook(call_again, prepend=True)
        assert all(same_bits(run(model, x), want) for _ in range(2))


def test_two_threads_that_call_one_model_take_turns() -> None:
    model = Stack()
    inputs = [torch.randn(2, 32) for _ in range(4)]
    plain = copy.deepcopy(model)
    wants = [run(plain, x) for x in inputs]
    right: list[bool] = []

    def call(x: torch.Tensor, want: torch.Tensor) -> None:
        right.extend(same_bits(run(model, x), want) for _ in range(5))

    with offloaded(model, store="disk", limit_gb=0, debug=True):
        threads = [
            threading.Thread(target=call, args=pair)
            for pair in zip(inputs, wants, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert right == [True] * 20


# -- shared modules, repeated and single calls --------------------------------------


class _Shares(nn.Module):
    """Calls one block at three places, once from inside another block."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.outer = nn.Module()
        self.outer.inner = self.shared
        self.between = nn.Linear(16, 16)
        self.nest = nn.Sequential(nn.LayerNorm(16), self.shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.shared(x))
        return self.nest(self.outer.inner(self.shared(x)))


@ALL
def test_a_shared_module_may_run_at_several_places(fields: dict[str, Any]) -> None:
    assert_runs_alike(_Shares(), torch.randn(2, 16), fields)


class _Changing(nn.Module):
    """Takes another path from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears(width=16, depth=5)
        self.path: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.path:
            x = self.layers[index](x)
        return x


@ALL
def test_layers_may_be_skipped_repeated_and_reordered(fields: dict[str, Any]) -> None:
    model, x = _Changing(), torch.randn(2, 16, dtype=fields.get("compute_dtype"))
    plain = copy.deepcopy(model).to(x.dtype)
    paths = [[0, 1, 2, 3, 4], [4, 4, 0], [], [2], [3, 2, 1, 0], [1, 1, 1, 1], [0, 4]]
    with offloaded(model, **fields):
        for path in [*paths, *reversed(paths)]:
            model.path = plain.path = path
            assert same_bits(run(model, x), run(plain, x))


@ALL
def test_parts_of_a_model_may_be_called_on_their_own(fields: dict[str, Any]) -> None:
    model, x = Stack(), torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    plain = copy.deepcopy(model).to(x.dtype)
    before = Picture(model)
    with offloaded(model, **fields):
        for _ in range(2):
            for name in ("blocks.2", "blocks.0.up", "", "blocks.2.norm"):
                got = run(model.get_submodule(name), x)
                assert same_bits(got, run(plain.get_submodule(name), x)), name
        offload(model)
        assert same_bits(run(model.blocks[1], x), run(plain.blocks[1], x))
    assert before.differences(model) == []


# -- hooks of the user --------------------------------------------------------------


def _collects(weights: list[torch.Tensor]) -> Any:
    """Return a hook that notes a module's weight."""
    return lambda module, *_: weights.append(module.weight.detach().clone())


@ALL
@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("prepend", [False, True])
def test_pre_hooks_of_the_user_find_the_weights_bound(
    prepend: bool, when: str, fields: dict[str, Any]
) -> None:
    model, weights = Stack(), []
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    want = model.blocks[1].up.weight.detach().clone().to(x.dtype)
    hook = _collects(weights)
    if when == "before":
        model.blocks[1].up.register_forward_pre_hook(hook, prepend=prepend)
    with offloaded(model, **fields):
        if when == "while":
            model.blocks[1].up.register_forward_pre_hook(hook)
        least = offload_plan(model).least_bytes
        for _ in range(3):
            run(model, x)
        assert offload_plan(model).least_bytes == least, "nothing was read sideways"
    assert len(weights) == 3 and all(same_bits(found, want) for found in weights)


@ALL
@pytest.mark.parametrize("when", ["before", "while"])
def test_post_hooks_of_the_user_find_the_weights_bound(
    when: str, fields: dict[str, Any]
) -> None:
    model, weights = Stack(), []
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    want = model.blocks[1].up.weight.detach().clone().to(x.dtype)
    module, hook = model.blocks[1].up, _collects(weights)
    if when == "before":
        module.register_forward_hook(hook)
    with offloaded(model, **fields):
        if when == "while":
            module.register_forward_hook(hook, prepend=True)
        for _ in range(3):
            run(model, x)
    assert len(weights) == 3 and all(same_bits(found, want) for found in weights)


def test_hooks_of_the_user_may_change_inputs_and_outputs() -> None:
    model, x = Stack(), torch.randn(2, 32)
    for module in (model, model.blocks[0], model.blocks[0].up):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        module.register_forward_hook(lambda m, args, output: output + 1)
    assert_runs_alike(model, x, {"store": "disk", "limit_gb": 0})


def test_a_hook_that_always_runs_sees_the_exception_of_its_module() -> None:
    model = linears(depth=2)
    called = []
    model[1].register_forward_hook(
        lambda m, a, output: called.append(output), always_call=True
    )
    with offloaded(model, store="disk", limit_gb=0):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shapes"):
                run(model[1], torch.randn(2, 31))
        run(model, torch.randn(2, 32))
    assert called[:2] == [None, None] and len(called) == 3


def test_weight_norm_computes_its_weight_in_a_hook_from_bound_tensors() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    want = run(model, x)
    with offloaded(model, store="disk", limit_gb=0, debug=True):
        assert all(same_bits(run(model, x), want) for _ in range(3))


@ALL
def test_hooks_may_come_and_go_while_attached(fields: dict[str, Any]) -> None:
    model, x = linears(), torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    attach_offload_hooks(model, OffloadPolicy(**fields))
    seen = seen_inside(model[3], lambda called: called)
    run(model, x)
    handle = model[0].register_forward_hook(lambda *_: None)
    run(model, x)
    handle.remove()
    run(model, x)
    detach(model)
    assert len(seen) == 3 and hooks_of(model) == 1


def test_a_resident_layer_has_no_hook_at_all() -> None:
    model = Stack()
    with offloaded(model, store="disk"):
        run(model, torch.randn(2, 32))
        run(model, torch.randn(2, 32))
        forward_hooks = [
            len(m._forward_hooks) + len(m._forward_pre_hooks)
            for m in model.modules()
            if m is not model
        ]
        assert not any(forward_hooks)
        moved = offload_stats(model).bytes_moved
        run(model, torch.randn(2, 32))
        assert offload_stats(model).bytes_moved == moved


@pytest.mark.parametrize("limit_gb", [None, 0])
@pytest.mark.parametrize("warm", [0, 3])
def test_part_called_by_itself_writes_its_cast_buffer_as_in_a_forward_of_the_root(
    limit_gb: float | None, warm: int
) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.tensor(2.71742))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state.mul_(1.01)
            return self.linear(x) * self.state

    x = torch.randn(2, 4, dtype=torch.bfloat16)
    states = []
    for part in ("", "0"):
        model = nn.Sequential(Counts())
        policy = OffloadPolicy(
            store="disk", compute_dtype=torch.bfloat16, limit_gb=limit_gb
        )
        attach_offload_hooks(model, policy)
        for _ in range(warm):
            run(model, x)
        run(model.get_submodule(part), x)
        detach(model)
        states.append(model[0].state.item())
    assert states[0] == states[1]


def _hooks_by_name(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
        if name and (module._forward_hooks or module._forward_pre_hooks)
    }


def _half_resident() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Attach a model of which a part stays resident; it has found its plan."""
    model, x = linears(depth=8), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    size = sum(p.nbytes for p in model.parameters())
    policy = OffloadPolicy(store="disk", limit_gb=0.7 * size / 2**30)
    attach_offload_hooks(model, policy)
    for _ in range(3):
        assert same_bits(run(model, x), want)
    return model, x, want


def test_a_resident_layer_among_streamed_ones_keeps_one_hook_that_only_looks() -> None:
    model, x, want = _half_resident()
    resident = {name for name, n in _hooks_by_name(model).items() if n == 1}
    plan = offload_plan(model)
    assert resident == {plan.layers[index].name for index in plan.resident}
    assert 0 < len(resident) < 8
    for name in (*resident, *resident):
        part = model.get_submodule(name)
        with torch.no_grad():
            assert same_bits(run(part, x), F.linear(x, part.weight))
        assert _hooks_by_name(model)[name] == 2
    assert same_bits(run(model, x), want)
    detach(model)
    assert not _hooks_by_name(model)


def test_a_resident_layer_that_was_called_alone_stands_by_again() -> None:
    model, x, want = _half_resident()
    before = _hooks_by_name(model)
    for _ in range(2):
        for part in model:
            run(part, x)
        for _ in range(2):
            assert same_bits(run(model, x), want)
        assert _hooks_by_name(model) == before
    detach(model)


def test_layers_that_stand_by_are_noted_once_however_often_hooks_come_and_go() -> None:
    model, x, _ = _half_resident()
    session = session_of(model)
    assert session is not None
    for _ in range(5):
        name = next(name for name, n in _hooks_by_name(model).items() if n == 1)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(0.5)
        model.state_dict()
        for _ in range(2):
            run(model, x)
        noted = session.hooks._standing_by
        assert all(len(sites) == 1 for sites in noted.values())
        assert len(noted) == list(_hooks_by_name(model).values()).count(1)
    detach(model)


def test_attach_takes_a_number_of_steps_that_grows_with_the_layers() -> None:
    def steps(depth: int) -> int:
        model = linears(width=8, depth=depth)
        with interrupted_at(None) as counted:
            attach_offload_hooks(model, OffloadPolicy(store="disk", limit_gb=0))
        detach(model)
        return counted.count

    assert steps(160) < 2.5 * steps(80)


def test_a_resident_layer_that_has_to_go_gets_its_hooks_back() -> None:
    model, x, want = _half_resident()
    before = {name for name, n in _hooks_by_name(model).items() if n == 1}
    set_limit(model, 0.5 * sum(p.nbytes for p in model.parameters()) / 2**30)
    for _ in range(3):
        assert same_bits(run(model, x), want)
    after = {name for name, n in _hooks_by_name(model).items() if n == 1}
    assert after < before
    offload(model)
    assert set(_hooks_by_name(model).values()) == {2}
    assert same_bits(run(model, x), want)


def test_an_edit_of_a_resident_layer_is_seen_by_the_next_forward_and_kept() -> None:
    model, x, _ = _half_resident()
    name = next(name for name, n in _hooks_by_name(model).items() if n == 1)
    part = model.get_submodule(name)
    with torch.no_grad():
        part.weight.mul_(2)
    plain = linears(depth=8)
    plain.load_state_dict(model.state_dict())
    assert same_bits(run(model, x), run(plain, x))
    for each in (model, plain):
        each.state_dict()[f"{name}.weight"].mul_(2)
    before = offload_stats(model).bytes_moved
    assert same_bits(run(model, x), run(plain, x))
    brought = offload_plan(model).pass_bytes + part.weight.nbytes
    assert offload_stats(model).bytes_moved - before == brought
    model.get_submodule(name).weight.data = torch.zeros(32, 32)
    plain.get_submodule(name).weight.data = torch.zeros(32, 32)
    assert same_bits(run(model, x), run(plain, x))
    detach(model)
    assert same_bits(run(model, x), run(plain, x))


def test_steady_passes_that_leave_residents_out_copy_what_the_plan_says() -> None:
    model, x, _ = _half_resident()
    before = offload_stats(model)
    run(model, x)
    after = offload_stats(model)
    moved = after.bytes_moved - before.bytes_moved
    plan = offload_plan(model)
    assert moved == plan.pass_bytes
    assert after.misses == before.misses


def test_an_output_that_is_a_view_of_a_weight_stays_right() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(8, 16))

        def forward(self, index: int) -> dict[str, Any]:
            return {"row": self.rows[index], "all": (self.rows, [self.rows.T])}

    model = nn.ModuleDict({"one": Table(), "other": Table()})
    want = {n: t.rows.detach().clone() for n, t in model.items()}
    with offloaded(model, store="disk", limit_gb=0, debug=True):
        outputs = {name: run(table, 3) for name, table in model.items()}
        for name, output in outputs.items():
            assert same_bits(output["row"], want[name][3])
            assert same_bits(output["all"][0], want[name])
            assert same_bits(output["all"][1][0], want[name].T)

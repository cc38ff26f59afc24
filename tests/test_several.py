"""Several models under one limit."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    Placement,
    Plans,
    activate,
    add_lora,
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
    report,
    set_limit,
)
from hookoffload.session import Session
from hookoffload.state_hooks import session_of
from tests.interrupts import interrupted_at, steps_of
from tests.samples import (
    GIB,
    Picture,
    Stack,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    weight_bytes,
)
from tests.workers import in_thread, in_threads

WIDTH = 32
LAYER = WIDTH * WIDTH * 4  # bytes of one of `linears`, a multiple of the alignment
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)

Models = dict[str, nn.Module]


def _models(**depths: int) -> Models:
    return {name: linears(WIDTH, depth) for name, depth in depths.items()}


def _policy(layers: float | None, **fields: Any) -> OffloadPolicy:
    """Stream from disk on the CPU, with a limit of so many layers."""
    limit = None if layers is None else layers * LAYER / GIB
    fields = {"store": "disk", **fields}
    return OffloadPolicy(limit_gb=limit, compute_device="cpu", **fields)


def _outputs(models: Models) -> dict[str, torch.Tensor]:
    return {name: run(model, X) for name, model in models.items()}


def _kept(models: Models) -> dict[str, int]:
    """Count the layers of each model that lie on the compute device."""
    kept = {}
    for name, model in models.items():
        session = session_of(model)
        assert session is not None
        kept[name] = sum(layer.resident is not None for layer in session.layers)
    return kept


def _moved(models: Models, call: Callable[[], object]) -> float:
    """Return how many layers' bytes are copied in a call."""
    before = offload_stats(models).bytes_moved
    call()
    return (offload_stats(models).bytes_moved - before) / LAYER


def _run_all(models: Models, want: dict[str, torch.Tensor], order: str) -> None:
    for name in order:
        assert same_bits(run(models[name], X), want[name]), name


@pytest.fixture
def unattached() -> Iterator[None]:
    """Notices threads of attached models that are left behind."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


# -- what fits stays, what does not gives way ---------------------------------------


def test_outputs_are_equal_and_one_limit_holds_for_all(unattached: None) -> None:
    models = {"a": Stack(), "b": linears(WIDTH, 5), "c": Stack(depth=2)}
    want = _outputs(models)
    before = {name: Picture(model) for name, model in models.items()}
    total = sum(map(weight_bytes, models.values()))
    for limit in (0.0, 0.25 * total / GIB, 0.6 * total / GIB, 2 * total / GIB, None):
        policy = OffloadPolicy(limit_gb=limit, compute_device="cpu", store="disk")
        assert attach_offload_hooks(models, policy) is models
        _run_all(models, want, "abcabbbcaabc")
        stats = offload_stats(models)
        assert stats.forwards == 12
        assert sum(stats.peak_by_kind.values()) == stats.peak_bytes
        if limit:
            assert stats.peak_bytes <= limit * GIB
        assert detach(models) is models
        for name, model in models.items():
            assert before[name].differences(model) == []


def test_nothing_is_evicted_that_still_fits() -> None:
    models = _models(a=3, b=4, c=2)
    want = _outputs(models)
    with offloaded(models, _policy(9 + 3)):  # and the window of the first forwards
        _run_all(models, want, "aabbcc")
        assert _kept(models) == {"a": 3, "b": 4, "c": 2}
        assert _moved(models, lambda: _run_all(models, want, "abcabc")) == 0


def test_idle_models_give_way_only_as_far_as_needed() -> None:
    models = _models(a=4, b=4)
    want = _outputs(models)
    with offloaded(models, _policy(6)):
        _run_all(models, want, "aa")
        assert _kept(models) == {"a": 4, "b": 0}
        _run_all(models, want, "bb")
        assert _kept(models) == {"a": 2, "b": 4}
        assert not _is_kept(models["a"], 3)
        assert _is_kept(models["a"], 0), "its first layers are needed soonest"
        _run_all(models, want, "aa")
        assert _kept(models) == {"a": 4, "b": 2}


def _is_kept(model: nn.Module, index: int) -> bool:
    session = session_of(model)
    assert session is not None
    return session.layers[index].resident is not None


def test_least_soon_needed_gives_way_first() -> None:
    models = _models(a=3, b=3, c=3)
    want = _outputs(models)
    with offloaded(models, _policy(6)):
        _run_all(models, want, "aabbccaabbcc")
        assert _kept(models) == {"a": 0, "b": 3, "c": 3}
        _run_all(models, want, "aa")
        # Behind a comes b, and c after that.
        assert _kept(models) == {"a": 3, "b": 3, "c": 0}


def test_models_that_take_turns_do_not_take_each_others_place() -> None:
    models = _models(a=8, b=8)
    want = _outputs(models)
    with offloaded(models, _policy(12)):
        _run_all(models, want, "abababab")
        cycle = _moved(models, lambda: _run_all(models, want, "ab"))
        assert cycle == _moved(models, lambda: _run_all(models, want, "ab"))
        # 12 layers fit, and streaming takes a window of three of them.
        assert cycle <= 16 - (12 - 3)


def test_a_model_that_runs_once_a_run_does_not_drive_out_the_one_that_loops() -> None:
    models = _models(text=6, unet=6)
    want = _outputs(models)

    def generate() -> None:
        for name in ("text", *["unet"] * 5):
            assert same_bits(run(models[name], X), want[name])

    with offloaded(models, _policy(7)):
        generate()
        generate()
        # All of text, and of unet what gave way to the window of text.
        assert _moved(models, generate) <= 6 + 3


def test_a_limit_of_zero_keeps_nothing_of_idle_models() -> None:
    models: Models = {"a": Stack(), "b": Stack()}
    want = _outputs(models)
    alone = []
    for model in models.values():
        with offloaded(model, _policy(0)):
            run(model, X)
            run(model, X)
            alone.append(offload_stats(model).peak_bytes)
    with offloaded(models, _policy(0)):
        _run_all(models, want, "abab")
        assert offload_stats(models).peak_bytes == max(alone)


@given(data=st.data())
def test_whatever_is_called_the_limit_holds_and_the_outputs_are_equal(
    data: st.DataObject,
) -> None:
    depths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    models: Models = {}
    for number, depth in enumerate(depths):
        stack = data.draw(st.booleans())
        models["abcd"[number]] = Stack(WIDTH, depth) if stack else linears(WIDTH, depth)
    want = _outputs(models)
    before = {name: Picture(model) for name, model in models.items()}
    least = 0
    for model in models.values():
        plan = offload_plan(model, _policy(None))
        least = max(least, plan.least_bytes)
    limit = least / LAYER + data.draw(st.floats(0, 20))
    fields: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {"store": "disk"},
                {"store": "disk", "debug": True},
                {
                    "store": None,
                    "offload": Placement(device="disk"),
                    "onload": Placement(device="cpu"),
                    "computation": Placement(dtype=torch.float32),
                },
                {"record": True},
            ]
        )
    )
    attach_offload_hooks(models, _policy(limit, **fields))
    names = st.sampled_from(list(models))
    for action in data.draw(st.lists(st.one_of(names, st.integers(0, 3)), max_size=14)):
        if isinstance(action, str):
            assert same_bits(run(models[action], X), want[action])
        elif action == 0:
            activate(models, data.draw(st.lists(names, max_size=2)))
        elif action == 1:
            offload(models[data.draw(names)])
        elif action == 2:
            limit = least / LAYER + data.draw(st.floats(0, 20))
            set_limit(models, limit * LAYER / GIB)
            session = session_of(models["a"])
            assert session is not None and session.group is not None
            session.group.budget.reset_peak()
        else:
            part = next(iter(models["a"].modules()))
            linear = next(m for m in part.modules() if isinstance(m, nn.Linear))
            run(linear, X)
        stats = offload_stats(models)
        assert stats.limit_bytes is not None
        assert stats.peak_bytes <= stats.limit_bytes
    detach(models)
    for name, model in models.items():
        assert before[name].differences(model) == []


# -- by hand ------------------------------------------------------------------------


def test_activate_onloads_the_named_and_offloads_the_others() -> None:
    models = _models(a=3, b=3)
    want = _outputs(models)
    with offloaded(models, _policy(None)):
        _run_all(models, want, "aabb")
        assert _kept(models) == {"a": 3, "b": 3}
        activate(models, ["b"])
        assert _kept(models) == {"a": 0, "b": 3}
        activate(models, [])
        assert _kept(models) == {"a": 0, "b": 0}
        session = session_of(models["a"])
        assert session is not None and session.group is not None
        assert session.group.budget.used == 0
        _run_all(models, want, "ab")


def _in_ram(model: nn.Module) -> bool:
    return not any(lies_in_a_file(p) for p in model.parameters())


TIERS = {
    "store": None,
    "offload": Placement(device="disk"),
    "onload": Placement(device="cpu", dtype=torch.float64),
}


def test_an_idle_model_that_offloads_to_disk_gives_its_ram_back() -> None:
    models = _models(a=2, b=2)
    want = _outputs(models)
    with offloaded(models, _policy(None, **TIERS)):
        for name, other in ("ab", "ba", "ab"):
            assert same_bits(run(models[name], X), want[name])
            assert _in_ram(models[name])
            assert not _in_ram(models[other])


def test_models_that_were_activated_together_keep_their_ram() -> None:
    models = _models(a=2, b=2, c=2)
    want = _outputs(models)
    with offloaded(models, _policy(None, **TIERS)):
        activate(models, ["a", "b"])
        assert [_in_ram(model) for model in models.values()] == [True, True, False]
        _run_all(models, want, "abab")
        assert [_in_ram(model) for model in models.values()] == [True, True, False]
        _run_all(models, want, "c")
        assert [_in_ram(model) for model in models.values()] == [False, False, True]


def test_onload_and_offload_take_all_models_or_one() -> None:
    models = _models(a=2, b=2)
    with offloaded(models, _policy(None, **TIERS)):
        onload(models)
        assert all(map(_in_ram, models.values()))
        offload(models["a"])
        assert not _in_ram(models["a"])
        assert _in_ram(models["b"])
        offload(models)
        assert not any(map(_in_ram, models.values()))


def test_set_limit_holds_for_all_at_once() -> None:
    models = _models(a=4, b=4)
    want = _outputs(models)
    with offloaded(models, _policy(None)):
        _run_all(models, want, "aabb")
        set_limit(models, 5 * LAYER / GIB)
        session = session_of(models["a"])
        assert session is not None and session.group is not None
        assert session.group.budget.used <= 5 * LAYER
        session.group.budget.reset_peak()
        _run_all(models, want, "aabb")
        assert offload_stats(models).peak_bytes <= 5 * LAYER


def test_set_limit_takes_the_memory_of_all_and_not_of_the_last_alone() -> None:
    models = _models(a=2, b=1)
    want = _outputs(models)
    least = max(plan.least_bytes for plan in offload_plan(models, _policy(9)).values())
    with offloaded(models, _policy(least / LAYER + 2, store="disk")):
        _run_all(models, want, "ab")
        set_limit(models, least / GIB)
        session = session_of(models["a"])
        assert session is not None and session.group is not None
        assert session.group.budget.used <= least
        _run_all(models, want, "ab")


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("together", [False, True])
def test_interrupt_at_any_step_of_another_limit_leaves_one_for_all(
    together: bool, layers: int
) -> None:
    models = _models(a=4, b=4) if together else _models(a=4)
    attached: Any = models if together else models["a"]
    want = _outputs(models)

    def limits() -> set[int | None]:
        sessions = [session_of(model) for model in models.values()]
        return {s.budget.limit_bytes for s in sessions if s is not None} | {
            s.plan.limit_bytes for s in sessions if s is not None
        }

    with offloaded(attached, _policy(5)):
        _run_all(models, want, "".join(models))
        steps = steps_of(lambda: set_limit(attached, layers * LAYER / GIB))
        after = limits()
        set_limit(attached, 5 * LAYER / GIB)
        before = limits()
        for step in steps:
            with (
                contextlib.suppress(KeyboardInterrupt),
                interrupted_at(step),
            ):
                set_limit(attached, layers * LAYER / GIB)
            assert limits() in (before, after), step
            _run_all(models, want, "".join(models))
            set_limit(attached, 5 * LAYER / GIB)
            assert limits() == before


@pytest.mark.parametrize("layers", [0, 3, 5])
def test_models_that_gave_memory_back_let_every_thread_in(layers: int) -> None:
    models = _models(a=4, b=4)
    want = _outputs(models)
    with offloaded(models, _policy(None)):
        _run_all(models, want, "ab")
        set_limit(models, layers * LAYER / GIB)
        before = offload_stats(models).forwards
        _run_all(models, want, "ab")
        in_thread(lambda: _run_all(models, want, "ba"))
        _run_all(models, want, "ab")
        assert offload_stats(models).forwards == before + 6


@pytest.mark.parametrize("together", [False, True])
def test_a_limit_of_0_gives_the_memory_back_at_once(together: bool) -> None:
    models = _models(a=4, b=4) if together else _models(a=4)
    want = _outputs(models)
    attached: Any = models if together else models["a"]
    with offloaded(attached, _policy(None, store="disk")):
        _run_all(models, want, "".join(models))
        session = session_of(models["a"])
        assert session is not None
        assert session.budget.total_used >= 4 * LAYER
        set_limit(attached, 0)
        assert session.budget.total_used <= session.plan.least_bytes
        _run_all(models, want, "".join(models))


def test_a_limit_that_one_model_cannot_run_in_changes_nothing() -> None:
    models: Models = {"small": linears(WIDTH, 2), "large": linears(2 * WIDTH, 2)}
    with offloaded(models, _policy(20)):
        with pytest.raises(BudgetExceededError, match=r"^large: limit_gb="):
            set_limit(models, 2 * LAYER / GIB)
        assert offload_stats(models).limit_bytes == 20 * LAYER
        plans = offload_plan(models)
        assert {plan.limit_bytes for plan in plans.values()} == {20 * LAYER}
        assert same_bits(run(models["small"], X), run(models["small"], X))


def test_plans_and_figures_are_told_for_each_model() -> None:
    models = _models(a=2, b=3)
    plans = offload_plan(models, _policy(4))
    assert isinstance(plans, Plans)
    assert {name: len(plan.layers) for name, plan in plans.items()} == {"a": 2, "b": 3}
    with offloaded(models, _policy(4)):
        run(models["b"], X)
        assert list(offload_plan(models)) == ["a", "b"]
        assert str(offload_plan(models)).startswith("a\nPlan: ")
        stats = offload_stats(models)
        assert stats.by_model["b"].bytes_moved == stats.bytes_moved == 3 * LAYER
        assert offload_stats(models["b"]).forwards == 1
        assert offload_stats(models["a"]).forwards == 0
        assert offload_plan(models["b"]).limit_bytes == 4 * LAYER


def test_a_lora_of_one_model_counts_against_the_limit_of_all() -> None:
    models = _models(a=4, b=4)
    want = _outputs(models)
    with offloaded(models, _policy(5)):
        _run_all(models, want, "aabb")
        lora = {"0.lora_A.weight": torch.ones(1, WIDTH), "0.lora_B.weight": X[:1].T}
        add_lora(models["a"], lora)
        assert not same_bits(run(models["a"], X), want["a"])
        _run_all(models, want, "bb")
        assert offload_stats(models).peak_bytes <= 5 * LAYER


def test_each_model_has_a_report() -> None:
    models = _models(a=2, b=2)
    with offloaded(models, _policy(4, record=True)):
        run(models["a"], X)
        assert "1 forwards" in repr(report(models["a"]))
        with pytest.raises(ValueError, match="holds several: a, b"):
            report(models)  # type: ignore[arg-type]


# -- calls in and beside each other -------------------------------------------------


class Calls(nn.Module):
    """Calls another model in the middle of its forward, and does not own it."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.before = linears(WIDTH, 3)
        self.after = linears(WIDTH, 3)
        self._other = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self._other[0](self.before(x)))


@pytest.mark.parametrize("layers", [2, 4, 6, 8, None])
def test_a_model_may_call_another_one(layers: int | None) -> None:
    inner = linears(WIDTH, 4)
    models: Models = {"outer": Calls(inner), "inner": inner}
    want = _outputs(models)
    with offloaded(models, _policy(layers, debug=True)):
        for name in ["outer"] * 4 + ["inner", "inner", "outer", "outer"]:
            assert same_bits(run(models[name], X), want[name])
        if layers:
            assert offload_stats(models).peak_bytes <= layers * LAYER


def test_what_gave_way_in_the_middle_of_a_forward_comes_back() -> None:
    inner = linears(WIDTH, 4)
    models: Models = {"outer": Calls(inner), "inner": inner}
    want = _outputs(models)
    attach_offload_hooks(models, _policy(6))
    for _ in range(4):
        assert same_bits(run(models["outer"], X), want["outer"])
    models["outer"]._other = [nn.Identity()]  # type: ignore[assignment]
    alone = run(models["outer"], X)
    assert same_bits(run(models["outer"], X), alone)
    assert _kept(models)["outer"] == 6
    assert _moved(models, lambda: run(models["outer"], X)) == 0
    detach(models)


@pytest.mark.parametrize("layers", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_keeps_the_memory_that_an_idle_model_gave_way(
    dtype: torch.dtype, layers: float
) -> None:
    models = {"a": Stack(depth=3), "b": linears(WIDTH, 5)}
    x = X.to(dtype)
    policy = _policy(layers * dtype.itemsize / 4, compute_dtype=dtype)
    with offloaded(models, policy):
        for _ in range(3):
            run(models["a"], x)
        session = session_of(models["a"])
        assert session is not None
        live = session.mover.memory._live
        taken = {
            key: (block.kind, StorageWeakRef(block.bytes.untyped_storage()))
            for key, block in live.items()
        }
        run(models["b"], x)
        run(models["b"], x)
        gc.collect()
        gone = {key: kept for key, kept in taken.items() if key not in live}
        assert "window" in {kind for kind, _ in gone.values()}
        assert [kind for kind, memory in gone.values() if not memory.expired()] == []
        run(models["a"], x)


def test_buffers_that_are_always_on_the_device_find_room() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(8, WIDTH, WIDTH))
            self.tail = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tail(x + self.table.mean((0, 1)))

    models: Models = {"a": linears(WIDTH, 8), "norm": Norm()}
    # Cast to twice their size, they are copies also where the CPU computes.
    with offloaded(models, _policy(2 * 11, compute_dtype=torch.float64)):
        for name in ("a", "a", "norm", "norm", "a", "a", "norm"):
            run(models[name], X.double())
            assert offload_stats(models).peak_bytes <= 22 * LAYER


def test_a_model_that_does_not_fit_beside_the_one_that_calls_it_says_so() -> None:
    class Held(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(WIDTH))
            self.tail = nn.Linear(WIDTH, WIDTH)
            self._other = [other]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tail(self._other[0](x @ self.weight))

    inner = linears(2 * WIDTH, 1)
    inner.forward = lambda x: x @ inner[0].weight[:WIDTH, :WIDTH]  # type: ignore
    outer = nn.Sequential(Held(linears(WIDTH, 1)))
    models: Models = {"outer": outer, "inner": linears(WIDTH, 2)}
    outer[0]._other = [models["inner"]]  # type: ignore[assignment]
    want = _outputs(models)
    attach_offload_hooks(models, _policy(2.5))
    with pytest.raises(BudgetExceededError, match=r"inner .* beside outer .*running"):
        run(outer, X)
    set_limit(models, 4 * LAYER / GIB)
    _check(models, want)
    detach(models)


def _check(models: Models, want: dict[str, torch.Tensor]) -> None:
    for name, model in models.items():
        assert same_bits(run(model, X), want[name]), name


def test_threads_that_call_different_models_take_turns(unattached: None) -> None:
    models = _models(a=4, b=5, c=3)
    want = _outputs(models)
    attach_offload_hooks(models, _policy(4.5, debug=True))

    def work(number: int) -> None:
        for turn in range(15):
            name = "abc"[(number + turn * (number + 1)) % 3]
            assert same_bits(run(models[name], X), want[name])

    in_threads(work, 4)
    assert offload_stats(models).forwards == 60
    assert offload_stats(models).peak_bytes <= 4.5 * LAYER
    detach(models)


def test_nothing_gives_way_while_a_part_of_a_resident_model_runs() -> None:
    models = _models(a=2, b=2)
    want = _outputs(models)
    inside = threading.Event()
    left: list[float] = []
    part: nn.Module = models["a"][0]  # type: ignore[index]

    def linger(*_: Any) -> None:
        inside.set()
        time.sleep(0.3)
        left.append(time.monotonic())

    with offloaded(models, _policy(20)):
        _run_all(models, want, "aabb")
        handle = part.register_forward_pre_hook(linger)

        def work(number: int) -> float:
            if number == 0:
                run(part, X)
            else:
                assert inside.wait(10)
                _run_all(models, want, "b")
            return time.monotonic()

        ends = in_threads(work, 2)
        handle.remove()
        assert ends[1] >= left[0], "one thread at a time is inside any of them"


def test_a_model_that_calls_another_one_does_not_wait_for_a_thread_inside_it() -> None:
    inner = linears(WIDTH, 2)
    models: Models = {"outer": Calls(inner), "inner": inner}
    want = _outputs(models)
    attach_offload_hooks(models, _policy(5))

    def work(number: int) -> None:
        name = ("outer", "inner")[number % 2]
        for _ in range(20):
            assert same_bits(run(models[name], X), want[name])

    in_threads(work, 4)
    detach(models)


class Killed(BaseException):
    """Ends a forward like Ctrl-C: hooks for a failed forward do not run."""


@pytest.mark.parametrize("error", [ValueError, Killed])
@pytest.mark.parametrize("same", [True, False])
def test_after_a_forward_that_was_cut_short_every_model_runs(
    error: type[BaseException], same: bool
) -> None:
    models = _models(a=4, b=4)
    want = _outputs(models)
    before = {name: Picture(model) for name, model in models.items()}
    attach_offload_hooks(models, _policy(5))
    _run_all(models, want, "aabb")

    def fail(*_: Any) -> None:
        raise error

    handle = models["a"][2].register_forward_pre_hook(fail)  # type: ignore[index]
    with pytest.raises(error):
        run(models["a"], X)
    handle.remove()
    _run_all(models, want, "aabb" if same else "bbaa")
    in_thread(lambda: _run_all(models, want, "abab"))
    assert offload_stats(models).peak_bytes <= 5 * LAYER
    detach(models)
    for name, model in models.items():
        assert before[name].differences(model) == []


def test_detach_in_the_middle_of_a_forward_is_refused_for_all() -> None:
    models = _models(a=2, b=2)
    want = _outputs(models)
    attach_offload_hooks(models, _policy(3))
    raised = []

    def inside(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="inside the model's own forward"):
            detach(models)
        raised.append(True)

    handle = models["b"][0].register_forward_hook(inside)  # type: ignore[index]
    _run_all(models, want, "ab")
    handle.remove()
    assert raised
    _run_all(models, want, "ab")
    detach(models)


def test_a_part_that_is_called_by_itself_makes_its_model_active() -> None:
    models = _models(a=4, b=4)
    want = _outputs(models)
    first = run(models["b"][0], X)  # type: ignore[index]
    with offloaded(models, _policy(4.5)):
        _run_all(models, want, "aa")
        for _ in range(3):
            assert same_bits(run(models["b"][0], X), first)  # type: ignore[index]
        assert offload_stats(models).peak_bytes <= 4.5 * LAYER
        _run_all(models, want, "ab")


# -- what is given ------------------------------------------------------------------


def test_components_that_are_no_modules_are_left_alone() -> None:
    pipe = SimpleNamespace(
        components={
            "tokenizer": object(),
            "unet": linears(),
            "vae": None,
            "scale": 2,
            "resize": nn.Upsample(scale_factor=2),
        }
    )
    want = run(pipe.components["unet"], X)
    with offloaded(pipe, _policy(4)):
        assert same_bits(run(pipe.components["unet"], X), want)
        assert list(offload_plan(pipe)) == ["unet"]


def test_two_names_of_one_model_are_one_model() -> None:
    model = linears()
    models: Models = {"a": model, "again": model}
    with offloaded(models, _policy(4)):
        assert list(offload_plan(models)) == ["a"]
        activate(models, ["again"])
        run(model, X)
        assert offload_stats(models).forwards == 1


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": ({}, ValueError, "holds no torch.nn.Module with weights: it is empty"),
    "no module": ({"a": linears(), "b": 3}, ValueError, "'b' is a int and not a"),
    "no models": (
        SimpleNamespace(components={"tokenizer": 1}),
        ValueError,
        "holds no torch.nn.Module with weights: tokenizer",
    ),
    "a list": ([linears()], ValueError, "must be a torch.nn.Module"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_holds_no_models_is_refused(case: str) -> None:
    given_models, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attach_offload_hooks(given_models, _policy(None))


def test_models_that_share_a_module_are_refused_by_its_names() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    models: Models = {"a": nn.Sequential(shared), "b": nn.Sequential(nn.ReLU(), shared)}
    with pytest.raises(ValueError, match=r"^b\.1 and a\.0 are the same"):
        attach_offload_hooks(models, _policy(None))
    assert session_of(models["a"]) is None


def test_models_that_share_a_tensor_are_refused_by_its_names() -> None:
    models = _models(a=2, b=2)
    models["b"][1].weight = models["a"][0].weight  # type: ignore[index]
    with pytest.raises(ValueError, match=r"^b\.1\.weight and a\.0\.weight are the sa"):
        attach_offload_hooks(models, _policy(None))


def test_a_model_that_is_attached_already_is_named() -> None:
    models = _models(a=2, b=2)
    with (
        offloaded(models["b"], _policy(None)),
        pytest.raises(RuntimeError, match=r"^b: Sequential has offload hooks already"),
    ):
        attach_offload_hooks(models, _policy(None))
    with offloaded(models, _policy(None)):
        for again in (models, models["a"]):
            with pytest.raises(RuntimeError, match="has offload hooks already"):
                attach_offload_hooks(again, _policy(None))
        with pytest.raises(RuntimeError, match=r"^b: Sequential has offload hooks"):
            attach_offload_hooks({"new": linears(), "b": models["b"]}, _policy(None))


def test_one_of_several_models_is_not_detached_alone() -> None:
    models = _models(a=2, b=2)
    with offloaded(models, _policy(None)):
        with pytest.raises(RuntimeError, match=r"a shares its limit .*\(a, b\)"):
            detach(models["a"])
        with pytest.raises(RuntimeError, match="a shares its limit with other models"):
            set_limit(models["a"], 3)


def test_another_mapping_of_the_same_models_detaches_them() -> None:
    models = _models(a=2, b=2)
    attach_offload_hooks(models, _policy(None))
    detach({"other name": models["b"]})
    assert session_of(models["a"]) is session_of(models["b"]) is None


def test_models_of_two_attachments_are_not_mixed_up() -> None:
    models, others = _models(a=2, b=2), _models(c=2, d=2)
    with offloaded(models, _policy(None)), offloaded(others, _policy(None)):
        with pytest.raises(RuntimeError, match="not attached as one: a, b; c, d"):
            detach({**models, **others})
        with pytest.raises(RuntimeError, match="not attached as one"):
            offload_stats({"a": models["a"], "c": others["c"]})


def test_what_is_not_attached_is_said() -> None:
    models = _models(a=2)
    for call in (detach, onload, offload, offload_stats, offload_plan):
        with pytest.raises(RuntimeError, match="dict has no offload hooks"):
            call(models)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="dict has no offload hooks"):
        activate(models, [])


def test_unknown_names_are_refused_by_activate() -> None:
    models = _models(a=2, b=2)
    with offloaded(models, _policy(None)):
        with pytest.raises(ValueError, match=r"no model 'c' .* attached: a, b"):
            activate(models, ["a", "c"])
        with pytest.raises(ValueError, match=r"give a list: \['a'\]"):
            activate(models, "a")
        with pytest.raises(ValueError, match="holds several models"):
            activate(models["a"], ["a"])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_half_way_puts_every_model_back(
    failing: int, monkeypatch: pytest.MonkeyPatch, unattached: None
) -> None:
    models = _models(a=2, b=2, c=2)
    want = _outputs(models)
    before = {name: Picture(model) for name, model in models.items()}
    begin = Session.begin
    begun = []

    def fail(session: Session) -> None:
        begin(session)
        begun.append(session)
        if len(begun) == failing + 1:
            session.end()  # as `begin` does behind an error of its own
            raise OSError("no space left")

    monkeypatch.setattr(Session, "begin", fail)
    with pytest.raises(OSError, match="no space left"):
        attach_offload_hooks(models, _policy(3))
    for name, model in models.items():
        assert before[name].differences(model) == []
        assert session_of(model) is None
    _check(models, want)


def test_a_limit_below_the_least_of_one_model_names_it_and_moves_nothing() -> None:
    models: Models = {"small": linears(WIDTH, 2), "large": linears(2 * WIDTH, 2)}
    before = {name: Picture(model) for name, model in models.items()}
    with pytest.raises(BudgetExceededError, match=r"^large: limit_gb="):
        attach_offload_hooks(models, _policy(2))
    for name, model in models.items():
        assert before[name].differences(model) == []


def test_a_map_is_for_all_models_together(caplog: pytest.LogCaptureFixture) -> None:
    models: Models = {"a": linears(), "b": Stack()}
    used = {nn.LayerNorm: "layer", nn.Linear: "layer"}
    with offloaded(models, _policy(None, module_map=used)):
        pass
    assert "no module of the model" not in caplog.text
    with offloaded(models, _policy(None, module_map={nn.Conv2d: "layer"})):
        pass
    assert caplog.text.count("no module of the model is a") == 1


def test_files_on_disk_are_removed(tmp_path: Path) -> None:
    models = _models(a=2, b=2)
    with offloaded(models, _policy(3, disk_dir=tmp_path)):
        assert list(tmp_path.rglob("*.safetensors"))
        run(models["a"], X)
    assert not list(tmp_path.rglob("*.safetensors"))

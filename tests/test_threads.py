"""Several threads and one model: they take turns, and none waits for a dead one."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offload_stats,
    onload,
    set_limit,
)
from hookoffload.calls import CallTracker
from hookoffload.copies import Copy
from hookoffload.host_copies import _HostReads
from hookoffload.session import Session
from hookoffload.state_hooks import session_of
from tests.small_models import (
    assert_same,
    expected,
    nbytes,
    on_disk,
    run,
    tiny_model,
    tokens,
)
from tests.snapshots import Snapshot, assert_untouched
from tests.workers import PATIENCE, Worker, in_thread, in_threads

LIMITS = [0, 0.00008, None]
every_limit = pytest.mark.parametrize("limit_gb", LIMITS)


class Killed(BaseException):
    """Ends a thread like Ctrl-C: hooks for a failed forward do not run."""


@every_limit
@pytest.mark.parametrize("count", [2, 4])
def test_threads_that_call_one_model_get_their_own_results(
    tmp_path: Path, count: int, limit_gb: Any
) -> None:
    model = tiny_model()
    before = Snapshot(model, tmp_path)
    rounds = 12
    wanted = [expected(model, tokens(seed)) for seed in range(count * rounds)]
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    start = threading.Barrier(count)

    def work(number: int) -> None:
        start.wait(PATIENCE)
        for seed in range(number, count * rounds, count):
            assert_same(run(model, tokens(seed)), wanted[seed])

    in_threads(work, count)
    assert offload_stats(model).forwards == count * rounds
    limit = 2**30 * (limit_gb or 1)
    assert offload_stats(model).peak_bytes <= limit
    detach(model)
    assert_untouched(model, before, same_memory=False)


def test_threads_that_call_parts_and_the_whole_get_their_own_results(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    x = torch.randn(2, 3, 48)
    whole, part = expected(model, tokens()), expected(model.blocks[1], x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=0.00008))

    def work(number: int) -> None:
        for _ in range(12):
            if number % 2:
                assert_same(run(model, tokens()), whole)
            else:
                assert_same(run(model.blocks[1], x), part)

    in_threads(work, 4)
    detach(model)


def test_threads_that_call_two_models_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    models = [tiny_model(seed) for seed in range(2)]
    wanted = [expected(model, tokens()) for model in models]
    for model in models:
        attach_offload_hooks(model, on_disk(tmp_path))

    def work(number: int) -> None:
        for _ in range(12):
            assert_same(run(models[number % 2], tokens()), wanted[number % 2])

    in_threads(work, 4)
    for model in models:
        detach(model)


def test_thread_waits_for_a_forward_that_takes_long(tmp_path: Path) -> None:
    model = tiny_model()
    wanted = [expected(model, tokens(seed)) for seed in range(2)]
    attach_offload_hooks(model, on_disk(tmp_path))
    inside, overlaps = [0], []

    def linger(*_: Any) -> None:
        inside[0] += 1
        overlaps.append(inside[0])
        time.sleep(0.7)  # longer than any patience with an owner that may have died
        inside[0] -= 1

    handle = model.blocks[1].up.register_forward_pre_hook(linger)
    outputs = in_threads(lambda seed: run(model, tokens(seed)), 2)
    handle.remove()
    for output, value in zip(outputs, wanted, strict=True):
        assert_same(output, value)
    assert overlaps == [1, 1], "one thread at a time is inside the model"
    detach(model)


@every_limit
@pytest.mark.parametrize("error", [ValueError, Killed, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["embed", "blocks.1", "blocks.1.down", "head"])
def test_thread_that_dies_inside_a_forward_blocks_nobody(
    tmp_path: Path, where: str, error: type[BaseException], limit_gb: Any
) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))

    def die(*_: Any) -> None:
        raise error("told to")

    handle = model.get_submodule(where).register_forward_pre_hook(die)
    with pytest.raises(error, match="told to"):
        in_thread(lambda: run(model, tokens()))
    handle.remove()
    assert_same(in_thread(lambda: run(model, tokens())), wanted)
    assert_same(run(model, tokens()), wanted)
    assert_same(in_thread(lambda: run(model, tokens())), wanted)
    detach(model)
    assert_untouched(model, before, same_memory=False)


@pytest.mark.parametrize("error", [ValueError, Killed])
@pytest.mark.parametrize("action", [detach, offload, onload])
def test_model_can_be_switched_after_a_thread_died_inside_it(
    tmp_path: Path, action: Callable[[nn.Module], Any], error: type[BaseException]
) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, on_disk(tmp_path))

    def die(*_: Any) -> None:
        raise error

    handle = model.blocks[1].down.register_forward_pre_hook(die)
    with pytest.raises(error):
        in_thread(lambda: run(model, tokens()))
    handle.remove()
    in_thread(lambda: action(model))
    assert_same(run(model, tokens()), wanted)
    if action is not detach:
        detach(model)
    assert_untouched(model, before, same_memory=False)


def test_threads_go_on_while_others_die(tmp_path: Path) -> None:
    model = tiny_model()
    before = Snapshot(model, tmp_path)
    wanted = expected(model, tokens())
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=0.00008))
    doomed = threading.local()

    def die(*_: Any) -> None:
        error = getattr(doomed, "error", None)
        if error is not None:
            raise error

    handle = model.blocks[1].up.register_forward_pre_hook(die)

    def work(number: int) -> None:
        for attempt in range(8):
            doomed.error = None
            if (attempt + number) % 3 == 0:
                doomed.error = (ValueError if number % 2 else Killed)("told to")
                with pytest.raises((ValueError, Killed), match="told to"):
                    run(model, tokens())
            else:
                assert_same(run(model, tokens()), wanted)

    in_threads(work, 3)
    handle.remove()
    detach(model)
    assert_untouched(model, before, same_memory=False)


def test_model_that_was_attached_in_one_thread_is_run_and_detached_in_others(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    in_thread(lambda: attach_offload_hooks(model, on_disk(tmp_path)))
    for _ in range(2):
        assert_same(in_thread(lambda: run(model, tokens())), wanted)
    assert_same(run(model, tokens()), wanted)
    in_thread(lambda: detach(model))
    assert_untouched(model, before, same_memory=False)


def test_detach_waits_for_the_forward_of_another_thread(tmp_path: Path) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, on_disk(tmp_path))
    inside = threading.Event()

    def linger(*_: Any) -> None:
        inside.set()
        time.sleep(0.5)

    handle = model.blocks[1].up.register_forward_pre_hook(linger)
    worker = Worker(run, model, tokens())
    assert inside.wait(PATIENCE)
    detach(model)
    assert_same(worker.result(), wanted)
    handle.remove()
    assert_untouched(model, before, same_memory=False)


def test_thread_that_waits_at_detach_runs_the_plain_model(tmp_path: Path) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    for _ in range(6):
        attach_offload_hooks(model, on_disk(tmp_path))
        workers = [Worker(run, model, tokens()) for _ in range(4)]
        detach(model)
        for worker in workers:
            assert_same(worker.result(), wanted)
    assert_untouched(model, before, same_memory=False)


@every_limit
def test_saving_in_one_thread_while_another_computes_gives_the_weights(
    tmp_path: Path, limit_gb: Any
) -> None:
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = expected(model, tokens())
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            assert_same(run(model, tokens()), wanted)

    worker = Worker(compute)
    try:
        for _ in range(20):
            saved = {k: v.clone() for k, v in model.state_dict().items()}
            for name, tensor in state.items():
                assert_same(saved[name], tensor)
    finally:
        stop.set()
    worker.result()
    detach(model)


def test_modes_of_the_calling_thread_do_not_matter(tmp_path: Path) -> None:
    """no_grad and inference_mode belong to a thread; the copies are made by another."""
    model = tiny_model()
    wanted = expected(model, tokens())
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=0.00008))

    def infer() -> torch.Tensor:
        with torch.inference_mode():
            return model(tokens()).clone()

    for _ in range(2):
        assert_same(run(model, tokens()), wanted)
        assert_same(in_thread(infer), wanted)
        assert_same(infer(), wanted)
    detach(model)


class FansOut(nn.Module):
    """Has threads of its own call its branches, and waits for them."""

    def __init__(self, how: str, branches: int = 3, depth: int = 0) -> None:
        super().__init__()
        self.how = how
        self.own = nn.Parameter(torch.randn(16))
        self.first = nn.Linear(16, 16)
        self.branches = nn.ModuleList(
            FansOut(how, branches, depth - 1)
            if depth
            else nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
            for _ in range(branches)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.own
        call = torch.no_grad()(lambda branch: branch(x))  # a mode of the thread
        if self.how == "threads":
            outputs: list[Any] = [None] * len(self.branches)

            def work(index: int) -> None:
                outputs[index] = call(self.branches[index])

            threads = [
                threading.Thread(target=work, args=(i,)) for i in range(len(outputs))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        elif self.how == "executor":
            with ThreadPoolExecutor(2) as pool:
                outputs = list(pool.map(call, self.branches))
        else:
            with ThreadPool(2) as pool:
                outputs = pool.map(call, self.branches)
        return sum(outputs) + self.own


@pytest.mark.parametrize("how", ["threads", "executor", "pool"])
@pytest.mark.parametrize("depth", [0, 1])
def test_forward_may_call_its_children_in_threads_of_its_own(
    tmp_path: Path, how: str, depth: int
) -> None:
    torch.manual_seed(0)
    model = FansOut(how, depth=depth)
    x = torch.randn(2, 16)
    wanted = expected(model, x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=0.00003))
    for _ in range(3):
        assert_same(run(model, x), wanted)
    detach(model)
    assert_same(run(model, x), wanted)


def test_forward_whose_thread_raises_leaves_the_model_usable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FansOut("executor")
    x = torch.randn(2, 16)
    wanted = expected(model, x)
    attach_offload_hooks(model, on_disk(tmp_path))
    handle = model.branches[1][1].register_forward_hook(_raise)
    with pytest.raises(ValueError, match="in a branch"):
        run(model, x)
    handle.remove()
    assert_same(run(model, x), wanted)
    detach(model)


def _raise(*_: Any) -> None:
    raise ValueError("in a branch")


def test_loading_in_one_thread_while_another_computes_takes_turns(
    tmp_path: Path,
) -> None:
    """A forward has the weights from before a load or from behind it, never both."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    states = [
        {name: torch.randn_like(t) for name, t in model.state_dict().items()}
        for _ in range(2)
    ]
    x = torch.randn(2, 32)
    wanted = []
    for state in states:
        model.load_state_dict(state)
        wanted.append(run(model, x))
    attach_offload_hooks(model, on_disk(tmp_path))
    done = threading.Event()

    def load() -> None:
        for turn in range(20):
            model.load_state_dict(states[turn % 2])
        done.set()

    worker = Worker(load)
    while not done.is_set():
        output = run(model, x)
        assert any(torch.equal(output, one) for one in wanted)
    worker.result()
    assert_same(run(model, x), wanted[1])
    detach(model)


def test_loading_from_inside_the_forward_is_refused(tmp_path: Path) -> None:
    class LoadsItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.load_state_dict(self.state_dict())
            return self.inner(x)

    model = LoadsItself()
    attach_offload_hooks(model, on_disk(tmp_path))
    with pytest.raises(RuntimeError, match="load_state_dict was called from inside"):
        run(model, torch.zeros(1, 4))
    detach(model)


def test_of_two_threads_that_attach_one_model_the_second_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = Snapshot(model, tmp_path)
    begin = Session.begin
    other: list[Worker] = []

    def attach() -> None:
        attach_offload_hooks(model, on_disk(tmp_path))

    def begin_slowly(session: Session) -> None:
        if not other:
            other.append(Worker(attach))
            time.sleep(0.1)
        begin(session)

    monkeypatch.setattr(Session, "begin", begin_slowly)
    attach()
    with pytest.raises(RuntimeError, match="has offload hooks already"):
        other[0].result()
    detach(model)
    assert_untouched(model, before, same_memory=False)


def test_thread_that_waited_while_the_model_was_detached_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    attach_offload_hooks(model, on_disk(tmp_path))
    end = Session.end
    late: list[Worker] = []

    def end_slowly(session: Session) -> None:
        late.append(Worker(set_limit, model, 1))
        time.sleep(0.1)
        end(session)

    monkeypatch.setattr(Session, "end", end_slowly)
    detach(model)
    with pytest.raises(RuntimeError, match="was detached by another thread"):
        late[0].result()


def test_part_whose_edits_do_not_fit_the_limit_lets_other_threads_in(
    tmp_path: Path,
) -> None:
    """Tensors that are untied take more; the error must not leave the model owned."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    attach_offload_hooks(model, on_disk(tmp_path))
    session = session_of(model)
    assert session is not None

    def refuse() -> bool:
        raise BudgetExceededError("too small")

    session.edits.part_changed = refuse  # type: ignore[method-assign]
    with pytest.raises(BudgetExceededError):
        run(model[0], torch.zeros(1, 64))
    assert (session.calls.owner, session.calls.depth) == (None, 0)
    del session.edits.part_changed
    in_thread(run, model[0], torch.zeros(1, 64))
    detach(model)


class LetsAnotherIn(nn.Module):
    """Goes on in its forward when another thread waits at one of its parts.

    Args:
        sideways: use the last part's weight without calling it.
    """

    def __init__(self, *, sideways: bool) -> None:
        super().__init__()
        self.part = nn.Linear(32, 32)
        self.last = nn.Linear(32, 32)
        self.sideways = sideways
        self.inside = threading.Event()
        self.waits: threading.Event | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.part(x)
        if self.waits is not None:
            self.inside.set()
            end = time.monotonic() + PATIENCE
            # Not in `wait`: whoever does is taken to have sent the other thread.
            while not self.waits.is_set() and time.monotonic() < end:
                time.sleep(0.001)
        if self.sideways:
            return nn.functional.linear(x, self.last.weight)
        return self.last(x)


@pytest.mark.parametrize("limit_gb", [None, 0])
@pytest.mark.parametrize("sideways", [False, True])
def test_thread_that_waits_at_a_part_while_its_hooks_change_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_gb: float | None,
    sideways: bool,
) -> None:
    """The first pass ends with fewer hooks, or with sites that were made anew."""
    model = LetsAnotherIn(sideways=sideways)
    x = torch.randn(2, 32)
    wanted, part_wanted = expected_of_both(model, x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    session = session_of(model)
    assert session is not None
    wait, waits = CallTracker._wait_for_turn, threading.Event()

    def tell_and_wait(tracker: CallTracker) -> bool:
        waits.set()
        return wait(tracker)

    def call_part() -> torch.Tensor:
        assert model.inside.wait(PATIENCE)
        return run(model.part, x)

    monkeypatch.setattr(CallTracker, "_wait_for_turn", tell_and_wait)
    model.waits = waits
    other = Worker(call_part)
    assert_same(run(model, x), wanted)
    assert_same(other.result(), part_wanted)
    assert waits.is_set()
    model.waits = None
    assert (session.calls.owner, session.calls.depth) == (None, 0)
    assert not any(layer.bound for layer in session.layers)
    run(model, x)  # makes resident what the part's call has brought
    before = offload_stats(model).bytes_moved
    assert_same(run(model, x), wanted)
    if limit_gb is None:
        assert offload_stats(model).bytes_moved == before, "everything stays"
    detach(model)


def expected_of_both(
    model: LetsAnotherIn, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return run(model, x), run(model.part, x)


def test_forward_gets_its_turn_beside_a_thread_that_loads_all_the_time(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    attach_offload_hooks(model, on_disk(tmp_path))
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            model.load_state_dict(state)

    loader = Worker(load)
    try:
        for _ in range(5):
            in_thread(run, model, torch.zeros(1, 8))
    finally:
        stop.set()
    loader.result()
    detach(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_can_run_and_detach_its_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.zeros(1, 8)
    attach_offload_hooks(model, on_disk(tmp_path))
    wanted = run(model, x)
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        same = torch.equal(run(model, x), wanted)
        detach(model)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert_same(run(model, x), wanted)
    detach(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("first", [None, offload, detach])
def test_child_that_is_forked_while_layers_are_copied_does_not_wait_for_its_parent(
    first: Callable[[nn.Module], object] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threads that copy are not forked: what they were given is never done."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x = torch.zeros(1, 8)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=None))
    wanted = run(model, x)
    parent, forked = os.getpid(), threading.Event()
    perform = _HostReads.perform

    def held_up(self: _HostReads, begun: Copy) -> None:
        if os.getpid() == parent:
            assert forked.wait(PATIENCE)
        perform(self, begun)

    offload(model)
    monkeypatch.setattr(_HostReads, "perform", held_up)
    session = session_of(model)
    assert session is not None
    onload(model)
    session.passes.apply(session.plan)
    session.mover.copies.prefetch()
    under_way = [layer.copy for layer in session.layers if layer.copy is not None]
    assert len(under_way) > 1
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE))
        if first is not None:
            first(model)
        same = torch.equal(run(model, x), wanted)
        os._exit(0 if same else 1)
    forked.set()
    assert os.waitpid(child, 0)[1] == 0
    assert_same(run(model, x), wanted)
    detach(model)


def test_ctrl_c_while_the_copying_thread_starts_does_not_block_detach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.zeros(1, 8)
    wanted = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path))

    def interrupted(_thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, x)
    assert_same(run(model, x), wanted)
    in_thread(detach, model)
    assert_same(run(model, x), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_threads_on_streams_of_their_own_get_their_own_results(count: int) -> None:
    model = tiny_model(width=256)
    plain = tiny_model(width=256).cuda()
    wanted = [run(plain, tokens(seed).cuda()) for seed in range(count * 8)]
    torch.cuda.synchronize()
    limit = nbytes(model) / 3 / 2**30
    policy = OffloadPolicy(limit_gb=limit, compute_device="cuda")
    attach_offload_hooks(model, policy)

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(number, count * 8, count):
                output = run(model, tokens(seed))
                torch.cuda.current_stream().synchronize()
                assert_same(output, wanted[seed])

    in_threads(work, count)
    detach(model)


@pytest.mark.gpu
def test_residents_that_one_stream_brings_late_are_waited_for_by_another() -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    x = torch.randn(8, 512)
    wanted = run(copy.deepcopy(model).cuda(), x.cuda())
    attach_offload_hooks(model, OffloadPolicy(limit_gb=None, compute_device="cuda"))
    x = x.cuda()
    torch.cuda.synchronize()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(2**30)  # new memory is written to behind what is queued
        run(model, x)
    with torch.cuda.stream(other):
        output = run(model, x)
    torch.cuda.synchronize()
    assert_same(output, wanted)
    detach(model)


def test_an_owner_seen_in_a_generator_that_yields_meanwhile_is_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, go_on = nn.Identity(), threading.Event()
    module.register_forward_pre_hook(lambda *_: go_on.wait(PATIENCE) and None)
    tracker = CallTracker(frozenset([id(module)]))

    def run_inside() -> None:
        tracker.enter()
        module(torch.zeros(1))
        tracker.leave()

    yielded = (number for number in range(2))
    next(yielded)  # as it lies there now, no frame is behind its own
    look, looks = sys._current_frames, []

    def look_into_a_generator() -> dict[int, Any]:
        looks.append(look())
        frames = dict(looks[-1])
        if len(looks) == 1:
            frames[tracker.owner or 0] = yielded.gi_frame
        return frames

    worker = Worker(run_inside)
    while not tracker.is_running():
        time.sleep(0.001)
    monkeypatch.setattr(sys, "_current_frames", look_into_a_generator)
    assert tracker.is_running() and looks
    go_on.set()
    worker.result()
    assert not tracker.is_running()

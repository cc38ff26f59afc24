"""Ctrl-C at any moment: nothing is lost, nobody is blocked, the next forward works."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offloaded,
    onload,
    set_limit,
)
from hookoffload.device_memory import DeviceMemory
from hookoffload.host_copies import HostCopyEngine
from hookoffload.layer import Layer
from hookoffload.mover import LayerMover
from hookoffload.session import Session
from hookoffload.state_hooks import session_of
from tests.garbage import freeze_old_objects
from tests.interrupts import NthCall, deadline, interrupted_at, steps_of
from tests.small_models import (
    assert_same,
    chain,
    expected,
    on_disk,
    run,
    tiny_model,
    tokens,
)
from tests.snapshots import Snapshot, assert_same_surroundings, assert_untouched
from tests.workers import in_thread

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs SIGALRM"),
    pytest.mark.skipif(sys.gettrace() is not None, reason="needs the trace function"),
]

LONG = settings.get_current_profile_name() == "long"

POLICIES: dict[str, dict[str, Any]] = {
    "streamed from disk": {"store": "disk", "limit_gb": 0},
    "partly resident": {"store": "disk", "limit_gb": 0.00006},
    "resident": {"store": "disk", "limit_gb": None},
    "cast": {"compute_dtype": torch.float64, "limit_gb": 0},
    "in place": {"limit_gb": 0},
}
every_policy = pytest.mark.parametrize("kind", POLICIES)


@pytest.fixture
def new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Return what makes a new temporary folder, in which masters are written."""
    numbers = itertools.count()

    def make() -> Path:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        return folder

    make()
    return make


@pytest.fixture(autouse=True)
def _no_function_mode_stays() -> Iterator[None]:
    """Keep a mode that a failing test left on from disturbing the others."""
    yield
    while torch.overrides._get_current_function_mode() is not None:
        torch.overrides._pop_mode()


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection() -> None:
    freeze_old_objects()


def _small() -> nn.Module:
    return tiny_model(depth=1, width=16)


def _policy(kind: str) -> OffloadPolicy:
    return OffloadPolicy(compute_device="cpu", **POLICIES[kind])


def _attach(model: nn.Module, kind: str) -> nn.Module:
    return attach_offload_hooks(model, _policy(kind))


def _outputs(kind: str) -> torch.Tensor:
    """Return what an undisturbed model computes under a policy."""
    model = _small()
    plain = model.double() if kind == "cast" else model
    return run(plain, tokens())


NewFolder = Callable[[], Path]


class Problems:
    """Collects what went wrong after which interrupt, and tells all of it at once."""

    def __init__(self) -> None:
        self._found: list[str] = []

    @contextmanager
    def after(self, place: str) -> Iterator[None]:
        """Note an error of the block, or that it hangs."""
        try:
            with deadline(3):
                yield
        except Exception as error:
            told = str(error).partition("\n")[0] or type(error).__name__
            self._found.append(f"after an interrupt at {place}: {told}")

    def assert_none(self) -> None:
        if self._found:
            pytest.fail("\n".join(self._found), pytrace=False)


@pytest.fixture
def problems() -> Iterator[Problems]:
    found = Problems()
    yield found
    found.assert_none()


def _interrupt(action: Callable[[], Any], step: int) -> str:
    """Do something that is interrupted, and return where it was.

    With a copying thread beside it the last steps of an action may not be taken each
    time: then it was not interrupted.
    """
    try:
        with interrupted_at(step) as steps:
            action()
    except KeyboardInterrupt:
        pass
    return steps.interrupted or "no step at all"


def _share(steps: list[int], number: int) -> list[int]:
    """Return one of three parts of some steps; the long profile takes all of them.

    Under each policy an action calls mostly the same places: together the parts of
    several policies have about each of them.
    """
    return steps if LONG else steps[number % 3 :: 3]


def _assert_whole(model: nn.Module, before: Snapshot) -> None:
    gc.collect()  # the interrupt's traceback may refer to itself
    assert_untouched(model, before, same_memory=False)


def _assert_saves(model: nn.Module, before: Snapshot) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, before.tensors[name].value)


def _assert_recovers(model: nn.Module, before: Snapshot, wanted: torch.Tensor) -> None:
    """Fail unless an interrupted model computes in any thread and comes back whole."""
    _assert_saves(model, before)
    assert_same(in_thread(run, model, tokens()), wanted)
    for _ in range(2):
        assert_same(run(model, tokens()), wanted)
    detach(model)
    _assert_whole(model, before)


# --- attach ---


@every_policy
def test_interrupt_at_any_step_of_attach_leaves_the_model_untouched(
    new_folder: NewFolder, problems: Problems, kind: str
) -> None:
    detach(_attach(_small(), kind))  # what is looked up once a process takes steps too
    model = _small()
    steps = steps_of(lambda: _attach(model, kind))
    detach(model)
    assert len(steps) > 50
    for step in _share(steps, list(POLICIES).index(kind)):
        model = _small()
        before = Snapshot(model, new_folder())
        place = _interrupt(lambda model=model: _attach(model, kind), step)
        with problems.after(place):
            _assert_whole(model, before)
    model = _attach(_small(), kind)
    assert_same(run(model, tokens()), _outputs(kind))
    detach(model)


PATCHED: dict[str, tuple[Any, str]] = {
    "a write to the spill file": (os, "pwrite"),
    "making the folder": (Path, "mkdir"),
    "naming the finished file": (os, "replace"),
    "a pre hook": (nn.Module, "register_forward_pre_hook"),
    "a post hook": (nn.Module, "register_forward_hook"),
    "a hook on saving": (nn.Module, "register_state_dict_post_hook"),
    "a hook on loading": (nn.Module, "register_load_state_dict_pre_hook"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", PATCHED)
def test_interrupt_around_the_nth_call_leaves_the_model_untouched(
    new_folder: NewFolder,
    monkeypatch: pytest.MonkeyPatch,
    problems: Problems,
    what: str,
    after: bool,
) -> None:
    owner, name = PATCHED[what]
    original = getattr(owner, name)
    for number in range(1000):
        model = _small()
        before = Snapshot(model, new_folder())
        patched = NthCall(original, number, after=after)
        monkeypatch.setattr(owner, name, patched)
        try:
            _attach(model, "streamed from disk")
        except KeyboardInterrupt:
            monkeypatch.setattr(owner, name, original)
            with problems.after(f"call {number}"):
                _assert_whole(model, before)
            continue
        break
    monkeypatch.setattr(owner, name, original)
    assert number == patched.calls > 0, "every call was interrupted once"
    assert_same(run(model, tokens()), _outputs("streamed from disk"))
    detach(model)
    _assert_whole(model, before)


def test_interrupt_at_any_step_of_load_model_leaves_no_trace(
    tmp_path: Path, problems: Problems
) -> None:
    path = tmp_path / "model.safetensors"
    plain = chain(8, 16, 8)
    save_file(plain.state_dict(), path)

    def load() -> nn.Module:
        return load_model(lambda: chain(8, 16, 8), path, on_disk(tmp_path))

    models: list[nn.Module] = []
    steps = steps_of(lambda: models.append(load()))
    detach(models.pop())
    gc.collect()
    before = Snapshot(plain, tmp_path)
    for step in steps:
        with problems.after(_interrupt(load, step)):
            gc.collect()
            assert_same_surroundings(before)
    x = torch.ones(1, 8)
    model = load()
    assert_same(run(model, x), run(plain, x))
    detach(model)


# --- a forward ---


class Interrupt:
    """A hook that interrupts its call of one number."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt("in a layer")


@pytest.mark.parametrize("passes", [0, 1, 2] if LONG else [0, 1])
@every_policy
def test_interrupt_inside_any_layer_leaves_the_model_whole(
    new_folder: NewFolder, problems: Problems, kind: str, passes: int
) -> None:
    wanted = _outputs(kind)
    names = [name for name, m in _small().named_modules() if not _is_list(m)]
    for name in names:
        for register in ("register_forward_pre_hook", "register_forward_hook"):
            model = _small()
            before = Snapshot(model, new_folder())
            _attach(model, kind)
            handle = getattr(model.get_submodule(name), register)(Interrupt(passes))
            for _ in range(passes):
                assert_same(run(model, tokens()), wanted)
            with pytest.raises(KeyboardInterrupt, match="in a layer"):
                run(model, tokens())
            handle.remove()
            with problems.after(f"{register} of {name!r}"):
                _assert_recovers(model, before, wanted)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


@pytest.mark.parametrize("passes", [0, 1])
@every_policy
def test_interrupt_at_any_step_of_a_forward_leaves_the_model_whole(
    new_folder: NewFolder, problems: Problems, kind: str, passes: int
) -> None:
    wanted = _outputs(kind)
    model = _attach(_small(), kind)
    for _ in range(passes):
        run(model, tokens())
    steps = steps_of(lambda: run(model, tokens()))
    steps = _share(steps, passes + list(POLICIES).index(kind))
    detach(model)
    for step in steps:
        model = _small()
        before = Snapshot(model, new_folder())
        _attach(model, kind)
        for _ in range(passes):
            run(model, tokens())
        place = _interrupt(lambda model=model: run(model, tokens()), step)
        with problems.after(place):
            _assert_recovers(model, before, wanted)


@pytest.mark.parametrize("action", [detach, offload, onload])
@every_policy
def test_interrupted_model_can_be_switched_at_once(
    new_folder: NewFolder,
    problems: Problems,
    kind: str,
    action: Callable[[nn.Module], Any],
) -> None:
    wanted = _outputs(kind)
    for name in ("", "embed", "blocks.0", "blocks.0.down", "head"):
        model = _small()
        before = Snapshot(model, new_folder())
        _attach(model, kind)
        handle = model.get_submodule(name).register_forward_pre_hook(Interrupt(0))
        with pytest.raises(KeyboardInterrupt):
            run(model, tokens())
        handle.remove()
        with problems.after(f"{name!r}"):
            action(model)
            if action is detach:
                _assert_whole(model, before)
            else:
                _assert_recovers(model, before, wanted)


def test_several_interrupts_in_a_row_do_not_add_up(new_folder: NewFolder) -> None:
    wanted = _outputs("partly resident")
    model = _small()
    before = Snapshot(model, new_folder())
    _attach(model, "partly resident")
    for name in ("blocks.0.down", "blocks.0", "head", "", "embed", "head"):
        handle = model.get_submodule(name).register_forward_hook(Interrupt(0))
        with pytest.raises(KeyboardInterrupt):
            run(model, tokens())
        handle.remove()
    _assert_recovers(model, before, wanted)


def test_interrupt_inside_a_part_that_was_called_alone_leaves_the_model_whole(
    new_folder: NewFolder,
) -> None:
    wanted = _outputs("streamed from disk")
    model = _small()
    before = Snapshot(model, new_folder())
    _attach(model, "streamed from disk")
    handle = model.blocks[0].down.register_forward_pre_hook(Interrupt(0))
    with pytest.raises(KeyboardInterrupt):
        run(model.blocks[0], torch.ones(1, 16))
    handle.remove()
    _assert_recovers(model, before, wanted)


def test_weights_that_an_interrupted_forward_changed_are_kept(tmp_path: Path) -> None:
    """Statistics that were updated before the interrupt are those of a plain model."""
    model, plain = _small().train(), _small().train()
    attach_offload_hooks(model, on_disk(tmp_path))
    for one in (model, plain):
        handle = one.head.register_forward_pre_hook(Interrupt(0))
        with pytest.raises(KeyboardInterrupt):
            run(one, tokens())
        handle.remove()
    assert_same(run(model, tokens(1)), run(plain, tokens(1)))
    detach(model)
    assert plain.statistics.num_batches_tracked == 2
    for name, buffer in plain.named_buffers():
        assert_same(model.get_buffer(name), buffer)


def test_real_ctrl_c_while_the_forward_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chain(64, 64, 64, 64, 64)
    x = torch.ones(1, 64)
    wanted = expected(model, x)
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, on_disk(tmp_path))
    read, main = os.preadv, threading.main_thread().ident
    assert main is not None
    reads = []

    def slow(*args: Any) -> int:
        reads.append(args)
        if len(reads) == 3:
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        return read(*args)

    monkeypatch.setattr(os, "preadv", slow)
    with pytest.raises(KeyboardInterrupt):
        run(model, x)
    monkeypatch.setattr(os, "preadv", read)
    assert len(reads) < 8
    with deadline(5):
        assert_same(in_thread(run, model, x), wanted)
        assert_same(run(model, x), wanted)
        detach(model)
        _assert_whole(model, before)
    # Nothing of it is left on this thread: torch.func refuses saved-tensor hooks.
    assert torch.func.grad(torch.sin)(torch.zeros(())) == 1


def test_interrupt_in_a_with_block_detaches(new_folder: NewFolder) -> None:
    model = _small()
    model.blocks[0].down.register_forward_pre_hook(Interrupt(0))
    before = Snapshot(model, new_folder())
    with (
        pytest.raises(KeyboardInterrupt),
        offloaded(model, _policy("streamed from disk")),
    ):
        run(model, tokens())
    _assert_whole(model, before)


# --- detach, and what a program switches by hand ---


@every_policy
def test_interrupted_detach_can_be_done_again(
    new_folder: NewFolder, problems: Problems, kind: str
) -> None:
    def get_ready() -> tuple[nn.Module, Snapshot]:
        model = _small()
        before = Snapshot(model, new_folder())
        _attach(model, kind)
        run(model, tokens())
        return model, before

    first, _ = get_ready()
    steps = steps_of(lambda: detach(first))
    for step in _share(steps, list(POLICIES).index(kind)):
        model, before = get_ready()
        place = _interrupt(lambda model=model: detach(model), step)
        with problems.after(place):
            if "_apply" in model.__dict__:
                detach(model)
            _assert_whole(model, before)


def _load(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in _small().state_dict().items()})


ACTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "offload": offload,
    "onload": lambda model: (offload(model), onload(model)),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": _load,
}


SWITCHED = ["partly resident", "resident", "cast", "from RAM"]
FROM_RAM = OffloadPolicy.from_vram_config(
    {"offload_device": "disk", "onload_device": "cpu", "computation_device": "cpu"}
)


@pytest.mark.parametrize("what", ACTIONS)
@pytest.mark.parametrize("kind", SWITCHED)
def test_interrupted_switch_leaves_the_model_whole(
    new_folder: NewFolder, problems: Problems, kind: str, what: str
) -> None:
    action = ACTIONS[what]
    wanted = _outputs(kind)

    def get_ready() -> tuple[nn.Module, Snapshot]:
        model = _small()
        before = Snapshot(model, new_folder())
        attach_offload_hooks(model, FROM_RAM if kind == "from RAM" else _policy(kind))
        run(model, tokens())
        return model, before

    model, _ = get_ready()
    steps = steps_of(lambda: action(model))
    detach(model)
    for step in _share(steps, SWITCHED.index(kind)):
        model, before = get_ready()
        place = _interrupt(lambda model=model: action(model), step)
        with problems.after(place):
            _assert_recovers(model, before, wanted)


# --- in the middle of a hook: the very next call cleans up ---

# Nothing may heal before: not what a state dict does, nor another thread's call.

TORN: dict[str, OffloadPolicy] = {
    "streamed": OffloadPolicy(compute_device="cpu", store="disk", limit_gb=0),
    "some stay": OffloadPolicy(compute_device="cpu", store="disk", limit_gb=0.000018),
    "cast": OffloadPolicy(
        compute_device="cpu", compute_dtype=torch.float64, limit_gb=0
    ),
}
every_torn = pytest.mark.parametrize("kind", TORN)


def _deeper() -> nn.Module:
    return tiny_model(depth=3, width=16)


def _begin(kind: str, passes: int) -> tuple[nn.Module, Snapshot]:
    """Attach a model and have it run; and what it was before."""
    model = _deeper()
    before = Snapshot(model)
    attach_offload_hooks(model, TORN[kind])
    for _ in range(passes):
        run(model, tokens())
    return model, before


def _deeper_outputs(kind: str) -> torch.Tensor:
    model = _deeper()
    return run(model.double() if kind == "cast" else model, tokens())


def _live(model: nn.Module) -> Session:
    session = session_of(model)
    assert session is not None
    return session


def _assert_next_calls_heal(
    model: nn.Module, before: Snapshot, wanted: torch.Tensor
) -> None:
    """Fail unless the next two forwards are right, and nothing is kept behind them."""
    session = _live(model)
    for _ in range(2):
        assert_same(run(model, tokens()), wanted)
        live = {layer.region for layer in session.layers}
        assert set(session.mover.window._ring._live) <= live, "regions are lost"
    assert not [m.name for m in session.store.masters if m.dirty], "taken for edited"
    offload(model)
    assert session.budget.used == 0, "memory is lost"
    detach(model)
    _assert_whole(model, before)


class RestsInside:
    """Notes which weights lie at rest in forwards, but for rows that are looked up."""

    def __init__(self, model: nn.Module) -> None:
        self.found: set[str] = set()
        self._members = {id(m.tensor): m for m in _live(model).inventory}
        self._handles = [
            module.register_forward_pre_hook(self._look)
            for module in model.modules()
            if module is not model and not isinstance(module, nn.Embedding)
        ]

    def _look(self, module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            member = self._members[id(parameter)]
            if parameter.data_ptr() == member.rest_pointer:
                self.found.add(member.name)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", [(Layer, "bind"), (LayerMover, "_unbind")])
@every_torn
def test_interrupt_while_a_layer_is_swapped_is_healed_by_the_next_forward(
    monkeypatch: pytest.MonkeyPatch,
    problems: Problems,
    kind: str,
    what: tuple[type, str],
    after: bool,
) -> None:
    wanted = _deeper_outputs(kind)
    owner, name = what
    original = getattr(owner, name)
    for number in range(1000):
        model, before = _begin(kind, 2)
        patched = NthCall(original, number, after=after)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, patched)
            try:
                run(model, tokens())
            except KeyboardInterrupt:
                interrupted = True
            else:
                interrupted = False
        with problems.after(f"call {number}"):
            _assert_next_calls_heal(model, before, wanted)
        if not interrupted:
            break
    assert number == patched.calls > 0, "every call was interrupted once"


def test_interrupt_while_a_layer_rests_leaves_its_weights_in_the_users_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    plain = chain(8, 16, 8)
    save_file(plain.state_dict(), path)
    model = load_model(lambda: chain(8, 16, 8), path, on_disk(tmp_path))
    x = torch.ones(1, 8)
    run(model, x)
    for number in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(LayerMover, "_unbind", NthCall(LayerMover._unbind, number))
            with pytest.raises(KeyboardInterrupt):
                run(model, x)
        assert_same(run(model, x), run(plain, x))
    masters = _live(model).store.masters
    assert masters and all(master.location is not None for master in masters)
    detach(model)


def test_data_that_is_given_behind_a_half_done_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    policy = OffloadPolicy(
        store="disk", limit_gb=0, storage_dtype=torch.bfloat16, compute_device="cpu"
    )

    def swap_and_stop(members: list[Any]) -> None:
        members[0].tensor.data = members[0].rest
        raise KeyboardInterrupt

    with offloaded(model, policy), torch.no_grad():
        model(torch.ones(1, 16))
        with monkeypatch.context() as patched:
            patched.setattr("hookoffload.layer.rest_members", swap_and_stop)
            with pytest.raises(KeyboardInterrupt):
                model(torch.ones(1, 16))
        given = torch.randn(16, 16).bfloat16()
        model[0].weight.data = given.clone()
        model(torch.ones(1, 16))
        assert torch.equal(model[0].weight, given)


@every_torn
def test_interrupt_at_any_step_of_a_parts_call_is_healed_by_the_next_one(
    problems: Problems, kind: str
) -> None:
    wanted = _deeper_outputs(kind)
    dtype = torch.float64 if kind == "cast" else torch.float32
    x = torch.ones(1, 16, dtype=dtype)

    model, _ = _begin(kind, 2)
    part_wanted = run(model.blocks[0].up, x)
    steps = steps_of(lambda: run(model.blocks[0].up, x))
    detach(model)
    for step in _share(steps, list(TORN).index(kind)):
        model, before = _begin(kind, 2)
        part = model.blocks[0].up
        place = _interrupt(lambda part=part: run(part, x), step)
        with problems.after(place):
            assert_same(run(part, x), part_wanted)
            _assert_next_calls_heal(model, before, wanted)


def test_interrupt_at_any_step_of_a_lookup_by_itself_is_healed_by_the_next_one(
    problems: Problems,
) -> None:
    model = nn.Sequential(nn.Embedding(4200, 64), nn.Linear(64, 4))
    table, ids = model[0].weight.detach().clone(), torch.arange(3)
    policy = OffloadPolicy(compute_dtype=torch.float64, limit_gb=0.002)
    attach_offload_hooks(model, policy)  # the table does not fit
    wanted, rows = run(model, ids), table[ids].double()
    for step in steps_of(lambda: run(model[0], ids)):
        place = _interrupt(lambda: run(model[0], ids), step)
        with problems.after(place):
            assert_same(run(model[0], ids), rows)
            assert_same(run(model, ids), wanted)
            assert model[0].weight.dtype == torch.float32
            assert_same(model.state_dict()["0.weight"], table)
    detach(model)
    assert_same(model[0].weight.detach(), table)


def _offload_with_a_window() -> tuple[nn.Module, Snapshot, Callable[[], Any]]:
    model, before = _begin("some stay", 3)
    return model, before, lambda: offload(model)


def _first_forward() -> tuple[nn.Module, Snapshot, Callable[[], Any]]:
    model, before = _begin("some stay", 0)
    return model, before, lambda: run(model, tokens())


@pytest.mark.parametrize(
    ("owner", "name", "get_ready"),
    [
        (HostCopyEngine, "drain", _offload_with_a_window),
        (DeviceMemory, "free", _offload_with_a_window),
        (DeviceMemory, "allocate", _first_forward),
    ],
    ids=["drained", "given back", "taken"],
)
def test_interrupt_while_memory_is_taken_or_given_back_loses_none(
    monkeypatch: pytest.MonkeyPatch,
    problems: Problems,
    owner: type,
    name: str,
    get_ready: Callable[[], tuple[nn.Module, Snapshot, Callable[[], Any]]],
) -> None:
    wanted, original = _deeper_outputs("some stay"), getattr(owner, name)
    for number in range(1000):
        model, before, action = get_ready()
        patched = NthCall(original, number)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, patched)
            with contextlib.suppress(KeyboardInterrupt):
                action()
        with problems.after(f"call {number}"):
            _assert_next_calls_heal(model, before, wanted)
        if patched.calls <= number:
            break
    assert number == patched.calls > 0, "every call was interrupted once"


HOOKS_CHANGE: dict[str, Callable[[nn.Module], Any]] = {
    "offload": offload,
    "set_limit": lambda model: set_limit(model, 0.000014),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict(_deeper().state_dict()),
    "forward": lambda model: run(model, tokens()),
}


def _ready_to_change_hooks(what: str) -> nn.Module:
    """Attach a model, part of which stands by; some actions find an edit of it."""
    model, _ = _begin("some stay", 1 if what == "forward" else 3)
    if what == "state_dict":
        with torch.no_grad():
            for parameter in model.blocks[0].parameters():
                parameter.add_(0)
    return model


@pytest.mark.parametrize("what", HOOKS_CHANGE)
def test_interrupt_while_hooks_change_leaves_no_weight_at_rest_in_a_forward(
    problems: Problems, what: str
) -> None:
    """On an accelerator the weights at rest are on another device."""
    wanted, action = _deeper_outputs("some stay"), HOOKS_CHANGE[what]
    model = _ready_to_change_hooks(what)
    steps = steps_of(lambda: action(model))
    if what in ("forward", "load_state_dict"):
        steps = _share(steps, len(what))  # most of them change no hooks
    detach(model)
    for step in steps:
        model = _ready_to_change_hooks(what)
        place = _interrupt(lambda model=model: action(model), step)
        with problems.after(place):
            rests = RestsInside(model)
            assert_same(run(model, tokens()), wanted)
            rests.remove()
            assert not rests.found, f"at rest: {rests.found}"
        detach(model)


@pytest.mark.parametrize("number", range(0, 12, 2))
def test_interrupt_behind_a_hook_that_was_registered_is_no_hook_that_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    wanted = _deeper_outputs("some stay")
    model, _ = _begin("some stay", 1)
    register = NthCall(nn.Module.register_forward_pre_hook, number, after=True)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_pre_hook", register)
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(2):
                run(model, tokens())
    rests = RestsInside(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0)
    model.state_dict()  # residents that were written to rest again
    for _ in range(2):
        assert_same(run(model, tokens()), wanted)
    assert not rests.found
    rests.remove()
    detach(model)

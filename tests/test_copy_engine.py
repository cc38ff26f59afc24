"""Streams and events, recorded: every wait and release in the right order."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import hookoffload.copy_engine as copy_engine
import hookoffload.mover as mover
from hookoffload import offload, offload_plan, offload_stats, offloaded
from hookoffload.copy_engine import Copy, HostCopyEngine, StreamCopyEngine
from tests.real_models import REAL_MODELS, first_output
from tests.samples import GIB, Stack, linears, run, same_bits
from tests.simulated_device import CPU, RaceDetector, Simulation, Stream


class _Target:
    """Stands in for the bytes of a region, and notes what is written to them."""

    def __init__(
        self, log: list[tuple[Any, ...]], device: Simulation, size: int
    ) -> None:
        self._log = log
        self._device = device
        self._size = size

    def numel(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> _Target:
        size = len(range(self._size)[part])
        return _Target(self._log, self._device, size)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        stream = self._device.current_stream()
        self._log.append(("write", stream, source.data_ptr(), non_blocking))

    def fill_(self, value: int) -> None:
        self._log.append(("fill", self._device.current_stream(), value))


class _Source:
    """Stands in for a master."""

    def __init__(self, log: list[tuple[Any, ...]], size: int, *, pinned: bool) -> None:
        self._log = log
        self.pinned = pinned
        self.in_ram = pinned
        self.flat = torch.zeros(size, dtype=torch.uint8)
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None

    def read_into(self, destination: torch.Tensor, start: int = 0) -> None:
        assert self.gate.wait(timeout=30)
        if self.error is not None:
            raise self.error
        is_buffer = isinstance(destination, torch.Tensor)
        self._log.append(("read", destination.data_ptr() if is_buffer else None))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    simulation = Simulation()
    monkeypatch.setattr(copy_engine, "torch", simulation)
    return simulation


def _copy(
    device: Simulation, *, pinned: bool, after: Sequence[Any] = (), sizes: Any = (8, 8)
) -> Copy:
    pieces: Any = [
        (_Source(device.log, size, pinned=pinned), _Target(device.log, device, size))
        for size in sizes
    ]
    return Copy("layer", pieces, tuple(after))


def _token(device: Simulation, stream: Stream | None = None) -> Any:
    event = device.Event()
    event.record(stream or device.compute)
    return event


# -- the verbs ----------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "staged"])
def test_a_copy_waits_for_the_last_users_of_its_region_before_the_first_byte(
    pinned: bool, device: Simulation
) -> None:
    engine = StreamCopyEngine(CPU)
    tokens = [_token(device), _token(device)]
    begun = _copy(device, pinned=pinned, after=tokens)
    device.log.clear()
    engine.start(begun)
    engine.drain()
    words = [word for word in device.words() if word in ("wait", "write", "record")]
    waits = [entry for entry in device.log if entry[0] == "wait"]
    writes = [entry for entry in device.log if entry[0] == "write"]
    assert words[:3] == ["wait", "wait", "write"]
    assert [entry[1] for entry in waits] == tokens
    streams = {entry[2].name for entry in waits} | {entry[1].name for entry in writes}
    assert len(streams) == 1 and device.compute.name not in streams
    assert all(non_blocking for *_, non_blocking in writes)
    engine.close()


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "staged"])
def test_ready_is_recorded_behind_the_last_byte_and_waited_for_by_compute(
    pinned: bool, device: Simulation
) -> None:
    engine = StreamCopyEngine(CPU)
    begun = _copy(device, pinned=pinned)
    engine.start(begun)
    assert begun.queued.wait(timeout=30)
    assert device.log[-1][0] == "record" and device.log[-1][1] is begun.ready
    assert device.log[-1][2] is not device.compute
    device.log.clear()
    engine.wait(begun)
    waits = [entry for entry in device.log if entry[0] == "wait"]
    assert [(event, stream) for _, event, stream in waits] == [
        (begun.ready, device.compute)
    ]
    engine.close()


def test_a_copy_that_has_happened_is_not_waited_for(device: Simulation) -> None:
    engine = StreamCopyEngine(CPU)
    begun = _copy(device, pinned=True)
    engine.start(begun)
    device.finished = True
    device.log.clear()
    engine.wait(begun)
    assert device.log == []
    assert engine.stall_seconds() == 0
    engine.close()


def test_done_is_recorded_on_the_stream_that_computes(device: Simulation) -> None:
    engine = StreamCopyEngine(CPU)
    for stream in (device.compute, Stream(CPU, "another")):
        device.set_stream(stream)
        token = engine.done()
        assert device.log[-1] == ("record", token, stream)
    engine.close()


def test_compute_waits_for_tokens_of_scratch(device: Simulation) -> None:
    engine = StreamCopyEngine(CPU)
    tokens = [_token(device), _token(device)]
    device.log.clear()
    engine.order_after(tokens)
    assert device.log == [("wait", token, device.compute) for token in tokens]
    engine.close()


def test_copies_into_new_memory_come_after_compute_that_used_it(
    device: Simulation,
) -> None:
    engine = StreamCopyEngine(CPU)
    before = device.compute.tick()
    engine.fence()
    begun = _copy(device, pinned=True)
    engine.start(begun)
    ready: Any = begun.ready
    assert ready.clock[device.compute.name] >= before
    engine.close()


def test_poison_comes_behind_the_last_user_and_before_the_next_copy(
    device: Simulation,
) -> None:
    engine = StreamCopyEngine(CPU)
    token = _token(device)
    device.log.clear()
    target: Any = _Target(device.log, device, 8)
    engine.poison(target, token)
    engine.start(_copy(device, pinned=True))
    assert device.words()[:3] == ["wait", "fill", "write"]
    assert device.log[0][1] is token
    assert device.log[0][2] is device.log[1][1] is device.log[2][1]
    engine.close()


def test_a_staging_buffer_is_read_into_again_only_behind_its_copy(
    device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_engine, "STAGING_BYTES", 64)
    engine = StreamCopyEngine(CPU)
    engine.start(_copy(device, pinned=False, sizes=(64 * 5 + 3, 64 * 4)))
    engine.drain()
    behind: dict[int, Any] = {}  # buffer -> event behind the copy out of it
    safe: set[int] = set()
    last = 0
    reused = 0
    for word, *entry in device.log:
        if word == "read":
            reused += entry[0] in behind
            assert entry[0] not in behind or entry[0] in safe
            safe.discard(entry[0])
        elif word == "write":
            last = entry[1]
        elif word == "record" and last:
            behind[last], last = entry[0], 0
        elif word == "synchronize":
            safe |= {buffer for buffer, event in behind.items() if event is entry[0]}
    assert reused >= 6 and len(behind) <= 3
    engine.close()


@pytest.mark.parametrize("make", [HostCopyEngine, lambda: StreamCopyEngine(CPU)])
def test_start_returns_at_once_and_wait_waits(
    make: Callable[[], Any], device: Simulation
) -> None:
    engine = make()
    begun = _copy(device, pinned=False)
    source: Any = begun.pieces[0][0]
    source.gate.clear()
    engine.start(begun)
    assert not begun.queued.is_set()
    threading.Timer(0.05, source.gate.set).start()
    before = time.perf_counter()
    engine.wait(begun)
    assert begun.queued.is_set() and "read" in device.words()
    assert 0 < engine.stall_seconds() <= time.perf_counter() - before
    engine.close()


@pytest.mark.parametrize("make", [HostCopyEngine, lambda: StreamCopyEngine(CPU)])
def test_a_copy_that_fails_raises_where_it_is_waited_for(
    make: Callable[[], Any], device: Simulation
) -> None:
    engine = make()
    failing, following = _copy(device, pinned=False), _copy(device, pinned=False)
    source: Any = failing.pieces[1][0]
    source.error = OSError("the disk is gone")
    engine.start(failing)
    engine.start(following)
    with pytest.raises(OSError, match="the disk is gone"):
        engine.wait(failing)
    engine.wait(following)
    engine.close()


# -- whole passes -------------------------------------------------------------------


class _Watched:
    """A copy engine on the simulated device, whose writes are noted.

    Args:
        device: where it copies to.
    """

    def __init__(self, device: Simulation) -> None:
        self.device = device
        self.detector = RaceDetector()

    def make(self, _: torch.device) -> Any:
        engine: Any = StreamCopyEngine(CPU)
        detector = self.detector

        class Noting(StreamCopyEngine):
            def start(self, begun: Copy) -> None:
                super().start(begun)
                assert begun.queued.wait(timeout=30)
                ready: Any = begun.ready
                for _, destination in begun.pieces:
                    detector.write(destination, self._stream, ready.clock, begun.name)  # type: ignore[arg-type]

            def poison(self, destination: torch.Tensor, token: object | None) -> None:
                super().poison(destination, token)
                stream: Any = self._stream
                stream.tick()
                detector.write(destination, stream, dict(stream.clock), "poison")

        engine.close()
        return Noting(CPU)

    def watch(self, model: nn.Module) -> None:
        """Note what the forwards of an attached model read."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda called, _, name=name: self._note(called, name)
            )
            module.register_forward_hook(
                lambda called, a, o, name=name: self._note(called, name), prepend=True
            )

    def _note(self, module: nn.Module, name: str) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                self.detector.read(parameter, self.device.current_stream(), name)


@pytest.fixture
def watched(device: Simulation, monkeypatch: pytest.MonkeyPatch) -> _Watched:
    engine = _Watched(device)
    monkeypatch.setattr(mover, "make_copy_engine", engine.make)
    return engine


class _Shares(nn.Module):
    """Runs layers more than once, inside and beside others that hold tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(32))
        self.layers = linears(depth=5)
        self.stack = Stack(32, 2)
        self.order = [0, 1, 2, 3, 4, 1, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = self.layers[index](x) * self.own
        x = nn.functional.linear(x, self.layers[2].weight)
        return self.stack(x)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("windows", [0, 1.0, 1.5, 2.5, 4.0])
def test_no_region_is_written_while_its_last_user_may_run(
    windows: float, debug: bool, watched: _Watched
) -> None:
    model, x = _Shares(), torch.randn(2, 32)
    plain = copy.deepcopy(model)
    with offloaded(model, store="disk", limit_gb=0) as attached:
        run(attached, x)
        least = offload_plan(attached).least_bytes
    with offloaded(model, store="disk", limit_gb=windows * least / GIB, debug=debug):
        watched.watch(model)
        for order in ([0, 1, 2, 3, 4, 1, 0], [4, 3, 2], [1, 1, 0, 4], [0, 1, 2, 3, 4]):
            model.order = plain.order = order
            for _ in range(2):
                assert same_bits(run(model, x), run(plain, x))
            offload(model)
    assert watched.detector.counted > 100
    assert watched.detector.races == []


def test_passes_on_several_streams_that_wait_for_each_other_are_in_order(
    watched: _Watched, device: Simulation
) -> None:
    model, x = linears(depth=6), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    window = 3 * model[0].weight.nbytes
    with offloaded(model, store="disk", limit_gb=window / GIB):
        watched.watch(model)
        before = device.compute
        for number in range(4):
            stream = Stream(CPU, f"pass {number}")
            stream.learn(before.clock)
            device.set_stream(stream)
            assert same_bits(run(model, x), want)
            before = stream
    assert watched.detector.counted > 20
    assert watched.detector.races == []


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_pass_without_a_race(name: str, watched: _Watched) -> None:
    model, inputs = REAL_MODELS[name]()
    want = first_output(run(copy.deepcopy(model), **inputs))
    with offloaded(model, store="disk", limit_gb=0):
        watched.watch(model)
        for _ in range(3):
            assert same_bits(first_output(run(model, **inputs)), want)
        assert offload_stats(model).bytes_moved > 0
    assert watched.detector.counted > 100
    assert watched.detector.races == []


# -- late readers -------------------------------------------------------------------


class _KeepsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = [self.weight.data]
        return x @ self.weight


class _ReadsLate(nn.Module):
    def __init__(self, keeper: _KeepsItsWeight) -> None:
        super().__init__()
        self.keeper = [keeper]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.keeper[0].kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_a_module_that_keeps_a_streamed_weight_computes_nan_under_debug(
    store: Any, dtype: torch.dtype
) -> None:
    if store == "cpu" and dtype == torch.float32:
        pytest.skip("used in place: there is nothing to poison")
    keeper = _KeepsItsWeight()
    model = nn.Sequential(keeper, _ReadsLate(keeper), nn.Linear(64, 2, bias=False))
    x = torch.randn(2, 64, dtype=dtype)
    fields: dict[str, Any] = {"store": store, "compute_dtype": dtype, "limit_gb": 0}
    for debug in (False, True):
        with offloaded(model, **fields, debug=debug):
            for _ in range(2):
                assert bool(run(model, x).isnan().all()) == debug

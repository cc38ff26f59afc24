"""Streams and events, recorded: every wait and release in the right order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import hookoffload.copy_engine as copy_engine
import hookoffload.staging as staging
from hookoffload.copies import Copy
from hookoffload.copy_engine import HostCopyEngine, StreamCopyEngine
from tests.simulated_device import CPU, Simulation, Stream


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
        self.source = None
        self.nbytes = size
        self.copied_revision = 0
        self.bytes = torch.zeros(size, dtype=torch.uint8)
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
    return Copy("layer", pieces, sum(sizes), tuple(after))


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
    assert begun.queued is None or begun.queued.wait(timeout=30)
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


def test_a_wait_lasts_from_when_compute_comes_until_the_copy_is_ready(
    device: Simulation,
) -> None:
    engine = StreamCopyEngine(CPU)
    for late in (5.0, -3.0, 2.0):  # ms; one is ready before
        begun = _copy(device, pinned=True)
        engine.start(begun)
        device.log.clear()
        engine.wait(begun)
        kind, before, stream = device.log[0]
        assert (kind, stream, before.timing) == ("record", device.compute, True)
        assert device.log[1:] == [("wait", begun.ready, device.compute)]
        before.elapsed_time = {begun.ready: late}.__getitem__
    assert engine.stall_seconds() == pytest.approx(0.007)
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


def test_scratch_goes_on_without_an_event_on_the_default_stream(
    device: Simulation,
) -> None:
    engine = StreamCopyEngine(CPU)
    token = engine.computed()
    engine.order_after((token,))
    assert device.log == []
    engine.close()


def test_a_stream_that_used_scratch_may_be_gone_when_it_is_waited_for(
    device: Simulation,
) -> None:
    engine = StreamCopyEngine(CPU)
    device.set_stream(Stream(CPU, "another"))
    token = engine.computed()
    assert device.words() == ["record"]
    device.set_stream(device.compute)
    engine.order_after((token,))
    assert device.words() == ["record", "wait"]
    engine.close()


@pytest.mark.parametrize("first", ["default", "another"])
def test_scratch_that_another_stream_used_is_waited_for(
    first: str, device: Simulation
) -> None:
    engine = StreamCopyEngine(CPU)
    streams = [device.compute, Stream(CPU, "another")]
    before, after = streams if first == "default" else streams[::-1]
    device.set_stream(before)
    token = engine.computed()
    used = before.tick() if first == "default" else before.clock[before.name]
    device.set_stream(after)
    engine.order_after((token,))
    assert after.clock.get(before.name, -1) >= used
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
    monkeypatch.setattr(staging, "BUFFER_BYTES", 64)
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


def test_copies_that_the_device_refuses_lose_no_staging_buffer(
    device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StreamCopyEngine(CPU)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(_Target, "copy_", refuse)
        for _ in range(8):  # more often than there are buffers
            begun = _copy(device, pinned=False)
            engine.start(begun)
            with pytest.raises(RuntimeError, match="no room"):
                engine.wait(begun)
    begun = _copy(device, pinned=False)
    engine.start(begun)
    engine.wait(begun)
    engine.close()

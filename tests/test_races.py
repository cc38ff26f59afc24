"""Whole passes on a simulated device: nobody overwrites what is still being read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import hookoffload.copy_engine as copy_engine
import hookoffload.layer_copies as layer_copies
from hookoffload import offload, offload_plan, offload_stats, offloaded
from hookoffload.copies import Copy
from hookoffload.copy_engine import StreamCopyEngine
from hookoffload.host_copies import HostCopyEngine
from hookoffload.master import Master
from hookoffload.master_code import MasterCode
from tests.real_models import REAL_MODELS
from tests.samples import GIB, Stack, first_output, linears, run, same_bits
from tests.simulated_device import CPU, RaceDetector, Simulation, Stream
from tests.unreadable_ram import have_ram_unreadable


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    simulation = Simulation()
    monkeypatch.setattr(copy_engine, "torch", simulation)
    return simulation


class _NotingEngine(StreamCopyEngine):
    """Copies to the simulated device, and notes what is written there."""

    def __init__(self, detector: RaceDetector) -> None:
        super().__init__(CPU)
        self._detector = detector

    def start(self, begun: Copy) -> None:
        super().start(begun)
        assert begun.queued is not None and begun.queued.wait(timeout=30)
        stream: Any = self._stream
        ready: Any = begun.ready
        for _, destination in begun.pieces:
            self._detector.write(destination, stream, ready.clock, begun.name)

    def poison(self, destination: torch.Tensor, token: object | None) -> None:
        super().poison(destination, token)
        stream: Any = self._stream
        stream.tick()
        self._detector.write(destination, stream, dict(stream.clock), "poison")


class _Watched:
    """Notes what is copied to the simulated device and what forwards read there.

    Args:
        device: the device.
    """

    def __init__(self, device: Simulation) -> None:
        self.device = device
        self.detector = RaceDetector()

    def make_engine(self, _: torch.device) -> StreamCopyEngine:
        """Stand in for the function that makes the engine for a device."""
        return _NotingEngine(self.detector)

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
    monkeypatch.setattr(layer_copies, "make_copy_engine", engine.make_engine)
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


def test_scratch_that_one_stream_used_is_waited_for_by_the_next(
    watched: _Watched, device: Simulation
) -> None:
    model, x = linears(depth=3), torch.randn(2, 32, dtype=torch.bfloat16)
    with offloaded(model, store="disk", limit_gb=0, compute_dtype=torch.bfloat16):
        run(model, x)
        used = device.compute.tick()  # behind all that copies have waited for
        other = Stream(CPU, "other")
        device.set_stream(other)
        run(model, x)
    assert other.clock.get(device.compute.name, 0) >= used


def test_residents_that_one_stream_brought_are_waited_for_by_others(
    watched: _Watched, device: Simulation
) -> None:
    """Threads with streams of their own need not wait for each other's."""
    model, x = linears(depth=6), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=None):
        watched.watch(model)
        for number in range(3):
            device.set_stream(Stream(CPU, f"pass {number}"))
            assert same_bits(run(model, x), want)
    assert watched.detector.counted > 10
    assert watched.detector.races == []


def test_residents_that_one_stream_cast_are_waited_for_by_others(
    watched: _Watched, device: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, cast = layer_copies.fill_residence, 0

    def noted(*args: Any) -> None:
        nonlocal cast
        fill(*args)
        cast = device.compute.tick()

    monkeypatch.setattr(layer_copies, "fill_residence", noted)
    model, x = linears(depth=3), torch.randn(2, 32, dtype=torch.bfloat16)
    fields: dict[str, Any] = {"compute_dtype": torch.bfloat16, "limit_gb": None}
    with offloaded(model, store="disk", **fields):
        run(model, x)
        other = Stream(CPU, "other")
        device.set_stream(other)
        run(model, x)
        assert cast and other.clock.get(device.compute.name, 0) >= cast


def test_residents_that_are_there_are_not_waited_for(device: Simulation) -> None:
    engine = StreamCopyEngine(CPU)
    engine.note_filled()
    device.finished = True
    device.set_stream(Stream(CPU, "other"))
    engine.see_filled()
    assert "wait" not in device.words()


@pytest.mark.parametrize("edit", ["code", "data"])
def test_masters_are_written_behind_copies_of_forwards_that_may_be_under_way(
    edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host runs ahead: the copies of a whole forward may not have begun yet."""
    have_ram_unreadable(monkeypatch)
    model, x = linears(width=256, depth=4).bfloat16(), torch.randn(2, 256).bfloat16()
    done: list[str] = []

    def note(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return function(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    codec: Any = {"code": "lossless", "data": None}[edit]
    with offloaded(model, limit_gb=0, compute_device="cpu", codec=codec):
        for _ in range(2):
            run(model, x)
        note(HostCopyEngine, "drain")
        note(MasterCode, "renew")
        note(Master, "_adopt_new_data")
        with torch.no_grad():
            if edit == "code":
                model[2].weight.mul_(0.5)
            else:
                model[2].weight.data = model[2].weight * 0.5
        done.clear()
        output = run(model, x)
        writes = [
            done.index(name) for name in ("renew", "_adopt_new_data") if name in done
        ]
        assert len(writes) == 1 and "drain" in done[: writes[0]]
    assert same_bits(output, run(model, x))


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


# Where nobody looks for views of weights: not an output, an input, an attribute.
_KEPT: list[torch.Tensor] = []


class _KeepsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _KEPT[:] = [self.weight.data]
        return x @ self.weight


class _ReadsLate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ _KEPT[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_a_module_that_keeps_a_streamed_weight_computes_nan_under_debug(
    store: Any, dtype: torch.dtype
) -> None:
    if store == "cpu" and dtype == torch.float32:
        pytest.skip("used in place: there is nothing to poison")
    model = nn.Sequential(_KeepsItsWeight(), _ReadsLate(), nn.Linear(64, 2, bias=False))
    x = torch.randn(2, 64, dtype=dtype)
    fields: dict[str, Any] = {"store": store, "compute_dtype": dtype, "limit_gb": 0}
    for debug in (False, True):
        with offloaded(model, **fields, debug=debug):
            for _ in range(2):
                assert bool(run(model, x).isnan().all()) == debug

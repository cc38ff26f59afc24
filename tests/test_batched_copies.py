"""A layer's copies go to CUDA's driver as one list, where it takes lists."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import hookoffload as ho
from hookoffload import batched_copies, copy_engine
from hookoffload.batched_copies import CopyList, driver_stream
from hookoffload.copies import Copy
from hookoffload.copy_engine import StreamCopyEngine
from hookoffload.moves import Moves
from tests.simulated_device import CPU, Simulation

STREAM = ctypes.c_void_p(7)


class Driver:
    """Stands in for the driver's function: copies at once, or refuses."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.streams: list[int | None] = []
        self.counts: list[int] = []

    def __call__(self, to: Any, of: Any, sizes: Any, count: Any, *rest: Any) -> int:
        attributes, first, number, stream = rest
        self.streams.append(stream.value)
        self.counts.append(count.value)
        assert (first[0], number.value) == (0, 1)
        assert attributes._obj.source_order == 1, "as the stream comes to them"
        if not self.answer:
            for index in range(count.value):
                ctypes.memmove(to[index], of[index], sizes[index])
        return self.answer


def use(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    monkeypatch.setattr(batched_copies, "_driver_function", lambda: driver)


def moves(*sizes: int) -> Moves:
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    return Moves([(source, torch.zeros_like(source)) for source in sources])


def arrived(made: Moves) -> bool:
    return all(torch.equal(source, target) for source, target in made.pairs)


def test_a_list_holds_the_bytes_of_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    use(monkeypatch, driver)
    made = moves(5, 1, 4096, 300)
    assert CopyList(made).queue(STREAM)
    assert arrived(made)
    assert (driver.counts, driver.streams) == ([4], [7])


def engine_with_lists(monkeypatch: pytest.MonkeyPatch) -> StreamCopyEngine:
    monkeypatch.setattr(copy_engine, "torch", Simulation())
    monkeypatch.setattr(copy_engine, "driver_stream", lambda _stream: STREAM)
    return StreamCopyEngine(CPU)


def test_the_engine_makes_a_list_once_for_a_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    use(monkeypatch, driver)
    engine = engine_with_lists(monkeypatch)
    made = moves(30, 20)
    engine.start(Copy("layer", (), 50, (), made))
    listed = made.listed
    for _, target in made.pairs:
        target.zero_()
    engine.start(Copy("layer", (), 50, (), made))
    assert arrived(made)
    assert made.listed is listed and driver.counts == [2, 2]
    engine.close()


def test_copies_go_one_by_one_when_the_driver_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(answer=1)
    use(monkeypatch, driver)
    engine = engine_with_lists(monkeypatch)
    for _ in range(2):
        made = moves(30, 20)
        engine.start(Copy("layer", (), 50, (), made))
        assert arrived(made)
    assert len(driver.counts) == 1, "it is not asked again"
    engine.close()


def test_other_devices_copy_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Driver())
    stream: Any = Simulation().compute
    assert driver_stream(stream) is None


# -- a GPU --------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_driver_with_lists_copies_what_pytorch_would() -> None:
    stream = torch.Stream("cuda")
    listed = driver_stream(stream)
    if listed is None:
        pytest.skip("the driver is older than CUDA 13")
    sources = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1, 2**20, 77)]
    pairs = [
        (locked, torch.zeros_like(locked, device="cuda"))
        for locked in (source.pin_memory() for source in sources)
    ]
    torch.cuda.synchronize()
    made = Moves(pairs)
    assert CopyList(made).queue(listed)
    stream.synchronize()
    for source, (_, target) in zip(sources, pairs, strict=True):
        assert torch.equal(target.cpu(), source)


@pytest.mark.gpu
def test_a_streamed_model_computes_the_same_with_lists_and_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12)))
    inputs = torch.randn(3, 512)
    outputs = []
    for lists in (True, False):
        if not lists:
            use(monkeypatch, None)
        with ho.offloaded(model, limit_gb=0, compute_device="cuda"), torch.no_grad():
            outputs += [model(inputs).cpu() for _ in range(3)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)

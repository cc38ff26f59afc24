"""Parts of a model that are called by themselves: what they take counts as well.

A stand-in for an accelerator's allocator counts activations: each layer's forward takes
so many bytes beside the weights, which the limit must have room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import OffloadPolicy, attach_offload_hooks, detach, offload_stats
from hookoffload.budget import MemoryBudget
from hookoffload.device_memory import DeviceMemory
from hookoffload.state_hooks import session_of
from tests.samples import GIB, linears, run, same_bits

WIDTH = 32
LAYER = WIDTH * WIDTH * 4
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


class Allocator:
    """Counts what the library has reserved, and what forwards take beside it."""

    def __init__(self) -> None:
        self.reserved = 0
        self.activations = 0
        self.peak = 0
        self.highest = 0  # which nobody resets

    def note(self) -> None:
        self.peak = max(self.peak, self.reserved + self.activations)
        self.highest = max(self.highest, self.peak)

    def take(self, nbytes: int) -> None:
        self.activations += nbytes
        self.note()


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    """Let the library take the CPU for a device that counts its memory."""
    counted = Allocator()
    reserve, release = MemoryBudget.reserve, MemoryBudget.release

    def take(budget: MemoryBudget, kind: str, nbytes: int, what: str = "") -> None:
        reserve(budget, kind, nbytes, what)
        if budget._within is None:
            counted.reserved += nbytes
            counted.note()

    def give(budget: MemoryBudget, kind: str, nbytes: int) -> None:
        release(budget, kind, nbytes)
        if budget._within is None:
            counted.reserved -= nbytes

    def reset(memory: DeviceMemory) -> None:
        counted.peak = counted.reserved + counted.activations

    def allocated(memory: DeviceMemory) -> int:
        return counted.reserved + counted.activations

    monkeypatch.setattr(MemoryBudget, "reserve", take)
    monkeypatch.setattr(MemoryBudget, "release", give)
    monkeypatch.setattr(DeviceMemory, "measures_peak", True)
    monkeypatch.setattr(DeviceMemory, "allocated_bytes", allocated)
    monkeypatch.setattr(DeviceMemory, "peak_bytes", lambda memory: counted.peak)
    monkeypatch.setattr(DeviceMemory, "reset_peak", reset)
    yield counted


class Part(nn.Sequential):
    """Layers, and something that takes memory between them."""

    def __init__(self, depth: int) -> None:
        super().__init__(*linears(WIDTH, depth))
        self.between: Callable[[], None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x)
            if self.between is not None:
                self.between()
        return x


class Coder(nn.Module):
    """Has two ways in, and none of them is its forward."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.encoder = Part(depth)
        self.decoder = Part(depth)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


def _takes(part: nn.Sequential, nbytes: int, allocator: Allocator) -> None:
    """Have each layer's forward take memory."""
    for layer in part:
        layer.register_forward_pre_hook(lambda *_: allocator.take(nbytes))
        layer.register_forward_hook(lambda *_: allocator.take(-nbytes))


def _between(part: Part, nbytes: int, allocator: Allocator) -> None:
    """Have a part take memory while none of its layers runs."""

    def work() -> None:
        allocator.take(nbytes)
        allocator.take(-nbytes)

    part.between = work


def _policy(layers: float) -> OffloadPolicy:
    return OffloadPolicy(
        limit_gb=layers * LAYER / GIB, compute_device="cpu", store="disk"
    )


@pytest.mark.parametrize("takes", [_takes, _between])
@pytest.mark.parametrize("limit", [4, 5.5, 7, 9])
def test_activations_of_a_part_are_held_against_the_limit(
    limit: float, takes: Any, allocator: Allocator, caplog: pytest.LogCaptureFixture
) -> None:
    model = Coder()
    want = run(model, X)
    takes(model.decoder, 2 * LAYER, allocator)
    attach_offload_hooks(model, _policy(limit))
    for _ in range(4):
        with torch.no_grad():
            assert same_bits(model.decode(model.encode(X)), want)
        assert allocator.highest <= limit * LAYER
    assert "was exceeded" not in caplog.text
    stats = offload_stats(model)
    assert stats.peak_bytes <= limit * LAYER
    detach(model)
    assert allocator.reserved == 0


def test_a_part_leaves_what_its_activations_do_not_need_to_residents(
    allocator: Allocator,
) -> None:
    model = Coder()
    _takes(model.decoder, 2 * LAYER, allocator)
    attach_offload_hooks(model, _policy(8 + 2.25))
    for _ in range(3):
        with torch.no_grad():
            model.decode(model.encode(X))
    before = offload_stats(model).bytes_moved
    with torch.no_grad():
        model.decode(model.encode(X))
    assert offload_stats(model).bytes_moved == before, "all eight layers fit"
    detach(model)


def test_larger_inputs_of_one_part_do_not_hide_behind_those_of_another(
    allocator: Allocator,
) -> None:
    model = Coder()
    _takes(model.decoder, 3 * LAYER, allocator)
    attach_offload_hooks(model, _policy(6))
    with torch.no_grad():
        for _ in range(3):
            model.encode(X.repeat(8, 1))
        model.decode(X)
    assert allocator.highest <= 6 * LAYER
    detach(model)


def test_a_part_that_failed_is_measured_again(allocator: Allocator) -> None:
    model = Coder()
    attach_offload_hooks(model, _policy(6))
    with torch.no_grad():
        model.encode(X)
        model.encode(X)

    def fail(*_: Any) -> None:
        raise ValueError("not now")

    handle = model.decoder[0].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="not now"), torch.no_grad():
        model.decode(X)
    handle.remove()
    _takes(model.decoder, 3 * LAYER, allocator)
    with torch.no_grad():
        model.decode(X)
    assert allocator.highest <= 6 * LAYER
    detach(model)


@pytest.mark.parametrize("limit", [4.5, 6, 9, 14])
def test_idle_models_leave_room_for_the_activations_of_the_active_one(
    limit: float, allocator: Allocator
) -> None:
    coder, text, unet = Coder(), linears(WIDTH, 3), linears(WIDTH, 5)
    models = {"text": text, "unet": unet, "vae": coder}
    want = run(text, X), run(unet, X), run(coder, X)
    _takes(coder.decoder, 2 * LAYER, allocator)
    _takes(unet, int(1.5 * LAYER), allocator)
    attach_offload_hooks(models, _policy(limit))
    for _ in range(3):
        with torch.no_grad():
            assert same_bits(text(X), want[0])
            for _ in range(3):
                assert same_bits(unet(X), want[1])
            assert same_bits(coder.decode(coder.encode(X)), want[2])
        assert allocator.highest <= limit * LAYER
    assert offload_stats(models).peak_bytes <= limit * LAYER
    session = session_of(text)
    assert session is not None and session.group is not None
    assert session.group.budget.used == allocator.reserved
    detach(models)
    assert allocator.reserved == 0


def test_when_all_fits_with_the_largest_activations_nothing_is_evicted(
    allocator: Allocator,
) -> None:
    models = {"unet": linears(WIDTH, 4), "vae": Coder(2)}
    _takes(models["vae"].decoder, 2 * LAYER, allocator)
    attach_offload_hooks(models, _policy(8 + 2 + 0.5))

    def generate() -> None:
        with torch.no_grad():
            models["unet"](X)
            models["unet"](X)
            models["vae"].decode(X)
            models["vae"].encode(X)

    for _ in range(3):
        generate()
    before = offload_stats(models).bytes_moved
    generate()
    assert offload_stats(models).bytes_moved == before
    detach(models)

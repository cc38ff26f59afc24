"""Models that ask a weight at rest which device it is on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offloaded,
    set_limit,
)
from hookoffload.stand_ins import StandIns
from tests.interrupts import interrupted_at, steps_of
from tests.samples import run, same_bits

WIDTH = 128


class Asks(nn.Module):
    """Asks for devices as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.words = nn.Embedding(3000, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.sideways = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.fail = False
        self.saved: dict[str, torch.Tensor] | None = None
        self.seen: list[torch.device] = []
        self.stood: list[tuple[bool, ...]] = []

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        device = self.device
        stood = [_stands_in(self.first), _stands_in(self.last)]
        x = self.words(ids.to(self.words.weight.device))
        x = x.to(self.words.weight.device)
        x = x.to(self.device) + self.first(x)
        positions = torch.arange(ids.shape[1], device=self.places.weight.device)
        x = x + self.places(positions)
        kept = torch.ones(WIDTH, dtype=x.dtype, device=self.last.weight.device)
        x = x * kept + functional.linear(x, self.sideways.weight.to(x.dtype))
        x = x + torch.ones((), dtype=x.dtype, device=self.sideways.weight.device)
        if self.fail:
            raise RuntimeError("as asked")
        if self.saved is not None:
            self.saved = {k: v.clone() for k, v in self.state_dict().items()}
        self.seen += [device, self.device, self.last.weight.device]
        self.stood.append((*stood, _stands_in(self.first), _stands_in(self.last)))
        return self.last(x)


def _stands_in(module: nn.Module) -> bool:
    """Tell without asking it for anything that the probe would see."""
    with torch._C.DisableTorchFunction():
        return module.weight.stride() == (0, 0)


class Decoder(nn.Module):
    """Has a part that a pipeline calls by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Asks()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.part(ids)


CPU = pytest.param("cpu", id="as if RAM were another device")
GPU = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", [CPU, GPU])


@pytest.fixture
def fields(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    if device == "cpu":
        monkeypatch.setattr(StandIns, "_rests_elsewhere", lambda *_: True)
    yield {"limit_gb": 0, "compute_device": device, "store": "disk"}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(16).view(2, 8)


def _plain(model: nn.Module, ids: torch.Tensor, device: str) -> torch.Tensor:
    return run(copy.deepcopy(model).to(device), ids.to(device))


@DEVICES
@pytest.mark.parametrize("limit", [0, 0.002, None])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_told_the_compute_device_and_computes_the_same(
    device: str,
    fields: dict[str, Any],
    ids: torch.Tensor,
    limit: float | None,
    dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(0)
    model = Asks().to(dtype=dtype or torch.float32)
    wanted = _plain(model, ids, device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with offloaded(model, **{**fields, "limit_gb": limit}):
        for _ in range(4):
            assert same_bits(run(model, ids.to(device)), wanted)
            after = model.state_dict()
            assert all(same_bits(after[name], before[name]) for name in before)
    assert {seen.type for seen in model.seen} == {device}
    after = model.state_dict()
    assert all(same_bits(after[name], before[name]) for name in before)


@DEVICES
def test_it_stands_in_wherever_it_is_not_bound_from_the_first_question_on(
    device: str, fields: dict[str, Any], ids: torch.Tensor
) -> None:
    model = Decoder()
    with offloaded(model, **fields):
        for called in (model, model, model.part):
            run(called, ids.to(device))
    # The last layer is asked in the middle of the first forward.
    assert model.part.stood[0] == (True, False, True, True)
    assert model.part.stood[1:] == [(True, True, True, True)] * 2


@DEVICES
def test_a_cast_weight_says_the_dtype_that_it_computes_in(
    device: str, fields: dict[str, Any], ids: torch.Tensor
) -> None:
    model = Asks()
    wanted = _plain(model.to(torch.bfloat16), ids, device)
    dtypes, stood = [], []

    def look(*_: object) -> None:
        stood.append(_stands_in(model.words))  # rows of it are looked up in the master
        with torch._C.DisableTorchFunction():
            dtypes.append(model.last.weight.dtype)

    model.first.register_forward_hook(look)
    with offloaded(model.to(torch.float32), **fields, compute_dtype=torch.bfloat16):
        for _ in range(3):
            assert same_bits(run(model, ids.to(device)), wanted)
    assert stood == [True] * 3
    assert dtypes[1:] == [torch.bfloat16] * 2  # asked at the end of the first


@DEVICES
def test_a_part_that_is_called_by_itself_is_told_so_too(
    device: str, fields: dict[str, Any], ids: torch.Tensor
) -> None:
    model = Decoder()
    wanted = _plain(model, ids, device)
    with offloaded(model, **fields):
        for called in (model, model.part, model, model.part):
            assert same_bits(run(called, ids.to(device)), wanted)
            assert not any(p.isnan().any() for p in model.parameters())


@DEVICES
def test_an_exception_leaves_no_stand_in(
    device: str, fields: dict[str, Any], ids: torch.Tensor
) -> None:
    model = Asks()
    wanted = _plain(model, ids, device)
    with offloaded(model, **fields):
        for fail in (True, True, False, False, True, False):
            model.fail = fail
            if fail:
                with pytest.raises(RuntimeError, match="as asked"):
                    run(model, ids.to(device))
            else:
                assert same_bits(run(model, ids.to(device)), wanted)
            assert not any(p.isnan().any() for p in model.parameters())


@DEVICES
@pytest.mark.parametrize("then", ["call", "detach"])
def test_an_interrupt_leaves_no_stand_in(
    device: str, fields: dict[str, Any], ids: torch.Tensor, then: str
) -> None:
    model = Asks()
    wanted = _plain(model, ids, device)
    attach_offload_hooks(model, OffloadPolicy(**fields))
    run(model, ids.to(device))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.first.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids.to(device))
    handle.remove()
    if then == "call":
        assert same_bits(run(model, ids.to(device)), wanted)
    detach(model)
    assert same_bits(_plain(model, ids, device), wanted)


@pytest.mark.usefixtures("fields")
@pytest.mark.parametrize("device", [CPU])
@pytest.mark.parametrize("passes", [0, 1])
def test_an_interrupt_at_any_step_of_a_forward_leaves_no_stand_in(
    device: str, passes: int
) -> None:
    policy = OffloadPolicy(limit_gb=0, compute_device=device, store="disk")
    torch.manual_seed(0)
    plain, x = Edits(), torch.randn(2, WIDTH)
    wanted, state = run(plain, x), plain.state_dict()

    def attached() -> Edits:
        model = Edits()
        model.load_state_dict(state)
        attach_offload_hooks(model, policy)
        for _ in range(passes):
            run(model, x)
        return model

    model = attached()
    steps = steps_of(lambda: run(model, x))
    detach(model)
    for number, step in enumerate(steps):
        model = attached()
        try:
            with interrupted_at(step) as interrupt:
                run(model, x)
        except KeyboardInterrupt:
            pass
        if number % 2:
            assert same_bits(run(model, x), wanted), interrupt.interrupted
        detach(model)
        after = model.state_dict()
        for name, value in state.items():
            assert same_bits(after[name], value), (name, interrupt.interrupted)


@DEVICES
def test_what_is_saved_inside_a_forward_are_the_weights(
    device: str, fields: dict[str, Any], ids: torch.Tensor
) -> None:
    model = Asks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with offloaded(model, **fields):
        run(model, ids.to(device))
        model.saved = {}
        run(model, ids.to(device))
        saved, model.saved = model.saved, None
        assert saved.keys() == before.keys()
        assert all(same_bits(saved[name].cpu(), before[name]) for name in before)


@DEVICES
def test_edits_and_other_limits_between_forwards_are_seen(
    device: str, fields: dict[str, Any], ids: torch.Tensor
) -> None:
    model = Asks()
    with offloaded(model, **fields):
        run(model, ids.to(device))
        for limit in (0.002, None, 0):
            with torch.no_grad():
                model.last.weight.mul_(1.5)
                model.words.weight.add_(0.25)
            wanted = _plain(_copy(model), ids, device)
            set_limit(model, limit)
            for _ in range(3):
                assert same_bits(run(model, ids.to(device)), wanted)


def _copy(model: Asks) -> Asks:
    twin = Asks()
    twin.load_state_dict(model.state_dict())
    return twin


class Edits(nn.Module):
    """Does things to a weight that it has asked for its device before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.asked = nn.Linear(WIDTH, WIDTH)
        self.then = ""
        self.stood: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).to(self.asked.weight.device)
        if self.then == "other data":
            self.asked.weight.data = torch.full_like(self.asked.weight, 0.5)
        elif self.then == "zeros":
            with torch.no_grad():
                self.asked.weight.zero_()
        elif self.then == "state dict":
            self.first.state_dict()
            self.stood.append(_stands_in(self.asked))
        return self.asked(x)


def _after_two_forwards(device: str) -> tuple[Edits, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Edits(), torch.randn(2, WIDTH, device=device)
    policy = OffloadPolicy(limit_gb=0, compute_device=device, store="disk")
    attach_offload_hooks(model, policy)
    run(model, x)
    run(model, x)
    return model, x


@pytest.mark.usefixtures("fields")
@pytest.mark.parametrize("device", [CPU])
def test_other_data_that_it_is_given_is_taken_over(device: str) -> None:
    model, x = _after_two_forwards(device)
    plain = _copied(model)
    plain.then = model.then = "other data"
    for _ in range(2):
        assert same_bits(run(model, x), run(plain, x))
    detach(model)
    assert (model.asked.weight == 0.5).all()


@pytest.mark.usefixtures("fields")
@DEVICES
def test_a_write_that_would_be_lost_is_refused_and_done_the_next_time(
    device: str,
) -> None:
    model, x = _after_two_forwards(device)
    model.then = "zeros"
    with pytest.raises(RuntimeError, match=r"asked\.weight: a module wrote to it"):
        run(model, x)
    assert model.asked.weight.abs().sum() > 0
    run(model, x)
    detach(model)
    assert not model.asked.weight.any()


@pytest.mark.usefixtures("fields")
@DEVICES
def test_it_stands_in_again_behind_a_state_dict(device: str) -> None:
    model, x = _after_two_forwards(device)
    model.then = "state dict"
    run(model, x)
    detach(model)
    assert model.stood == [True]


class _Shows(nn.Module):
    """Returns a weight that it has asked for its device, and uses one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.to(self.book.weight.device) * self.gain, self.book.weight


class _UsesWhatItIsShown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shows = _Shows()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(*self.shows(x))


@DEVICES
def test_a_weight_that_a_forward_returns_is_the_weight(
    device: str, fields: dict[str, Any]
) -> None:
    model, x = _UsesWhatItIsShown(), torch.randn(2, WIDTH, device=device)
    wanted = _plain(model, x, device)
    with offloaded(model, **fields):
        for _ in range(4):
            assert same_bits(run(model, x), wanted)


@pytest.mark.usefixtures("fields")
@DEVICES
def test_what_takes_its_name_need_not_be_floating(device: str) -> None:
    model, x = _after_two_forwards(device)
    model.asked = _Whole()
    for _ in range(2):
        assert run(model, x).shape == x.shape
    detach(model)


class _Whole(nn.Module):
    """A layer of integers."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.ones(WIDTH, WIDTH, dtype=torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.device)  # who asked before was told where it rests
        return functional.linear(x, self.weight.to(x.dtype))


def _copied(model: Edits) -> Edits:
    twin = Edits()
    twin.load_state_dict(model.state_dict())
    return twin


def test_where_weights_rest_on_the_compute_device_nothing_stands_in(
    ids: torch.Tensor,
) -> None:
    model = Asks()
    lies: list[tuple[int, ...]] = []
    model.first.register_forward_pre_hook(
        lambda *_: lies.append(model.last.weight.stride())
    )
    with offloaded(model, limit_gb=0, compute_device="cpu", store="disk"):
        for _ in range(3):
            run(model, ids)
    assert lies == [(WIDTH, 1)] * 3

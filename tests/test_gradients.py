"""Inference in every mode; gradients are right or refused, never wrong."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    offload_plan,
    offload_stats,
    offloaded,
)
from hookoffload.graph_guard import GraphGuard
from tests.process_memory import anonymous_bytes, settled_bytes
from tests.real_models import REAL_MODELS
from tests.samples import (
    STREAMING,
    Picture,
    Stack,
    first_output,
    linears,
    run,
    same_bits,
    weight_bytes,
)

# With a limit, layers stream; without one, those that are cast do.
REFUSED = {name: f for name, f in STREAMING.items() if "unlimited" not in name}
SUPPORTED = r"no_grad\(\) or torch\.inference_mode\(\)"


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
def test_an_output_that_needs_a_gradient_through_streamed_weights_is_refused(
    fields: dict[str, Any],
) -> None:
    model = Stack()
    before = Picture(model)
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    want = run(copy.deepcopy(model).to(x.dtype), x)
    with offloaded(model, **fields):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=SUPPORTED) as refusal:
                model(x)
            assert "blocks.0.norm" in str(refusal.value)
            assert same_bits(run(model, x), want)
    assert before.differences(model) == []


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
def test_a_gradient_for_the_input_through_frozen_weights_is_refused(
    fields: dict[str, Any],
) -> None:
    model = Stack().requires_grad_(False)
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"), requires_grad=True)
    with offloaded(model, **fields):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=SUPPORTED):
                model(x)
            assert not run(model, x).requires_grad


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_frozen_weights_and_plain_inputs_need_no_mode(fields: dict[str, Any]) -> None:
    model = Stack().requires_grad_(False)
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    want = run(copy.deepcopy(model).to(x.dtype), x)
    with offloaded(model, **fields):
        assert all(same_bits(model(x), want) for _ in range(3))


def test_a_part_that_needs_a_gradient_is_refused_as_well() -> None:
    model = Stack().requires_grad_(False)
    model.blocks[2].down.bias.requires_grad_(True)
    x = torch.randn(2, 32)
    with offloaded(model, store="disk", limit_gb=0):
        assert torch.isfinite(model.blocks[1](x)).all()
        for part in (model, model.blocks[2], model.blocks[2].down):
            with pytest.raises(RuntimeError, match=r"blocks\.2\.down"):
                part(torch.randn(2, 64 if part is model.blocks[2].down else 32))


def test_a_looked_up_embedding_that_needs_a_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(40_000, 16), nn.Linear(16, 4))
    model[1].requires_grad_(False)
    with (
        offloaded(model, store="disk", limit_gb=0),
        pytest.raises(RuntimeError, match=SUPPORTED),
    ):
        model(torch.tensor([[1, 2]]))


class _Hidden:
    """Keeps a tensor where nobody looks."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class _Hides(nn.Module):
    """Returns its output in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> _Hidden:
        return _Hidden(x @ self.weight.T)


class _Keeps(nn.Module):
    """Keeps its output and returns another, that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.kept = _Hidden(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.value = x @ self.weight.T
        return self.kept.value.detach()


@pytest.mark.parametrize("make", [_Hides, _Keeps])
def test_gradients_of_hidden_outputs_are_refused_or_right(
    make: Callable[[], nn.Module],
) -> None:
    part = make()
    model = nn.ModuleList([part, *linears(depth=4)])
    plain, x = copy.deepcopy(part), torch.randn(2, 32, requires_grad=True)

    def value_of(module: nn.Module) -> torch.Tensor:
        output = module(x)
        hidden = output if isinstance(output, _Hidden) else module.kept
        return hidden.value

    (want,) = torch.autograd.grad(value_of(plain).sum(), x)
    with offloaded(model, store="disk", limit_gb=0):
        try:
            value = value_of(part)
        except RuntimeError as refusal:
            assert "no_grad" in str(refusal)
            return
        run(model[1], torch.randn(2, 32))
        (got,) = torch.autograd.grad(value.sum(), x)
        assert same_bits(got, want)


class _Enables(nn.Module):
    """Asks for gradients by itself, whatever its caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return x @ self.weight.T


def test_a_gradient_that_the_model_asks_for_itself_is_refused() -> None:
    model = nn.Sequential(_Enables(), *linears(depth=2))
    with offloaded(model, store="disk", limit_gb=0):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="gradient"):
                run(model[0], torch.randn(2, 32))
            with pytest.raises(RuntimeError, match="gradient"):
                run(model, torch.randn(2, 32))


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("warm", [False, True])
def test_training_a_model_that_fits_without_a_limit_gives_the_same_weights(
    warm: bool, store: Any
) -> None:
    model, x = Stack(), torch.randn(4, 32)
    plain = copy.deepcopy(model)
    with offloaded(model, store=store):
        assert len(offload_plan(model).resident) in (0, len(offload_plan(model).layers))
        if warm:
            run(model, x)
        for each in (model, plain):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                each(x).square().mean().backward()
                optimizer.step()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert same_bits(mine, theirs)


class _Checkpointed(Stack):
    """Computes its blocks anew for backward; has a layer that no forward asks for."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.spare = nn.Linear(32, 32)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x * self.scale + self.shift


@pytest.mark.parametrize("warm", [False, True], ids=["first forward", "warmed up"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_checkpoints_in_a_model_that_fits_give_the_same_gradients(
    store: Any, reentrant: bool, warm: bool
) -> None:
    model = _Checkpointed(reentrant=reentrant)
    plain = copy.deepcopy(model)
    x = torch.randn(4, 32, requires_grad=True)
    with offloaded(model, store=store):
        if warm:
            run(model, x)
        for each in (model, plain):
            each(x).square().mean().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or same_bits(mine.grad, theirs.grad)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell of hooks further out",
)
def test_hooks_of_the_program_are_asked_for_what_is_saved_for_backward() -> None:
    model, x = _Checkpointed(reentrant=False), torch.randn(4, 32)
    packed: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or len(packed) - 1,
        lambda number: packed[number],
    )
    with offloaded(model, store="disk"):
        run(model, x)
        with hooks:
            out = model.blocks[0](x)
        out.sum().backward()
    assert packed


def test_what_looks_after_gradients_is_gone_with_its_forward() -> None:
    """It refers to hooks of the program, and these to what is kept for backward."""
    model, x = Stack(), torch.randn(2, 32)
    with offloaded(model, store="disk", limit_gb=0):
        gc.collect()
        gc.disable()
        try:
            run(model, x)
            left = [one for one in gc.get_objects() if type(one) is GraphGuard]
        finally:
            gc.enable()
    assert not left


def test_a_head_can_be_trained_on_what_an_attached_model_returns() -> None:
    model, head = Stack(), nn.Linear(32, 2)
    with offloaded(model, store="disk", limit_gb=0):
        features = run(model, torch.randn(2, 32))
        head(features).sum().backward()
    assert head.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
CASTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without cache": lambda: torch.autocast(
        "cpu", torch.bfloat16, cache_enabled=False
    ),
}
RUNS = [
    *((name, "plain") for name in REAL_MODELS),
    *((name, "autocast") for name in ("gpt2", "t5", "unet")),
    ("gpt2", "autocast without cache"),
]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("name", "cast"), RUNS)
def test_a_model_runs_in_every_mode_of_inference(
    name: str, cast: str, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    model, inputs = REAL_MODELS[name]()
    plain = copy.deepcopy(model)
    with mode(), CASTS[cast]():
        want = first_output(plain(**inputs))
    for fields in ({"limit_gb": 0, "debug": True}, {}):
        with offloaded(model, store="disk", **fields):
            for _ in range(3):
                with mode(), CASTS[cast]():
                    got = first_output(model(**inputs))
                assert same_bits(got, want)
                assert got.is_inference() == want.is_inference()


def test_modes_may_change_from_call_to_call() -> None:
    model, x = Stack(), torch.randn(2, 32)
    before = Picture(model)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk"):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(model(x), want)
        with torch.no_grad():
            model.scale.mul_(1)
    assert before.differences(model) == []
    assert not any(tensor.is_inference() for tensor in model.parameters())


def test_a_model_that_was_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = Stack()
    before = Picture(model)
    with pytest.raises(ValueError, match=r"scale.*inference_mode.*outside"):
        attach_offload_hooks(model, OffloadPolicy(store="disk"))
    assert before.differences(model) == []


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs the figures of Linux"
)
def test_autocast_keeps_no_copy_of_a_weight_beyond_its_forward() -> None:
    model, x = linears(width=1024, depth=24), torch.randn(1, 1024)
    with offloaded(model, store="disk", limit_gb=0):
        run(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            run(model[0], x)
            before = settled_bytes()
            run(model, x)
            kept = anonymous_bytes() - before
        # As bfloat16 they would take half of their bytes.
        assert kept < weight_bytes(model) / 8
        assert offload_stats(model).forwards == 2

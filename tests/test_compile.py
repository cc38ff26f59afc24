"""Compiled code around the hooks and between them: same numbers, hooks uncompiled."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from hookoffload import attach_offload_hooks, detach, offload_stats
from tests.samples import Block, Stack
from tests.small_models import assert_same, on_disk, run

# The blocks' children have layers of their own; a graph may not reach across them.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _whole(model: nn.Module) -> Callable[..., torch.Tensor]:
    return torch.compile(model, backend=BACKEND)


def _in_place(model: nn.Module) -> Callable[..., torch.Tensor]:
    model.compile(backend=BACKEND)
    return model


def _blocks(model: nn.Module) -> Callable[..., torch.Tensor]:
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=BACKEND)
    return model


@pytest.mark.parametrize("compiled", [_whole, _in_place, _blocks])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_model_compiled_behind_attach_computes_the_same(
    tmp_path: Path,
    compiled: Callable[[nn.Module], Callable[..., torch.Tensor]],
    warm: bool,
) -> None:
    torch.manual_seed(0)
    model = Stack()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 32)
    expected = run(reference, x)
    attach_offload_hooks(model, on_disk(tmp_path))
    if warm:
        run(model, x)
    call = compiled(model)
    for _ in range(3):
        assert_same(run(call, x), expected)
    assert offload_stats(model).forwards == 3 + warm
    detach(model)
    assert_same(run(model, x), expected)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="None counts no references")
def test_forwards_take_no_references_to_none(tmp_path: Path) -> None:
    model, x = Stack(), torch.randn(2, 32)
    attach_offload_hooks(model, on_disk(tmp_path))
    for _ in range(3):
        run(model, x)
    before = sys.getrefcount(None)
    for _ in range(200):
        run(model, x)
    # Asking Dynamo for its callback took one in each hook with torch 2.6.
    assert abs(sys.getrefcount(None) - before) < 100
    detach(model)

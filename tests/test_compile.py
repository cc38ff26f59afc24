"""Compiled code around the hooks and between them: same numbers, hooks uncompiled."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hookoffload import (
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    set_limit,
)
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


def test_repeated_blocks_compiled_before_the_first_forward_compute_the_same(
    tmp_path: Path,
) -> None:
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    places = torch.cartesian_prod(*map(torch.arange, (1, 2, 2)))
    inputs = {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    expected = run(partial(model, **inputs))[0]
    attach_offload_hooks(model, on_disk(tmp_path))
    model.compile_repeated_blocks(backend="eager")
    # Dynamo traced what watches the first pass into its graphs.
    assert_same(run(partial(model, **inputs))[0], expected)
    detach(model)


def test_other_limits_compile_nothing_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack(depth=2)
    x = torch.randn(2, 32)
    expected = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path))
    _blocks(model)
    for _ in range(3):
        assert_same(run(model, x), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    size = sum(parameter.nbytes for parameter in model.parameters())
    for limit in (0.8 * size / 2**30, 0.5 * size / 2**30, None, 0):
        set_limit(model, limit)
        for _ in range(2):
            assert_same(run(model, x), expected)
    offload(model)
    assert_same(run(model, x), expected)
    assert counters["stats"]["unique_graphs"] == graphs
    detach(model)


def test_a_model_that_was_compiled_as_a_whole_is_said_to_be_one_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.compile(Stack(), backend="eager")
    expected = run(model, torch.ones(2, 32))
    attach_offload_hooks(model, on_disk(tmp_path))
    assert "the model was compiled as a whole" in caplog.text
    assert len(offload_plan(model).layers) == 1
    assert_same(run(model, torch.ones(2, 32)), expected)
    detach(model)


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

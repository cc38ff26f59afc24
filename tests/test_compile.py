"""Compiled code around the hooks and between them: same numbers, hooks uncompiled."""

from __future__ import annotations

import copy
import gc
import inspect
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
from hookoffload.compiling import captures_cuda_graphs
from tests.real_models import llama
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


class _Graphs:
    """A backend that counts graphs and the calls in each."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nodes = (node for node in graph.graph.nodes)
        self.calls.append(sum(node.op.startswith("call") for node in nodes))
        return graph.forward


def _limit(model: nn.Module, share: float) -> float:
    return share * sum(parameter.nbytes for parameter in model.parameters()) / 2**30


@pytest.mark.parametrize("behind_attach", [False, True])
def test_compiled_blocks_in_the_place_of_blocks_are_one_graph_without_a_break(
    tmp_path: Path, behind_attach: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Stack(depth=12)
    x = torch.randn(2, 32)
    expected = run(model, x)
    graphs = _Graphs()

    def compile_blocks() -> None:
        for index, block in enumerate(model.blocks):
            compiled = torch.compile(block, fullgraph=True, backend=graphs)
            model.blocks[index] = compiled

    if not behind_attach:
        compile_blocks()
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=_limit(model, 0.7)))
    if behind_attach:
        compile_blocks()
    for share in (0.7, 0.4, 0.6):
        set_limit(model, _limit(model, share))
        for _ in range(3):
            assert_same(run(model, x), expected)
        assert offload_plan(model).pass_bytes
    assert len(graphs.calls) == 1
    assert "compiled" not in caplog.text  # nothing is wrong with them
    detach(model)
    assert_same(run(model, x), expected)


def test_a_graph_that_may_not_end_at_hooks_is_refused_and_the_way_out_is_named(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Stack()
    x = torch.randn(2, 32)
    expected = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path))
    run(model, x)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    reasons = "reason" in inspect.signature(torch.compiler.disable).parameters
    match = "Leave fullgraph=True out" if reasons else "outside_graphs"
    for _ in range(2):
        with pytest.raises(Exception, match=match):
            run(whole, x)
        assert_same(run(model, x), expected)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=match):
        run(model, x)
    for block in model.blocks:
        block._compiled_call_impl = None
    assert_same(run(model, x), expected)
    detach(model)
    torch._dynamo.reset()
    assert_same(run(whole, x), expected)  # now it is one


def test_a_model_that_was_compiled_as_a_whole_may_be_one_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Stack()
    x = torch.randn(2, 32)
    expected = run(plain, x)
    model = torch.compile(plain, fullgraph=True, backend="aot_eager")
    attach_offload_hooks(model, on_disk(tmp_path))
    for _ in range(3):
        assert_same(run(model, x), expected)
    detach(model)


def test_blocks_for_cuda_graphs_are_known_and_right(tmp_path: Path) -> None:
    """On a CPU there are none, and the mode only compiles."""
    torch.manual_seed(0)
    model = Stack(depth=8)
    x = torch.randn(2, 32)
    expected = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=_limit(model, 0.7)))
    for block in model.blocks:
        block.compile(mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(run(model, x), expected)
    assert all(captures_cuda_graphs(block) for block in model.blocks)
    others = ({"mode": "max-autotune-no-cudagraphs"}, {"backend": "eager"}, {})
    for block, options in zip(model.blocks, others, strict=False):
        block.compile(**options)
        assert not captures_cuda_graphs(block)
    assert not captures_cuda_graphs(model)
    detach(model)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_compiled_blocks_are_one_graph_each_whatever_stays(
    tmp_path: Path, warm: bool
) -> None:
    torch.manual_seed(0)
    model = Stack(depth=12)
    x = torch.randn(2, 32)
    expected = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=_limit(model, 0.5)))
    graphs = _Graphs()
    if warm:
        run(model, x)
    for block in model.blocks:
        block.compile(backend=graphs)
    for _ in range(2 + warm):
        assert_same(run(model, x), expected)
    names = [layer.name for layer in offload_plan(model).layers]
    assert sorted(names) == sorted(["Stack", *(f"blocks.{i}" for i in range(12))])
    if not warm:  # else the first one found hooks inside
        assert len(graphs.calls) == 1
    compiled = len(graphs.calls)
    for share in (0.7, 0.4, 0.6):
        set_limit(model, _limit(model, share))
        for _ in range(3):
            assert_same(run(model, x), expected)
    assert len(graphs.calls) == compiled
    detach(model)
    assert_same(run(model, x), expected)


def test_what_is_inside_a_compiled_module_is_no_bundle_of_its_own(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Stack(depth=4) for _ in range(8)))
    x = torch.randn(2, 32)
    expected = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=_limit(model, 0.7)))
    for number, part in enumerate(model):
        if number % 2:
            part.compile(backend="eager")
    for _ in range(3):
        assert_same(run(model, x), expected)
    names = [layer.name for layer in offload_plan(model).layers]
    blocks = [f"{n}.blocks.{i}" for n in range(0, 8, 2) for i in range(4)]
    assert sorted(names) == sorted([*map(str, range(8)), *blocks])
    detach(model)


def test_compiled_blocks_that_do_not_fit_as_a_whole_are_told_and_divided(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Stack(depth=3)
    x = torch.randn(2, 32)
    expected = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=_limit(model, 0.6)))
    _blocks(model)
    for _ in range(3):
        assert_same(run(model, x), expected)
    assert len(offload_plan(model).layers) > 4
    (told,) = [text for text in caplog.messages if "too large to move as one" in text]
    assert "3 compiled modules" in told and "blocks." in told
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
    gc.collect()  # what waits to be collected has references, too
    before = sys.getrefcount(None)
    for _ in range(200):
        run(model, x)
    gc.collect()
    # Asking Dynamo for its callback took one in each hook with torch 2.6.
    assert abs(sys.getrefcount(None) - before) < 100
    detach(model)


def test_a_real_model_that_is_compiled_before_its_first_forward_computes_the_same(
    tmp_path: Path,
) -> None:
    """Dynamo traces Llama wrongly under a mode of torch functions."""
    model, inputs = llama()
    with torch.no_grad():
        wanted = model(**inputs).logits
        attach_offload_hooks(model, on_disk(tmp_path))
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(**inputs).logits, wanted)
    detach(model)

"""Which tensors move together, and with whom: the layers of a model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from hookoffload import offload, offload_plan, offload_stats, offloaded
from tests.real_models import REAL_MODELS
from tests.samples import (
    GIB,
    STREAMING,
    Stack,
    assert_runs_alike,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    seen_inside,
)

ALL = pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)


def _layers(model: nn.Module, **fields: Any) -> list[str]:
    with offloaded(model, store="disk", **fields):
        return [layer.name for layer in offload_plan(model).layers]


# -- the rule -----------------------------------------------------------------------


def test_each_module_with_tensors_of_its_own_is_a_layer() -> None:
    inner = [
        f"blocks.{i}{part}" for i in range(2) for part in ("", ".norm", ".up", ".down")
    ]
    assert sorted(_layers(Stack(depth=2))) == sorted(["Stack", *inner])


@pytest.mark.parametrize("name", REAL_MODELS)
def test_every_parameter_of_a_real_model_is_in_exactly_one_layer(name: str) -> None:
    model, _ = REAL_MODELS[name]()
    with offloaded(model, store="disk"):
        layers = offload_plan(model).layers
        assert sum(layer.copy_bytes for layer in layers) == sum(
            parameter.nbytes for parameter in model.parameters()
        )
        assert len({layer.name for layer in layers}) == len(layers)


def test_buffers_stay_on_the_device_and_are_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8).eval())
    with offloaded(model, compute_dtype=torch.float64, limit_gb=0):
        inside = seen_inside(model[1], lambda called: called.running_mean.data_ptr())
        for _ in range(3):
            run(model, torch.randn(4, 8, dtype=torch.float64))
        assert len(set(inside)) == 1
        assert offload_plan(model).always_bytes >= 2 * 8 * 8 + 8
        assert offload_stats(model).peak_by_kind["always"] > 0


def test_small_tensors_stay_before_all_others() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(1024)
            self.linear = nn.Linear(1024, 1024, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x))

    model = nn.Sequential(*(Wide() for _ in range(6)))
    limit = 2 * 1024 * 1024 * 4
    with offloaded(model, store="disk", limit_gb=limit / GIB):
        for _ in range(2):
            run(model, torch.randn(2, 1024))
        plan = offload_plan(model)
        resident = {plan.layers[index].name for index in plan.resident}
        assert resident == {f"{index}.norm" for index in range(6)}
        moved = offload_stats(model).bytes_moved
        run(model, torch.randn(2, 1024))
        assert offload_stats(model).bytes_moved - moved == 6 * 1024 * 1024 * 4


def test_small_tensors_that_are_most_of_a_model_do_not_all_stay() -> None:
    model = linears(width=64, depth=64)
    limit = 16 * 64 * 64 * 4
    with offloaded(model, store="disk", limit_gb=limit / GIB):
        for _ in range(2):
            run(model, torch.randn(2, 64))
        assert 0 < len(offload_plan(model).resident) < 16
        assert offload_stats(model).peak_bytes <= limit


# -- classes that read their children's tensors -------------------------------------


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def _recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    return nn.Sequential(kind(16, 8, num_layers=2, bidirectional=True))


class _Parametrized(nn.Module):
    """Uses parametrized weights twice, with and without their cache."""

    def __init__(self) -> None:
        super().__init__()
        self.one = parametrizations.weight_norm(nn.Linear(16, 16))
        self.other = parametrizations.orthogonal(nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.other(self.one(x))
        with parametrize.cached():
            return self.other(self.other(self.one(self.one(x))))


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still met
        return nn.Sequential(torch.jit.script(linears(16, 3)), nn.Linear(16, 16))


def _compiled() -> nn.Module:
    inner = torch.compile(linears(16, 3), backend="eager")
    return nn.Sequential(inner, nn.Linear(16, 16))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


ATOMIC: dict[str, tuple[Any, list[str]]] = {
    "attention": (_Attention, ["attention", "out"]),
    "lstm": (lambda: _recurrent(nn.LSTM), ["0"]),
    "gru": (lambda: _recurrent(nn.GRU), ["0"]),
    "rnn": (lambda: _recurrent(nn.RNN), ["0"]),
    "parametrized": (_Parametrized, ["one", "other"]),
    "scripted": (_scripted, ["0", "1"]),
    "compiled": (_compiled, ["0", "1"]),
    "fused encoder": (_encoder, ["layers.0", "layers.1"]),
}


@pytest.mark.parametrize(("make", "layers"), ATOMIC.values(), ids=ATOMIC)
def test_a_class_that_reads_its_childrens_tensors_moves_as_one(
    make: Any, layers: list[str]
) -> None:
    assert _layers(make()) == layers


@pytest.mark.parametrize("module_map", [{}, {Stack: "atomic"}])
def test_nothing_inside_a_module_that_moves_as_one_is_hooked(module_map: Any) -> None:
    model = nn.Sequential(_Attention(), Stack(16, 2))
    atomic = [model[1]] if module_map else [model[0].attention]
    with offloaded(model, store="disk", limit_gb=0, module_map=module_map):
        for _ in range(2):
            run(model, torch.randn(2, 5, 16))
            for module in atomic:
                assert module._forward_hooks
                inner = [m for m in module.modules() if m is not module]
                assert inner and not any(m._forward_hooks for m in inner)


@ALL
@pytest.mark.parametrize("name", sorted({*ATOMIC} - {"scripted", "compiled"}))
def test_such_a_class_computes_the_same_bits(name: str, fields: dict[str, Any]) -> None:
    assert_runs_alike(ATOMIC[name][0](), torch.randn(2, 5, 16), fields)


@ALL
@pytest.mark.parametrize("make", [_scripted, _compiled])
def test_such_a_program_computes_the_same_bits(
    make: Any, fields: dict[str, Any]
) -> None:
    model = make()
    x = torch.randn(2, 16, dtype=fields.get("compute_dtype"))
    want = x
    for parameter in list(model.parameters())[:3]:
        want = nn.functional.linear(want, parameter.detach().to(x.dtype))
    want = run(copy.deepcopy(model[1]).to(x.dtype), want)
    with offloaded(model, **fields):
        assert all(same_bits(run(model, x), want) for _ in range(3))


def test_a_model_that_is_compiled_as_a_whole_is_one_layer() -> None:
    model, x = linears(16, 3), torch.randn(2, 16)
    want = run(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="eager")
    with offloaded(compiled, store="disk", limit_gb=0):
        for _ in range(3):
            assert same_bits(run(compiled, x), want)
            assert all(lies_in_a_file(parameter) for parameter in model.parameters())
        assert len(offload_plan(compiled).layers) == 1


# -- tables -------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("rows", [50, 40_000])
def test_hooks_on_an_embedding_see_the_true_rows(
    rows: int, fields: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Embedding(rows, 16, padding_idx=0), nn.Linear(16, 16))
    tokens = torch.tensor([[0, 3, rows - 1], [3, 3, 0]])
    dtype = fields.get("compute_dtype", torch.float32)
    want = run(copy.deepcopy(model[0]).to(dtype), tokens)
    seen: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda m, a, output: seen.append(output.clone()))
    with offloaded(model, **fields):
        for _ in range(3):
            run(model, tokens)
        assert same_bits(run(model[0], input=tokens), want)
    assert len(seen) == 4 and all(same_bits(rows_seen, want) for rows_seen in seen)


@ALL
@pytest.mark.parametrize("rows", [50, 40_000])
def test_an_embedding_that_renormalises_its_rows_keeps_them(
    rows: int, fields: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Embedding(rows, 16, max_norm=1.0), nn.Linear(16, 16))
    dtype = fields.get("compute_dtype", torch.float32)
    plain = copy.deepcopy(model).to(dtype)
    with offloaded(model, **fields):
        for token in (1, 2, rows - 1):
            tokens = torch.tensor([[token, 3]])
            assert torch.allclose(run(model, tokens), run(plain, tokens))
    assert torch.allclose(model[0].weight, plain[0].weight.float())


# -- maps ---------------------------------------------------------------------------


def test_a_map_overrides_the_rule_both_ways() -> None:
    model = nn.Sequential(_Attention(), Stack(16, 1))
    by_rule = _layers(model)
    assert "0.attention.out_proj" not in by_rule and "1.blocks.0.up" in by_rule
    attention: Any = {nn.MultiheadAttention: "layer"}
    assert "0.attention.out_proj" in _layers(model, module_map=attention)
    block: Any = {type(model[1].blocks[0]): "atomic"}
    assert "1.blocks.0.up" not in _layers(model, module_map=block)


@ALL
def test_an_atomic_block_moves_with_one_copy_group_and_computes_the_same(
    fields: dict[str, Any],
) -> None:
    model = Stack()
    module_map: Any = {type(model.blocks[0]): "atomic"}
    assert_runs_alike(model, torch.randn(2, 32), {**fields, "module_map": module_map})


def test_offloading_puts_every_layer_back_where_it_rests() -> None:
    model = Stack()
    with offloaded(model, store="disk"):
        for _ in range(2):
            run(model, torch.randn(2, 32))
        offload(model)
        assert all(lies_in_a_file(parameter) for parameter in model.parameters())

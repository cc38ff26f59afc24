"""Tensors of modules that are never called come with the module that uses them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import offload, offload_plan, offloaded
from tests.samples import (
    STREAMING,
    Picture,
    Stack,
    assert_runs_alike,
    run,
    same_bits,
)

ALL = pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)


def _layers(model: nn.Module, **fields: Any) -> list[str]:
    with offloaded(model, store="disk", **fields):
        return [layer.name for layer in offload_plan(model).layers]


class _Lists(nn.Module):
    """Parameters in containers, one of them inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(16) for _ in range(3))
        self.named = nn.ParameterDict({"gain": torch.randn(16)})
        self.nested = nn.ModuleList([nn.ParameterList([torch.randn(16)])])
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for row in self.rows:
            x = x + row
        return self.linear(x * self.named["gain"]) * self.nested[0][0]


class _Expert(nn.Module):
    """Holds tensors and has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(16, 16))
        self.down = nn.Parameter(torch.randn(16, 16))


class _Mixture(nn.Module):
    """Chooses between experts by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(_Expert() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            expert, mine = self.experts[index], chosen == index
            out[mine] = torch.relu(x[mine] @ expert.up) @ expert.down
        return out


@pytest.mark.parametrize(
    ("make", "layers"),
    [(_Lists, ["_Lists", "linear"]), (_Mixture, ["_Mixture", "router"])],
)
def test_tensors_of_a_module_that_is_never_called_go_to_its_ancestor(
    make: Any, layers: list[str]
) -> None:
    assert _layers(make()) == layers
    nested = nn.Sequential(make(), nn.Linear(16, 16))
    assert _layers(nested) == ["0", f"0.{layers[1]}", "1"]


@ALL
@pytest.mark.parametrize("make", [_Lists, _Mixture])
def test_a_model_with_such_modules_computes_the_same_bits(
    make: Any, fields: dict[str, Any]
) -> None:
    assert_runs_alike(make(), torch.randn(5, 16), fields)
    assert_runs_alike(nn.Sequential(make(), make()), torch.randn(5, 16), fields)


def test_a_real_mixture_of_experts_runs() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).eval()
    for fields in ({"limit_gb": 0, "debug": True}, {}):
        assert_runs_alike(
            model, torch.randint(0, 64, (2, 6)), {"store": "disk", **fields}
        )


class _Root(nn.ModuleDict):
    """Is never called itself; its parts are."""

    def __init__(self) -> None:
        super().__init__({"encoder": Stack(16, 2), "decoder": Stack(16, 2)})
        self.scale = nn.Parameter(torch.randn(16))


@ALL
def test_a_root_that_is_never_called_has_parts_that_run(fields: dict[str, Any]) -> None:
    model, x = _Root(), torch.randn(2, 16, dtype=fields.get("compute_dtype"))
    plain = copy.deepcopy(model).to(x.dtype)
    before = Picture(model)
    with offloaded(model, **fields):
        for _ in range(2):
            for part in ("encoder", "decoder"):
                assert same_bits(run(model[part], x), run(plain[part], x))
        offload(model)
        assert same_bits(run(model["decoder"], x), run(plain["decoder"], x))
    assert before.differences(model) == []

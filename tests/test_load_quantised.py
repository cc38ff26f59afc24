"""Quantised models from files that hold the parts of their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    detach,
    load_model,
    offload_stats,
    offloaded,
    save_model,
)
from hookoffload.safetensors_header import CheckpointError
from tests.quantised_models import (
    WIDTH,
    Coded,
    coded,
    linears,
    parts,
    quanto,
    rows,
    torchao,
)
from tests.samples import run, same_bits

STORES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk", "limit_gb": 0},
    "disk, unlimited": {"store": "disk"},
    "ram": {},
    "part in ram": {"limit_gb": 0, "host_limit_gb": 0.0005},
}


def _flat(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict in which each part has a name of its own."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Coded):
            state[f"{name}.codes"], state[f"{name}.scale"] = tensor.codes, tensor.scale
        else:
            state[name] = tensor
    return state


def _policy(**fields: Any) -> OffloadPolicy:
    return OffloadPolicy(compute_device="cpu", **fields)


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_parts_are_read_from_the_file_into_a_model_that_was_quantised_empty(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    source, x = coded(), rows()
    want = run(source, x)
    save_file(_flat(source), tmp_path / "model.safetensors")
    model = load_model(coded, tmp_path / "model.safetensors", _policy(**store))
    for _ in range(3):
        assert same_bits(run(model, x), want)
    assert isinstance(model[0].weight, Coded)
    assert isinstance(model[0].weight, nn.Parameter)
    if "disk" in store.values():
        assert offload_stats(model).disk_bytes == sum(
            part.nbytes for part in parts(source).values()
        )
        # They are read where they lie, and not written anywhere else.
        assert not list(Path(tempfile.gettempdir()).glob("hookoffload-*"))
    detach(model)
    assert same_bits(run(model, x), want)


@pytest.mark.parametrize("qtype", ["qint8", "qfloat8", "qint2"])
def test_what_optimum_quanto_saves_is_loaded_as_it_is(
    tmp_path: Path, qtype: str
) -> None:
    source, x = quanto(qtype), rows()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = load_model(
        lambda: quanto(qtype),
        tmp_path / "model.safetensors",
        _policy(store="disk", limit_gb=0),
    )
    assert same_bits(run(model, x), run(source, x))
    detach(model)
    with pytest.raises(CheckpointError, match=r"optimum\.quanto\.quantize\(model"):
        load_model(linears, tmp_path / "model.safetensors", _policy())


TORCHAO: dict[str, Callable[[], nn.Module]] = {
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "int4": lambda: torchao("IntxWeightOnlyConfig", torch.int4),
    "fp8": lambda: torchao("Float8WeightOnlyConfig"),
}


def _saved_by_torchao(
    source: nn.Module, folder: Path, prefix: str = ""
) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    named = {prefix + name: value for name, value in source.state_dict().items()}
    state, metadata = support.flatten_tensor_state_dict(named)
    path = folder / "model.safetensors"
    save_file(state, path, metadata)
    return path, state, metadata


@pytest.mark.parametrize("kind", TORCHAO)
@pytest.mark.parametrize("factory", ["plain", "quantised"])
@pytest.mark.parametrize("store", ["disk", "ram"])
def test_what_torchao_saves_is_read_where_it_lies(
    tmp_path: Path, kind: str, factory: str, store: str
) -> None:
    source, x = TORCHAO[kind](), rows()
    want = run(source, x)
    path, state, _ = _saved_by_torchao(source, tmp_path)
    spill = tmp_path / "spill"
    spill.mkdir()
    policy = _policy(**STORES[store], disk_dir=spill if store == "disk" else None)
    make = linears if factory == "plain" else TORCHAO[kind]
    model = load_model(make, path, policy)
    for _ in range(3):
        assert same_bits(run(model, x), want)
    assert type(model[0].weight) is type(source[0].weight)
    assert not model[0].weight.requires_grad
    if store == "disk":
        assert offload_stats(model).disk_bytes == sum(t.nbytes for t in state.values())
        assert not list(spill.iterdir())
    detach(model)
    assert same_bits(run(model, x), want)


def test_names_of_torchao_may_be_converted(tmp_path: Path) -> None:
    source, x = TORCHAO["int8"](), rows()
    policy = _policy(store="disk", limit_gb=0)
    path, *_ = _saved_by_torchao(source, tmp_path, "model.")
    model = load_model(
        linears,
        path,
        policy,
        state_dict_converter=lambda state: {
            name.removeprefix("model."): value for name, value in state.items()
        },
    )
    assert same_bits(run(model, x), run(source, x))
    other = load_model(
        TORCHAO["int8"],
        path,
        policy,
        state_dict_converter=lambda state: {
            name[6:].replace("._weight_", ".weight."): value
            for name, value in state.items()
        },
    )
    assert same_bits(run(other, x), run(source, x))


def test_what_torchao_saved_for_another_model_is_refused(tmp_path: Path) -> None:
    source = TORCHAO["int8"]()
    path, state, metadata = _saved_by_torchao(source, tmp_path)
    refused: list[tuple[str, Callable[[], nn.Module]]] = [
        (r"4\.weight is a Int8Tensor of shape \(256, 512\).*\(256, 99\)", _narrow),
        (r"does not have: 2\._weight_qdata", lambda: linears()[:2]),
    ]
    for match, make in refused:
        with pytest.raises(CheckpointError, match=match):
            load_model(make, path, _policy())
    del state["2._weight_scale"]
    save_file(state, path, metadata)
    with pytest.raises(CheckpointError, match=r"2\.weight: torchao needs more"):
        load_model(linears, path, _policy())
    damaged = metadata["0.weight"].replace("Int8Tensor", "Int9Tensor")
    save_file(state, path, {**metadata, "0.weight": damaged})
    with pytest.raises(CheckpointError, match=r"0\.weight: torchao cannot make"):
        load_model(linears, path, _policy())
    for text in ('{"_tensor_data_names"', '{"_tensor_data_names": 7}'):
        save_file(state, path, {"0.weight": text})
        with pytest.raises(CheckpointError, match=r"missing: 0\.weight"):
            load_model(linears, path, _policy())


def _narrow() -> nn.Module:
    model = linears()
    model[4] = nn.Linear(99, WIDTH)
    return model


@pytest.mark.parametrize("kind", TORCHAO)
def test_quantised_weights_that_torch_saved_are_converted_in_their_parts(
    tmp_path: Path, kind: str
) -> None:
    source, x = TORCHAO[kind](), rows()
    torch.save(source.state_dict(), tmp_path / "model.bin")
    policy = _policy(store="disk", limit_gb=0)
    for _ in range(2):  # computed, found again
        model = load_model(
            linears, tmp_path / "model.bin", policy, cache_dir=tmp_path / "cache"
        )
        assert same_bits(run(model, x), run(source, x))
        assert type(model[0].weight) is type(source[0].weight)
        detach(model)


def test_quantised_weights_of_others_that_torch_saved_have_the_names_of_their_parts(
    tmp_path: Path,
) -> None:
    source, x = coded(), rows()
    with torch.serialization.safe_globals([Coded, torch._tensor._rebuild_from_type_v2]):
        torch.save(source.state_dict(), tmp_path / "model.bin")
        model = load_model(
            coded, tmp_path / "model.bin", _policy(), cache_dir=tmp_path / "cache"
        )
    assert same_bits(run(model, x), run(source, x))


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_what_is_saved_of_a_quantised_model_is_loaded_again(
    tmp_path: Path, store: dict[str, Any]
) -> None:
    source, x = coded(), rows()
    want = run(source, x)
    with offloaded(source, _policy(**store)):
        run(source, x)
        save_model(source, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == set(
        _flat(source)
    )
    model = load_model(coded, tmp_path / "saved", _policy(**store))
    assert same_bits(run(model, x), want)


class Twice(nn.Module):
    """One quantised weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = coded()[0], coded()[0]
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_a_tied_quantised_weight_is_tied_when_it_is_loaded(tmp_path: Path) -> None:
    source, x = Twice(), rows()
    state = _flat(source)
    del state["two.weight.codes"], state["two.weight.scale"]
    save_file(state, tmp_path / "model.safetensors")
    policy = _policy(store="disk", limit_gb=0)
    model = load_model(Twice, tmp_path / "model.safetensors", policy)
    assert model.one.weight is model.two.weight
    assert same_bits(run(model, x), run(source, x))


def test_parts_of_another_dtype_or_name_are_refused_and_named(tmp_path: Path) -> None:
    state = _flat(coded())
    state["2.weight.codes"] = state["2.weight.codes"].float()
    del state["4.weight.scale"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(coded, tmp_path / "model.safetensors", _policy())
    assert "1 missing: 4.weight.scale" in str(caught.value)
    assert "2.weight.codes is torch.float32" in str(caught.value)
    assert "needs torch.int8" in str(caught.value)

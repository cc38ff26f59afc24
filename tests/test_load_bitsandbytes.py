"""What bitsandbytes saved: read in place from its own files."""

from __future__ import annotations

import json
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
from tests.quantised_models import KINDS, linears, parts, rows
from tests.samples import run, same_bits

bitsandbytes = pytest.importorskip("bitsandbytes")

STORES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk", "limit_gb": 0},
    "disk, unlimited": {"store": "disk"},
    "ram": {},
    "part in ram": {"limit_gb": 0, "host_limit_gb": 0.0005},
}
FORMS = ["nf4", "fp4", "int8"]


def _policy(tmp_path: Path, **fields: Any) -> OffloadPolicy:
    if fields.get("store") == "disk" or "host_limit_gb" in fields:
        fields["disk_dir"] = tmp_path / "spill"
        fields["disk_dir"].mkdir(exist_ok=True)
    return OffloadPolicy(compute_device="cpu", **fields)


def _layer(form: str, plain: nn.Linear) -> nn.Module:
    shape = (plain.in_features, plain.out_features)
    if form == "int8":
        return bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
    made = bitsandbytes.nn.Linear4bit(
        *shape, compute_dtype=torch.bfloat16, quant_type=form
    )
    made.support_avx512bf16_for_cpu = False
    return made


def _empty(form: str) -> Callable[[], nn.Module]:
    """Return what makes a model of layers that wait for their packed weights."""

    def make() -> nn.Module:
        model = linears()
        for index in (0, 2, 4):
            model[index] = _layer(form, model[index])
        return model

    return make


def _saved(form: str, folder: Path, x: torch.Tensor) -> tuple[nn.Module, Path]:
    source = KINDS[f"bitsandbytes {form}"]()
    run(source, x)  # 8-bit scales go to another place in the first forward
    path = folder / "model.safetensors"
    save_file(source.state_dict(), path)
    return source, path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_what_bitsandbytes_saves_is_read_where_it_lies(
    tmp_path: Path, form: str, store: dict[str, Any]
) -> None:
    x = rows()
    source, path = _saved(form, tmp_path, x)
    want = run(source, x)
    policy = _policy(tmp_path, **store)
    model = load_model(_empty(form), path, policy)
    for _ in range(3):
        assert same_bits(run(model, x), want)
    assert type(model[0].weight) is type(source[0].weight)
    if "disk" in store.values():
        packed = {p.data_ptr(): p.nbytes for p in parts(source).values() if p.ndim}
        assert offload_stats(model).disk_bytes == sum(packed.values())
        assert not list((tmp_path / "spill").iterdir())
    detach(model)
    assert same_bits(run(model, x), want)


def test_plain_linear_layers_become_those_that_compute_with_4_bits(
    tmp_path: Path,
) -> None:
    x = rows()
    source, path = _saved("nf4", tmp_path, x)
    policy = _policy(tmp_path, store="disk", limit_gb=0)
    model = load_model(linears, path, policy)
    assert type(model[0]) is bitsandbytes.nn.Linear4bit
    assert type(model[1]) is nn.LayerNorm
    assert not model[0].training
    assert same_bits(run(model, x), run(source, x))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_saved_quantised_is_loaded_from_its_folder(
    tmp_path: Path, bits: int
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
        dtype=torch.bfloat16,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    about = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    source = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=about, device_map={"": "cpu"}
    ).eval()
    for module in source.modules():
        module.support_avx512bf16_for_cpu = False
    tokens = torch.arange(12).reshape(2, 6)
    want = run(source, tokens).logits
    source.save_pretrained(tmp_path / "packed")
    policy = _policy(tmp_path, store="disk", limit_gb=0)
    model = load_model(transformers.LlamaForCausalLM, tmp_path / "packed", policy)
    for _ in range(2):
        assert same_bits(run(model, tokens).logits, want)
    assert not list((tmp_path / "spill").iterdir())
    layer = model.model.layers[0].mlp.up_proj
    assert f"{bits}bit" in type(layer).__name__
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_of_an_attached_model_is_loaded_again(
    tmp_path: Path, form: str
) -> None:
    x = rows()
    source, path = _saved(form, tmp_path, x)
    want = run(source, x)
    with offloaded(source, _policy(tmp_path, store="disk", limit_gb=0)):
        run(source, x)
        save_model(source, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == set(
        load_file(path)
    )
    policy = _policy(tmp_path, store="disk", limit_gb=0)
    model = load_model(_empty(form), tmp_path / "again", policy)
    assert same_bits(run(model, x), want)


def test_a_prefix_that_a_converter_takes_off_is_no_hindrance(tmp_path: Path) -> None:
    x = rows()
    source, path = _saved("nf4", tmp_path, x)
    state = {f"model.{name}": value for name, value in load_file(path).items()}
    save_file(state, path)
    policy = _policy(tmp_path, store="disk", limit_gb=0)
    model = load_model(
        linears,
        path,
        policy,
        state_dict_converter=lambda state: {
            name.removeprefix("model."): value for name, value in state.items()
        },
    )
    assert same_bits(run(model, x), run(source, x))


# -- refused -----------------------------------------------------------------------


def test_8_bit_weights_for_plain_layers_are_refused_without_their_threshold(
    tmp_path: Path,
) -> None:
    _, path = _saved("int8", tmp_path, rows())
    with pytest.raises(CheckpointError, match=r"0\.weight is saved in 8.*Linear8bitLt"):
        load_model(linears, path, _policy(tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_of_another_shape_are_refused(tmp_path: Path, form: str) -> None:
    _, path = _saved(form, tmp_path, rows())

    def wider() -> nn.Module:
        model = _empty(form)()
        model[4] = _layer(form, nn.Linear(1024, 256))
        return model

    with pytest.raises(CheckpointError, match=r"4\.weight has .-bit .*\(256, 1024\)"):
        load_model(wider, path, _policy(tmp_path))


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["2.weight.absmax"]


def _with_a_damaged_state(state: dict[str, torch.Tensor]) -> None:
    text = json.dumps({"blocksize": 64, "dtype": "bfloat16"}).encode()
    name = "2.weight.quant_state.bitsandbytes__fp4"
    state[name] = torch.tensor(list(text), dtype=torch.uint8)


def _cut(state: dict[str, torch.Tensor]) -> None:
    state["2.weight"] = state["2.weight"][:-1].clone()


@pytest.mark.parametrize("damage", [_without, _with_a_damaged_state, _cut])
def test_4_bit_weights_that_lack_something_are_refused_and_named(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    _, path = _saved("fp4", tmp_path, rows())
    state = load_file(path)
    damage(state)
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"^2\.weight"):
        load_model(_empty("fp4"), path, _policy(tmp_path))


def test_8_bit_weights_in_another_order_are_refused(tmp_path: Path) -> None:
    _, path = _saved("int8", tmp_path, rows())
    state = load_file(path)
    state["2.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"2\.weight: .* in order 2"):
        load_model(_empty("int8"), path, _policy(tmp_path))


def test_packed_weights_for_what_the_model_does_not_have_are_named(
    tmp_path: Path,
) -> None:
    _, path = _saved("fp4", tmp_path, rows())
    with pytest.raises(CheckpointError, match=r"does not have: 2\.bias"):
        load_model(lambda: linears()[:2], path, _policy(tmp_path))

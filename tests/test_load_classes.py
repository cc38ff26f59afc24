"""Classes of transformers and diffusers find their configuration in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hookoffload import CheckpointError, OffloadPolicy, detach, load_model
from tests.small_models import assert_same, run

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

every_store = pytest.mark.parametrize("store", ["cpu", "disk"])

GPT2 = {
    "vocab_size": 64,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _gpt2(**fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT2, **fields)
    return transformers.GPT2LMHeadModel(config).eval()


def _load(make: Any, folder: Path, store: str, **options: Any) -> Any:
    policy = OffloadPolicy(store=store, limit_gb=0, compute_device="cpu")  # type: ignore[arg-type]
    return load_model(make, folder, policy, **options)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@every_store
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_class_is_configured_by_the_folder(
    tmp_path: Path, store: str, twice: bool, tied: bool
) -> None:
    plain = _gpt2(tie_word_embeddings=tied)
    plain.save_pretrained(tmp_path)
    if twice:
        state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    held = load_file(tmp_path / "model.safetensors")
    assert len(held) == len(plain.state_dict()) - (tied and not twice)
    for make in (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM):
        model = _load(make, tmp_path, store)
        assert type(model) is transformers.GPT2LMHeadModel
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        assert_same(_logits(model), _logits(plain))
        detach(model)
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied


@every_store
def test_three_tied_tables_of_an_encoder_and_decoder_are_one(
    tmp_path: Path, store: str
) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    torch.manual_seed(0)
    plain = transformers.T5ForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path)
    model = _load(transformers.T5ForConditionalGeneration, tmp_path, store)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight is model.shared.weight
    ids = torch.arange(6)[None]
    with torch.no_grad():
        wanted = plain(input_ids=ids, decoder_input_ids=ids).logits
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    assert_same(found, wanted)
    detach(model)


@every_store
def test_diffusers_class_is_configured_by_the_folder(
    tmp_path: Path, store: str
) -> None:
    torch.manual_seed(0)
    plain = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1
    ).eval()
    plain.save_pretrained(tmp_path)
    model = _load(diffusers.AutoencoderKL, tmp_path, store)
    assert model.config.block_out_channels in ([8], (8,))
    image = torch.randn(1, 3, 8, 8)
    assert_same(run(lambda x: model(x).sample, image), plain(image).sample.detach())
    detach(model)


def test_config_that_is_given_goes_before_that_of_the_folder(tmp_path: Path) -> None:
    plain = _gpt2()
    plain.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"n_layer": 7}))
    model = _load(transformers.GPT2LMHeadModel, tmp_path, "disk", config=plain.config)
    assert_same(_logits(model), _logits(plain))
    detach(model)


def test_config_that_is_damaged_is_refused(tmp_path: Path) -> None:
    _gpt2().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: GPT2LMHeadModel"):
        _load(transformers.GPT2LMHeadModel, tmp_path, "disk")

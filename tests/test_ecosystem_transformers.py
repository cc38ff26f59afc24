"""Attached transformers models with the tools around them, random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
    offloaded,
)
from tests.real_models import gpt2, t5
from tests.samples import Picture, same_bits

transformers = pytest.importorskip("transformers")

_PROMPT = torch.tensor([[5, 17, 33, 8, 60, 21]])


def _small(name: str, **fields: Any) -> nn.Module:
    """Make a causal language model of a family, small and with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **fields,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _generated(model: Any, prompt: torch.Tensor = _PROMPT, **options: Any) -> Any:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        **options,
    )


def _tight(model: nn.Module) -> dict[str, Any]:
    """Return fields with 30% of the weights as the limit, from disk."""
    nbytes = sum(p.nbytes for p in model.parameters())
    return {"store": "disk", "limit_gb": 0.3 * nbytes / 2**30}


def _least(model: nn.Module) -> dict[str, Any]:
    return {"store": "disk", "limit_gb": 0}


_LIMITS = pytest.mark.parametrize("fields_of", [_tight, _least])
_GENERATION: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}


@_LIMITS
@pytest.mark.parametrize("options", _GENERATION.values(), ids=_GENERATION)
def test_generate_gives_the_same_tokens(
    options: dict[str, Any], fields_of: Callable[[nn.Module], dict[str, Any]]
) -> None:
    model = _small("Llama")
    want = _generated(model, **options)
    before = Picture(model)
    with offloaded(model, **fields_of(model)):
        for _ in range(2):
            got = _generated(model, **options)
            if isinstance(want, torch.Tensor):
                assert torch.equal(got, want)
            else:
                assert torch.equal(got.sequences, want.sequences)
                assert all(map(same_bits, got.scores, want.scores))
        assert offload_stats(model).bytes_moved > 0
        assert offload_stats(model).forwards >= 16
    assert before.differences(model) == []


def test_sampling_draws_the_same_tokens() -> None:
    model = _small("Llama")

    def drawn() -> torch.Tensor:
        torch.manual_seed(7)
        mask = torch.ones_like(_PROMPT)
        return model.generate(
            _PROMPT, attention_mask=mask, max_new_tokens=8, do_sample=True, top_k=20
        )

    want = drawn()
    with offloaded(model, **_tight(model)):
        assert torch.equal(drawn(), want)


@pytest.mark.parametrize("attached", ["model", "assistant", "both"])
def test_assisted_decoding_gives_the_same_tokens(attached: str) -> None:
    model, assistant = _small("Llama"), _small("Llama", head_dim=16)
    want = _generated(model, assistant_model=assistant)
    chosen = {"model": [model], "assistant": [assistant], "both": [model, assistant]}
    for one in chosen[attached]:
        attach_offload_hooks(one, OffloadPolicy(**_tight(one)))
    for _ in range(2):
        assert torch.equal(_generated(model, assistant_model=assistant), want)
    for one in chosen[attached]:
        assert offload_stats(one).bytes_moved > 0
        detach(one)
    assert torch.equal(_generated(model, assistant_model=assistant), want)


@_LIMITS
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_of_an_encoder_and_decoder_gives_the_same_tokens(
    options: dict[str, Any], fields_of: Callable[[nn.Module], dict[str, Any]]
) -> None:
    model, _ = t5()
    want = _generated(model, **options)
    with offloaded(model, **fields_of(model)):
        for _ in range(2):
            assert torch.equal(_generated(model, **options), want)


def _fused_experts() -> nn.Module:
    model = _small("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    stacked = [p for p in model.parameters() if p.dim() == 3 and len(p) == 4]
    assert stacked, "the experts of a layer lie in one tensor"
    return model


class _ExpertModules(nn.Module):
    """Experts as modules of their own; which of them run depends on the tokens."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width))
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen = self.gate(rows).argmax(dim=-1)
        out = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            picked = chosen == number
            out[picked] = self.experts[number](rows[picked])
        return out.reshape(x.shape)


def _expert_modules() -> nn.Module:
    model = _small("Llama")
    for layer in model.model.layers:
        layer.mlp = _ExpertModules(32, 4)
    return model.eval()


@_LIMITS
@pytest.mark.parametrize("make", [_fused_experts, _expert_modules])
def test_generate_of_a_mixture_of_experts_gives_the_same_tokens(
    make: Callable[[], nn.Module],
    fields_of: Callable[[nn.Module], dict[str, Any]],
) -> None:
    model = make()
    want = _generated(model)
    logits = _logits(model)
    before = Picture(model)
    with offloaded(model, **fields_of(model)):
        for _ in range(2):
            assert torch.equal(_generated(model), want)
        assert same_bits(_logits(model), logits)
        other = torch.tensor([[70, 2, 44, 90, 11, 7, 63]])
        got = _generated(model, other)
    assert torch.equal(got, _generated(model, other))
    assert before.differences(model) == []


def test_only_the_experts_that_run_cross_the_link() -> None:
    model = _expert_modules()
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.gate.weight)  # each token goes to the first
    experts = sum(
        p.nbytes
        for layer in model.model.layers
        for expert in layer.mlp.experts[1:]
        for p in expert.parameters()
    )
    every = sum(p.nbytes for p in model.parameters())
    with offloaded(model, store="disk", limit_gb=0):
        for _ in range(4):
            _logits(model)
        begun = offload_stats(model).bytes_moved
        for _ in range(4):
            _logits(model)
        moved = (offload_stats(model).bytes_moved - begun) / 4
    assert moved <= every - experts


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(_PROMPT, use_cache=False).logits


def _tokenizer() -> Any:
    """Make a tokenizer with a word for each token of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(96)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", pad_token="w0", eos_token="w95"
    )


def test_a_text_pipeline_runs_with_an_attached_model() -> None:
    model, words = _small("Llama"), _tokenizer()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=words)

    def said() -> Any:
        return pipe("w5 w17 w33", max_new_tokens=6, do_sample=False)

    want = said()
    with offloaded(model, **_tight(model)):
        assert said() == want
        made_now = transformers.pipeline(
            "text-generation", model=model, tokenizer=words
        )
        assert made_now("w5 w17 w33", max_new_tokens=6, do_sample=False) == want
        assert offload_stats(model).bytes_moved > 0


def test_a_classification_pipeline_runs_with_an_attached_model() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    pipe = transformers.pipeline(
        "text-classification", model=model, tokenizer=_tokenizer()
    )
    texts = ["w5 w17 w33", "w1 w2 w3 w4"]
    want = pipe(texts, top_k=3)
    with offloaded(model, **_tight(model)):
        assert pipe(texts, top_k=3) == want


def test_features_of_both_towers_are_the_same() -> None:
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 94,
        "eos_token_id": 95,
    }
    vision = {**text, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    ids, picture = torch.tensor([[1, 2, 3, 95]]), torch.randn(1, 3, 16, 16)

    @torch.no_grad()
    def features() -> list[torch.Tensor]:
        found = (model.get_text_features(ids), model.get_image_features(picture))
        # Releases differ in what they return.
        return [f if isinstance(f, torch.Tensor) else f.pooler_output for f in found]

    want = features()
    with offloaded(model, **_tight(model)):
        for _ in range(2):
            assert all(map(same_bits, features(), want))
        assert offload_stats(model).bytes_moved > 0


@pytest.mark.parametrize("make", [gpt2, t5])
@_LIMITS
def test_save_pretrained_of_an_attached_model_writes_the_same(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]],
    fields_of: Callable[[nn.Module], dict[str, Any]],
    tmp_path: Path,
) -> None:
    model, inputs = make()
    model.save_pretrained(tmp_path / "plain")
    with offloaded(model, **fields_of(model)), torch.no_grad():
        model.save_pretrained(tmp_path / "before a forward")
        model(**inputs)
        model.save_pretrained(tmp_path / "after a forward")
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    for name in ("before a forward", "after a forward"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == plain
    again = type(model).from_pretrained(tmp_path / "after a forward").eval()
    want = model.state_dict()
    got = again.state_dict()
    assert list(got) == list(want)
    assert all(same_bits(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loaded_in_a_narrow_dtype_computes_the_same(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    _small("Llama").save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert model.dtype == dtype
    want = _logits(model)
    with offloaded(model, **_tight(model)):
        assert model.dtype == dtype
        assert same_bits(_logits(model), want)


def test_a_model_with_a_device_map_is_refused(tmp_path: Path) -> None:
    _small("Llama").save_pretrained(tmp_path)
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(RuntimeError, match="device_map"):
        attach_offload_hooks(model, OffloadPolicy(limit_gb=1))


def test_what_a_model_says_about_itself_stays_the_same() -> None:
    model = _small("Llama")
    twin = copy.deepcopy(model)
    with offloaded(model, **_tight(model)):
        _logits(model)
        assert same_bits(
            model.get_input_embeddings().weight, twin.get_input_embeddings().weight
        )
        assert model.num_parameters() == twin.num_parameters()
        assert model.get_memory_footprint() == twin.get_memory_footprint()
        assert model.device == twin.device


def test_hidden_states_and_attentions_are_outside_the_window() -> None:
    model = _small("Llama", attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True}

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            found = model(_PROMPT, **options)
        return [*found.hidden_states, *found.attentions, found.logits]

    want = outputs()
    with offloaded(model, **_least(model)):
        first = outputs()
        second = outputs()
        assert offload_plan(model).least_bytes > 0
        for got in (first, second):
            assert all(map(same_bits, got, want))

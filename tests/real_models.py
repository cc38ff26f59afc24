"""Real architectures with a tiny config and random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """A decoder whose lm_head is tied to its embedding; Conv1D layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96,
        n_positions=32,
        n_embd=32,
        n_layer=3,
        n_head=4,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval(), {"input_ids": _tokens(96)}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """An encoder whose predictions are tied to its embedding."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertForMaskedLM(config).eval(), {"input_ids": _tokens(96)}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """A decoder with a rotary embedding, whose tables are buffers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": _tokens(96)}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    """An encoder and a decoder that share an embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
    )
    inputs = {"input_ids": _tokens(96), "decoder_input_ids": _tokens(96)}
    return T5ForConditionalGeneration(config).eval(), inputs


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """A denoiser of convolutions and cross attention."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    return model.eval(), inputs


def dit() -> tuple[nn.Module, dict[str, Any]]:
    """A diffusion transformer."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([2]),
    }
    return model.eval(), inputs


REAL_MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "gpt2": gpt2,
    "bert": bert,
    "llama": llama,
    "t5": t5,
    "unet": unet,
    "dit": dit,
}


def _tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 7))

"""Diffusers pipelines of each large family, of tiny random components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# What a test file has made already: the pipeline, its options and its picture.
Made = dict[str, tuple[Any, dict[str, Any], torch.Tensor]]


def tiny_tokenizer(length: int = 8) -> Any:
    """Make a tokenizer that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(96)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="w0",
        pad_token="w0",
        eos_token="w95",
        model_max_length=length,
    )


def _clip(projected: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=94,
        eos_token_id=95,
    )
    if projected:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def _t5(kind: str = "T5", width: int = 32) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def tiny_vae(channels: int) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=8,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def tiny_unet(**fields: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **fields,
    )


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny_vae(4),
        text_encoder=_clip(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(cross_attention_dim=32),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"height": 16, "width": 16, "guidance_scale": 3.0}


def _stable_diffusion_xl() -> tuple[Any, dict[str, Any]]:
    unet = tiny_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(4),
        text_encoder=_clip(),
        text_encoder_2=_clip(projected=True),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return pipe, {"height": 16, "width": 16, "guidance_scale": 3.0}


def _stable_diffusion_3() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(4),
        text_encoder=_clip(projected=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=_t5(width=64),
        tokenizer_3=tiny_tokenizer(),
    )
    options = {"height": 16, "width": 16, "guidance_scale": 3.0}
    return pipe, {**options, "max_sequence_length": 8}


def _flux() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(4),
        text_encoder=_clip(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer,
    )
    return pipe, {"height": 16, "width": 16, "max_sequence_length": 8}


def _wan() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    )
    pipe = diffusers.WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=_t5("UMT5"),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
    )
    options = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 3.0}
    return pipe, {**options, "max_sequence_length": 8}


def _qwen_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    text = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
    }
    text |= {"bos_token_id": None, "eos_token_id": None}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tiny_tokenizer(),
        transformer=transformer,
    )
    options = {"height": 16, "width": 16, "negative_prompt": "w2"}
    return pipe, {**options, "true_cfg_scale": 2.0, "max_sequence_length": 64}


def _z_image() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    config = transformers.Qwen3Config(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(16),
        text_encoder=transformers.Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    options = {"height": 32, "width": 32, "guidance_scale": 3.0}
    return pipe, {**options, "max_sequence_length": 8}


def _ltx() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=tiny_tokenizer(),
        transformer=transformer,
    )
    options = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0}
    return pipe, {**options, "max_sequence_length": 8}


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=8,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=_t5(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    options = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 3.0}
    return pipe, {**options, "max_sequence_length": 8}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "stable diffusion": stable_diffusion,
    "stable diffusion xl": _stable_diffusion_xl,
    "stable diffusion 3": _stable_diffusion_3,
    "flux": _flux,
    "wan": _wan,
    "qwen image": _qwen_image,
    "z image": _z_image,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
}


def pipeline(name: str, made: Made) -> tuple[Any, dict[str, Any], torch.Tensor]:
    if name not in made:
        torch.manual_seed(0)
        pipe, options = PIPELINES[name]()
        for component in components_of(pipe).values():
            component.eval()
            with torch.no_grad():
                for parameter in component.parameters():
                    # Gates and last layers that start at zero would hide the rest.
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        pipe.set_progress_bar_config(disable=True)
        made[name] = pipe, options, picture_of(pipe, options)
    return made[name]


def components_of(pipe: Any) -> dict[str, nn.Module]:
    return {k: c for k, c in pipe.components.items() if isinstance(c, nn.Module)}


def picture_of(pipe: Any, options: dict[str, Any]) -> torch.Tensor:
    found = pipe(
        "w5 w17 w33",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **options,
    )
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]

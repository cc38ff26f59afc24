"""Diffusers pipelines of tiny random components, each attached by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import offload_stats, offloaded
from tests.samples import Picture, same_bits

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def _tokenizer(length: int = 8) -> Any:
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


def _vae(channels: int) -> nn.Module:
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


def _unet(**fields: Any) -> nn.Module:
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


def _stable_diffusion() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        unet=_unet(cross_attention_dim=32),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"height": 16, "width": 16, "guidance_scale": 3.0}


def _stable_diffusion_xl() -> tuple[Any, dict[str, Any]]:
    unet = _unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(),
        text_encoder_2=_clip(projected=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
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
        vae=_vae(4),
        text_encoder=_clip(projected=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=_t5(width=64),
        tokenizer_3=_tokenizer(),
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
        vae=_vae(4),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(),
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
        tokenizer=_tokenizer(),
        text_encoder=_t5("UMT5"),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
    )
    options = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 3.0}
    return pipe, {**options, "max_sequence_length": 8}


_PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "stable diffusion": _stable_diffusion,
    "stable diffusion xl": _stable_diffusion_xl,
    "stable diffusion 3": _stable_diffusion_3,
    "flux": _flux,
    "wan": _wan,
}


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Any, dict[str, Any], torch.Tensor]]:
    """Return each pipeline when it is first asked for: options and its picture."""
    return {}


def _pipeline(
    name: str, made: dict[str, Any]
) -> tuple[Any, dict[str, Any], torch.Tensor]:
    if name not in made:
        torch.manual_seed(0)
        pipe, options = _PIPELINES[name]()
        for component in _components(pipe).values():
            component.eval()
            with torch.no_grad():
                for parameter in component.parameters():
                    # Gates and last layers that start at zero would hide the rest.
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        pipe.set_progress_bar_config(disable=True)
        made[name] = pipe, options, _picture(pipe, options)
    return made[name]


def _components(pipe: Any) -> dict[str, nn.Module]:
    return {k: c for k, c in pipe.components.items() if isinstance(c, nn.Module)}


def _picture(pipe: Any, options: dict[str, Any]) -> torch.Tensor:
    found = pipe(
        "w5 w17 w33",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **options,
    )
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


def _tight(model: nn.Module) -> dict[str, Any]:
    nbytes = sum(p.nbytes for p in model.parameters())
    return {"store": "disk", "limit_gb": 0.5 * nbytes / 2**30}


@pytest.mark.parametrize("name", _PIPELINES)
def test_each_component_attached_by_itself_gives_the_same_picture(
    name: str, made: dict[str, Any]
) -> None:
    pipe, options, want = _pipeline(name, made)
    assert want.isfinite().all()
    assert want.std() > 0
    for key, component in _components(pipe).items():
        before = Picture(component)
        with offloaded(component, **_tight(component)):
            for _ in range(2):
                assert same_bits(_picture(pipe, options), want), key
            stats = offload_stats(component)
            assert stats.bytes_moved > 0, key
            assert stats.limit_bytes is not None
            assert stats.peak_bytes <= stats.limit_bytes, key
        assert before.differences(component) == []


@pytest.mark.parametrize("name", _PIPELINES)
def test_all_components_attached_at_the_same_time_give_the_same_picture(
    name: str, made: dict[str, Any]
) -> None:
    pipe, options, want = _pipeline(name, made)
    with contextlib.ExitStack() as attached:
        for component in _components(pipe).values():
            attached.enter_context(
                offloaded(component, store="disk", limit_gb=0, debug=True)
            )
        for _ in range(2):
            assert same_bits(_picture(pipe, options), want)
    assert same_bits(_picture(pipe, options), want)


def test_a_decoder_with_slices_and_tiles_gives_the_same_picture(
    made: dict[str, Any],
) -> None:
    pipe, options, _ = _pipeline("stable diffusion", made)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    try:
        want = _picture(pipe, options)
        with offloaded(pipe.vae, **_tight(pipe.vae)):
            for _ in range(2):
                assert same_bits(_picture(pipe, options), want)
    finally:
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()


def test_a_component_that_was_fused_gives_the_same_picture(
    made: dict[str, Any],
) -> None:
    pipe, options, _ = _pipeline("stable diffusion", made)
    pipe.fuse_qkv_projections()
    try:
        want = _picture(pipe, options)
        with offloaded(pipe.unet, **_tight(pipe.unet)):
            for _ in range(2):
                assert same_bits(_picture(pipe, options), want)
    finally:
        pipe.unfuse_qkv_projections()


def test_entry_points_other_than_forward_give_the_same() -> None:
    torch.manual_seed(0)
    vae = _vae(4).eval()
    pixels, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 8, 8)

    def both() -> list[torch.Tensor]:
        with torch.no_grad():
            encoded = vae.encode(pixels).latent_dist.parameters
            return [encoded, vae.decode(latents).sample]

    want = both()
    before = Picture(vae)
    with offloaded(vae, store="disk", limit_gb=0):
        for _ in range(2):
            assert all(map(same_bits, both(), want))
        assert offload_stats(vae).bytes_moved > 0
    assert before.differences(vae) == []

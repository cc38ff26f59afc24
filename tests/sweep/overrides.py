"""What the rules for configs and inputs cannot know, class by class.

Each table is keyed by the name of a config class. Keep them short: a rule in
`shrink` or `inputs` serves the models of the next release too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_RESNET_LAST = {**_RESNET, "out_features": ["stage4"]}

# Arguments of a config without which its own defaults make no model.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AutoformerConfig": {"prediction_length": 8, "context_length": 16},
    "InformerConfig": {"prediction_length": 8, "context_length": 16},
    "TimeSeriesTransformerConfig": {"prediction_length": 8, "context_length": 16},
    "BambaConfig": {"attn_layer_indices": [1]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybridConfig": {
        "layer_types": ["linear_attention", "full_attention"] * 16
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 16},
    "ConditionalDetrConfig": {"backbone_config": _RESNET_LAST},
    "DabDetrConfig": {"backbone_config": _RESNET_LAST},
    "DeformableDetrConfig": {
        "backbone_config": {
            **_RESNET,
            "out_features": ["stage2", "stage3", "stage4"],
        }
    },
    "DetrConfig": {"backbone_config": _RESNET_LAST},
    "TableTransformerConfig": {"backbone_config": _RESNET_LAST},
    "Blip2Config": {"image_token_index": 50300},
    "InstructBlipConfig": {"image_token_index": 50300},
    "InstructBlipVideoConfig": {"video_token_index": 50300},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 8, "IMGIMGA": 9}},
}

# Values of a config that is small already.
VALUES: dict[str, dict[str, Any]] = {
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma3nConfig": {"text_config.num_kv_shared_layers": 0},
    "EfficientNetConfig": {
        "hidden_dim": 64,
        "width_coefficient": 0.05,
        "depth_coefficient": 0.3,
        "image_size": 64,
    },
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "Qwen4ExpConfig": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 2,
    },
}

# Their models divide heads of 128 in three; those of 8 need other parts.
_SMALL_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
for _family in ("Qwen2VL", "Qwen2_5_VL", "Glm4v", "GlmImage"):
    VALUES[f"{_family}TextConfig"] = {"rope_parameters": _SMALL_ROPE}
    VALUES[f"{_family}Config"] = {"text_config.rope_parameters": _SMALL_ROPE}

# If a config leaves them open, a model needs them nevertheless.
FILLED: dict[str, Any] = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}

# Arguments of a diffusers class; what is callable is called to make the value.
_UNET_3D = {
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "sample_size": 8,
}
_UNET_2_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
_COG = {
    "max_text_seq_length": 8,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 5,
    "text_embed_dim": 32,
}
_HUNYUAN_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 32,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
    "text_len": 8,
    "text_len_t5": 8,
}
DIFFUSION_VALUES: dict[str, dict[str, Any]] = {
    "AudioLDM2ProjectionModel": {
        "text_encoder_dim": 16,
        "text_encoder_1_dim": 24,
        "langauge_model_dim": 32,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 32,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "block_out_channels": (32, 32, 64, 64, 64),
    },
    "AutoencoderKLHunyuanVideo15": {"block_out_channels": (32, 32, 64, 64, 64)},
    "AutoencoderOobleck": {"encoder_hidden_size": 16, "decoder_channels": 16},
    "ConsisIDTransformer3DModel": _COG,
    "CogVideoXTransformer3DModel": _COG,
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "I2VGenXLUNet": {**_UNET_3D, **_UNET_2_LEVELS},
    "Lumina2Transformer2DModel": {
        "hidden_size": 192,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "cap_feat_dim": 32,
    },
    "LuminaNextDiT2DModel": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "cross_attention_dim": 32,
        "num_layers": 2,
    },
    "MultiAdapter": {"adapters": lambda: [_t2i_adapter(), _t2i_adapter()]},
    "MultiControlNetModel": {"controlnets": lambda: [_controlnet(), _controlnet()]},
    "FluxMultiControlNetModel": {"controlnets": lambda: [_flux_controlnet()]},
    "SD3MultiControlNetModel": {
        "controlnets": lambda: [_sd3_controlnet(), _sd3_controlnet()]
    },
    "QwenImageMultiControlNetModel": {"controlnets": lambda: [_qwen_controlnet()]},
    "HunyuanDiT2DMultiControlNetModel": {
        "controlnets": lambda: [_hunyuan_controlnet(), _hunyuan_controlnet()]
    },
    "HunyuanDiT2DControlNetModel": _HUNYUAN_DIT,
    "PRXTransformer2DModel": {"hidden_size": 128, "num_heads": 2},
    "SanaControlNetModel": {"sample_size": 8},
    "StableAudioProjectionModel": {
        "text_encoder_dim": 16,
        "conditioning_dim": 16,
        "min_value": 0,
        "max_value": 10,
    },
    "Transformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 32,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
    },
    "DreamLiteTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 32,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
    },
    "TransformerTemporalModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 32,
        "norm_num_groups": 8,
    },
    "UNet1DModel": {"extra_in_channels": 64},
    "UNet3DConditionModel": {**_UNET_3D, **_UNET_2_LEVELS},
    "UNetMotionModel": {
        **_UNET_3D,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "attention_head_dim": 2,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64),
        "down_block_types": (
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "num_attention_heads": (2, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48,
        "sample_size": 8,
    },
    "UniDiffuserTextDecoder": {
        "prefix_length": 4,
        "prefix_inner_dim": 16,
        "prefix_hidden_dim": 16,
        "vocab_size": 128,
        "n_positions": 32,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    },
    "WanVACETransformer3DModel": {"vace_layers": [0, 1], "vace_in_channels": 16},
    "ZImageTransformer2DModel": {"dim": 256, "n_heads": 2, "n_kv_heads": 2},
}


def _controlnet() -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(16, 32, 96, 256),
        cross_attention_dim=32,
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=4,
    )


def _t2i_adapter() -> Any:
    from diffusers import T2IAdapter

    return T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=8)


def _flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel

    return FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 6, 6],
    )


def _sd3_controlnet() -> Any:
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        extra_conditioning_channels=0,
    )


def _qwen_controlnet() -> Any:
    from diffusers import QwenImageControlNetModel

    return QwenImageControlNetModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


def _hunyuan_controlnet() -> Any:
    from diffusers import HunyuanDiT2DControlNetModel

    return HunyuanDiT2DControlNetModel(**_HUNYUAN_DIT)


# Inputs of a diffusers class, from its config.
def _hunyuan_dit(config: Any) -> dict[str, Any]:
    table = torch.randn(16, 16)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "text_embedding_mask": torch.ones(1, 8),
        "encoder_hidden_states_t5": torch.randn(1, 8, 32),
        "text_embedding_mask_t5": torch.ones(1, 8),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": (table, table),
    }


def _hunyuan_control(config: Any) -> dict[str, Any]:
    return {**_hunyuan_dit(config), "controlnet_cond": torch.randn(1, 4, 8, 8)}


def _hunyuan_controls(config: Any) -> dict[str, Any]:
    conditions = [torch.randn(1, 4, 8, 8) for _ in range(2)]
    return {
        **_hunyuan_dit(config),
        "controlnet_cond": conditions,
        "conditioning_scale": [1.0, 0.5],
    }


def _video_unet(config: Any) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 5, 32),
    }


DIFFUSION_INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "AudioLDM2ProjectionModel": lambda config: {
        "hidden_states": torch.randn(1, 5, 16),
        "hidden_states_1": torch.randn(1, 6, 24),
        "attention_mask": torch.ones(1, 5),
        "attention_mask_1": torch.ones(1, 6),
    },
    "HunyuanDiT2DModel": _hunyuan_dit,
    "HunyuanDiT2DControlNetModel": _hunyuan_control,
    "HunyuanDiT2DMultiControlNetModel": _hunyuan_controls,
    "I2VGenXLUNet": lambda config: {
        **_video_unet(config),
        "fps": torch.tensor([8]),
        "image_latents": torch.randn(1, 4, 2, 8, 8),
        "image_embeddings": torch.randn(1, 32),
    },
    "LuminaNextDiT2DModel": lambda config: {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "encoder_mask": torch.ones(1, 8),
        "image_rotary_emb": torch.randn(384, 384, 8, dtype=torch.complex64),
        "cross_attention_kwargs": {},
    },
    "MultiAdapter": lambda config: {"xs": [torch.randn(1, 3, 64, 64)] * 2},
    "MultiControlNetModel": lambda config: {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "controlnet_cond": [torch.randn(1, 3, 64, 64) for _ in range(2)],
        "conditioning_scale": [1.0, 0.5],
    },
    "FluxMultiControlNetModel": lambda config: {
        "hidden_states": torch.randn(1, 16, 16),
        "controlnet_cond": [torch.randn(1, 16, 16)],
        "controlnet_mode": [None],
        "conditioning_scale": [0.5],
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": None,
    },
    "SD3MultiControlNetModel": lambda config: {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "controlnet_cond": [torch.randn(1, 4, 8, 8) for _ in range(2)],
        "conditioning_scale": [1.0, 0.5],
        "pooled_projections": torch.randn(1, 16),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "timestep": torch.tensor([3.0]),
    },
    "QwenImageMultiControlNetModel": lambda config: {
        "hidden_states": torch.randn(1, 16, 16),
        "controlnet_cond": [torch.randn(1, 16, 16)],
        "conditioning_scale": [0.5],
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "encoder_hidden_states_mask": torch.ones(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    },
    "PriorTransformer": lambda config: {
        "hidden_states": torch.randn(1, config["embedding_dim"]),
        "timestep": torch.tensor([3]),
        "proj_embedding": torch.randn(1, config["embedding_dim"]),
        "encoder_hidden_states": torch.randn(
            1, config["num_embeddings"], config["embedding_dim"]
        ),
    },
    "StableAudioDiTModel": lambda config: {
        "hidden_states": torch.randn(1, config["in_channels"], 12),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 8, config["cross_attention_dim"]),
        "global_hidden_states": torch.randn(1, 1, config["global_states_input_dim"]),
    },
    "StableAudioProjectionModel": lambda config: {
        "text_hidden_states": torch.randn(1, 5, 16),
        "attention_mask": torch.ones(1, 5),
        "start_seconds": torch.tensor([1.0]),
        "end_seconds": torch.tensor([4.0]),
    },
    "TransformerTemporalModel": lambda config: {
        "hidden_states": torch.randn(2, 32, 4, 4),
        "num_frames": 2,
    },
    "UNet3DConditionModel": _video_unet,
    "UNetMotionModel": _video_unet,
    "UNetSpatioTemporalConditionModel": lambda config: {
        "sample": torch.randn(1, 2, 8, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 1, 32),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    },
    "UniDiffuserTextDecoder": lambda config: {
        "input_ids": torch.arange(5)[None],
        "prefix_embeds": torch.randn(1, 4, 16),
    },
    "WanVACETransformer3DModel": lambda config: {
        "hidden_states": torch.randn(1, config["in_channels"], 2, 8, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 8, config["text_dim"]),
        "control_hidden_states": torch.randn(1, 16, 2, 8, 8),
    },
    "ZImageTransformer2DModel": lambda config: {
        "x": [torch.randn(config["in_channels"], 1, 8, 8)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(8, config["cap_feat_dim"])],
    },
}

"""Diffusers pipelines of tiny random components, each attached by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    offload_stats,
    offloaded,
)
from hookoffload.state_hooks import session_of
from tests.samples import GIB, Picture, least_limit_gb, same_bits, weight_bytes
from tests.tiny_pipelines import (
    PIPELINES,
    Made,
    components_of,
    diffusers,
    picture_of,
    pipeline,
    tiny_vae,
    transformers,
)

FAMILIES = list(PIPELINES)
if settings.get_current_profile_name() != "long":
    FAMILIES = FAMILIES[:5]  # test_pipelines.py has all of them, each as a whole


@pytest.fixture(scope="module")
def made() -> Made:
    """Return each pipeline when it is first asked for: options and its picture."""
    return {}


def _tight(model: nn.Module) -> dict[str, Any]:
    half, least = weight_bytes(model) / 2 / GIB, least_limit_gb(model, store="disk")
    return {"store": "disk", "limit_gb": max(half, 1.01 * least)}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_component_attached_by_itself_gives_the_same_picture(
    name: str, made: Made
) -> None:
    pipe, options, want = pipeline(name, made)
    assert want.isfinite().all()
    assert want.std() > 0
    for key, component in components_of(pipe).items():
        before = Picture(component)
        with offloaded(component, **_tight(component)):
            for _ in range(2):
                assert same_bits(picture_of(pipe, options), want), key
            stats = offload_stats(component)
            assert stats.bytes_moved > 0, key
            assert stats.limit_bytes is not None
            assert stats.peak_bytes <= stats.limit_bytes, key
        assert before.differences(component) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_all_components_attached_at_the_same_time_give_the_same_picture(
    name: str, made: Made
) -> None:
    pipe, options, want = pipeline(name, made)
    with contextlib.ExitStack() as attached:
        for component in components_of(pipe).values():
            attached.enter_context(
                offloaded(component, store="disk", limit_gb=0, debug=True)
            )
        for _ in range(2):
            assert same_bits(picture_of(pipe, options), want)
    assert same_bits(picture_of(pipe, options), want)


def test_a_decoder_with_slices_and_tiles_gives_the_same_picture(
    made: Made,
) -> None:
    pipe, options, _ = pipeline("stable diffusion", made)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    try:
        want = picture_of(pipe, options)
        with offloaded(pipe.vae, **_tight(pipe.vae)):
            for _ in range(2):
                assert same_bits(picture_of(pipe, options), want)
    finally:
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()


def test_a_component_that_was_fused_gives_the_same_picture(
    made: Made,
) -> None:
    pipe, options, _ = pipeline("stable diffusion", made)
    pipe.fuse_qkv_projections()
    try:
        want = picture_of(pipe, options)
        with offloaded(pipe.unet, **_tight(pipe.unet)):
            for _ in range(2):
                assert same_bits(picture_of(pipe, options), want)
    finally:
        pipe.unfuse_qkv_projections()


def _with_adapter(pipe: Any) -> Any:
    """Return a pipeline of the same models that takes pictures as prompts."""
    torch.manual_seed(2)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    parts = {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": transformers.CLIPImageProcessor(size=16, crop_size=16),
    }
    made = diffusers.StableDiffusionPipeline(
        **{**pipe.components, **parts}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def _adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Make an IP adapter of random weights: four tokens for a picture."""
    widths = [
        unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for name in unet.attn_processors
        if "attn2" in name
    ]
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return {
        "image_proj": {
            "proj.weight": random(4 * 32, 32),
            "proj.bias": random(4 * 32),
            "norm.weight": torch.ones(32),
            "norm.bias": torch.zeros(32),
        },
        "ip_adapter": {
            f"{2 * number + 1}.to_{key}_ip.weight": random(*shape)
            for number, shape in enumerate(widths)
            for key in "kv"
        },
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_ip_adapter_draws_the_same(when: str, made: Made) -> None:
    pipe, options, _ = pipeline("stable diffusion", made)
    pipe = _with_adapter(pipe)
    shown = {"ip_adapter_image": torch.ones(1, 3, 16, 16) / 2}
    adapter = _adapter(pipe.unet)
    no_file = {"subfolder": None, "weight_name": None}
    pipe.load_ip_adapter(adapter, **no_file)
    want = picture_of(pipe, {**options, **shown})
    if when == "after":
        image_encoder = pipe.image_encoder
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=image_encoder)
    plain = picture_of(pipe, options) if when == "after" else None
    half = sum(map(weight_bytes, components_of(pipe).values())) / 2 / GIB
    with offloaded(pipe, store="disk", limit_gb=half):
        if plain is not None:
            assert same_bits(picture_of(pipe, options), plain)
            pipe.load_ip_adapter(adapter, **no_file)
        for _ in range(2):
            assert same_bits(picture_of(pipe, {**options, **shown}), want)
        stats = offload_stats(pipe)
        assert stats.limit_bytes is not None
        assert stats.peak_bytes <= stats.limit_bytes
        assert stats.by_model["image_encoder"].forwards
    pipe.unload_ip_adapter()
    assert not same_bits(picture_of(pipe, options), want)


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_vae(4)


def _sparse() -> nn.Module:
    vae = tiny_vae(4)
    vae.table = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    return vae


def _lazy() -> nn.Module:
    vae = tiny_vae(4)
    vae.head = nn.LazyLinear(3)
    return vae


def _compiled() -> nn.Module:
    vae = tiny_vae(4)
    vae.decoder.compile(backend="eager")
    return vae


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_on_meta, r"encoder\.\S+ is on the meta device.*load_model"),
        (_sparse, r"table is a Parameter with layout torch\.sparse_coo"),
        (_lazy, r"head\.\S+ is not initialised yet"),
        (_compiled, r"decoder was compiled in place.*Attach first"),
    ],
)
def test_a_component_that_cannot_be_managed_is_named(
    make: Callable[[], nn.Module], message: str, made: Made
) -> None:
    pipe, _, _ = pipeline("stable diffusion", made)
    other = SimpleNamespace(components={**pipe.components, "vae": make()})
    with pytest.raises(ValueError, match=rf"^vae: {message}"):
        attach_offload_hooks(other, OffloadPolicy(store="disk", compute_device="cpu"))
    assert all(session_of(c) is None for c in components_of(pipe).values())


def test_entry_points_other_than_forward_give_the_same() -> None:
    torch.manual_seed(0)
    vae = tiny_vae(4).eval()
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

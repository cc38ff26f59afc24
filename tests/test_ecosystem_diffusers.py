"""Diffusers pipelines of tiny random components, each attached by itself."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from hookoffload import offload_stats, offloaded
from tests.samples import GIB, Picture, least_limit_gb, same_bits, weight_bytes
from tests.tiny_pipelines import (
    PIPELINES,
    Made,
    components_of,
    picture_of,
    pipeline,
    tiny_vae,
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

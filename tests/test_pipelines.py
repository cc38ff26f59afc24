"""Diffusers pipelines of tiny random components, attached as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    OffloadPolicy,
    Placement,
    activate,
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
)
from hookoffload.state_hooks import session_of
from tests.samples import GIB, Picture, lies_in_a_file, same_bits, weight_bytes
from tests.tiny_pipelines import (
    PIPELINES,
    Made,
    components_of,
    picture_of,
    pipeline,
    stable_diffusion,
    tiny_unet,
)

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def made() -> Made:
    """Return each pipeline when it is first asked for: options and its picture."""
    return {}


@pytest.fixture
def fresh(made: Made) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Return a pipeline that a test may spoil."""
    pipe, options, want = pipeline("stable diffusion", made)
    other, _ = stable_diffusion()
    for name, component in components_of(pipe).items():
        mine = getattr(other, name)
        mine.load_state_dict(component.state_dict())
        mine.eval()
    other.set_progress_bar_config(disable=True)
    return other, options, want


def _policy(pipe: Any, share: float, **fields: Any) -> OffloadPolicy:
    """Stream from disk within a share of all components' bytes."""
    total = sum(map(weight_bytes, components_of(pipe).values()))
    fields = {"store": "disk", **fields}
    return OffloadPolicy(limit_gb=share * total / GIB, compute_device="cpu", **fields)


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_gives_the_same_picture_within_one_limit(
    name: str, share: float, made: Made
) -> None:
    pipe, options, want = pipeline(name, made)
    components = components_of(pipe)
    before = {key: Picture(component) for key, component in components.items()}
    attributes = set(vars(pipe))
    plans = offload_plan(pipe, _policy(pipe, 0))
    least = max(plan.least_bytes for plan in plans.values())
    total = sum(map(weight_bytes, components.values()))
    policy = _policy(pipe, max(share, 1.1 * least / total))
    largest = max(s.stream_bytes for p in plans.values() for s in p.layers)
    assert attach_offload_hooks(pipe, policy) is pipe
    for _ in range(3):
        assert same_bits(picture_of(pipe, options), want)
    stats = offload_stats(pipe)
    assert stats.limit_bytes is not None
    assert largest < stats.peak_bytes <= stats.limit_bytes < total
    assert all(figures.bytes_moved for figures in stats.by_model.values())
    assert detach(pipe) is pipe
    for key, component in components.items():
        assert before[key].differences(component) == []
    assert set(vars(pipe)) == attributes
    assert same_bits(picture_of(pipe, options), want)


def test_components_that_go_to_disk_take_ram_only_while_in_use(
    made: Made,
) -> None:
    pipe, options, want = pipeline("flux", made)
    tiers = {
        "store": None,
        "offload": Placement(device="disk"),
        "onload": Placement(device="cpu"),
    }
    seen: dict[str, list[str]] = {}

    def look(module: nn.Module, *_: Any) -> None:
        in_ram = [
            name
            for name, component in components_of(pipe).items()
            if not any(lies_in_a_file(p) for p in component.parameters())
        ]
        names = {id(c): n for n, c in components_of(pipe).items()}
        seen[names[id(module)]] = in_ram

    handles = [
        component.register_forward_pre_hook(look)
        for component in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer)
    ]
    with offloaded(pipe, _policy(pipe, 0.5, **tiers)):
        assert same_bits(picture_of(pipe, options), want)
        assert seen == {name: [name] for name in seen}
        assert len(seen) == 3
        activate(pipe, [])
        assert not any(
            not lies_in_a_file(p)
            for component in components_of(pipe).values()
            for p in component.parameters()
        )
    for handle in handles:
        handle.remove()


def test_inputs_are_made_on_the_device_where_components_compute(
    fresh: tuple[Any, dict[str, Any], torch.Tensor],
) -> None:
    pipe, _, _ = fresh
    with offloaded(pipe, _policy(pipe, 0.5)):
        assert pipe._execution_device == torch.device("cpu")
        for component in components_of(pipe).values():
            component._hf_hook.execution_device = torch.device("meta")
        # It is these that are asked, and not where weights rest.
        assert pipe._execution_device == torch.device("meta")
    assert pipe._execution_device == torch.device("cpu")
    assert not any(hasattr(c, "_hf_hook") for c in components_of(pipe).values())


def test_a_generator_of_the_pipelines_device_works(
    made: Made,
) -> None:
    pipe, options, _ = pipeline("stable diffusion", made)

    def picture() -> torch.Tensor:
        generator = torch.Generator(pipe.device).manual_seed(1)
        return pipe(
            "w1",
            num_inference_steps=1,
            output_type="pt",
            generator=generator,
            **options,
        )[0]

    want = picture()
    with offloaded(pipe, _policy(pipe, 0.4)):
        assert same_bits(picture(), want)


MOVES: dict[str, Callable[[Any], object]] = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "another dtype": lambda pipe: pipe.to(torch.float16),
    "another device": lambda pipe: pipe.to("meta"),
    "accelerate's hook": lambda pipe: accelerate.cpu_offload_with_hook(pipe.vae, "cpu"),
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_of_an_attached_pipeline_are_refused_by_name(
    move: str, fresh: tuple[Any, dict[str, Any], torch.Tensor]
) -> None:
    pipe, options, want = fresh
    names = "|".join(components_of(pipe))
    with offloaded(pipe, _policy(pipe, 0.4)):
        message = rf"^({names}) \(\w+\) has offload hooks.*Call detach on the pipeline"
        with pytest.raises(RuntimeError, match=message):
            MOVES[move](pipe)
        assert same_bits(picture_of(pipe, options), want)


def test_group_offloading_of_an_attached_pipeline_is_refused_by_name(
    fresh: tuple[Any, dict[str, Any], torch.Tensor],
) -> None:
    pipe, options, _ = fresh
    with offloaded(pipe, _policy(pipe, 0.4)):
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="has diffusers' group offloading"):
                picture_of(pipe, options)


def test_components_that_something_else_moves_are_named(
    fresh: tuple[Any, dict[str, Any], torch.Tensor],
) -> None:
    pipe, _, _ = fresh
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
    with pytest.raises(RuntimeError, match=r"^unet: UNet2DCond.* carries accel"):
        attach_offload_hooks(pipe, _policy(pipe, 0.4))
    hook.remove()
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(RuntimeError, match=r"^vae: .* has diffusers' group offloading"):
        attach_offload_hooks(pipe, _policy(pipe, 0.4))
    assert all(session_of(c) is None for c in components_of(pipe).values())


def test_a_controlnet_that_takes_turns_with_its_unet_gives_the_same_picture(
    fresh: tuple[Any, dict[str, Any], torch.Tensor],
) -> None:
    plain, options, _ = fresh
    torch.manual_seed(1)
    control = diffusers.ControlNetModel.from_unet(
        plain.unet, conditioning_embedding_out_channels=(16, 32)
    ).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **plain.components, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    options = {**options, "image": torch.rand(1, 3, 16, 16)}
    want = picture_of(pipe, options)
    with offloaded(pipe, _policy(pipe, 0.6)):
        for _ in range(2):
            assert same_bits(picture_of(pipe, options), want)
        stats = offload_stats(pipe)
        assert stats.limit_bytes is not None
        assert stats.peak_bytes <= stats.limit_bytes
        assert stats.by_model["controlnet"].forwards


def test_another_pipeline_of_the_same_components_encodes_a_picture(
    made: Made,
) -> None:
    pipe, options, _ = pipeline("stable diffusion", made)
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    options = {
        "guidance_scale": 3.0,
        "image": torch.rand(1, 3, 16, 16),
        "strength": 1.0,
    }
    want = picture_of(other, options)
    with offloaded(pipe, _policy(pipe, 0.4)):
        for _ in range(2):
            assert same_bits(picture_of(other, options), want)
        stats = offload_stats(other)
        assert stats.limit_bytes is not None
        assert stats.peak_bytes <= stats.limit_bytes


@pytest.mark.parametrize("when", ["before", "after"])
def test_tiles_slices_and_fused_projections_give_the_same_picture(
    when: str, fresh: tuple[Any, dict[str, Any], torch.Tensor]
) -> None:
    pipe, options, _ = fresh

    def switch() -> None:
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size = pipe.vae.tile_sample_min_size = 6
        if when == "before":
            pipe.fuse_qkv_projections()

    switch()
    want = picture_of(pipe, options)
    pipe.vae.disable_tiling()
    attach_offload_hooks(pipe, _policy(pipe, 0.4))
    switch()
    for _ in range(2):
        assert same_bits(picture_of(pipe, options), want)
    stats = offload_stats(pipe)
    assert stats.limit_bytes is not None
    assert stats.peak_bytes <= stats.limit_bytes
    detach(pipe)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cache_of_steps_gives_the_same_picture(when: str, made: Made) -> None:
    pipe, options, _ = pipeline("flux", made)
    config = diffusers.FirstBlockCacheConfig(threshold=10.0)
    steps = {**options}
    try:
        pipe.transformer.enable_cache(config)
        want = picture_of(pipe, steps)
        if when == "after":
            pipe.transformer.disable_cache()
        with offloaded(pipe, _policy(pipe, 0.5)):
            if when == "after":
                pipe.transformer.enable_cache(config)
            for _ in range(2):
                assert same_bits(picture_of(pipe, steps), want)
    finally:
        pipe.transformer.disable_cache()


def test_loras_are_loaded_into_an_attached_pipeline_and_out_of_it(
    fresh: tuple[Any, dict[str, Any], torch.Tensor],
) -> None:
    pytest.importorskip("peft")
    pipe, options, want = fresh
    name = next(
        name for name, _ in pipe.unet.named_modules() if name.endswith("attn1.to_q")
    )
    rows, columns = pipe.unet.get_submodule(name).weight.shape
    lora = {
        f"unet.{name}.lora_A.weight": torch.randn(2, columns),
        f"unet.{name}.lora_B.weight": torch.randn(rows, 2),
    }
    attach_offload_hooks(pipe, _policy(pipe, 0.4))
    assert same_bits(picture_of(pipe, options), want)
    offload(pipe)
    pipe.load_lora_weights(lora)
    changed = [picture_of(pipe, options) for _ in range(2)]
    assert not same_bits(changed[0], want)
    assert same_bits(*changed)
    detach(pipe)
    assert same_bits(picture_of(pipe, options), changed[0])
    pipe.unload_lora_weights()
    assert same_bits(picture_of(pipe, options), want)


def test_an_attached_pipeline_is_saved_as_it_is(
    tmp_path: Path, fresh: tuple[Any, dict[str, Any], torch.Tensor]
) -> None:
    pipe, options, _ = fresh
    with offloaded(pipe, _policy(pipe, 0.4)):
        picture_of(pipe, options)
        pipe.unet.save_pretrained(tmp_path)
        pipe.text_encoder.save_pretrained(tmp_path / "text")
    loaded = type(pipe.unet).from_pretrained(tmp_path)
    text = type(pipe.text_encoder).from_pretrained(tmp_path / "text")
    for mine, saved in ((pipe.unet, loaded), (pipe.text_encoder, text)):
        state = saved.state_dict()
        assert all(same_bits(v, state[k]) for k, v in mine.state_dict().items())


def test_a_component_that_was_put_in_after_attach_runs_beside_the_others(
    fresh: tuple[Any, dict[str, Any], torch.Tensor],
) -> None:
    pipe, options, want = fresh
    attach_offload_hooks(pipe, _policy(pipe, 0.4))
    replaced, pipe.unet = pipe.unet, tiny_unet(cross_attention_dim=32).eval()
    assert not same_bits(picture_of(pipe, options), want)
    detach(pipe)
    assert session_of(replaced) is None
    pipe.unet = replaced
    assert same_bits(picture_of(pipe, options), want)

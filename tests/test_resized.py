"""Weights that are given data of another shape (``weight.data = larger``).

So token embeddings grow in transformers, and with them textual inversion's tokens. Each
test does the same to a plain model and to an attached one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
    save_model,
    set_limit,
)

from .samples import GIB, STREAMING, run, same_bits, weight_bytes

WIDTH, WORDS = 32, 40
IDS = torch.arange(12).view(2, 6)


class Words(nn.Module):
    """An embedding, layers, and a head that shares its table.

    Args:
        tied: how the head shares it.
    """

    def __init__(self, tied: str = "object") -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("scale", torch.ones(1))
        if tied == "object":
            self.head.weight = self.embed.weight
        elif tied == "memory":
            self.head.weight = nn.Parameter(self.embed.weight.detach())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(self.embed(ids))))
        out: torch.Tensor = self.head(x * self.scale)
        return out


SIZE_GB = weight_bytes(Words()) / GIB
POLICIES: dict[str, dict[str, Any]] = {
    **STREAMING,
    "in place": {},
    "cast, all stay": {"compute_dtype": torch.float64},
    "disk, some stay": {"store": "disk", "limit_gb": 0.8 * SIZE_GB},
    "disk, all stay, poisoned": {"store": "disk", "debug": True},
    "disk, coded": {"store": "disk", "codec": "lossless"},
    "some in RAM": {"store": "disk", "host_limit_gb": SIZE_GB / 2},
    "disk to RAM": {
        "offload": Placement(device="disk"),
        "onload": Placement(device="cpu"),
    },
}


@pytest.fixture(params=POLICIES.values(), ids=POLICIES)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def grow(model: Any) -> None:
    """Have more words, and write to one of the new, as textual inversion does."""
    torch.manual_seed(3)
    table, shared = model.embed.weight, model.head.weight
    tied = shared.data_ptr() == table.data_ptr()
    new = table.data.new_empty(WORDS + 10, WIDTH).normal_()
    new[:WORDS] = table.data
    table.data = new
    if tied:
        shared.data = new
    table.data[WORDS + 5] = 1.5


def widen(model: Any) -> None:
    """Have more hidden units, and another buffer."""
    torch.manual_seed(4)
    for tensor in (model.up.weight, model.up.bias):
        size = (2 * WIDTH, *tensor.shape[1:])
        tensor.data = tensor.data.new_empty(size).normal_()
    tensor = model.down.weight
    tensor.data = tensor.data.new_empty(WIDTH, 2 * WIDTH).normal_()
    model.scale.data = model.scale.data.new_full((WIDTH,), 0.5)


def narrow(model: Any) -> None:
    """Have views of the old data, of which some begin where that begins."""
    model.up.weight.data = model.up.weight.data[:16]
    model.up.bias.data = model.up.bias.data[16:]
    model.down.weight.data = model.down.weight.data[:, 16:]


EDITS = {"grow": grow, "widen": widen, "narrow": narrow}


def assert_alike(model: nn.Module, twin: nn.Module) -> None:
    """Compare what there is; outputs differ by rounding where strides do."""
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in twin.named_parameters()
    ]
    for key, wanted in twin.state_dict().items():
        assert same_bits(model.state_dict()[key], wanted), key


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("tied", ["object", "memory", "no"])
@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_other_shapes_are_taken_over(
    fields: dict[str, Any],
    edit: Callable[[Any], None],
    tied: str,
    calls_before: int,
    tmp_path: Path,
) -> None:
    model, twin = Words(tied), Words(tied)
    twin.load_state_dict(model.state_dict())
    objects = dict(model.named_parameters())
    dtype = fields.get("compute_dtype", torch.float32)
    fields.setdefault("limit_gb", None)
    with offloaded(model, OffloadPolicy(compute_device="cpu", **fields)):
        for _ in range(calls_before):
            run(model, IDS)
        edit(model)
        edit(twin)
        wanted = run(copy.deepcopy(twin).to(dtype), IDS)
        for _ in range(3):
            torch.testing.assert_close(run(model, IDS), wanted)
        assert_alike(model, twin)
        stats = offload_stats(model)
        assert not stats.limit_bytes or stats.peak_bytes <= stats.limit_bytes
        save_model(model, tmp_path)
        for key, value in load_file(tmp_path / "model.safetensors").items():
            assert same_bits(value, twin.state_dict()[key])
    assert_alike(model, twin)
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
    shares = model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert shares == (twin.head.weight.data_ptr() == twin.embed.weight.data_ptr())
    torch.testing.assert_close(run(model, IDS), run(twin, IDS))


NEXT: dict[str, Callable[[Any], Any]] = {
    "state dict": lambda model: model.state_dict(),
    "offload": offload,
    "onload": onload,
    "another limit": lambda model: set_limit(model, None),
    "another host limit": lambda model: set_limit(model, host_limit_gb=1),
    "a part": lambda model: run(model.embed, IDS),
    "interrupt": lambda model: interrupt(model),
    "detach": lambda model: None,
}


def interrupt(model: Any) -> None:
    """Have a forward fail in the middle, as by Ctrl-C."""

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.down.register_forward_pre_hook(fail)
    with suppress(KeyboardInterrupt):
        run(model, IDS)
    handle.remove()


@pytest.mark.parametrize("then", NEXT.values(), ids=NEXT)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_other_shapes_are_kept_whatever_comes_next(
    then: Callable[[Any], Any], edit: Callable[[Any], None], tmp_path: Path
) -> None:
    twin = Words()
    save_file({k: v.clone() for k, v in twin.state_dict().items()}, tmp_path / "it")
    (tmp_path / "it").rename(tmp_path / "model.safetensors")
    policy = OffloadPolicy(store="disk", limit_gb=2 * SIZE_GB, compute_device="cpu")
    model = load_model(Words, tmp_path / "model.safetensors", policy=policy)
    for _ in range(3):
        run(model, IDS)
    if then is NEXT["interrupt"]:
        interrupt(model)
    edit(model)
    edit(twin)
    then(model)
    if then is not NEXT["detach"]:
        for _ in range(2):
            torch.testing.assert_close(run(model, IDS), run(twin, IDS))
        assert_alike(model, twin)
    detach(model)
    assert_alike(model, twin)
    assert model.head.weight is model.embed.weight


def test_the_plan_has_the_new_size() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    policy = OffloadPolicy(store="disk", limit_gb=0, compute_device="cpu")
    with offloaded(model, policy):
        run(model, torch.zeros(1, 8))
        before = offload_plan(model)
        model[1].weight.data = torch.zeros(80, 8)
        run(model, torch.zeros(1, 8))
        after = offload_plan(model)
        assert after.least_bytes >= model[1].weight.nbytes > before.least_bytes
        assert sum(layer.copy_bytes for layer in after.layers) == weight_bytes(model)
        assert offload_stats(model).disk_bytes == weight_bytes(model)


def test_what_a_forward_cannot_use_is_its_own_error_and_can_be_mended() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    wanted = run(model, x)
    policy = OffloadPolicy(store="disk", limit_gb=0, compute_device="cpu")
    attach_offload_hooks(model, policy)
    run(model, x)
    old = model[0].weight.data.clone()
    model[0].weight.data = old[:3]
    with pytest.raises(RuntimeError, match="must match"):
        run(model, x)
    model[0].weight.data = old
    assert same_bits(run(model, x), wanted)
    detach(model)
    assert same_bits(run(model, x), wanted)


def test_a_limit_that_is_too_small_for_the_new_shape_can_be_raised() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    limit_gb = 4 * weight_bytes(model) / GIB
    policy = OffloadPolicy(store="disk", limit_gb=limit_gb, compute_device="cpu")
    attach_offload_hooks(model, policy)
    run(model, x)
    model[2].weight.data = torch.randn(4000, 8)
    model[2].bias.data = torch.randn(4000)
    wanted = functional(model, x)
    with pytest.raises(BudgetExceededError, match=r"2 takes .*Set limit_gb="):
        run(model, x)
    set_limit(model, None)
    torch.testing.assert_close(run(model, x), wanted)
    detach(model)
    torch.testing.assert_close(run(model, x), wanted)


def functional(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute with the weights as they are, without the hooks."""
    for layer in model:
        x = nn.functional.linear(x, layer.weight.data, layer.bias.data)
    return x


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("limit_gb", [0, None])
def test_transformers_resizes_token_embeddings(
    tie: bool, limit_gb: float | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    twin = copy.deepcopy(model)
    policy = OffloadPolicy(store="disk", limit_gb=limit_gb, compute_device="cpu")
    attach_offload_hooks(model, policy)
    for _ in range(2):
        run(model, IDS)
    for one in (model, twin):
        torch.manual_seed(5)
        one.resize_token_embeddings(50)
    ids = IDS + 30
    for _ in range(3):
        assert same_bits(run(model, ids).logits, run(twin, ids).logits)
    assert_alike(model, twin)
    detach(model)
    assert_alike(model, twin)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert same_bits(run(model, ids).logits, run(twin, ids).logits)


def test_textual_inversion_brings_tokens_into_a_pipeline() -> None:
    from .tiny_pipelines import stable_diffusion

    pictures: list[list[torch.Tensor]] = [[], []]
    for attached, seen in zip((False, True), pictures, strict=True):
        torch.manual_seed(0)
        pipe, options = stable_diffusion()
        if attached:
            size = weight_bytes(pipe.unet) + weight_bytes(pipe.vae)
            policy = OffloadPolicy(
                store="disk", limit_gb=0.7 * size / GIB, compute_device="cpu"
            )
            attach_offload_hooks(pipe, policy)
        for token in (None, "cat", "dog"):
            if token is not None:
                torch.manual_seed(4)
                pipe.load_textual_inversion(torch.randn(2, 32), token=token)
            for _ in range(2):
                generator = torch.Generator().manual_seed(3)
                options |= {"generator": generator, "output_type": "pt"}
                found = pipe("w1 cat dog", num_inference_steps=2, **options)
                seen.append(found.images)
        if attached:
            detach(pipe)
        seen.append(pipe.text_encoder.get_input_embeddings().weight.detach())
    for want, got in zip(*pictures, strict=True):
        assert same_bits(got, want)
    assert not torch.equal(pictures[0][0], pictures[0][2])
    assert not torch.equal(pictures[0][2], pictures[0][4])

"""Several models and pipelines on a GPU: what the allocator holds, and the pictures."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
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
    offload_stats,
    offloaded,
)
from tests.samples import GIB, Picture, same_bits

pytestmark = pytest.mark.gpu

WIDTH = 1024
LAYER = WIDTH * WIDTH * 4


class Wide(nn.Module):
    """Layers whose activations are as large as some of the layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.part = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encode(x))


def _held() -> int:
    gc.collect()
    return torch.cuda.memory_allocated()


@pytest.fixture(autouse=True)
def _memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    ones = torch.ones(8, 8, device="cuda")
    ones @ ones  # the libraries' workspaces are made once
    del ones
    before = _held()
    yield
    # diffusers caches tables by the module that made them, for good.
    if "a_pipeline_draws" not in request.node.name:
        assert _held() <= before


def _generate(models: dict[str, Any], x: torch.Tensor) -> list[torch.Tensor]:
    """Call models as a pipeline does, one of them through a part."""
    outputs = []
    with torch.no_grad():
        outputs.append(models["text"](x[:64]).cpu())
        for _ in range(3):
            outputs.append(models["control"](x).cpu())
            outputs.append(models["unet"](x).cpu())
        outputs.append(models["vae"].encode(x).cpu())
    return outputs


def _models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"text": Wide(6), "control": Wide(6), "unet": Wide(10), "vae": Wide(4)}


def _plain(models: dict[str, Any], x: torch.Tensor) -> list[torch.Tensor]:
    for model in models.values():
        model.cuda()
    want = _generate(models, x)
    for model in models.values():
        model.cpu()
    return want


@pytest.mark.parametrize("layers", [8, 12, 20, 40])
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_peak_of_the_allocator_is_within_one_limit_from_the_first_run_on(
    layers: int, store: Any
) -> None:
    models = _models()
    before = {name: Picture(model) for name, model in models.items()}
    x = torch.randn(512, WIDTH, device="cuda")  # half a layer
    want = _plain(models, x)
    limit = layers * LAYER + torch.cuda.memory_allocated()
    policy = OffloadPolicy(limit_gb=limit / GIB, store=store, compute_device="cuda")
    attach_offload_hooks(models, policy)
    highest = 0
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        assert all(map(same_bits, _generate(models, x), want))
        highest = max(highest, torch.cuda.max_memory_allocated())
    stats = offload_stats(models)
    assert stats.limit_bytes is not None
    assert max(highest, stats.peak_bytes) <= stats.limit_bytes
    detach(models)
    for name, model in models.items():
        assert before[name].differences(model) == []


def test_when_all_models_fit_nothing_is_copied_again() -> None:
    models = _models()
    x = torch.randn(512, WIDTH, device="cuda")
    with offloaded(models, limit_gb=60 * LAYER / GIB, compute_device="cuda"):
        for _ in range(3):
            _generate(models, x)
        before = offload_stats(models).bytes_moved
        _generate(models, x)
        assert offload_stats(models).bytes_moved == before


def test_activate_gives_the_memory_of_the_others_back() -> None:
    models = _models()
    x = torch.randn(512, WIDTH, device="cuda")
    before = torch.cuda.memory_allocated()
    with offloaded(models, limit_gb=60 * LAYER / GIB, compute_device="cuda"):
        for _ in range(2):
            _generate(models, x)
        activate(models, ["text"])
        held = torch.cuda.memory_allocated() - before
        assert held <= 6 * LAYER + LAYER // 4
        activate(models, [])
        assert torch.cuda.memory_allocated() == before


FAMILIES = (
    "stable diffusion",
    "stable diffusion xl",
    "stable diffusion 3",
    "flux",
    "wan",
    "qwen image",
    "z image",
    "ltx",
    "cogvideox",
)


@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_draws_what_it_draws_on_the_gpu(name: str, share: float) -> None:
    pytest.importorskip("diffusers")
    from tests.tiny_pipelines import components_of, picture_of, pipeline

    pipe, options, _ = pipeline(name, {})
    pipe.to("cuda")
    want = picture_of(pipe, options).cpu()
    pipe.to("cpu")
    held = _held()
    components = components_of(pipe)
    before = {key: Picture(component) for key, component in components.items()}
    total = sum(p.nbytes for c in components.values() for p in c.parameters())
    # Tiny weights: room for activations and for cuBLAS's workspaces beside a share.
    limit = (share * total + 96 * 2**20 + held) / GIB
    tiers: dict[str, Callable[[], dict[str, Any]]] = {
        "ram": dict,
        "disk": lambda: {"store": "disk"},
        "disk to ram": lambda: {
            "offload": Placement(device="disk"),
            "onload": Placement(device="cpu"),
        },
    }
    for tier in tiers.values():
        with offloaded(pipe, limit_gb=limit, compute_device="cuda", **tier()):
            assert pipe._execution_device == torch.device("cuda", 0)
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                assert same_bits(picture_of(pipe, options).cpu(), want)
                assert torch.cuda.max_memory_allocated() <= limit * GIB
    assert _held() <= held
    for key, component in components.items():
        assert before[key].differences(component) == []

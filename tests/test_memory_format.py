"""``model.to(memory_format=...)`` does to an attached model what it does to any."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import OffloadPolicy, attach_offload_hooks, detach
from hookoffload.state_hooks import StateHooks
from tests.small_models import assert_same, run

GPU_TOO = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAST = torch.channels_last


def _convolutions() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(4, 8, 3), norm, nn.Conv2d(8, 4, 3)).eval()


def _strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [tensor.stride() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("device", GPU_TOO)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("limit", [0, None])
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_channels_last_is_taken_over(
    store: Any, limit: float | None, before: int, device: str
) -> None:
    model, x = _convolutions(), torch.randn(2, 4, 9, 9, device=device)
    plain = copy.deepcopy(model).to(device)
    policy = OffloadPolicy(store=store, limit_gb=limit, compute_device=device)
    attach_offload_hooks(model, policy)
    for _ in range(before):
        run(model, x)
    objects = list(model.parameters())
    for one in (model, plain):
        assert one.to(memory_format=LAST) is one
    wanted = run(plain, x)
    for _ in range(3):
        output = run(model, x)
        assert_same(output, wanted)
        assert output.stride() == wanted.stride()
    detach(model)
    assert _strides(model) == _strides(plain)
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))


@pytest.mark.parametrize("limit", [0, None])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_model_that_is_laid_out_so_can_be_laid_out_as_before(
    when: str, limit: float | None
) -> None:
    model, x = _convolutions(), torch.randn(2, 4, 9, 9)
    plain = copy.deepcopy(model)
    policy = OffloadPolicy(store="disk", limit_gb=limit, compute_device="cpu")
    if when == "before":
        model.to(memory_format=LAST)
    attach_offload_hooks(model, policy)
    if when == "behind":
        model.to(memory_format=LAST)
    run(model, x)
    model.to(memory_format=torch.contiguous_format)
    assert _strides(model) == _strides(plain)
    wanted = run(plain, x)
    for _ in range(2):
        assert_same(run(model, x), wanted)
    detach(model)
    assert _strides(model) == _strides(plain)


def test_a_move_besides_is_refused_and_changes_no_strides() -> None:
    model = attach_offload_hooks(_convolutions())
    before = _strides(model)
    with pytest.raises(RuntimeError, match="detach"):
        model.to(torch.float16, memory_format=LAST)
    assert _strides(model) == before
    detach(model)


def test_inside_a_forward_it_is_refused() -> None:
    class Converts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _convolutions()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.to(memory_format=LAST)
            return self.inner(x)

    model = attach_offload_hooks(Converts(), OffloadPolicy(compute_device="cpu"))
    with pytest.raises(RuntimeError, match="inside the model's own forward"):
        run(model, torch.randn(1, 4, 9, 9))
    detach(model)


def test_what_lies_on_a_device_is_not_taken_for_shared_by_the_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch calls every tensor of a GPU shared; the meta device stands for one."""
    monkeypatch.setattr(torch.Tensor, "is_shared", lambda _: True)
    on_device, in_ram = torch.empty(2, device="meta"), torch.empty(2)
    assert StateHooks._is_kept(lambda tensor: tensor, on_device)
    assert not StateHooks._is_kept(lambda tensor: tensor, in_ram)

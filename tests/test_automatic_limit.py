"""``limit_gb="auto"``: what is free on the device, other programs respected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    host_memory,
    offload_stats,
    set_limit,
)
from hookoffload.host_memory import automatic_limit
from tests.samples import GIB, linears

CPU = torch.device("cpu")


def _device(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> torch.device:
    module = SimpleNamespace(**functions)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("free", "ours", "limit"),
    [(20 * GIB, 0, 18 * GIB), (10 * GIB, 10 * GIB, 18 * GIB), (2 * GIB, 0, 1.5 * GIB)],
)
def test_accelerator_gives_what_is_free_and_what_is_held_already_less_a_margin(
    monkeypatch: pytest.MonkeyPatch, free: int, ours: int, limit: float
) -> None:
    device = _device(
        monkeypatch,
        mem_get_info=lambda _device: (free, 80 * GIB),
        memory_reserved=lambda _device: ours,
    )
    assert automatic_limit(device) == limit


def test_full_accelerator_leaves_a_limit_that_names_the_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = _device(
        monkeypatch,
        mem_get_info=lambda _device: (0, 80 * GIB),
        memory_reserved=lambda _device: 0,
    )
    assert automatic_limit(device) == 1  # neither unlimited nor "as little as possible"


def test_device_that_does_not_say_what_is_free_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r'limit_gb="auto".* Pass a number'):
        automatic_limit(_device(monkeypatch))


def test_cpu_gives_a_part_of_what_is_available_to_its_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 8 * GIB)
    monkeypatch.setattr(host_memory, "cgroup_limit", lambda: None)
    assert automatic_limit(CPU) == 6 * GIB
    monkeypatch.setattr(host_memory, "cgroup_limit", lambda: 5 * GIB)
    monkeypatch.setattr(host_memory, "_own_memory", lambda: GIB)
    assert automatic_limit(CPU) == 3 * GIB


def test_limit_is_found_at_attach_and_again_when_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_memory, "cgroup_limit", lambda: None)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 8 * GIB)
    model = linears()
    policy = OffloadPolicy(limit_gb="auto", compute_device="cpu", store="disk")
    attach_offload_hooks(model, policy)
    assert offload_stats(model).limit_bytes == 6 * GIB
    monkeypatch.setattr(host_memory, "available_memory", lambda: 4 * GIB)
    set_limit(model, "auto")
    assert offload_stats(model).limit_bytes == 3 * GIB
    detach(model)


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="limit_gb='automatic' is not a number"):
        OffloadPolicy(limit_gb="automatic")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_free_memory_of_the_gpu_is_the_limit() -> None:
    free, total = torch.cuda.mem_get_info()
    limit = automatic_limit(torch.device("cuda"))
    assert 0 < limit < free + torch.cuda.memory_reserved() < total

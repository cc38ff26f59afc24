"""Writes to a loaded model's weights that move no version are seen behind offload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hookoffload import OffloadPolicy, detach, load_model, offload, save_model
from hookoffload.private_pages import written_privately
from tests.small_models import assert_same, chain, run

linux_only = pytest.mark.skipif(
    not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc/self/pagemap"
)


def _zero(parameter: nn.Parameter) -> None:
    parameter.data.zero_()


def _by_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[:] = 0


@linux_only
@pytest.mark.parametrize("edit", [_zero, _by_numpy])
@pytest.mark.parametrize("when", ["before the first forward", "behind offload"])
def test_uncounted_write_to_a_loaded_weight_is_used(
    tmp_path: Path, edit: Callable[[nn.Parameter], None], when: str
) -> None:
    plain = chain(64, 64, 64)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    before = path.read_bytes()
    policy = OffloadPolicy(store="disk", limit_gb=0, compute_device="cpu")
    model = load_model(lambda: chain(64, 64, 64), path, policy)
    x = torch.randn(2, 64)
    if when == "behind offload":
        assert_same(run(model, x), run(plain, x))
        offload(model)
    edit(model[1].weight)
    edit(plain[1].weight)
    for _ in range(2):
        assert_same(run(model, x), run(plain, x))
    detach(model)
    assert_same(run(model, x), run(plain, x))
    assert path.read_bytes() == before


@linux_only
@pytest.mark.parametrize("edit", [_zero, _by_numpy])
def test_uncounted_write_behind_offload_is_saved(
    tmp_path: Path, edit: Callable[[nn.Parameter], None]
) -> None:
    plain = chain(64, 64, 64)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    policy = OffloadPolicy(store="disk", limit_gb=0, compute_device="cpu")
    model = load_model(lambda: chain(64, 64, 64), path, policy)
    run(model, torch.randn(2, 64))
    offload(model)
    edit(model[1].weight)
    save_model(model, tmp_path / "saved", progress=False)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not saved["1.weight"].any() and saved["0.weight"].any()


@linux_only
def test_only_pages_that_were_written_to_count(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(5 * 4096))
    size = 5 * 4096
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    parts = list(mapped.split(4096))
    assert list(written_privately(parts)) == [False] * 5
    mapped.sum()  # reading copies nothing
    assert list(written_privately(parts)) == [False] * 5
    parts[1][7] = 3
    parts[4][0] = 1
    assert list(written_privately(parts)) == [False, True, False, False, True]

"""The seed system's files, devices and promise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    load_model,
    offload_plan,
    offload_stats,
    offloaded,
)
from tests.process_memory import anonymous_bytes, settled_bytes
from tests.real_models import REAL_MODELS
from tests.samples import (
    GIB,
    Stack,
    first_output,
    least_limit_gb,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    seen_inside,
    weight_bytes,
)

READS_COUNTED = pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count reads"
)


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("the system does not count reads")


# -- files --------------------------------------------------------------------------


@READS_COUNTED
def test_nothing_is_read_from_a_checkpoint_before_a_layer_needs_it(
    tmp_path: Path,
) -> None:
    source = linears(width=256, depth=8)
    one_layer = source[0].weight.nbytes
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    before = _bytes_read()
    model = load_model(
        lambda: linears(width=256, depth=8),
        tmp_path / "model.safetensors",
        OffloadPolicy(store="disk", limit_gb=0),
    )
    assert _bytes_read() - before < one_layer, "no more than the header"
    run(model[0], torch.randn(2, 256))
    assert one_layer <= _bytes_read() - before < 3 * one_layer
    detach(model)


def test_of_several_files_the_later_wins_where_both_have_a_tensor(
    tmp_path: Path,
) -> None:
    source = linears(depth=2)
    state = source.state_dict()
    wrong = {"0.weight": torch.zeros(32, 32)}
    save_file({**state, **wrong}, tmp_path / "a.safetensors")
    save_file({"0.weight": state["0.weight"]}, tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    x = torch.randn(2, 32)
    policy = OffloadPolicy(store="disk", limit_gb=0)
    model = load_model(lambda: linears(depth=2), files, policy)
    assert same_bits(run(model, x), run(source, x))


def test_loading_initialises_nothing(tmp_path: Path) -> None:
    source = linears(depth=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    initialised: list[torch.device] = []

    def make() -> nn.Module:
        model = linears(depth=3)
        initialised.extend(p.device for p in model.parameters())
        return model

    model = load_model(make, tmp_path / "model.safetensors")
    assert {device.type for device in initialised} == {"meta"}
    assert all(
        same_bits(mine.weight, theirs.weight)
        for mine, theirs in zip(model, source, strict=True)
    )


# -- the root, devices, the promise -------------------------------------------------


def test_parameters_of_the_root_itself_are_managed() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 32))
            self.inner = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) @ self.table.T

    model, x = Root(), torch.randn(2, 32)
    want = run(copy.deepcopy(model), x)
    with offloaded(model, store="disk", limit_gb=0):
        assert "Root" in [layer.name for layer in offload_plan(model).layers]
        assert lies_in_a_file(model.table)
        assert same_bits(run(model, x), want)
        assert lies_in_a_file(model.table)
        assert offload_stats(model).bytes_moved >= model.table.nbytes


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_every_kind_of_device_that_torch_knows_can_be_named(kind: str) -> None:
    policy = OffloadPolicy(compute_device=kind)
    assert policy.compute_device == torch.device(kind)


def test_a_device_that_is_not_there_is_refused_when_attaching() -> None:
    model = linears()
    with pytest.raises(ValueError, match=r"compute_device='cuda:77'.*available: .*cpu"):
        attach_offload_hooks(model, OffloadPolicy(compute_device="cuda:77"))


@pytest.mark.gpu
@pytest.mark.parametrize("limit_gb", [0, None])
def test_a_model_in_host_memory_computes_on_cuda(limit_gb: float | None) -> None:
    model, x = Stack(), torch.randn(3, 32)
    want = run(copy.deepcopy(model).cuda(), x.cuda())
    with offloaded(model, compute_device="cuda", limit_gb=limit_gb):
        assert all(same_bits(run(model, x), want) for _ in range(3))
        assert run(model, x).device.type == "cuda"


@pytest.mark.parametrize("name", REAL_MODELS)
def test_a_real_model_runs_in_a_fraction_of_its_weights(name: str) -> None:
    model, inputs = REAL_MODELS[name]()
    want = first_output(run(copy.deepcopy(model), **inputs))
    least = least_limit_gb(model, store="disk")
    assert least * GIB < weight_bytes(model) / 2
    with offloaded(model, store="disk", limit_gb=least):
        for _ in range(3):
            assert same_bits(first_output(run(model, **inputs)), want)
        assert offload_stats(model).peak_bytes <= least * GIB


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs the figures of Linux"
)
def test_weights_of_twenty_times_the_limit_never_lie_in_memory(tmp_path: Path) -> None:
    # 40 GB in 2 GB, at a scale of 1 : 320.
    width, depth = 1024, 32
    file = tmp_path / "model.safetensors"
    save_file(
        {f"{i}.weight": torch.randn(width, width) / 32 for i in range(depth)}, file
    )
    limit = weight_bytes(nn.Linear(width, width, bias=False)) * depth // 20
    limit_gb = limit / GIB
    before = settled_bytes()
    model = load_model(
        lambda: linears(width, depth),
        file,
        OffloadPolicy(store="disk", limit_gb=limit_gb),
    )
    taken = [
        seen_inside(layer, lambda _: anonymous_bytes() - before) for layer in model
    ]
    for _ in range(2):
        run(model, torch.randn(1, width))
    total = weight_bytes(model)
    assert offload_stats(model).peak_bytes <= limit
    assert max(max(seen) for seen in taken) < limit + 24 * 2**20 < total / 4

"""Plans before anything runs: of models, attached or not, and of checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    BudgetExceededError,
    CheckpointError,
    OffloadPolicy,
    Placement,
    Plan,
    Rates,
    attach_offload_hooks,
    detach,
    load_model,
    offload_plan,
    offloaded,
)
from hookoffload.cli import main
from tests.safetensors_samples import descriptors_kept
from tests.small_models import chain, expected, run, tiny_model, tokens
from tests.snapshots import same_bits
from tests.sparse_checkpoints import write_sparse, write_sparse_shards

GIB = 2**30
INDEX = "pytorch_model.bin.index.json"
KIB = 2**10


class Tables(nn.Module):
    """A large table, a small one, and layers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Embedding(8192, 64)
        self.small = nn.Embedding(64, 64)
        self.blocks = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.large(x) + self.small(x))


MODELS = {"tiny": tiny_model, "chain": lambda: chain(*[64] * 9), "tables": Tables}
POLICIES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk", "limit_gb": 0.0002},
    "least": {"store": "disk", "limit_gb": 0},
    "unlimited": {"store": "disk"},
    "ram": {},
    "cast": {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32},
    "cast on disk": {
        "store": "disk",
        "limit_gb": 0.0004,
        "compute_dtype": torch.float64,
    },
    "narrow on disk": {
        "store": "disk",
        "limit_gb": 0.0002,
        "compute_dtype": torch.bfloat16,
    },
    "no residents": {"store": "disk", "preparing": Placement(dtype="disk")},
    "atomic": {"store": "disk", "module_map": {nn.Sequential: "atomic"}},
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_plan_before_attach_is_the_plan_after_it(make: Any, policy: Any) -> None:
    model = make()
    wanted = OffloadPolicy(compute_device="cpu", **policy)
    try:
        before: Plan | str = offload_plan(model, wanted)
    except BudgetExceededError as error:
        before = str(error)
    try:
        attach_offload_hooks(model, wanted)
    except BudgetExceededError as error:
        assert before == str(error)
        return
    assert before == offload_plan(model)
    detach(model)


def test_planning_changes_nothing_of_the_model() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    wanted = expected(model, tokens())
    offload_plan(model, OffloadPolicy(limit_gb=0, store="disk", compute_device="cpu"))
    after = model.state_dict()
    assert [tensor.data_ptr() for tensor in after.values()] == pointers
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert same_bits(run(model, tokens()), wanted)


def test_device_that_is_not_here_can_be_planned_for() -> None:
    model = chain(*[512] * 9)
    plan = offload_plan(model, OffloadPolicy(limit_gb=0.005, compute_device="cuda:7"))
    assert plan.device == "cuda:7"
    assert 0 < len(plan.resident) < 8
    assert plan.link_bytes == plan.pass_bytes > 0
    assert plan.disk_bytes == 0


def test_limit_below_the_least_is_refused_with_the_smallest_that_works() -> None:
    model = chain(*[512] * 5)
    policy = OffloadPolicy(limit_gb=0.0001, compute_device="cuda")
    with pytest.raises(
        BudgetExceededError, match=r"Set limit_gb=([\d.]+) or more"
    ) as e:
        offload_plan(model, policy)
    smallest = float(str(e.value).split("Set limit_gb=")[1].split()[0])
    plan = offload_plan(model, OffloadPolicy(limit_gb=smallest, compute_device="cuda"))
    assert plan.total_bytes <= smallest * GIB


def test_attached_model_has_a_policy_already() -> None:
    with (
        offloaded(chain(8, 8), compute_device="cpu") as model,
        pytest.raises(ValueError, match=r"Sequential is attached.*curve"),
    ):
        offload_plan(model, OffloadPolicy(limit_gb=1))


def test_model_without_a_policy_is_told_of_both_ways() -> None:
    with pytest.raises(RuntimeError, match=r"attach_offload_hooks.*or pass a policy"):
        offload_plan(chain(8, 8))


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a.safetensors", {"w": ("F32", (2,))})
    for what in (chain(8, 8), path):
        with pytest.raises(ValueError, match="policy must be an OffloadPolicy"):
            offload_plan(what, {"limit_gb": 2})  # type: ignore[arg-type]


def tied() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("make", [*MODELS.values(), tied], ids=[*MODELS, "tied"])
def test_plan_on_the_meta_device_is_that_of_the_model_with_its_values(
    make: Any, policy: Any, device: str
) -> None:
    """So a model is planned before its weights are fetched."""
    wanted = OffloadPolicy(compute_device=device, **policy)
    with torch.device("meta"):
        empty = make()
    try:
        plan = offload_plan(make(), wanted)
    except BudgetExceededError as error:
        with pytest.raises(BudgetExceededError, match=re.escape(str(error))):
            offload_plan(empty, wanted)
        return
    assert offload_plan(empty, wanted) == plan


def test_model_on_the_meta_device_is_planned_for_but_not_attached() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    policy = OffloadPolicy(limit_gb=1, compute_device="cpu", store="disk")
    assert offload_plan({"one": model}, policy)["one"].resident
    with pytest.raises(ValueError, match="weight is on the meta device"):
        attach_offload_hooks(model, policy)


def test_plan_where_nothing_moves_says_why_and_what_to_do() -> None:
    told = "The CPU computes where weights rest, so nothing moves. Less RAM: store="
    policy = OffloadPolicy(limit_gb=0.001, compute_device="cpu")
    model = chain(8, 8)
    lines = str(offload_plan(model, policy)).splitlines()
    assert lines[1] == f'{told}"disk".'
    assert max(map(len, lines)) <= 80
    with offloaded(model, policy):
        assert told in str(offload_plan(model))
    for other in ({"store": "disk"}, {"compute_device": "cuda"}):
        moving = dataclasses.replace(policy, **other)
        assert "nothing moves" not in str(offload_plan(model, moving))


def test_plan_of_a_running_model_names_dtypes_and_what_comes_from_disk() -> None:
    policy = OffloadPolicy(store="disk", limit_gb=0, compute_device="cpu")
    with offloaded(chain(64, 64, 64), policy) as model:
        run(model, torch.zeros(1, 64))
        plan = offload_plan(model)
    assert {layer.dtype for layer in plan.layers} == {"F32"}
    assert plan.disk_bytes == plan.pass_bytes > 0
    assert plan.link_bytes == 0, "the CPU has no link"
    cast = dataclasses.replace(policy, compute_dtype=torch.float64)
    with offloaded(chain(64, 64), cast) as model:
        assert offload_plan(model).layers[0].dtype == "F32 > F64"


# -- checkpoints --------------------------------------------------------------------


def saved(model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_plan_of_a_checkpoint_is_that_of_its_model(tmp_path: Path, policy: Any) -> None:
    """Where no module reads its children's tensors and none is a buffer."""
    if "module_map" in policy:
        pytest.skip("a checkpoint has no classes")
    folder = saved(chain(*[64] * 9), tmp_path)
    wanted = OffloadPolicy(compute_device="cpu", **policy)
    plan = offload_plan(folder, wanted)
    model = load_model(lambda: chain(*[64] * 9), folder, wanted)
    attached = offload_plan(model)
    assert plan.layers == attached.layers
    assert plan == dataclasses.replace(attached, chains=plan.chains)
    detach(model)


def test_modules_with_modules_inside_are_held_while_those_run(tmp_path: Path) -> None:
    shape = ("F32", (256,))
    names = ["scale", "blocks.0.gain", "blocks.0.up.weight", "blocks.1.up.weight"]
    path = write_sparse(tmp_path / "a.safetensors", dict.fromkeys(names, shape))
    plan = offload_plan(path, OffloadPolicy(limit_gb=0, compute_device="cuda"))
    assert [(layer.name, layer.held) for layer in plan.layers] == [
        ("(root)", True),
        ("blocks.0", True),
        ("blocks.0.up", False),
        ("blocks.1.up", False),
    ]
    assert plan.stack_bytes == 2 * KIB
    assert plan.least_bytes == 3 * KIB


def test_blocks_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tensors = {f"h.{i}.w": ("F32", (256,)) for i in (10, 2, 1, 0)}
    path = write_sparse(tmp_path / "a.safetensors", tensors)
    plan = offload_plan(path)
    assert [layer.name for layer in plan.layers] == ["h.0", "h.1", "h.2", "h.10"]


def test_checkpoint_can_be_several_files_or_an_index(tmp_path: Path) -> None:
    tensors = {f"h.{i}.w": ("BF16", (256,)) for i in range(6)}
    write_sparse_shards(tmp_path, tensors, 3)
    shards = sorted(tmp_path.glob("*.safetensors"))
    policy = OffloadPolicy(limit_gb=0, compute_device="cuda")
    plans = [
        offload_plan(tmp_path, policy),
        offload_plan(str(tmp_path / "model.safetensors.index.json"), policy),
        offload_plan(list(shards), policy),
        offload_plan(tuple(shards), policy),
    ]
    assert len(plans[0].layers) == 6
    assert all(plan == plans[0] for plan in plans)


def test_planning_a_checkpoint_leaves_no_file_open(tmp_path: Path) -> None:
    write_sparse_shards(tmp_path, {f"h.{i}.w": ("F32", (9,)) for i in range(9)}, 3)
    with descriptors_kept():
        plan = offload_plan(tmp_path, OffloadPolicy(compute_device="cuda"))
    assert len(plan.layers) == 9


def test_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        offload_plan(tmp_path / "gone", OffloadPolicy(limit_gb=1))


@pytest.mark.parametrize("given", ["", INDEX, "pytorch_model-*.bin", "one.bin"])
def test_binary_checkpoint_is_to_be_converted_as_a_whole(
    tmp_path: Path, given: str
) -> None:
    shards = [f"pytorch_model-{number}.bin" for number in (1, 2)]
    for shard, name in zip([*shards, "one.bin"], "abc", strict=True):
        torch.save({name: torch.ones(2)}, tmp_path / shard)
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only safetensors files") as error:
        offload_plan(tmp_path / given, OffloadPolicy(limit_gb=1))
    _, _, advice = str(error.value).partition("hookoffload convert ")
    source, folder = shlex.split(advice)
    assert (source, folder) == (str(tmp_path / given), "FOLDER")
    assert main(["convert", source, str(tmp_path / "new")]) == 0
    plan = offload_plan(tmp_path / "new")
    assert plan.pass_bytes == 0
    assert plan.layers[0].host_bytes == (8 if given == "one.bin" else 16)


def test_checkpoint_for_a_model_that_waits_on_the_device_has_no_plan(
    tmp_path: Path,
) -> None:
    path = write_sparse(tmp_path / "a.safetensors", {"w": ("F32", (2,))})
    there = Placement(device="cuda")
    policy = OffloadPolicy(compute_device="cuda", onload=there, limit_gb=1)
    with pytest.raises(ValueError, match="nothing to plan"):
        offload_plan(path, policy)


def test_dtypes_that_no_cast_touches_keep_their_size(tmp_path: Path) -> None:
    tensors = {"a.weight": ("F8_E4M3", (1024,)), "a.index": ("I64", (64,))}
    path = write_sparse(tmp_path / "a.safetensors", tensors)
    policy = OffloadPolicy(compute_dtype=torch.bfloat16, compute_device="cuda")
    (layer,) = offload_plan(path, policy).layers
    assert layer.dtype == "F8_E4M3 > BF16 + I64"
    assert (layer.copy_bytes, layer.cast_bytes) == (1024 + 512, 2048)
    assert layer.resident_bytes == 1024 + 512


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint of 400 GB: 80 shards, 20,000 tensors, all of it holes."""
    shape = ("BF16", (1250, 8000))
    parts = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down")
    tensors = {
        f"blocks.{block}.{part}.{kind}": shape
        for block in range(2000)
        for part in parts
        for kind in ("weight", "bias")
    }
    folder = tmp_path_factory.mktemp("huge")
    write_sparse_shards(folder, tensors, 80)
    return folder


def test_plan_of_400_gigabytes_takes_two_seconds_and_little_memory(huge: Path) -> None:
    measured = (
        "import resource, sys, time\n"
        "from hookoffload import OffloadPolicy, offload_plan\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before, began = peak(), time.process_time()\n"
        "policy = OffloadPolicy(limit_gb=8, compute_device='cuda')\n"
        "plan = offload_plan(sys.argv[1], policy)\n"
        "text = str(plan)\n"
        "print(time.process_time() - began, peak() - before, plan.pass_bytes)\n"
    )
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", measured, str(huge)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, nbytes, moved = map(float, ended.stdout.split())
    assert seconds < 2, f"and {time.perf_counter() - began:.1f} s with the interpreter"
    assert nbytes < 200e6
    assert 390e9 < moved < 400e9


# -- rates --------------------------------------------------------------------------


def test_rates_reach_the_plan(tmp_path: Path) -> None:
    rates = Rates(link_bytes_per_second=1e9)
    policy = OffloadPolicy(limit_gb=0, compute_device="cuda")
    path = write_sparse(tmp_path / "a.safetensors", {"w": ("F32", (250_000,))})
    model = chain(8, 8)
    plans = [offload_plan(path, policy, rates=rates)]
    plans.append(offload_plan(model, policy, rates=rates))
    with offloaded(model, compute_device="cpu"):
        plans.append(offload_plan(model, rates=rates))
    assert [plan.rates for plan in plans] == [rates] * 3
    prediction = plans[0].predict()
    assert prediction is not None
    assert prediction.seconds == pytest.approx(0.001)

"""Another host limit for what is attached already, and one for several models."""

from __future__ import annotations

import contextlib
import errno
import os
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
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
    set_limit,
)
from hookoffload.state_hooks import session_of
from tests.interrupts import interrupted_at, steps_of
from tests.process_memory import settled_bytes
from tests.safetensors_samples import failing
from tests.samples import lies_in_a_file, same_bits
from tests.test_tiers import (
    DEPTH,
    GIB,
    LAYER,
    MODEL,
    WANTED,
    net,
    run,
    saved,
    spilled_bytes,
    tiered,
)

LIMITS = [5, 0, 3, DEPTH, None, 1, 7.5, 0, None]


def _attached(folder: Path, from_file: bool, layers: float, **fields: Any) -> nn.Module:
    policy = tiered(folder / "spill", layers, **fields)
    if from_file:
        return load_model(net, saved(folder), policy)
    return attach_offload_hooks(net(), policy)


def _set(model: nn.Module, layers: float | None) -> None:
    set_limit(model, host_limit_gb=None if layers is None else layers * LAYER / GIB)


def _in_ram(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if not lies_in_a_file(p)]


@pytest.mark.parametrize("from_file", [False, True])
def test_another_host_limit_is_as_if_attached_with_it(
    tmp_path: Path, from_file: bool
) -> None:
    model = _attached(tmp_path, from_file, 5)
    for layers in LIMITS:
        before = set(_in_ram(model))
        _set(model, layers)
        policy = tiered(tmp_path / "other", DEPTH if layers is None else layers)
        with offloaded(net(), policy) as other:
            assert _in_ram(model) == _in_ram(other)
        after = set(_in_ram(model))
        assert before <= after or after <= before, "no layer is exchanged"
        for _ in range(2):
            assert same_bits(run(model), WANTED)
        stats = offload_stats(model)
        waiting = DEPTH if layers is None else int(layers)
        assert stats.host_bytes == waiting * LAYER
        assert stats.disk_bytes == MODEL - stats.host_bytes
        # Neither written a second time nor, what lies in the user's files, a first.
        assert spilled_bytes(tmp_path / "spill") <= (not from_file) * (MODEL + 16384)
    detach(model)
    assert same_bits(run(model), WANTED)
    assert not spilled_bytes(tmp_path / "spill")


def test_layers_that_did_not_move_before_are_copied_ahead_too(tmp_path: Path) -> None:
    model = _attached(tmp_path, True, 6)
    for layers in (6, None, 0):
        _set(model, layers)
        run(model)
    before = offload_stats(model)
    run(model)
    stats = offload_stats(model)
    assert stats.misses == before.misses == 0
    assert stats.hits == before.hits + DEPTH
    detach(model)


def test_the_limit_of_the_device_is_kept_and_the_other_way_round(
    tmp_path: Path,
) -> None:
    model = _attached(tmp_path, True, 5)
    limit = offload_stats(model).limit_bytes
    _set(model, 2)
    assert offload_stats(model).limit_bytes == limit
    set_limit(model, 1)
    assert offload_stats(model).host_limit_bytes == 2 * LAYER
    set_limit(model, None, host_limit_gb=1)
    assert offload_stats(model).limit_bytes is None
    assert offload_stats(model).host_limit_bytes == GIB
    assert same_bits(run(model), WANTED)
    detach(model)


@pytest.mark.parametrize("from_file", [False, True])
def test_edits_of_what_leaves_ram_are_kept(tmp_path: Path, from_file: bool) -> None:
    """Also those that count nowhere: the file is compared before RAM is given up."""
    model, plain = _attached(tmp_path, from_file, DEPTH), net()
    with torch.no_grad():
        for layers in (DEPTH, 5, 0, 5, DEPTH, 0):
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                (one if lies_in_a_file(one) else one.data).mul_(1.25)
                other.mul_(1.25)
            _set(model, layers)
            assert same_bits(run(model), run(plain))
    detach(model)
    assert same_bits(run(model), run(plain))


@pytest.mark.parametrize("layers", [(DEPTH, 0), (0, DEPTH)])
def test_data_that_weights_were_given_go_along(
    tmp_path: Path, layers: tuple[int, int]
) -> None:
    model, plain = _attached(tmp_path, False, layers[0]), net()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        one.data = one.data * 3
        other.data.mul_(3)
    _set(model, layers[1])
    assert same_bits(run(model), run(plain))
    detach(model)
    assert same_bits(run(model), run(plain))


def test_edits_of_an_offloaded_model_go_along(tmp_path: Path) -> None:
    model, plain = _attached(tmp_path, True, 0), net()
    run(model)
    offload(model)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        one.data.mul_(3)
        other.data.mul_(3)
    _set(model, 5)
    assert same_bits(run(model), run(plain))
    detach(model)


@pytest.mark.parametrize("what", ["removed", "changed", "replaced", "cut", "failing"])
def test_what_its_file_holds_no_longer_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model = _attached(tmp_path, True, DEPTH)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with monkeypatch.context() as patch:
        if what == "removed":
            path.unlink()
        elif what == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif what == "failing":
            patch.setattr(os, "preadv", failing(errno.EIO))
        else:
            if what == "replaced":
                path.unlink()
            path.write_bytes(content)
        _set(model, 3)
    assert spilled_bytes(tmp_path / "spill") >= (DEPTH - 3) * LAYER
    assert same_bits(run(model), WANTED)
    detach(model)
    assert same_bits(run(model), WANTED)


def test_a_file_that_layers_went_back_to_is_looked_at_again(tmp_path: Path) -> None:
    model = _attached(tmp_path, True, DEPTH)
    _set(model, 3)
    assert same_bits(run(model), WANTED)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="changed its size"):
        run(model)
    detach(model)


def test_parameters_that_were_replaced_are_divided_too(tmp_path: Path) -> None:
    model, plain = _attached(tmp_path, False, 5), net()
    for one in (model, plain):
        for layer in (0, 3, 4):
            one[layer].weight = nn.Parameter(torch.full((64, 64), 0.01 * layer))
    _set(model, 2)
    assert same_bits(run(model), run(plain))
    assert offload_stats(model).host_bytes == 2 * LAYER
    detach(model)


def test_a_folder_without_a_host_limit_is_no_contradiction(tmp_path: Path) -> None:
    model = _attached(tmp_path, False, 3)
    _set(model, None)
    _set(model, 2)
    assert spilled_bytes(tmp_path / "spill") >= (DEPTH - 2) * LAYER
    detach(model)


@pytest.mark.parametrize("from_file", [False, True])
def test_storage_dtype_holds_in_every_tier(tmp_path: Path, from_file: bool) -> None:
    """What lies in the user's file keeps the dtype that it has there."""
    fields = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    plain = net()
    model = _attached(tmp_path, from_file, 0, **fields)
    rounded: set[str] = set()
    for layers in (0, 1.5, DEPTH, 1, 0, DEPTH):
        _set(model, layers / 2)
        assert offload_stats(model).host_bytes == int(layers) * LAYER // 2
        names = {n for n, _ in plain.named_parameters()}
        new = (set(_in_ram(model)) if from_file else names) - rounded
        rounded |= new  # and stay so when they are written to another file
        for name in new:
            parameter = plain.get_parameter(name)
            parameter.data = parameter.data.bfloat16().float()
        assert same_bits(run(model), run(plain))
    detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_that_rest_on_disk_wait_in_the_new_tiers(tmp_path: Path) -> None:
    model = _attached(tmp_path, True, 5, offload=Placement(device="disk"))
    for layers in (2, 7, 0, None, 4):
        _set(model, layers)
        assert offload_stats(model).host_bytes == 0, "it is offloaded"
        onload(model)
        waiting = DEPTH if layers is None else layers
        assert offload_stats(model).host_bytes == waiting * LAYER
        assert same_bits(run(model), WANTED)
    detach(model)


# -- what goes wrong ----------------------------------------------------------------


def _assert_as_before(model: nn.Module, in_ram: list[str]) -> None:
    assert _in_ram(model) == in_ram
    assert offload_stats(model).host_limit_bytes == 5 * LAYER
    for _ in range(2):
        assert same_bits(run(model), WANTED)
    _set(model, 2)
    assert same_bits(run(model), WANTED)
    detach(model)
    assert same_bits(run(model), WANTED)


@pytest.mark.parametrize(
    ("function", "layers"), [("pwrite", 1), ("open", 1), ("preadv", 8)]
)
def test_a_disk_that_refuses_leaves_the_old_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, layers: int
) -> None:
    model = _attached(tmp_path, False, 5)
    in_ram, limit = _in_ram(model), offload_stats(model).limit_bytes
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(errno.EIO))
        with pytest.raises(CheckpointError, match=r"weights-\d|cannot write"):
            set_limit(model, 1, host_limit_gb=layers * LAYER / GIB)
    assert offload_stats(model).limit_bytes == limit
    _assert_as_before(model, in_ram)


def test_a_limit_below_the_least_leaves_the_old_limits(tmp_path: Path) -> None:
    model = _attached(tmp_path, True, 5)
    in_ram = _in_ram(model)
    with pytest.raises(BudgetExceededError):
        set_limit(model, LAYER / 2 / GIB, host_limit_gb=2 * LAYER / GIB)
    _assert_as_before(model, in_ram)


@pytest.mark.parametrize("limit", [-1, float("nan"), "auto", True])
def test_a_host_limit_that_is_no_size_is_refused(tmp_path: Path, limit: Any) -> None:
    model = _attached(tmp_path, True, 5)
    with pytest.raises(ValueError, match="host_limit_gb"):
        set_limit(model, host_limit_gb=limit)
    _assert_as_before(model, _in_ram(model))


def test_a_host_limit_that_contradicts_the_policy_is_refused() -> None:
    policy = OffloadPolicy(compute_device="cpu", store="cpu")
    model = attach_offload_hooks(net(), policy)
    with pytest.raises(ValueError, match="store='cpu'"):
        set_limit(model, host_limit_gb=1)
    assert same_bits(run(model), WANTED)
    detach(model)


@pytest.mark.parametrize("layers", [1, 9])
def test_an_interrupt_at_any_step_leaves_a_model_that_runs(
    tmp_path: Path, layers: int
) -> None:
    def ready() -> nn.Module:
        model = _attached(tmp_path, True, 5)
        run(model)
        return model

    model = ready()
    steps = steps_of(lambda: _set(model, layers))
    detach(model)
    for step in steps[:: max(1, len(steps) // 40)]:
        model = ready()
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(step):
            _set(model, layers)
        assert same_bits(run(model), WANTED)
        _set(model, 3)
        assert same_bits(run(model), WANTED)
        assert offload_stats(model).host_bytes == 3 * LAYER
        detach(model)
        assert same_bits(run(model), WANTED)


def test_memory_of_what_goes_back_to_its_file_is_given_back(tmp_path: Path) -> None:
    def large() -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(12)])

    save_file(large().state_dict(), tmp_path / "model.safetensors")
    before = settled_bytes()
    policy = OffloadPolicy(compute_device="cpu", limit_gb=0, host_limit_gb=1)
    model = load_model(large, tmp_path / "model.safetensors", policy)
    assert settled_bytes() - before > 90 * 2**20
    set_limit(model, host_limit_gb=0)
    assert settled_bytes() - before < 24 * 2**20
    detach(model)


# -- several models -----------------------------------------------------------------


def _several(folder: Path, layers: float, **fields: Any) -> dict[str, nn.Module]:
    models = {"first": net(), "second": net()}
    return attach_offload_hooks(models, tiered(folder, layers, **fields))


def test_several_models_share_one_host_limit(tmp_path: Path) -> None:
    models = _several(tmp_path, 10)
    for layers in (10, 4, 0, 2 * DEPTH, 7):
        set_limit(models, host_limit_gb=layers * LAYER / GIB)
        for model in models.values():
            for _ in range(2):
                assert same_bits(run(model), WANTED)
            share = offload_stats(model)
            assert share.host_limit_bytes == layers * LAYER // 2
            assert share.host_bytes == layers // 2 * LAYER
        stats = offload_stats(models)
        assert stats.host_limit_bytes == layers * LAYER
        assert stats.host_bytes == layers // 2 * 2 * LAYER <= stats.host_limit_bytes
        assert stats.disk_bytes == 2 * MODEL - stats.host_bytes
    detach(models)


def test_several_models_are_planned_with_their_shares(tmp_path: Path) -> None:
    policy = tiered(tmp_path, 10)
    plans = offload_plan({"first": net(), "second": net()}, policy)
    assert [plan.host_bytes for plan in plans.values()] == [5 * LAYER, 5 * LAYER]
    models = attach_offload_hooks({"first": net(), "second": net()}, policy)
    assert offload_plan(models) == plans
    detach(models)


def test_a_disk_that_refuses_one_model_leaves_the_old_limits_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = _several(tmp_path, 10)
    second = session_of(models["second"])
    assert second is not None

    def full(*_: Any) -> None:
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(second.store, "_spill", full)
        with pytest.raises(CheckpointError, match="second: the disk is full"):
            set_limit(models, host_limit_gb=2 * LAYER / GIB)
    assert offload_stats(models).host_bytes == 10 * LAYER
    for model in models.values():
        assert same_bits(run(model), WANTED)
    detach(models)


# -- on an accelerator --------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("codec", [None, "auto"])
def test_another_host_limit_on_an_accelerator_gives_the_same_bits(
    tmp_path: Path, from_file: bool, codec: Any
) -> None:
    width, depth = 4096, 8  # 32 MiB each: as many in RAM as the ring leaves room for

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
        return nn.Sequential(*layers).bfloat16()

    x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = make().cuda()(x)
    policy = OffloadPolicy(
        limit_gb=0, compute_device="cuda", host_limit_gb=0, codec=codec
    )
    if from_file:
        save_file(make().state_dict(), tmp_path / "model.safetensors")
        model = load_model(make, tmp_path / "model.safetensors", policy)
    else:
        model = attach_offload_hooks(make(), policy)
    in_ram = []
    for host_mib in (192, None, 0, 240, 128, None, 200):
        set_limit(model, host_limit_gb=None if host_mib is None else host_mib / 1024)
        for _ in range(3):
            with torch.no_grad():
                assert same_bits(model(x), wanted)
        stats = offload_stats(model)
        in_ram.append(depth - stats.disk_bytes // (2 * width * width))
        if host_mib is None:
            assert (stats.coded_bytes > 0) == (codec == "auto")
        elif host_mib:
            assert stats.host_bytes <= stats.host_limit_bytes
    assert in_ram == [3, depth, 0, 3, 2, depth, 3]
    detach(model)
    with torch.no_grad():
        assert same_bits(model.cuda()(x), wanted)


def test_a_model_that_refuses_leaves_the_limits_of_the_others(tmp_path: Path) -> None:
    models = {"one": net(), "two": net()}
    with offloaded(models, tiered(tmp_path, DEPTH, limit_gb=1)):
        for model in models.values():
            run(model)
        limits = [session_of(m).policy.limit_bytes for m in models.values()]
        module = next(m for m in models["two"].modules() if isinstance(m, nn.Linear))
        weight = module.weight
        module.weight = nn.Parameter(weight.detach().to("meta"))
        with pytest.raises(RuntimeError, match=r"two: .* meta device"):
            set_limit(models, 0.5)
        assert [session_of(m).policy.limit_bytes for m in models.values()] == limits
        module.weight = weight
        assert all(same_bits(run(m), WANTED) for m in models.values())

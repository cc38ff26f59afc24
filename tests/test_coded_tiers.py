"""Codes in host RAM up to a limit, and the others on disk."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hookoffload as ho
from hookoffload.state_hooks import session_of

from .coded_checkpoints import (
    DEPTH,
    GIB,
    bytes_of_a_pass,
    coded_layer,
    kept_file,
    load,
    open_files,
    plain,
)
from .interrupts import interrupted_at, steps_of
from .test_lossless_offload import (
    LAYER_BYTES,
    Model,
    assert_same_bits,
    policy,
    run,
)

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.mark.parametrize("layers", [0, 1, 2.5, 5, 40])
def test_host_ram_within_its_limit_holds_codes_and_the_rest_is_read_as_codes(
    checkpoint: Path, ids: torch.Tensor, layers: float
) -> None:
    expected = run(plain(checkpoint), ids)
    ho.detach(load(checkpoint))
    limit = int(layers * coded_layer(checkpoint))
    fields = {"store": None, "host_limit_gb": limit / GIB}
    model = load(checkpoint, **fields)
    for _ in range(2):
        assert_same_bits(run(model, ids), expected)
    stats = ho.offload_stats(model)
    assert stats.host_bytes <= limit
    assert stats.decoded_bytes == DEPTH * LAYER_BYTES
    in_ram = sum(
        not m.on_disk and m.code is not None
        for m in session_of(model).moved_masters  # type: ignore[union-attr]
    )
    assert in_ram == min(int(layers), DEPTH)  # of weights as they are, a quarter less
    read = bytes_of_a_pass(model, ids)
    assert read <= (DEPTH - in_ram) * coded_layer(checkpoint) + 0.1 * LAYER_BYTES
    ho.detach(model)
    assert_same_bits(run(model, ids), expected)


def test_another_host_limit_moves_codes_between_the_tiers(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    expected = run(plain(checkpoint), ids)
    model = load(checkpoint, store=None, host_limit_gb=2 * LAYER_BYTES / GIB)
    for layers in (0, 5, None, 1, 40, 3):
        limit = None if layers is None else layers * coded_layer(checkpoint)
        ho.set_limit(model, host_limit_gb=limit and limit / GIB)
        for _ in range(2):
            assert_same_bits(run(model, ids), expected)
        stats = ho.offload_stats(model)
        assert stats.decoded_bytes == DEPTH * LAYER_BYTES
        assert limit is None or stats.host_bytes <= limit
        kept = (DEPTH if layers is None else min(layers, DEPTH)) - 0.1
        assert stats.host_bytes >= kept * coded_layer(checkpoint) * 0.97
        reads = layers is not None and layers < DEPTH
        assert len(open_files(checkpoint.parent.parent / "cache")) == reads
    ho.detach(model)
    assert_same_bits(run(model, ids), expected)
    assert not open_files(checkpoint.parent.parent / "cache")


@pytest.mark.parametrize("cached", [False, True])
def test_what_host_ram_holds_within_a_limit_is_no_more_than_its_weights(
    checkpoint: Path, ids: torch.Tensor, cached: bool
) -> None:
    # Without kept codes sizes are not known before: as many as fit uncoded.
    model = load(
        checkpoint, store=None, host_limit_gb=3 * LAYER_BYTES / GIB, cached=cached
    )
    assert_same_bits(run(model, ids), run(plain(checkpoint), ids))
    stats = ho.offload_stats(model)
    assert stats.host_bytes <= 3 * LAYER_BYTES
    assert (stats.decoded_bytes == DEPTH * LAYER_BYTES) == cached
    assert stats.decoded_bytes >= 2 * LAYER_BYTES


def test_weights_in_ram_within_a_host_limit_get_no_codes_beside_them(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = plain(checkpoint)
    expected = run(model, ids)
    limit = 3 * LAYER_BYTES
    fields = {"host_limit_gb": limit / GIB, "disk_dir": tmp_path / "spill"}
    ho.attach_offload_hooks(model, policy("cpu", **fields))
    for _ in range(2):
        assert_same_bits(run(model, ids), expected)
    assert ho.offload_stats(model).host_bytes <= limit
    ho.set_limit(model, host_limit_gb=1)
    assert_same_bits(run(model, ids), expected)
    ho.detach(model)
    assert_same_bits(run(model, ids), expected)


def test_codes_beside_weights_in_ram_go_with_a_host_limit_and_come_back_without(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    model = plain(checkpoint)
    expected = run(model, ids)
    ho.attach_offload_hooks(model, policy("cpu"))
    coded = ho.offload_stats(model)
    for host_limit in (3 * LAYER_BYTES / GIB, None):
        ho.set_limit(model, host_limit_gb=host_limit)
        for _ in range(2):
            assert_same_bits(run(model, ids), expected)
        stats = ho.offload_stats(model)
        assert stats.decoded_bytes == (0 if host_limit else coded.decoded_bytes)
        assert not host_limit or stats.host_bytes <= 3 * LAYER_BYTES
    assert stats.host_bytes <= coded.host_bytes
    ho.detach(model)
    assert_same_bits(run(model, ids), expected)


def test_codes_in_files_outlast_offload_where_the_other_tier_leaves_ram(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    ho.detach(load(checkpoint))
    model = load(
        checkpoint,
        store=None,
        offload=ho.Placement(device="disk"),
        onload=ho.Placement(device="cpu"),
        host_limit_gb=2 * coded_layer(checkpoint) / GIB,
    )
    for _ in range(3):
        assert_same_bits(run(model, ids), run(plain(checkpoint), ids))
        stats = ho.offload_stats(model)
        assert coded_layer(checkpoint) < stats.host_bytes <= 2 * coded_layer(checkpoint)
        ho.offload(model)
        assert ho.offload_stats(model).host_bytes < 0.1 * LAYER_BYTES


def test_a_cache_that_is_gone_when_a_layer_leaves_ram_is_done_without(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    expected = run(plain(checkpoint), ids)
    model = load(checkpoint, store=None, host_limit_gb=1)
    shutil.rmtree(kept_file(checkpoint).parent)
    assert_same_bits(run(model, ids), expected)  # nothing is read from it
    ho.set_limit(model, host_limit_gb=0)
    assert_same_bits(run(model, ids), expected)
    assert ho.offload_stats(model).decoded_bytes == 0
    ho.set_limit(model, host_limit_gb=1)
    assert_same_bits(run(model, ids), expected)
    assert ho.offload_stats(model).decoded_bytes == DEPTH * LAYER_BYTES


def test_two_weights_that_a_converter_makes_of_one_share_its_code(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**state, "blocks.5.weight": state["blocks.0.weight"]}

    expected = plain(checkpoint)
    expected.blocks[5].weight = nn.Parameter(expected.blocks[0].weight.detach().clone())
    for _ in range(2):
        model = load(checkpoint, state_dict_converter=convert)
        assert_same_bits(run(model, ids), run(expected, ids))
        assert ho.offload_stats(model).decoded_bytes == DEPTH * LAYER_BYTES
        with torch.no_grad():
            model.blocks[5].weight.zero_()
        assert_same_bits(model.blocks[0].weight, expected.blocks[0].weight)
        ho.detach(model)
    assert len(load_file(kept_file(checkpoint))) == DEPTH - 1


@pytest.mark.parametrize("layers", [1, 5])
def test_an_interrupt_while_tiers_change_leaves_a_model_that_runs(
    checkpoint: Path, ids: torch.Tensor, layers: int
) -> None:
    expected = run(plain(checkpoint), ids)
    ho.detach(load(checkpoint))
    size = coded_layer(checkpoint) / GIB

    def ready() -> Model:
        model = load(checkpoint, store=None, host_limit_gb=3 * size)
        run(model, ids)
        return model

    model = ready()
    steps = steps_of(lambda: ho.set_limit(model, host_limit_gb=layers * size))
    ho.detach(model)
    for step in steps[:: max(1, len(steps) // 15)]:
        model = ready()
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(step):
            ho.set_limit(model, host_limit_gb=layers * size)
        assert_same_bits(run(model, ids), expected)
        ho.set_limit(model, host_limit_gb=2 * size)
        assert_same_bits(run(model, ids), expected)
        stats = ho.offload_stats(model)
        assert stats.host_bytes <= 2 * size * GIB
        assert stats.decoded_bytes == DEPTH * LAYER_BYTES
        ho.detach(model)
        assert_same_bits(run(model, ids), expected)


def test_a_limit_that_is_refused_leaves_the_tiers_and_no_file_open(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    expected = run(plain(checkpoint), ids)
    ho.detach(load(checkpoint))
    model = load(checkpoint, store=None, host_limit_gb=1)
    before = ho.offload_stats(model)
    with pytest.raises(ho.BudgetExceededError):
        ho.set_limit(model, 1e-6, host_limit_gb=0)
    assert not open_files(checkpoint.parent.parent / "cache")
    assert_same_bits(run(model, ids), expected)
    stats = ho.offload_stats(model)
    assert (stats.host_bytes, stats.disk_bytes) == (before.host_bytes, 0)
    ho.detach(model)

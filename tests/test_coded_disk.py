"""Layers that wait on disk are read as kept codes: fewer bytes, the same bits."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hookoffload as ho
from hookoffload import master as masters
from hookoffload.master import Master
from hookoffload.reader_threads import ReaderThreads
from hookoffload.safetensors_file import CheckpointFile
from hookoffload.staging import BUFFER_BYTES, StagedRead, chunks_of
from hookoffload.state_hooks import session_of

from .coded_checkpoints import (
    DEPTH,
    GIB,
    ON_DISK,
    bytes_of_a_pass,
    kept_file,
    load,
    open_files,
    plain,
    saved,
)
from .test_lossless_offload import (
    LAYER_BYTES,
    WIDTH,
    Model,
    assert_same_bits,
    in_a_file,
    policy,
    run,
)
from .test_tiers import small_cache, staged  # noqa: F401, they are fixtures

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("limit", [0, 8 * LAYER_BYTES, None])
def test_outputs_are_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, ids: torch.Tensor, limit: int | None
) -> None:
    path = saved(tmp_path / "checkpoint", dtype)
    expected = run(plain(path), ids)
    for _ in range(2):  # the first one makes the codes
        model = load(path, limit=limit)
        for _ in range(3):
            assert_same_bits(run(model, ids), expected)
        assert ho.offload_stats(model).decoded_bytes >= DEPTH * LAYER_BYTES
        ho.detach(model)
        assert_same_bits(run(model, ids), expected)


def test_three_quarters_of_the_bytes_are_read_in_a_pass(
    checkpoint: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = load(checkpoint, codec=None)
    raw_bytes, raw_plan = bytes_of_a_pass(raw, ids), ho.offload_plan(raw)
    ho.detach(raw)
    model = load(checkpoint)
    assert DEPTH * LAYER_BYTES < raw_bytes < (DEPTH + 0.1) * LAYER_BYTES
    assert 0.74 * raw_bytes < bytes_of_a_pass(model, ids) <= 0.78 * raw_bytes
    # So says the system, too.
    read: dict[Path, int] = {}
    read_parts = CheckpointFile.read_parts

    def counted(self: CheckpointFile, parts: Any) -> None:
        read[self.path] = read.get(self.path, 0) + sum(len(m) for *_, m in parts)
        read_parts(self, parts)

    monkeypatch.setattr(CheckpointFile, "read_parts", counted)
    stats = ho.offload_stats(model)
    run(model, ids)
    ho.detach(model)  # what was read ahead is read by then
    assert 0.74 * raw_bytes < read[kept_file(checkpoint)] <= 2 * 0.78 * raw_bytes
    assert read.get(checkpoint, 0) < 0.1 * LAYER_BYTES  # biases, norms, rows
    assert stats.disk_bytes < 0.78 * (raw_bytes) + 2 * 2000 * WIDTH
    assert stats.host_bytes < 0.1 * LAYER_BYTES
    assert raw_plan.coded_share == 1


def test_plans_and_reports_tell_what_is_read(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    raw = load(checkpoint, codec=None)
    model = load(checkpoint, record=True)
    plan, raw_plan = ho.offload_plan(model), ho.offload_plan(raw)
    assert plan.disk_bytes <= 0.78 * raw_plan.disk_bytes
    assert plan.coded_share < 0.78 and "BF16 coded" in str(plan)
    rates = ho.Rates(link_bytes_per_second=1e12, disk_bytes_per_second=1e9)
    seconds = [one.predict(rates).seconds for one in (plan, raw_plan)]
    assert seconds[0] <= 0.78 * seconds[1]
    read = bytes_of_a_pass(model, ids)
    assert 0 <= read - plan.disk_bytes <= 5 * 4 * WIDTH  # the norm, used six times
    passes = ho.report(model).timeline.passes
    assert passes[-1].bytes_moved == read and passes[-1].disk_seconds > 0
    assert "coded in 7" in str(ho.offload_stats(model))


@pytest.mark.parametrize("layers", [None, 0, 2.5, 40])
@pytest.mark.parametrize("cached", [False, True])
def test_plans_of_checkpoints_foresee_what_is_read(
    tmp_path: Path, layers: float | None, cached: bool
) -> None:
    def large() -> nn.Module:
        blocks = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]
        return nn.Sequential(*blocks).to(torch.bfloat16)

    path = tmp_path / "model.safetensors"
    save_file(large().state_dict(), path)
    fields: dict[str, Any] = ON_DISK
    if layers is not None:
        fields = {"host_limit_gb": layers * LAYER_BYTES / GIB}
    asked = policy("cpu", 0, **fields)
    plan = ho.offload_plan(path, asked, cache_codes=cached)
    cache = {"cache_dir": tmp_path / "cache", "cache_codes": cached}
    model = ho.load_model(large, path, asked, progress=False, **cache)
    loaded = ho.offload_plan(model)
    assert loaded.disk_bytes * 0.99 <= plan.disk_bytes <= loaded.disk_bytes * 1.01
    assert loaded.host_bytes * 0.99 <= plan.host_bytes <= loaded.host_bytes * 1.01
    with pytest.raises(ValueError, match="cache_codes=True says"):
        ho.offload_plan(model, cache_codes=True)


def test_a_second_start_encodes_and_writes_nothing(
    checkpoint: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(load(checkpoint), ids)
    folder = checkpoint.parent.parent / "cache"

    def state() -> dict[str, tuple[int, int]]:
        paths = [folder, *folder.rglob("*")]
        stats = [path.stat() for path in paths]
        return {
            str(p): (s.st_ino, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)
        }

    before = state()
    monkeypatch.setattr(masters, "encode_from", None)
    assert_same_bits(run(load(checkpoint), ids), expected)
    assert state() == before


def test_one_entry_serves_disk_and_host_ram(
    checkpoint: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(plain(checkpoint), ids)
    ho.detach(load(checkpoint))
    monkeypatch.setattr(masters, "encode_from", None)
    for fields in ({"store": "cpu"}, {"store": None, "host_limit_gb": 0.001}, ON_DISK):
        model = load(checkpoint, **fields)
        assert_same_bits(run(model, ids), expected)
        assert ho.offload_stats(model).decoded_bytes == DEPTH * LAYER_BYTES
        reads = fields.get("store") != "cpu"
        assert len(open_files(checkpoint.parent.parent / "cache")) == reads
        ho.detach(model)


def test_where_no_cache_can_be_written_weights_are_read_as_they_are(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    (checkpoint.parent.parent / "file").write_text("no folder")
    model = load(checkpoint, cache_dir=checkpoint.parent.parent / "file" / "cache")
    assert ho.offload_stats(model).decoded_bytes == 0
    assert_same_bits(run(model, ids), run(plain(checkpoint), ids))


def test_without_kept_codes_weights_on_disk_are_read_as_they_are(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    model = load(checkpoint, cached=False)
    assert ho.offload_stats(model).decoded_bytes == 0
    assert_same_bits(run(model, ids), run(plain(checkpoint), ids))
    assert not (checkpoint.parent.parent / "cache").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [ON_DISK, {"host_limit_gb": 0.1}], ids=str)
@pytest.mark.parametrize("limit", [0, 2**28])
def test_an_accelerator_computes_the_same_bits_from_fewer_bytes(
    tmp_path: Path, fields: dict[str, Any], limit: int
) -> None:
    width, depth = 4096, 8

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
        return nn.Sequential(*layers).bfloat16()

    x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16)
    path = tmp_path / "model.safetensors"
    save_file(make().state_dict(), path)
    changed = make()
    raw = ho.load_model(make, path, policy("cuda", limit, codec=None, **fields))
    raw_bytes = bytes_of_a_pass(raw, x)
    ho.detach(raw)
    del raw
    for _ in range(2):
        model = ho.load_model(
            make,
            path,
            policy("cuda", limit, **fields),
            cache_dir=tmp_path / "cache",
            cache_codes=True,
        )
        for edited in (None, 3, 5):
            if edited is not None:
                for each in (model, changed):
                    with torch.no_grad():
                        each[edited].weight.mul_(-1.5)
            wanted = run(copy.deepcopy(changed).cuda(), x)
            for _ in range(3):
                assert_same_bits(run(model, x), wanted)
            if edited is None:
                assert bytes_of_a_pass(model, x) <= 0.78 * raw_bytes
        ho.detach(model)
        changed = make()


# -- values that change -------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, None])
def test_edits_between_forwards_are_seen(
    checkpoint: Path, ids: torch.Tensor, limit: int | None
) -> None:
    model, expected = load(checkpoint, limit=limit), plain(checkpoint)
    run(model, ids)
    spread = torch.randn(WIDTH, WIDTH) * torch.logspace(-30, 0, WIDTH)
    for edited in (model, expected):
        with torch.no_grad():
            edited.blocks[2].weight.mul_(-1)
            edited.blocks[3].weight.copy_(spread)  # needs more patches than have room
            edited.blocks[4].weight[17].fill_(2.0**-40)
    for _ in range(2):
        assert_same_bits(run(model, ids), run(expected, ids))
    ho.offload(model)
    for edited in (model, expected):
        edited.blocks[1].weight.data.mul_(3)  # counts nowhere
        edited.blocks[2].weight.data.mul_(3)
    assert_same_bits(run(model, ids), run(expected, ids))
    ho.detach(model)
    for name, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], value)
    for name, value in load_file(checkpoint).items():
        assert_same_bits(value, plain(checkpoint).state_dict()[name])


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_can_be_loaded(
    checkpoint: Path, ids: torch.Tensor, assign: bool
) -> None:
    model, other = load(checkpoint), Model().eval()
    run(model, ids)
    model.load_state_dict(other.state_dict(), assign=assign)
    for _ in range(2):
        assert_same_bits(run(model, ids), run(other, ids))
    ho.detach(model)
    assert_same_bits(run(model, ids), run(other, ids))


def test_what_is_read_ahead_of_an_edit_is_read_again_once_it_is_encoded(
    checkpoint: Path,
) -> None:
    model = load(checkpoint)
    master = coded_master(model, "blocks.2.weight")
    readers = ReaderThreads()

    def read_ahead() -> StagedRead:
        (chunk,) = chunks_of([master], BUFFER_BYTES)
        read = StagedRead((master,), chunk, is_first=True, is_last=True)
        read.begin(torch.empty(BUFFER_BYTES, dtype=torch.uint8), None, readers)
        read.wait()
        return read

    with torch.no_grad():
        model.blocks[2].weight.mul_(2)
    assert master.reconcile()
    early = read_ahead()  # by a thread that is quicker than the encoder
    assert master.has_old_code
    master.renew_code()
    assert not early.is_current()
    assert read_ahead().is_current()
    readers.join()


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("limit", [0, 4 * LAYER_BYTES])
def test_codes_come_through_the_ring_of_an_accelerator(
    checkpoint: Path, ids: torch.Tensor, limit: int
) -> None:
    model, expected = load(checkpoint, limit=limit), plain(checkpoint)
    for index in (0, 3, 1, 5, 3):
        for _ in range(2):
            assert_same_bits(run(model, ids), run(expected, ids))
        for edited in (model, expected):
            with torch.no_grad():
                edited.blocks[index].weight.mul_(-1.5)
    assert_same_bits(run(model, ids), run(expected, ids))
    ho.offload(model)
    assert_same_bits(run(model, ids), run(expected, ids))
    ho.detach(model)
    assert_same_bits(run(model, ids), run(expected, ids))


def test_codes_are_read_past_a_page_cache_that_is_too_small(
    checkpoint: Path, ids: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    past = request.getfixturevalue("small_cache")
    expected = run(plain(checkpoint), ids)
    model = load(checkpoint)
    for _ in range(2):
        assert_same_bits(run(model, ids), expected)
    file = next(iter(session_of(model).store.files))  # type: ignore[union-attr]
    if not file.read_past_cache():
        pytest.skip("the file system has no such reads")
    assert sum(past) > 2 * DEPTH * 0.74 * LAYER_BYTES


def coded_master(model: nn.Module, name: str) -> Master:
    session = session_of(model)
    assert session is not None
    return next(m for m in session.moved_masters if m.members[0].name == name)


def test_offload_and_onload_go_round(checkpoint: Path, ids: torch.Tensor) -> None:
    expected = run(plain(checkpoint), ids)
    model = load(checkpoint, limit=8 * LAYER_BYTES)
    for _ in range(3):
        assert_same_bits(run(model, ids), expected)
        ho.offload(model)
        assert ho.offload_stats(model).host_bytes < 0.1 * LAYER_BYTES
        assert in_a_file(model.blocks[0].weight, checkpoint)
        ho.onload(model)
    assert bytes_of_a_pass(load(checkpoint), ids) <= 0.78 * (DEPTH + 0.1) * LAYER_BYTES


# -- what is left -------------------------------------------------------------------


def test_detach_leaves_maps_of_the_checkpoint_and_closes_the_cache(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    model = load(checkpoint)
    weight = model.blocks[0].weight
    run(model, ids)
    assert in_a_file(weight, checkpoint)
    cache = checkpoint.parent.parent / "cache"
    assert open_files(cache) == [str(kept_file(checkpoint))]
    ho.detach(model)
    assert model.blocks[0].weight is weight and in_a_file(weight, checkpoint)
    assert not open_files(cache)
    shutil.rmtree(cache)
    for name, value in load_file(checkpoint).items():
        assert_same_bits(model.state_dict()[name], value)


def test_a_saved_model_is_the_checkpoint(
    checkpoint: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load(checkpoint)
    run(model, ids)
    ho.save_model(model, tmp_path / "saved", progress=False)
    written = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in load_file(checkpoint).items():
        assert_same_bits(written[name], value)


def test_several_models_are_read_as_codes(tmp_path: Path, ids: torch.Tensor) -> None:
    paths = [saved(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    expected = [run(plain(path), ids) for path in paths]
    models = {}
    for path in paths:
        fields = {"cache_dir": path.parent / "cache"}
        models[path.parent.name] = load(path, **fields)
    ho.attach_offload_hooks(
        models, policy("cpu", 9 * LAYER_BYTES, store="disk", disk_dir=tmp_path)
    )
    for _ in range(2):
        for model, wanted in zip(models.values(), expected, strict=True):
            assert_same_bits(run(model, ids), wanted)
    for stats in ho.offload_stats(models).by_model.values():
        assert stats.decoded_bytes == DEPTH * LAYER_BYTES
        assert stats.disk_bytes <= 0.78 * DEPTH * LAYER_BYTES + 2.1 * 2000 * WIDTH
    assert all(len(open_files(path.parent / "cache")) == 1 for path in paths)
    ho.detach(models)
    for model, wanted in zip(models.values(), expected, strict=True):
        assert_same_bits(run(model, ids), wanted)
    assert not any(open_files(path.parent / "cache") for path in paths)


def test_a_model_whose_joining_fails_goes_on_reading_codes(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    expected = run(plain(checkpoint), ids)
    model = load(checkpoint)
    large = nn.Linear(4096, 4096)
    with pytest.raises(ho.BudgetExceededError):
        ho.attach_offload_hooks(
            {"model": model, "large": large},
            policy("cpu", 6 * LAYER_BYTES, store="disk"),
        )
    assert_same_bits(run(model, ids), expected)
    assert ho.offload_stats(model).decoded_bytes == DEPTH * LAYER_BYTES


def test_a_copy_of_the_state_is_of_the_weights(checkpoint: Path) -> None:
    state = copy.deepcopy(load(checkpoint).state_dict())
    for name, value in load_file(checkpoint).items():
        assert_same_bits(state[name], value)

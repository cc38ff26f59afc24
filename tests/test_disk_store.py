"""Weights on disk: read when a layer needs them, written once, gone after detach."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm.std import tqdm

from hookoffload import (
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
)
from tests.process_memory import anonymous_bytes, settled_bytes
from tests.small_models import (
    TinyModel,
    assert_same,
    chain,
    expected,
    nbytes,
    on_disk,
    run,
    tiny_model,
    tokens,
)
from tests.snapshots import Snapshot, assert_untouched, same_bits

MIB = 2**20


@pytest.fixture(autouse=True)
def _own_temporary_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path_factory.mktemp("temporary"))
    monkeypatch.setattr(tempfile, "tempdir", folder)


class Traffic:
    """Counts what goes through the positioned reads and writes of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[str, int, int]] = []
        self.written = 0
        self._preadv, self._pwrite = os.preadv, os.pwrite
        monkeypatch.setattr(os, "preadv", self._count_read)
        monkeypatch.setattr(os, "pwrite", self._count_write)

    def _count_read(self, fd: int, buffers: Any, offset: int, *more: int) -> int:
        count = self._preadv(fd, buffers, offset, *more)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        self.read.append((name, offset, count))
        return count

    def _count_write(self, fd: int, data: Any, offset: int) -> int:
        count = self._pwrite(fd, data, offset)
        self.written += count
        return count

    @property
    def bytes_read(self) -> int:
        return sum(count for _, _, count in self.read)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to name the file behind a descriptor")
    return Traffic(monkeypatch)


@pytest.fixture
def tiny() -> Iterator[TinyModel]:
    model = tiny_model()
    yield model
    with_hooks = "_apply" in model.__dict__
    assert not with_hooks, "a test left its model attached"


def _save(model: nn.Module, path: Path) -> Path:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.pop("head.weight", None)
    save_file(state, path)
    return path


def _save_shards(model: nn.Module, folder: Path, count: int = 3) -> Path:
    """Write a checkpoint as the Hugging Face Hub has them: shards and an index."""
    folder.mkdir()
    state = dict(model.state_dict())
    state.pop("head.weight", None)
    weight_map = {}
    for shard in range(count):
        names = list(state)[shard::count]
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: state[name].clone() for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- a checkpoint that lies on disk already ---


@pytest.mark.parametrize("form", ["one file", "several files", "folder with an index"])
def test_checkpoint_on_disk_computes_what_the_plain_model_does(
    tmp_path: Path, tiny: TinyModel, form: str
) -> None:
    if form == "one file":
        checkpoint: Any = _save(tiny, tmp_path / "model.safetensors")
    else:
        checkpoint = _save_shards(tiny, tmp_path / "shards")
        if form == "several files":
            checkpoint = sorted(checkpoint.glob("*.safetensors"))
    model = load_model(TinyModel, checkpoint, on_disk(tmp_path / "spill"))
    for seed in range(3):
        assert_same(run(model, tokens(seed)), expected(tiny, tokens(seed)))
    assert not (tmp_path / "spill").exists(), "a checkpoint needs no second copy"
    detach(model)


def test_no_weight_is_read_before_its_layer_runs(
    tmp_path: Path, traffic: Traffic
) -> None:
    plain = chain(32, 64, 32, 64, 32)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    model = load_model(lambda: chain(32, 64, 32, 64, 32), path, on_disk(tmp_path))
    assert traffic.bytes_read == 0
    read_before: list[int] = []
    for layer in model:
        layer.register_forward_pre_hook(
            lambda *_: read_before.append(traffic.bytes_read)
        )
    x = torch.randn(3, 32)
    assert_same(run(model, x), expected(plain, x))
    sizes = [nbytes(layer) for layer in plain]
    for index, read in enumerate(read_before):
        # The pass has read a layer when it runs, and not much ahead: the window of
        # limit_gb=0 holds one layer.
        assert sum(sizes[: index + 1]) <= read <= sum(sizes[: index + 2])
    assert traffic.bytes_read >= nbytes(plain)
    detach(model)


def test_resident_layers_are_read_once(tmp_path: Path, traffic: Traffic) -> None:
    plain = chain(32, 64, 32, 64, 32)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    policy = on_disk(tmp_path, limit_gb=None)
    model = load_model(lambda: chain(32, 64, 32, 64, 32), path, policy)
    for seed in range(3):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        assert_same(run(model, x), expected(plain, x))
        assert traffic.bytes_read == nbytes(plain)
    detach(model)


def test_embedding_table_is_looked_up_and_not_brought_in(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(20_000, 16), nn.Linear(16, 16)).eval()
    x = torch.tensor([[0, 7, 19_999]])
    wanted = expected(model, x)
    attach_offload_hooks(model, on_disk(tmp_path))
    least = offload_plan(model).least_bytes
    assert least < model[0].weight.nbytes / 100
    for _ in range(3):
        assert_same(run(model, x), wanted)
    assert offload_stats(model).peak_bytes <= least
    assert offload_stats(model).bytes_moved < model[0].weight.nbytes
    detach(model)


# --- a model that lies in memory ---


def test_model_in_memory_is_written_once(
    tmp_path: Path, tiny: TinyModel, traffic: Traffic
) -> None:
    model = attach_offload_hooks(tiny, on_disk(tmp_path))
    (file,) = _files_below(tmp_path)
    # Tied weights once; buffers, which forwards write to, stay in memory.
    held = sum(tensor.nbytes for tensor in load_file(file).values())
    assert held == nbytes(tiny)
    written = traffic.written
    assert nbytes(tiny) <= written == file.stat().st_size
    for seed in range(2):
        run(model, tokens(seed))
    offload(model)
    onload(model)
    run(model, tokens())
    assert traffic.written == written
    detach(model)


def test_model_on_disk_computes_what_the_plain_model_does(
    tmp_path: Path, tiny: TinyModel
) -> None:
    outputs = [expected(tiny, tokens(seed)) for seed in range(3)]
    before = Snapshot(tiny, tmp_path)
    model = attach_offload_hooks(tiny, on_disk(tmp_path))
    for seed, output in enumerate(outputs):
        assert_same(run(model, tokens(seed)), output)
    detach(model)
    assert_untouched(model, before, same_memory=False)


def test_folder_that_does_not_exist_is_made(tmp_path: Path, tiny: TinyModel) -> None:
    folder = tmp_path / "new" / "spill"
    with offloaded(tiny, on_disk(folder)) as model:
        assert _files_below(folder)
        run(model, tokens())
    assert not _files_below(tmp_path)


def test_without_disk_dir_the_temporary_folder_is_used(tiny: TinyModel) -> None:
    where = Path(tempfile.gettempdir())
    policy = OffloadPolicy(limit_gb=0, store="disk", compute_device="cpu")
    with offloaded(tiny, policy):
        assert len(_files_below(where)) == 1
    assert list(where.iterdir()) == []


def test_files_of_others_in_the_folder_are_left_alone(
    tmp_path: Path, tiny: TinyModel
) -> None:
    foreign = tmp_path / "weights-0.safetensors"
    foreign.write_bytes(b"not ours")
    with offloaded(tiny, on_disk(tmp_path)):
        assert len(_files_below(tmp_path)) == 2
    assert _files_below(tmp_path) == [foreign]
    assert foreign.read_bytes() == b"not ours"


def test_memory_of_the_originals_is_freed(tmp_path: Path) -> None:
    model = chain(64, 64, 64)
    storages = {
        name: StorageWeakRef(parameter.untyped_storage())
        for name, parameter in model.named_parameters()
    }
    attach_offload_hooks(model, on_disk(tmp_path))
    alive = [name for name, storage in storages.items() if not storage.expired()]
    assert alive == []
    run(model, torch.randn(2, 64))
    detach(model)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_process_gives_a_large_models_memory_back(tmp_path: Path) -> None:
    width = 3200  # 39 MiB a layer: each is a mapping of its own, returned when freed
    start = settled_bytes()
    model = nn.Sequential(*[nn.Linear(width, width, device="meta") for _ in range(5)])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number / 1000)
    size = nbytes(model)
    assert size > 190 * MIB
    assert anonymous_bytes() - start > 0.9 * size
    x = torch.ones(1, width)
    wanted = run(model, x)
    attach_offload_hooks(model, on_disk(tmp_path))
    # The window of limit_gb=0 holds one layer of five, and is taken in the forward.
    assert anonymous_bytes() - start < 0.1 * size
    assert_same(run(model, x), wanted)
    assert anonymous_bytes() - start < 0.4 * size
    offload(model)
    assert anonymous_bytes() - start < 0.1 * size
    detach(model)
    assert anonymous_bytes() - start > 0.9 * size
    assert_same(run(model, x), wanted)


def test_model_larger_than_the_limit_runs_within_it(tmp_path: Path) -> None:
    model = chain(256, 256, 256, 256, 256, 256, 256, 256, 256)
    x = torch.randn(4, 256)
    wanted = expected(model, x)
    limit = nbytes(model) // 3
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit / 2**30))
    for _ in range(3):
        assert_same(run(model, x), wanted)
    assert 0 < offload_stats(model).peak_bytes <= limit
    plan = offload_plan(model)
    largest = max(layer.stream_bytes for layer in plan.layers)
    assert plan.total_bytes > limit - largest, "what the limit leaves is used"
    detach(model)


def test_two_models_of_one_class_in_one_folder_keep_their_own_weights(
    tmp_path: Path,
) -> None:
    one, other = tiny_model(seed=1), tiny_model(seed=2)
    outputs = expected(one, tokens()), expected(other, tokens())
    before = Snapshot(one), Snapshot(other)
    attach_offload_hooks(one, on_disk(tmp_path))
    attach_offload_hooks(other, on_disk(tmp_path))
    assert len(_files_below(tmp_path)) == 2
    for _ in range(2):
        assert_same(run(one, tokens()), outputs[0])
        assert_same(run(other, tokens()), outputs[1])
    detach(one)
    assert len(_files_below(tmp_path)) == 1
    assert_same(run(other, tokens()), outputs[1])
    detach(other)
    assert _files_below(tmp_path) == []
    assert_untouched(one, before[0], same_memory=False)
    assert_untouched(other, before[1], same_memory=False)


def test_model_can_be_attached_to_disk_again_and_again(
    tmp_path: Path, tiny: TinyModel
) -> None:
    wanted = expected(tiny, tokens())
    before = Snapshot(tiny, tmp_path)
    for _ in range(3):
        with offloaded(tiny, on_disk(tmp_path)) as model:
            assert_same(run(model, tokens()), wanted)
        assert_untouched(tiny, before, same_memory=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"store": "disk"},
        {"offload": Placement(device="disk"), "onload": Placement(device="cpu")},
        {"host_limit_gb": 1e-6},
    ],
    ids=["disk", "disk, waiting in RAM", "some in RAM"],
)
@pytest.mark.parametrize("how", ["assign", "data"])
def test_files_that_nothing_rests_in_any_more_are_removed(
    tmp_path: Path, fields: dict[str, Any], how: str
) -> None:
    policy = OffloadPolicy(
        **fields, disk_dir=tmp_path, limit_gb=0, compute_device="cpu"
    )
    model = chain(16, 16, 16, 16)
    with offloaded(model, policy):
        run(model, torch.ones(1, 16))
        written = sum(path.stat().st_size for path in _files_below(tmp_path))
        for factor in (0.5, 2, 3):
            state = {k: factor * v for k, v in model.state_dict().items()}
            wanted = run(_loaded(chain(16, 16, 16, 16), state), torch.ones(1, 16))
            if how == "assign":
                model.load_state_dict(state, assign=True)
            else:
                for name, parameter in model.named_parameters():
                    parameter.data = state[name]
            assert torch.equal(run(model, torch.ones(1, 16)), wanted)
            now = sum(path.stat().st_size for path in _files_below(tmp_path))
            assert now <= written


def _loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model


def test_model_that_is_dropped_leaves_no_file_and_no_thread(tmp_path: Path) -> None:
    threads = threading.active_count()
    model = attach_offload_hooks(chain(8, 8, 8), on_disk(tmp_path))
    run(model, torch.randn(1, 8))
    assert _files_below(tmp_path)
    del model
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    for thread in threading.enumerate():
        if thread.name.startswith("hookoffload-"):
            thread.join(timeout=5)
    assert threading.active_count() <= threads


class Oddities(nn.Module):
    """Tensors that a file could lose: strides, sharing, dtypes, sizes."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(12, 10)
        self.transposed = nn.Parameter(base.t())
        self.strided = nn.Parameter(torch.randn(8, 8)[::2, 1::3])
        self.expanded = nn.Parameter(torch.randn(1, 6).expand(4, 6))
        self.whole = nn.Parameter(torch.randn(30))
        self.part = nn.Parameter(self.whole.data[5:15])
        self.alias = self.whole
        self.scalar = nn.Parameter(torch.tensor(3.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.brain = nn.Parameter(torch.randn(7).bfloat16())
        self.imaginary = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.integer = nn.Parameter(torch.arange(9), requires_grad=False)
        self.truth = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
        self.special = nn.Parameter(special)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x + p.sum() if p.dim() else x * p for p in self.parameters()]


@pytest.mark.parametrize("limit_gb", [0, None])
def test_unusual_tensors_survive_the_disk(tmp_path: Path, limit_gb: Any) -> None:
    model = Oddities()
    x = torch.randn(2)
    wanted = run(model, x)
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    for _ in range(2):
        for one, other in zip(run(model, x), wanted, strict=True):
            assert_same(one, other)
    assert model.alias is model.whole
    with torch.no_grad():
        model.whole[7] = 100.0
    assert model.part[2] == 100.0, "they shared memory and still do"
    with torch.no_grad():
        model.whole[7] = before.tensors["whole"].value[7]
    detach(model)
    assert_untouched(model, before, same_memory=False)
    assert model.part.data_ptr() == model.whole.data_ptr() + 5 * 4


def test_storage_dtype_halves_the_file_and_rounds_the_weights(tmp_path: Path) -> None:
    model = chain(64, 64, 64)
    rounded = chain(64, 64, 64)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    x = torch.randn(2, 64)
    policy = on_disk(
        tmp_path, storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )
    attach_offload_hooks(model, policy)
    (file,) = _files_below(tmp_path)
    assert sum(t.nbytes for t in load_file(file).values()) == nbytes(rounded) // 2
    assert_same(run(model, x), expected(rounded, x))
    detach(model)
    for one, other in zip(model.parameters(), rounded.parameters(), strict=True):
        assert_same(one, other)


def test_statistics_that_a_forward_changes_are_kept(tmp_path: Path) -> None:
    model, plain = tiny_model().train(), tiny_model().train()
    attach_offload_hooks(model, on_disk(tmp_path))
    for seed in range(3):
        assert_same(run(model, tokens(seed)), run(plain, tokens(seed)))
    detach(model)
    assert plain.statistics.num_batches_tracked == 3
    for name, buffer in plain.named_buffers():
        assert_same(model.get_buffer(name), buffer)


class Counting(nn.Module):
    """Changes its own parameter in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.count = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.first(x) + self.count


@pytest.mark.parametrize("limit_gb", [0, None])
def test_parameters_that_a_forward_changes_are_kept(
    tmp_path: Path, limit_gb: Any
) -> None:
    model = Counting()
    plain = Counting()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 4)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    for _ in range(3):
        assert_same(run(model, x), run(plain, x))
    offload(model)
    assert_same(run(model, x), run(plain, x))
    detach(model)
    assert model.count.tolist() == [4.0] * 4


def test_edits_of_a_model_on_disk_are_used_and_kept(
    tmp_path: Path, tiny: TinyModel
) -> None:
    plain = tiny_model()
    attach_offload_hooks(tiny, on_disk(tmp_path))
    run(tiny, tokens())
    for model in (tiny, plain):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
    assert_same(run(tiny, tokens()), run(plain, tokens()))
    detach(tiny)
    assert_same(run(tiny, tokens()), run(plain, tokens()))
    for name, parameter in plain.named_parameters():
        assert_same(tiny.get_parameter(name), parameter)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_of_writing_is_shown_in_bytes(
    tmp_path: Path, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float, float]] = []
    update = tqdm.update

    def note(bar: Any, count: float = 1) -> Any:
        told.append((bar.desc, bar.total, count))
        return update(bar, count)

    monkeypatch.setattr(tqdm, "update", note)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with offloaded(tiny, on_disk(tmp_path)):
        pass
    written = [entry for entry in told if "writing" in entry[0]]
    assert {total for _, total, _ in written} == {nbytes(tiny)}
    assert sum(count for _, _, count in written) == nbytes(tiny)


@pytest.mark.gpu
@pytest.mark.parametrize("limit_gb", [0, None])
def test_weights_on_disk_reach_an_accelerator(tmp_path: Path, limit_gb: Any) -> None:
    model = tiny_model()
    plain = tiny_model().cuda()
    before = Snapshot(model, tmp_path)
    policy = on_disk(tmp_path, compute_device="cuda", limit_gb=limit_gb)
    attach_offload_hooks(model, policy)
    for seed in range(3):
        assert_same(run(model, tokens(seed)), run(plain, tokens(seed).cuda()))
    for parameter in model.parameters():  # (buffers are always on the device)
        assert parameter.device.type == "cpu" or limit_gb is None
    detach(model)
    assert_untouched(model, before, same_memory=False)
    assert same_bits(model.head.weight, model.embed.weight)

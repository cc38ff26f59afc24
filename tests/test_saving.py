"""`save_model`: what it writes, from which tier, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import nn

from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    onload,
    save_model,
    tensor_bytes,
)
from hookoffload.checkpoint import open_checkpoint
from tests.children import before_each_change, killed_at
from tests.safetensors_samples import DTYPES, descriptors_kept, random_tensor, read
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
from tests.workers import Worker, in_thread

LONG = settings.get_current_profile_name() == "long"
IN_RAM = OffloadPolicy(compute_device="cpu")
STREAMED = OffloadPolicy(compute_device="cpu", limit_gb=0, storage_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a temporary folder apart; wait for no disk (only a loss of power tells)."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def _saved_files(folder: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(folder)
    tensors = {name: read(location) for name, location in found.items()}
    for location in found.values():
        location.file.close()
    return tensors


def _assert_holds(folder: Path, state: dict[str, torch.Tensor], *tied: str) -> None:
    """Fail unless a folder has the tensors of a state dict, without those tied."""
    saved = _saved_files(folder)
    assert saved.keys() == state.keys() - set(tied)
    for name, tensor in saved.items():
        assert_same(tensor, state[name])


# --- from every tier ---


def _plain(model: nn.Module, folder: Path) -> nn.Module:
    return model


def _in_ram(model: nn.Module, folder: Path) -> nn.Module:
    return attach_offload_hooks(model, IN_RAM)


def _cast_at_rest(model: nn.Module, folder: Path) -> nn.Module:
    return attach_offload_hooks(model, STREAMED)


def _spilled(model: nn.Module, folder: Path) -> nn.Module:
    return attach_offload_hooks(model, on_disk(folder / "spill"))


def _spilled_cast(model: nn.Module, folder: Path) -> nn.Module:
    policy = on_disk(folder / "spill", storage_dtype=torch.float16)
    return attach_offload_hooks(model, policy)


def _partly_resident(model: nn.Module, folder: Path) -> nn.Module:
    limit = nbytes(model) * 0.8 / 2**30
    return attach_offload_hooks(model, on_disk(folder / "spill", limit_gb=limit))


def _loaded(model: nn.Module, folder: Path) -> nn.Module:
    save_model(model, folder / "checkpoint")
    return load_model(TinyModel, folder / "checkpoint", on_disk(folder / "spill"))


def _onloaded(model: nn.Module, folder: Path) -> nn.Module:
    policy = OffloadPolicy(
        offload=Placement(device="disk"),
        onload=Placement(device="cpu"),
        compute_device="cpu",
        disk_dir=folder / "spill",
    )
    model = attach_offload_hooks(model, policy)
    onload(model)
    return model


def _offloaded(model: nn.Module, folder: Path) -> nn.Module:
    model = _onloaded(model, folder)
    offload(model)
    return model


def _detached(model: nn.Module, folder: Path) -> nn.Module:
    return detach(_loaded(model, folder))


TIERS = [
    _plain,
    _in_ram,
    _cast_at_rest,
    _spilled,
    _spilled_cast,
    _partly_resident,
    _loaded,
    _onloaded,
    _offloaded,
    _detached,
]


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.__name__[1:])
def test_model_in_any_tier_is_saved_and_loaded_bit_for_bit(
    tmp_path: Path, tier: Callable[[nn.Module, Path], nn.Module], passes: int
) -> None:
    model = tier(tiny_model(), tmp_path)
    for _ in range(passes):
        run(model, tokens())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "saved", max_shard_size=20_000)
    _assert_holds(tmp_path / "saved", state, "head.weight")
    for name, tensor in model.state_dict().items():
        assert_same(tensor, state[name])
    again = load_model(TinyModel, tmp_path / "saved", IN_RAM)
    assert again.head.weight is again.embed.weight
    for name, tensor in again.state_dict().items():
        assert_same(tensor, state[name])
    if "cast" not in tier.__name__:
        assert_same(run(again, tokens()), run(model, tokens()))


def test_training_statistics_and_edits_are_saved(tmp_path: Path) -> None:
    """They are written to the copies on the compute device first."""
    model = attach_offload_hooks(tiny_model(), on_disk(tmp_path / "spill", limit_gb=1))
    plain = tiny_model()
    with torch.no_grad():
        for each in (model, plain):
            each.train()
            each(tokens())
            each.blocks[0].gain.add_(1)
            each.embed.weight.mul_(2)
    save_model(model, tmp_path / "saved")
    _assert_holds(tmp_path / "saved", plain.state_dict(), "head.weight")


def test_edits_of_a_loaded_model_are_saved_and_not_its_file(tmp_path: Path) -> None:
    model = _loaded(tiny_model(), tmp_path)
    with torch.no_grad():
        model.blocks[1].up.weight.zero_()
    run(model, tokens())
    save_model(model, tmp_path / "saved")
    saved = _saved_files(tmp_path / "saved")
    assert not saved["blocks.1.up.weight"].any()
    assert_same(saved["blocks.0.up.weight"], tiny_model().blocks[0].up.weight)


def test_part_of_an_attached_model_is_saved(tmp_path: Path) -> None:
    model = attach_offload_hooks(tiny_model(), on_disk(tmp_path / "spill"))
    save_model(model.blocks, tmp_path / "saved")
    _assert_holds(tmp_path / "saved", tiny_model().blocks.state_dict())


def test_model_with_attached_parts_is_saved(tmp_path: Path) -> None:
    parts = nn.ModuleDict({"one": chain(4, 8), "two": chain(8, 4), "rest": chain(4, 4)})
    state = copy.deepcopy(parts).state_dict()
    attach_offload_hooks(parts["one"], on_disk(tmp_path / "spill"))
    attach_offload_hooks(parts["two"], IN_RAM)
    save_model(parts, tmp_path / "saved")
    _assert_holds(tmp_path / "saved", state)


@pytest.mark.gpu
@pytest.mark.parametrize("limit_gb", [0, None])
def test_model_on_an_accelerator_is_saved(tmp_path: Path, limit_gb: Any) -> None:
    model = tiny_model()
    state = copy.deepcopy(model).state_dict()
    attach_offload_hooks(model, OffloadPolicy(limit_gb=limit_gb))
    run(model, tokens())
    save_model(model, tmp_path / "saved")
    _assert_holds(tmp_path / "saved", state, "head.weight")
    save_model(tiny_model().cuda(), tmp_path / "plain")
    _assert_holds(tmp_path / "plain", state, "head.weight")


# --- what is written ---


class Odd(nn.Module):
    """Tensors of every dtype, and with memory of every kind."""

    def __init__(self) -> None:
        super().__init__()
        for number, dtype in enumerate(DTYPES):
            value = random_tensor(dtype, (4, 6), number)
            self.register_buffer(str(dtype).replace(".", "_"), value)
        square = torch.randn(6, 6)
        self.transposed = nn.Parameter(torch.randn(300, 200).t())
        self.sliced = nn.Parameter(torch.randn(8, 8)[::2, 1:4])
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.also_empty = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.tensor(3.5))
        self.expanded = nn.Parameter(torch.randn(3).expand(5, 3))
        self.conjugated = nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]).conj())
        self.one, self.other = nn.Parameter(square), nn.Parameter(square[:3])
        self.tied = self.one
        self.turned = nn.Parameter(square.t())
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scalar


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("chunk", [64, 2**24])
def test_tensors_of_every_dtype_and_layout_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attached: bool, chunk: int
) -> None:
    monkeypatch.setattr(tensor_bytes, "_CHUNK", chunk)
    model = Odd()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if attached:
        del model.conjugated, state["conjugated"]
        attach_offload_hooks(model, on_disk(tmp_path / "spill"))
    save_model(model, tmp_path / "saved")
    _assert_holds(tmp_path / "saved", state, "tied")


def test_parameter_and_buffer_of_one_memory_are_both_saved(tmp_path: Path) -> None:
    """Making the model anew ties parameters with each other, not with buffers."""
    model = nn.Linear(4, 4)
    model.register_buffer("copy", model.weight.data)
    save_model(model, tmp_path)
    _assert_holds(tmp_path, model.state_dict())


class WithState(nn.Linear):
    """A layer whose state dict has something else than tensors."""

    def get_extra_state(self) -> Any:
        return {"scale": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def _with(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (WithState(2, 2), "'_extra_state' is a dict"),
        (_with(wide=torch.ones(2, dtype=torch.complex128)), "'wide'.*complex128"),
        (_with(sparse=torch.eye(3).to_sparse()), "'sparse' is a Tensor"),
        (_with(gone=torch.empty(3, device="meta")), "'gone'.*on meta"),
        (
            _with(q=torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)),
            "'q' is a Tensor",
        ),
        (nn.ModuleDict({"\ud800": nn.Linear(2, 2)}), "safetensors refuses"),
    ],
    ids=["extra state", "complex128", "sparse", "meta", "quantised", "surrogate"],
)
def test_tensor_that_a_file_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, model: nn.Module, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists() or not os.listdir(tmp_path / "saved")


def test_model_without_tensors_is_saved(tmp_path: Path) -> None:
    save_model(nn.ReLU(), tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}


# --- files ---


def test_model_that_fits_one_file_has_no_index(tmp_path: Path) -> None:
    save_model(chain(8, 8), str(tmp_path / "new" / "folder"))
    assert os.listdir(tmp_path / "new" / "folder") == ["model.safetensors"]
    assert (tmp_path / "new" / "folder" / "model.safetensors").stat().st_mode & 0o044


@pytest.mark.parametrize("size", [288, "288B", "0.288 KB", "0.28125KiB"])
def test_files_are_filled_in_order_up_to_the_largest_size(
    tmp_path: Path, size: int | str
) -> None:
    model = chain(8, 8, 8, 16, 8)  # 256 + 32 bytes twice, 512 + 64, 512 + 32
    save_model(model, tmp_path, max_shard_size=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": nbytes(model)}
    assert index["weight_map"] == {
        "0.weight": "model-00001-of-00006.safetensors",
        "0.bias": "model-00001-of-00006.safetensors",
        "1.weight": "model-00002-of-00006.safetensors",
        "1.bias": "model-00002-of-00006.safetensors",
        "2.weight": "model-00003-of-00006.safetensors",
        "2.bias": "model-00004-of-00006.safetensors",
        "3.weight": "model-00005-of-00006.safetensors",
        "3.bias": "model-00006-of-00006.safetensors",
    }
    assert set(os.listdir(tmp_path)) - {"tmp"} == {
        "model.safetensors.index.json",
        *index["weight_map"].values(),
    }
    _assert_holds(tmp_path, model.state_dict())


@pytest.mark.parametrize(
    "size", [0, -1, True, 2.5, None, "", "5", "GB", "5 XB", "-1GB"]
)
def test_what_is_no_size_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size=.*2GiB"):
        save_model(chain(2, 2), tmp_path / "saved", max_shard_size=size)
    with pytest.raises(ValueError, match="max_shard_size"):
        save_model(chain(2, 2), tmp_path / "saved", max_shard_size="9" * 400 + "B")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("model", [None, {"x": torch.ones(1)}])
def test_what_is_no_module_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        save_model(model, tmp_path / "saved")


def test_transformers_loads_what_was_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=32, n_positions=16
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(8)[None]
    wanted = expected(model, ids).logits
    attach_offload_hooks(model, on_disk(tmp_path / "spill"))
    for size in ("1KB", "1GB"):
        save_model(model, tmp_path / "saved", max_shard_size=size)
        config.save_pretrained(tmp_path / "saved")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
        assert_same(run(again, ids).logits, wanted)


# --- piece by piece ---


def test_model_on_disk_is_saved_without_bringing_it_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read is larger than a chunk, and no page of the file's map is touched."""
    chunk = 2**16
    save_model(chain(512, 512, 512), tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    policy = on_disk(tmp_path / "spill")
    model = load_model(lambda: chain(512, 512, 512), tmp_path / "checkpoint", policy)
    whole_read, sizes = os.preadv, []

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(part) for part in buffers))
        return whole_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    monkeypatch.setattr(tensor_bytes, "_CHUNK", chunk)
    save_model(model, tmp_path / "saved")
    assert max(sizes) == chunk
    assert sum(sizes) == nbytes(model)
    maps = Path("/proc/self/smaps")
    if maps.exists():
        entry = maps.read_text().split(str(file))[1]
        assert int(entry.split("Rss:")[1].split()[0]) == 0
    _assert_holds(tmp_path / "saved", chain(512, 512, 512).state_dict())


def test_progress_of_saving_is_counted_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Bar:
        def __init__(self, what: str, total: int) -> None:
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            self.done += count

    monkeypatch.setattr("hookoffload.saving.progress_bar", Bar)
    save_model(tiny_model(), tmp_path, max_shard_size=20_000)
    save_model(tiny_model(), tmp_path, progress=False)
    (bar,) = bars
    assert (
        bar.done == bar.total == sum(t.nbytes for t in _saved_files(tmp_path).values())
    )


# --- what lies in the folder ---

INDEX = "model.safetensors.index.json"


def _filled(value: float) -> nn.Sequential:
    model = chain(4, 4, 4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _save(value: float, folder: Path, files: int) -> None:
    size = {1: 2**20, 2: 160, 3: 80, 6: 1}[files]
    save_model(_filled(value), folder, max_shard_size=size, progress=False)


def _names(files: int) -> set[str]:
    if files == 1:
        return {"model.safetensors"}
    shards = {f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)}
    return {INDEX, *shards}


def _value_in(folder: Path) -> float:
    """Return the value that all tensors of a saved chain have."""
    tensors = _saved_files(folder)
    assert tensors.keys() == _filled(0).state_dict().keys()
    (value,) = torch.cat([tensor.flatten() for tensor in tensors.values()]).unique()
    return float(value)


CHANGES = [(1, 1), (1, 3), (3, 1), (3, 3), (3, 6), (6, 2)]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_older_checkpoint_is_replaced_and_the_users_files_stay(
    tmp_path: Path, before: int, after: int
) -> None:
    folder = tmp_path / "saved"
    users = {"config.json", "other.safetensors", "model-00001-of-00009.safetensors"}
    folder.mkdir()
    _save(1, folder, before)
    for name in users:
        (folder / name).write_text("the user's")
    with descriptors_kept():
        _save(2, folder, after)
    assert set(os.listdir(folder)) == _names(after) | users
    assert all((folder / name).read_text() == "the user's" for name in users)
    for name in users:
        (folder / name).unlink()
    assert _value_in(folder) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map":[]}',
        b'{"weight_map":{"x":[]}}',
        b'{"weight_map":{"x":3},"metadata":{"replaces":3}}',
        b'{"weight_map":{"x":"../saved/config.json","y":"config.json"},"metadata":{}}',
        b'{"weight_map":{},"metadata":{"replaces":["config.json"]}}',
    ],
)
def test_index_that_makes_no_sense_is_replaced_and_removes_nothing(
    tmp_path: Path, content: bytes
) -> None:
    for files in (1, 3):
        (tmp_path / INDEX).write_bytes(content)
        (tmp_path / "config.json").write_text("the user's")
        _save(files, tmp_path, files)
        assert (tmp_path / "config.json").exists()
        assert _value_in(tmp_path) == files


def _assert_one_whole_checkpoint(folder: Path, before: int) -> None:
    try:
        value = _value_in(folder)
    except CheckpointError:
        assert before == 0, "there was a checkpoint before"
    else:
        assert value in ((1, 2) if before else (2,))


@pytest.mark.parametrize(
    ("before", "after"),
    # Three files over three are in the two tests after the next.
    [(0, 3), (1, 1), (1, 3), (3, 1), (6, 2), *([(0, 1), (3, 3)] if LONG else [])],
)
def test_process_killed_at_any_step_of_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, before: int, after: int
) -> None:
    """And the next save leaves nothing of it behind."""
    original = tmp_path / "original"
    original.mkdir()
    if before:
        _save(1, original, before)
    for number in range(1000):
        folder = shutil.copytree(original, tmp_path / str(number))
        if not killed_at(number, lambda to=folder: _save(2, to, after)):
            break
        _assert_one_whole_checkpoint(folder, before)
        _save(3, folder, 3)
        assert set(os.listdir(folder)) == _names(3)
        assert _value_in(folder) == 3
    assert number > 5 + 3 * after
    assert set(os.listdir(folder)) == _names(after)
    assert _value_in(folder) == 2


def test_process_killed_twice_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The second save meets what a first one left, at each of its own steps."""
    original = tmp_path / "original"
    _save(1, original, 3)
    seen = set()
    for number in range(0, 1000, 3):
        folder = shutil.copytree(original, tmp_path / str(number))
        if not killed_at(number, lambda to=folder: _save(2, to, 3)):
            break
        left = frozenset(name for name in os.listdir(folder) if "saving" not in name)
        seen.add((left, (folder / INDEX).read_bytes()[:200]))
        assert killed_at(number // 2, lambda to=folder: _save(2, to, 6))
        _assert_one_whole_checkpoint(folder, 1)
        _save(3, folder, 1)
        assert os.listdir(folder) == ["model.safetensors"]
    assert len(seen) >= 3


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2)])
def test_interrupt_at_any_step_of_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, before: int, after: int
) -> None:
    original = tmp_path / "original"
    _save(1, original, before)

    def interrupt() -> None:
        raise KeyboardInterrupt

    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(1000):
        folder = shutil.copytree(original, tmp_path / str(number))
        with pytest.MonkeyPatch.context() as patch:
            before_each_change(patch, number, interrupt)
            try:
                _save(2, folder, after)
                break
            except KeyboardInterrupt:
                pass
        _assert_one_whole_checkpoint(folder, before)
        _save(3, folder, 3)
        assert set(os.listdir(folder)) == _names(3)
    assert _value_in(folder) == 2
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_disk_without_hard_links_never_mixes_two_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    _save(1, tmp_path / "original", 3)
    whole = 0
    for number in range(1000):
        folder = shutil.copytree(tmp_path / "original", tmp_path / str(number))
        if not killed_at(number, lambda to=folder: _save(2, to, 3)):
            break
        try:
            assert _value_in(folder) in (1, 2)
            whole += 1
        except CheckpointError as error:
            assert "index" in str(error)
        _save(3, folder, 3)
        assert set(os.listdir(folder)) == _names(3)
    assert whole > number * 0.6
    assert _value_in(folder) == 2


def test_two_saves_into_one_folder_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    write = os.pwrite

    def wait(fd: int, data: memoryview, offset: int) -> int:
        reached.set()
        assert go_on.wait(20)
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", wait)
    first = Worker(_save, 1, tmp_path / "saved", 3)
    assert reached.wait(20)
    with pytest.raises(CheckpointError, match="being saved into this folder already"):
        _save(2, tmp_path / "saved", 1)
    go_on.set()
    first.result()
    assert _value_in(tmp_path / "saved") == 1


def test_each_step_of_replacing_is_on_the_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a loss of power could keep a later step and lose an earlier one."""
    _save(1, tmp_path, 2)
    steps: list[str] = []

    def sync(fd: int) -> None:
        steps.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)

    def note(what: str) -> Callable[..., None]:
        original = getattr(os, what)

        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            named = Path(args[0] if what == "replace" else path)
            if named.parent == tmp_path:
                steps.append(f"{what} {named.name}")
            original(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", sync)
    for what in ("replace", "unlink"):
        monkeypatch.setattr(os, what, note(what))
    _save(2, tmp_path, 1)
    folder = f"sync {tmp_path.name}"
    assert steps == [
        "sync model.safetensors",
        f"sync {INDEX}",
        f"replace {INDEX}",
        folder,
        "unlink model-00001-of-00002.safetensors",
        "unlink model-00002-of-00002.safetensors",
        "replace model.safetensors",
        folder,
        f"unlink {INDEX}",
        folder,
    ]


# --- files and threads in use ---


def _on_disk(folder: Path, files: int) -> nn.Module:
    _save(1, folder, files)
    return load_model(
        lambda: chain(4, 4, 4, 4), folder, on_disk(folder.parent / "spill")
    )


@pytest.mark.parametrize("way", ["same", "link to it", "link to the file"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 3), (3, 1), (1, 3)])
def test_saving_over_the_files_that_a_model_reads_is_refused(
    tmp_path: Path, before: int, after: int, way: str
) -> None:
    folder = tmp_path / "saved"
    _save(1, folder, before)
    source = folder
    if way == "link to it":
        source = tmp_path / "link"
        source.symlink_to(folder)
    elif way == "link to the file":
        source = tmp_path / "links"
        source.mkdir()
        for path in folder.iterdir():
            (source / path.name).symlink_to(path)
    policy = on_disk(tmp_path / "spill")
    model = load_model(lambda: chain(4, 4, 4, 4), source, policy)
    size = 80 if after == 3 else "1GB"
    files = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"\.safetensors: the model reads .*deta"):
        save_model(model, folder, max_shard_size=size)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert_same(run(model, torch.ones(1, 4)), expected(_filled(1), torch.ones(1, 4)))
    detach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save_model(model, folder, max_shard_size=size)
    assert _value_in(folder) == 2
    assert all(bool((value == 2).all()) for value in model.state_dict().values())


def test_other_files_of_the_folder_may_be_read_by_the_model(tmp_path: Path) -> None:
    """Only the checkpoint that would be replaced is in the way."""
    _save(1, tmp_path, 1)
    (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    policy = on_disk(tmp_path / "spill")
    model = load_model(lambda: chain(4, 4, 4, 4), tmp_path / "mine.safetensors", policy)
    save_model(model, tmp_path)
    run(model, torch.ones(1, 4))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_links_of_a_hub_cache_are_replaced_and_not_what_they_link_to(
    tmp_path: Path,
) -> None:
    _save(1, tmp_path / "blobs", 1)
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to("../blobs/model.safetensors")
    _save(2, tmp_path / "snapshot", 1)
    assert _value_in(tmp_path / "snapshot") == 2
    assert _value_in(tmp_path / "blobs") == 1
    assert not link.is_symlink()


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("the user's")
    with pytest.raises(CheckpointError, match=r"saved.*save into another folder"):
        save_model(chain(2, 2), tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "the user's"


def test_saving_from_inside_the_models_own_forward_is_refused(tmp_path: Path) -> None:
    model = chain(4, 4)
    attach_offload_hooks(model, IN_RAM)
    model[0].register_forward_hook(lambda *_: save_model(model, tmp_path / "saved"))
    with pytest.raises(RuntimeError, match="save_model was called from inside"):
        run(model, torch.ones(1, 4))
    assert not (tmp_path / "saved").exists()


def test_forwards_of_other_threads_wait_until_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach_offload_hooks(tiny_model(), on_disk(tmp_path / "spill"))
    wanted = run(model, tokens())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write, workers = os.pwrite, []

    def forward_meanwhile(fd: int, data: memoryview, offset: int) -> int:
        if not workers:
            workers.append(Worker(run, model, tokens()))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", forward_meanwhile)
    save_model(model, tmp_path / "saved")
    assert_same(workers[0].result(), wanted)
    assert_same(in_thread(run, model, tokens()), wanted)
    _assert_holds(tmp_path / "saved", state, "head.weight")

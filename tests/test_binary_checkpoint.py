"""Files made by torch.save: converted once, and read from there; never run."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hookoffload import CheckpointError, OffloadPolicy, detach, load_model
from tests.safetensors_samples import DTYPES, descriptors_kept, random_tensor, same_bits
from tests.small_models import TinyModel, assert_same, chain, run, tiny_model, tokens

every_store = pytest.mark.parametrize("store", ["cpu", "disk"])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _load(checkpoint: Any, cache: Path, store: str = "disk", **options: Any) -> Any:
    policy = OffloadPolicy(store=store, limit_gb=0, compute_device="cpu")  # type: ignore[arg-type]
    make = options.pop("make", lambda: chain(4, 8, 4))
    return load_model(make, checkpoint, policy, cache_dir=cache, **options)


def _assert_chain(model: nn.Module) -> None:
    # Two rows: for one, some processors' kernels add up in another order where a matrix
    # does not begin on a multiple of 16 bytes, as in the maps that detach leaves.
    x = torch.ones(2, 4)
    assert_same(run(model, x), run(chain(4, 8, 4), x))
    detach(model)
    assert_same(run(model, x), run(chain(4, 8, 4), x))


def _written(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


@every_store
@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt", ".ckpt", ".PT"])
def test_binary_checkpoint_is_loaded_and_converted_once(
    tmp_path: Path, cache: Path, store: str, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(chain(4, 8, 4).state_dict(), path)
    _assert_chain(_load(path, cache, store))
    (file,) = _written(cache)
    about = file.stat()
    _assert_chain(_load(path, cache, store))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (
        about.st_ino,
        about.st_mtime_ns,
    )


def test_old_format_is_loaded(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.pth"
    state = chain(4, 8, 4).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    _assert_chain(_load(path, cache))


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "params"])
def test_usual_wrapping_is_taken_off(tmp_path: Path, cache: Path, key: str) -> None:
    path = tmp_path / "last.ckpt"
    state = OrderedDict(chain(4, 8, 4).state_dict())
    torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}}, path)
    _assert_chain(_load(path, cache))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.model


def test_tensor_that_is_called_like_a_wrapping_is_a_tensor(
    tmp_path: Path, cache: Path
) -> None:
    torch.save({"model": torch.full((3,), 2.0)}, tmp_path / "model.pt")
    model = _load(tmp_path / "model.pt", cache, make=Holder)
    assert_same(model.model.detach(), torch.full((3,), 2.0))
    detach(model)


@every_store
def test_tied_tensors_are_written_once(tmp_path: Path, cache: Path, store: str) -> None:
    path = tmp_path / "model.bin"
    torch.save(tiny_model().state_dict(), path)
    model = _load(path, cache, store, make=TinyModel)
    assert model.head.weight is model.embed.weight
    assert_same(run(model, tokens()), run(tiny_model(), tokens()))
    detach(model)
    (file,) = _written(cache)
    names = load_file(file).keys()
    assert len(names & {"head.weight", "embed.weight"}) == 1
    assert len(names) == len(tiny_model().state_dict()) - 1


def test_every_dtype_and_stride_comes_through(tmp_path: Path, cache: Path) -> None:
    state = {f"t{i}": random_tensor(d, (3, 4), i) for i, d in enumerate(DTYPES)}
    state |= {"turned": torch.randn(4, 3).T, "part": torch.randn(10)[2:5]}
    state |= {"empty": torch.empty(0, 3), "number": torch.tensor(3)}
    state["expanded"] = torch.randn(1, 3).expand(4, 3)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in state.items():
                self.register_buffer(name, torch.empty_like(tensor))
            self.one = nn.Parameter(torch.ones(1))

    path = tmp_path / "model.pt"
    torch.save(state | {"one": torch.ones(1)}, path)
    model = _load(path, cache, make=Bag)
    detach(model)
    for name, tensor in state.items():
        assert same_bits(model.get_buffer(name), tensor), name


def _shards(folder: Path) -> None:
    state = chain(4, 8, 4).state_dict()
    files = {"0": "pytorch_model-1.bin", "1": "pytorch_model-2.bin"}
    weight_map = {name: files[name[0]] for name in state}
    for file in files.values():
        part = {n: t.clone() for n, t in state.items() if weight_map[n] == file}
        torch.save(part, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_folder_with_an_index_of_binary_files_is_loaded(
    tmp_path: Path, cache: Path
) -> None:
    _shards(tmp_path)
    torch.save({"lr": 3}, tmp_path / "training_args.bin")
    for checkpoint in (tmp_path, tmp_path / "pytorch_model.bin.index.json"):
        _assert_chain(_load(checkpoint, cache))
    assert len(_written(cache)) == 2


def test_folder_with_one_usual_binary_file_is_loaded(
    tmp_path: Path, cache: Path
) -> None:
    torch.save(chain(4, 8, 4).state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    _assert_chain(_load(tmp_path, cache))


def test_safetensors_go_before_binaries(tmp_path: Path, cache: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(chain(4, 8, 4).state_dict(), tmp_path / "model.safetensors")
    _assert_chain(_load(tmp_path, cache))


def test_index_of_binaries_that_points_outside_is_refused(
    tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(chain(4, 8, 4).state_dict(), tmp_path / "pytorch_model.bin")
    weight_map = dict.fromkeys(chain(4, 8, 4).state_dict(), "../pytorch_model.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        _load(folder, cache)


def test_files_linked_from_a_cache_are_known_again(tmp_path: Path, cache: Path) -> None:
    blob = tmp_path / "blobs" / "0a1b"
    blob.parent.mkdir()
    torch.save(chain(4, 8, 4).state_dict(), blob)
    for snapshot in ("one", "two"):
        (tmp_path / snapshot).mkdir()
        link = tmp_path / snapshot / "pytorch_model.bin"
        link.symlink_to("../blobs/0a1b")
        _assert_chain(_load(link.parent, cache))
    assert len(_written(cache)) == 1


def test_binary_checkpoint_goes_through_a_converter(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "model.bin"
    torch.save({f"old.{k}": v for k, v in chain(4, 8, 4).state_dict().items()}, path)

    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name[4:]: tensor for name, tensor in state.items()}

    def halve(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name[4:]: tensor * 2 / 2 for name, tensor in state.items()}

    _assert_chain(_load(path, cache, state_dict_converter=rename))
    assert len(_written(cache)) == 1
    _assert_chain(_load(path, cache, state_dict_converter=halve))
    assert len(_written(cache)) == 2


# --- refused ---


class Runs:
    """Would make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.folder,))


@pytest.mark.parametrize("new", [True, False])
def test_file_that_would_run_code_is_refused_and_does_not(
    tmp_path: Path, cache: Path, new: bool
) -> None:
    path = tmp_path / "model.bin"
    state = {"x": torch.ones(1), "trap": Runs(tmp_path / "trapped")}
    torch.save(state, path, _use_new_zipfile_serialization=new)
    match = r"model\.bin: .*would run code.*mkdir.*weights_only=False"
    with descriptors_kept(), pytest.raises(CheckpointError, match=match):
        _load(path, cache)
    assert not (tmp_path / "trapped").exists()
    assert not _written(cache)


REFUSED = {
    "list": ([torch.ones(1)], r"holds a list, not a state dict"),
    "nothing": ({}, r"has nothing"),
    "no tensors": ({"epoch": 3}, r"has 'epoch'; of the names .* none"),
    "two": (
        {"model": {"x": torch.ones(1)}, "params": {"x": torch.ones(1)}},
        r"several state dicts \(model, params\)",
    ),
    "mixed": ({"x": torch.ones(1), "epoch": 3}, r"side by side: 'epoch' is a int"),
    "sparse": ({"x": torch.eye(3).to_sparse()}, r"'x' .*sparse"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_without_a_plain_state_dict_is_refused(
    tmp_path: Path, cache: Path, case: str
) -> None:
    content, match = REFUSED[case]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=match):
        _load(tmp_path / "model.pt", cache)
    assert not _written(cache)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_file_is_refused(tmp_path: Path, cache: Path) -> None:
    good = tmp_path / "good.bin"
    torch.save(chain(4, 8, 4).state_dict(), good)
    content = good.read_bytes()
    for number, data in enumerate(
        [b"", b"text", content[:-30], content[: len(content) // 2], pickle.dumps(3)]
    ):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(data)
        with descriptors_kept(), pytest.raises(CheckpointError, match=f"{number}.bin"):
            _load(path, cache)
    assert not _written(cache)


def test_what_is_no_file_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "pipe.bin")
    for name, match in {
        "folder.bin": "is a folder",
        "pipe.bin": "device or pipe",
        "fold.bin": "does not exist.*Similar names there: folder.bin",
    }.items():
        with pytest.raises(CheckpointError, match=match):
            _load([tmp_path / name], cache)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_program_of_torchscript_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Identity()).save(str(path))
    with pytest.raises(CheckpointError, match="TorchScript"):
        _load(path, cache)

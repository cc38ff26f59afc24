"""The command ``hookoffload convert``: any checkpoint -> a safetensors folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hookoffload import load_model
from hookoffload.cli import main
from tests.safetensors_samples import (
    descriptors_kept,
    same_bits,
    save,
    write_two_shards,
)
from tests.small_models import chain
from tests.test_cli import error_of

SAMPLES = "tests.convert_samples:"


def record_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main(["convert", *map(str, argv), "--json"]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {n: tensor for file in files for n, tensor in load_file(file).items()}


def assert_same(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = tensors_in(folder)
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in wanted.items())


def test_binary_checkpoint_becomes_a_folder_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chain(8, 16, 8)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    folder = tmp_path / "new" / "folder"
    record = record_of(capsys, tmp_path, folder)
    assert record == {
        "folder": str(folder),
        "files": ["model.safetensors"],
        "tensors": 4,
        "nbytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    again = load_model(lambda: chain(8, 16, 8), folder)
    for name, tensor in model.state_dict().items():
        assert same_bits(again.state_dict()[name], tensor)


def test_shards_become_one_file_and_one_file_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    write_two_shards(tmp_path / "old")
    files = tmp_path / "old" / "*.safetensors"
    one, several = tmp_path / "one", tmp_path / "several"
    record_of(capsys, files, one)
    wanted = {"x": torch.arange(4.0), "y": torch.zeros(3), "z": torch.arange(5)}
    assert_same(one, wanted)
    record = record_of(capsys, one, several, "--max-shard-size=40B")
    assert record["files"] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert_same(several, wanted)
    assert (several / "model.safetensors.index.json").exists()
    assert main(["convert", str(several), str(tmp_path / "last")]) == 0
    assert_same(tmp_path / "last", wanted)
    assert "Wrote 3 tensors" in capsys.readouterr().out


def test_converter_says_what_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.safetensors", x=torch.arange(4.0), y=torch.ones(2))
    option = f"--converter={SAMPLES}rename_and_halve"
    record_of(capsys, source, tmp_path / "new", option)
    halved = torch.arange(4.0) / 2
    x = torch.arange(4.0)
    assert_same(tmp_path / "new", {"a.x": x, "b.x": x, "half": halved})


def test_folder_can_be_converted_into_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model.safetensors", x=torch.arange(64.0), y=torch.ones(64))
    record_of(capsys, tmp_path, tmp_path, "--max-shard-size=256B")
    assert_same(tmp_path, {"x": torch.arange(64.0), "y": torch.ones(64)})
    assert len(list(tmp_path.iterdir())) == 3


def test_converting_leaves_no_file_open_and_nothing_in_the_users_cache(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pt")
    option = f"--converter={SAMPLES}rename_and_halve"
    record_of(capsys, tmp_path / "a.pt", tmp_path / "first", option)
    with descriptors_kept():
        record_of(capsys, tmp_path / "a.pt", tmp_path / "new", option)
    assert not (tmp_path / "cache").exists()


# -- mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--converter=rename", "should be package.module:name"),
        ("--converter=no_such_module:rename", "no_such_module"),
        (f"--converter={SAMPLES}failing", "KeyError: 'weight'"),
        (f"--converter={SAMPLES}returning_nothing", "must return a mapping"),
        ("--max-shard-size=many", "no size of a file"),
        ("--max-shard-size=0GB", "no size of a file"),
    ],
)
def test_option_that_makes_no_sense_is_told_and_writes_nothing(
    option: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.safetensors", x=torch.arange(4.0))
    new = tmp_path / "new"
    assert said in error_of(capsys, "convert", str(source), str(new), option)
    assert not new.exists()


def test_source_that_is_not_there_is_told_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, new = tmp_path / "gone", tmp_path / "new"
    assert "does not exist" in error_of(capsys, "convert", str(gone), str(new))
    assert not new.exists()


def test_source_that_is_damaged_leaves_the_old_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.safetensors", x=torch.arange(4.0))
    os.truncate(source, source.stat().st_size - 1)
    old = tmp_path / "old"
    old.mkdir()
    save(old / "model.safetensors", y=torch.ones(2))
    assert "fetch it again" in error_of(capsys, "convert", str(source), str(old))
    assert_same(old, {"y": torch.ones(2)})
    assert len(list(old.iterdir())) == 1


def test_folder_that_is_a_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.safetensors", x=torch.arange(4.0))
    assert "a.safetensors" in error_of(capsys, "convert", str(source), str(source))
    assert_same(tmp_path, {"x": torch.arange(4.0)})

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import torch

from hookoffload.checkpoint import open_checkpoint
from hookoffload.safetensors_header import CheckpointError
from tests.garbage import freeze_old_objects
from tests.safetensors_samples import (
    descriptors_kept,
    failing,
    read,
    save,
    write_two_shards,
)


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection():
    freeze_old_objects()


@pytest.fixture
def no_leak():
    with descriptors_kept():
        yield


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def two_shards(tmp_path):
    write_two_shards(tmp_path)
    return tmp_path


# Files that are not what they should be


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt", ".pt", ".PT"])
def test_pickled_checkpoint_is_refused_with_its_conversion(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(
        CheckpointError, match=rf"convert {re.escape(str(path))} FOLDER"
    ):
        open_checkpoint(path)


def test_missing_file_is_reported_with_similar_names(two_shards):
    save(two_shards / "model.safetensors", x=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"Similar names there: model\.safe"):
        open_checkpoint(two_shards / "modle.safetensors")


def test_missing_folder_is_reported_with_the_way_to_the_hub(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nor does its folder.*snapshot_download"
    ):
        open_checkpoint(tmp_path / "organisation" / "model")


def test_link_to_a_file_that_is_gone_is_told_from_a_missing_file(tmp_path):
    (tmp_path / "m.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(CheckpointError, match=r"link to \.\./blobs/abc.*incomplete"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_file_that_may_not_be_read_is_refused(two_shards, monkeypatch, no_leak):
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*Permission denied"):
        open_checkpoint(two_shards / "a.safetensors")


def test_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", failing(errno.EACCES))
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(tmp_path)


def test_folder_or_pipe_in_place_of_a_file_is_refused(tmp_path, no_leak):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        open_checkpoint([tmp_path])
    with pytest.raises(CheckpointError, match="is a device or pipe"):
        open_checkpoint(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("checkpoint_", ["a\0b.safetensors", [], None, [3], "x" * 999])
def test_what_is_no_path_is_refused(checkpoint_):
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint_)


# Folders, lists and indexes


def test_later_file_of_a_list_wins(two_shards):
    found = open_checkpoint([two_shards / f"{name}.safetensors" for name in "ab"])
    sources = {name: at.file.path.stem for name, at in found.items()}
    assert sources == {"x": "a", "y": "b", "z": "b"}
    assert read(found["y"]).equal(torch.zeros(3))


def test_file_of_a_list_that_gives_nothing_is_closed(two_shards, no_leak):
    found = open_checkpoint([str(two_shards / "a.safetensors")] * 3)
    assert len({location.file for location in found.values()}) == 1
    found["x"].file.close()


def test_bad_file_of_a_list_closes_those_before_it(two_shards, no_leak):
    (two_shards / "c.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"c\.safetensors"):
        open_checkpoint([two_shards / f"{name}.safetensors" for name in "abc"])


def test_only_file_of_a_folder_is_opened(tmp_path):
    save(tmp_path / "some.safetensors", x=torch.ones(2))
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).keys() == {"x"}
    assert open_checkpoint(str(tmp_path)).keys() == {"x"}


@pytest.mark.parametrize("prefix", ["model", "diffusion_pytorch_model", "own"])
def test_index_says_which_shard_has_which_tensor(two_shards, prefix):
    name = f"{prefix}.safetensors.index.json"
    write_index(two_shards, dict(x="a.safetensors", y="b.safetensors"), name)
    for path in (two_shards, two_shards / name):
        found = open_checkpoint(path)
        assert found.keys() == {"x", "y"}
        assert read(found["y"]).equal(torch.zeros(3))


def test_usual_index_is_preferred_to_others(two_shards):
    write_index(two_shards, {"x": "a.safetensors"}, "other.safetensors.index.json")
    write_index(two_shards, {"z": "b.safetensors"})
    assert open_checkpoint(two_shards).keys() == {"z"}


def test_files_linked_from_elsewhere_are_opened(two_shards, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("cache") / "snapshots" / "main"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_index(two_shards, dict(x="a.safetensors", z="b.safetensors"))
    for number, path in enumerate(sorted(two_shards.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    link = snapshot.parent / "link"
    link.symlink_to(snapshot)
    assert read(open_checkpoint(link)["x"]).equal(torch.arange(4.0))
    assert read(open_checkpoint(blobs / f"{0:064x}")["x"]).equal(torch.arange(4.0))


def test_folder_with_several_files_and_no_index_is_refused(two_shards, no_leak):
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors, b\.safe.*list of files"
    ):
        open_checkpoint(two_shards)


def test_folder_with_several_unusual_indexes_is_refused(two_shards):
    for name in "pq":
        write_index(two_shards, {}, f"{name}.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"several indexes: p\..*, q\."):
        open_checkpoint(two_shards)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "has nothing"),
        (["config.json"], r"has config\.json\. Pass the folder"),
        (["a.bin", "b.pt"], r"has a\.bin, b\.pt\. Pass the one"),
        ([f"{i:02}.txt" for i in range(20)], r"11\.txt and 8 more"),
    ],
)
def test_folder_without_safetensors_is_refused_with_what_it_has(
    tmp_path, names, reason
):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"no safetensors file.*{reason}"):
        open_checkpoint(tmp_path)


OUTSIDE = ["../a.safetensors", "/a.safetensors", "s/../../a", "..\\a", "C:\\a", "C:/a"]
BAD_INDEXES = {
    "not JSON": (b"{", "is not JSON"),
    "not text": (b"\xff\xfe\xff", "is not JSON"),
    "deep": (b"[" * 200_000, "is not JSON"),
    "list": (b"[]", "has no 'weight_map'"),
    "no map": (b'{"metadata":{}}', "has no 'weight_map'"),
    "map is a list": (b'{"weight_map":[]}', "has no 'weight_map'"),
    "number": (b'{"weight_map":{"x":3}}', "'x' is mapped to 3"),
    "empty name": (b'{"weight_map":{"x":""}}', "'x' is mapped to ''"),
    "folder": (b'{"weight_map":{"x":"."}}', "is a folder"),
    "pickle": (
        b'{"weight_map":{"x":"p.bin"}}',
        r"p\.bin: only .*hookoffload convert /(?!\S*p\.bin)\S+ FOLDER",
    ),
    "no such shard": (
        b'{"weight_map":{"y":"b.safetensors","x":"a.safetensor"}}',
        r"shard a\.safetensor \(tensor 'x'\).*Similar names there: a\.safetensors",
    ),
    "in another shard": (
        b'{"weight_map":{"y":"a.safetensors","z":"a.safetensors","x":"b.safetensors"}}',
        r"'z' is in a\.safetensors, .* it is in b\.safetensors",
    ),
    "in no shard": (
        b'{"weight_map":{"w":"a.safetensors"}}',
        r"'w' is in a\.safetensors, .* it is in no other",
    ),
} | {
    f"outside by {name}": (
        json.dumps({"weight_map": {"x": name}}).encode(),
        "'x' is mapped to .* outside the folder",
    )
    for name in OUTSIDE
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused_with_its_reason(two_shards, no_leak, case):
    content, reason = BAD_INDEXES[case]
    (two_shards / "p.bin").touch()
    (two_shards / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(two_shards)


def test_missing_index_is_reported_with_similar_names(two_shards):
    write_index(two_shards, {})
    with pytest.raises(CheckpointError, match=r"Similar names there: model\.safe"):
        open_checkpoint(two_shards / "models.safetensors.index.json")

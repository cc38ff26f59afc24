"""A later load reads kept codes instead of weights, and believes no damaged ones."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hookoffload as ho
from hookoffload import master as masters
from hookoffload.safetensors_file import CheckpointFile

from .test_lossless_offload import LAYER_BYTES, Model, assert_same_bits, policy, run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    path = tmp_path / "model.safetensors"
    save_file(Model().state_dict(), path)
    return path


def load(checkpoint: Path, **arguments: Any) -> Model:
    arguments = {"policy": policy("cpu"), "cache_codes": True, **arguments}
    return ho.load_model(
        Model, checkpoint, cache_dir=checkpoint.parent / "cache", **arguments
    )


def kept_file(checkpoint: Path) -> Path:
    (found,) = (checkpoint.parent / "cache").glob("*/*.safetensors")
    return found


def test_a_second_load_reads_codes_and_no_weights(
    checkpoint: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(checkpoint)
    expected = run(first, ids)
    stats = ho.offload_stats(first)
    monkeypatch.setattr(masters, "encode_from", None)
    read: dict[str, int] = {}
    read_into = CheckpointFile.read_into

    def counted(self: CheckpointFile, location: Any, to: Any, start: int = 0) -> None:
        read[self.path.parent.parent.name] = (
            read.get(self.path.parent.parent.name, 0) + to.nbytes
        )
        read_into(self, location, to, start)

    monkeypatch.setattr(CheckpointFile, "read_into", counted)
    second = load(checkpoint)
    assert read["cache"] < 0.76 * 6 * LAYER_BYTES
    assert ho.offload_stats(second).coded_bytes == stats.coded_bytes
    assert_same_bits(run(second, ids), expected)
    table = 2 * 2000 * 512
    assert sum(read.values()) < 0.76 * 6 * LAYER_BYTES + table + 64 * 2**10


def test_kept_codes_are_a_valid_file_with_metadata(checkpoint: Path) -> None:
    load(checkpoint)
    with safe_open(str(kept_file(checkpoint)), framework="pt") as file:
        metadata = file.metadata()
        assert metadata["hookoffload.codes"] == "2"
        names = set(file.keys())
        assert names == {f"blocks.{i}.weight" for i in range(6)}
        for name in names:
            dtype, count, base, patches, *_ = metadata[
                f"hookoffload.codes.{name}"
            ].split()
            assert (dtype, int(count)) == ("BF16", 512 * 512)
            assert 0 <= int(base) <= 240 and 0 <= int(patches) < 2000
            assert file.get_tensor(name).dtype == torch.uint8


def test_other_weights_are_encoded_anew(checkpoint: Path, ids: torch.Tensor) -> None:
    ho.detach(load(checkpoint))
    save_file({k: v + 1 for k, v in load_file(checkpoint).items()}, checkpoint)
    os.utime(checkpoint, (1, 1))
    plain = Model().eval()
    plain.load_state_dict(load_file(checkpoint))
    assert_same_bits(run(load(checkpoint), ids), run(plain, ids))


def test_bytes_that_changed_are_an_error_that_names_the_file(checkpoint: Path) -> None:
    ho.detach(load(checkpoint))
    path = kept_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ho.CheckpointError, match=r"checksum") as caught:
        load(checkpoint)
    assert str(path) in str(caught.value) and "Delete the folder" in str(caught.value)


def rewrite_header(path: Path, edit: Any) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


NAME = "hookoffload.codes.blocks.3.weight"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "metadata cannot be read"),
        ("BF16 262144 1", "metadata cannot be read"),
        ("BF16 262144 1 0 5", "metadata cannot be read"),
        ("BF16 262144 1 x 5 5", "metadata cannot be read"),
        ("BF16 262144 241 0 5 5", "metadata says"),
        ("BF16 262144 1 -1 5 5", "metadata says"),
        ("BF16 262145 1 0 5 5", "not that of the checkpoint's tensor"),
        ("F32 131072 1 0 5 5", "not that of the checkpoint's tensor"),
        ("BF16 262144 110 5000 5 5", "has not the"),
    ],
)
def test_metadata_that_cannot_be_is_an_error(
    checkpoint: Path, text: str | None, says: str
) -> None:
    ho.detach(load(checkpoint))

    def edit(metadata: dict[str, str]) -> None:
        if text is None:
            del metadata[NAME]
        else:
            metadata[NAME] = text

    rewrite_header(kept_file(checkpoint), edit)
    with pytest.raises(ho.CheckpointError, match=says):
        load(checkpoint)


def test_another_base_is_an_error(checkpoint: Path) -> None:
    ho.detach(load(checkpoint))

    def edit(metadata: dict[str, str]) -> None:
        dtype, count, base, *rest = metadata[NAME].split()
        metadata[NAME] = " ".join((dtype, count, str(int(base) - 1), *rest))

    rewrite_header(kept_file(checkpoint), edit)
    with pytest.raises(ho.CheckpointError, match="checksum"):
        load(checkpoint)


def test_a_file_that_was_cut_short_is_made_anew(
    checkpoint: Path, ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(load(checkpoint), ids)
    path = kept_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])
    assert_same_bits(run(load(checkpoint), ids), expected)
    assert "is damaged and made anew" in caplog.text
    assert kept_file(checkpoint).stat().st_size > 0


def test_an_edit_of_weights_is_encoded_and_not_read(
    checkpoint: Path, ids: torch.Tensor
) -> None:
    load(checkpoint)
    model = load(checkpoint)
    before = run(model, ids)
    with torch.no_grad():
        model.blocks[2].weight.mul_(2)
    after = run(model, ids)
    assert not torch.equal(before, after)
    ho.offload(model)
    assert_same_bits(run(model, ids), after)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"codec": None}, "codec=None makes none"),
        ({"codec": "auto"}, "codec='auto' makes none"),
        ({"codec": "auto", "host_limit_gb": 0.001}, "codec='auto' makes none"),
    ],
    ids=str,
)
def test_a_policy_that_keeps_no_codes_is_refused(
    checkpoint: Path, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match="cache_codes=True keeps") as caught:
        load(checkpoint, policy=policy("cpu", **fields))
    assert named in str(caught.value)


def test_a_policy_that_has_weights_wait_decoded_is_refused(checkpoint: Path) -> None:
    asked = ho.OffloadPolicy(
        compute_device="cpu", codec="lossless", onload=ho.Placement(device="cpu")
    )
    resolved = replace(asked.resolve(), onload=ho.Placement(device="cuda"))
    with (
        patch.object(ho.OffloadPolicy, "resolve", lambda self: resolved),
        pytest.raises(ValueError, match=r"cache_codes=True.*onload\.device='cuda'"),
    ):
        load(checkpoint, policy=asked)

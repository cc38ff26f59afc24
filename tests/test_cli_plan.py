"""The command ``hookoffload plan``: what its user sees, and what mistakes say."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hookoffload import OffloadPolicy, Rates, offload_plan
from hookoffload.cli import main
from hookoffload.measured_rates import default_cache_dir, keep_rates
from tests.sparse_checkpoints import write_sparse, write_sparse_shards
from tests.test_cli import error_of

GIB = 2**30


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a checkpoint of 20 GiB: 40 blocks of a quarter GiB and another."""
    shape = ("BF16", (8192, 16384))
    parts = ("attn.to_q", "mlp.up")
    names = [f"blocks.{i}.{part}.weight" for i in range(40) for part in parts]
    return write_sparse_shards(tmp_path, dict.fromkeys(names, shape), 4)


def output_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["plan", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def record_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(output_of(capsys, *argv, "--json"))
    return record


def test_plan_is_that_of_the_library(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = output_of(capsys, folder, "--limit-gb=8", "--device=cuda")
    plan = offload_plan(folder, OffloadPolicy(limit_gb=8, compute_device="cuda"))
    assert str(plan) in out
    assert f"{folder}: 20.000 GiB in RAM, to compute on cuda" in " ".join(out.split())


def test_record_is_one_json_object(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(capsys, folder, "--limit-gb=8", "--device=cuda")
    assert record["device"] == "cuda"
    assert record["limit_bytes"] == 8 * GIB
    assert record["predicted"] is None
    assert "curve" not in record
    assert [group["name"] for group in record["groups"]] == [
        "blocks.0-39.attn.to_q",
        "blocks.0-39.mlp.up",
    ]


def test_seconds_come_from_the_rates_that_are_given(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit-gb=0", "--store=disk", "--device=cuda"]
    rates = ["--link-gb-s=10", "--disk-gb-s=2.5", "--compute-s=1.5"]
    record = record_of(capsys, folder, *options, *rates)
    assert record["predicted"] == {
        "compute_seconds": 1.5,
        "link_seconds": 2.0,
        "disk_seconds": 8.0,
        "decode_seconds": 0.0,
        "seconds": 8.0,
        "complete": True,
    }
    out = output_of(capsys, folder, *options)
    assert "predicted" not in out
    assert "run hookoffload doctor" in " ".join(out.split())


def measured(folder: Path, device: str = "cuda:0") -> Path:
    """Keeps rates as the doctor does; returns their file."""
    rates = Rates(link_bytes_per_second=20 * GIB, disk_bytes_per_second=4 * GIB)
    keep_rates(device=device, rates=rates, disk_folder=str(folder))
    return default_cache_dir() / "rates.json"


def test_seconds_come_from_what_the_doctor_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(folder)
    options = ["--limit-gb=0", "--device=cuda"]
    assert record_of(capsys, folder, *options)["predicted"]["seconds"] == 1.0
    on_disk = record_of(capsys, folder, *options, "--store=disk")
    assert on_disk["predicted"]["seconds"] == 5.0
    assert on_disk["rates_measured"]
    out = " ".join(output_of(capsys, folder, *options, "--store=disk").split())
    assert "link 20.00 GiB/s, disk 4.00 GiB/s: measured by hookoffload doctor" in out
    assert "predicted >= 5.000 s a pass: compute not known" in out


def test_rates_that_are_given_go_before_measured_ones(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(folder)
    options = ["--limit-gb=0", "--store=disk", "--disk-gb-s=2", "--compute-s=0.5"]
    assert record_of(capsys, folder, *options)["predicted"] == {
        "compute_seconds": 0.5,
        "link_seconds": 1.0,
        "disk_seconds": 10.0,
        "decode_seconds": 0.0,
        "seconds": 10.0,
        "complete": True,
    }
    out = " ".join(output_of(capsys, folder, *options).split())
    assert "link 20.00 GiB/s: measured" in out


def test_rates_of_another_device_disk_or_machine_are_not_used(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--limit-gb=0", "--store=disk"]
    measured(folder, device="xpu:0")
    predicted = record_of(capsys, folder, *options)["predicted"]
    assert (predicted["link_seconds"], predicted["disk_seconds"]) == (None, 5.0)
    measured(Path("/proc"))
    predicted = record_of(capsys, folder, *options)["predicted"]
    assert (predicted["link_seconds"], predicted["disk_seconds"]) == (1.0, None)
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert record_of(capsys, folder, *options)["predicted"] is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"format": 2}', '{"format": 1, "machine": 3}']
)
def test_measured_rates_that_cannot_be_read_are_as_none(
    content: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(folder).write_text(content)
    assert record_of(capsys, folder)["rates"] is None


def test_curve_shows_what_other_limits_would_give(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device=cuda", "--link-gb-s=10", "--compute-s=0.5", "--curve"]
    curve = record_of(capsys, folder, *options)["curve"]
    assert curve[0]["seconds"] == 2.0
    assert curve[-1] == {
        "limit_bytes": 20 * GIB,
        "seconds": 0.5,
        "resident_bytes": 20 * GIB,
    }
    out = output_of(capsys, folder, *options)
    assert out.count("#") > 40
    assert ">= s a pass" not in out
    assert ">= s a pass" in output_of(capsys, folder, "--link-gb-s=10", "--curve")


def test_room_for_activations_is_taken_from_the_residents(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, with_room = (
        record_of(capsys, folder, "--limit-gb=8", f"--activations-gb={gib}")
        for gib in (0, 3)
    )
    less = without["resident_bytes"] - with_room["resident_bytes"]
    assert 2.5 * GIB < less < 3.5 * GIB


def test_plan_is_for_cuda_unless_told_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record_of(capsys, folder)["device"] == "cuda"
    out = output_of(capsys, folder, "--device=xpu:3")
    assert "to compute on xpu:3" in " ".join(out.split())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_rest_where_the_policy_keeps_them_by_default(
    device: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = output_of(capsys, folder, "--limit-gb=8", f"--device={device}")
    policy = OffloadPolicy(limit_gb=8, compute_device=device)
    plan = str(offload_plan(folder, policy))
    assert plan.replace('store="disk"', "--store disk") in out


def test_cpu_that_reads_weights_where_they_lie_is_told_of_the_disk(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit-gb=8", "--device=cpu"]
    assert "--store disk" in " ".join(output_of(capsys, folder, *options).split())
    record = record_of(capsys, folder, *options, "--store=disk")
    assert record["disk_bytes"] == record["pass_bytes"] > 0
    assert record["link_bytes"] == 0


def test_rate_of_the_disk_alone_names_no_second_of_what_crosses_the_link(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = Rates(disk_bytes_per_second=4 * GIB)
    keep_rates(device="cpu", rates=rates, disk_folder=str(folder))
    out = output_of(capsys, folder, "--limit-gb=8", "--device=cuda", "--curve")
    assert "predicted" not in out
    assert "s a pass" not in out
    assert "For seconds, give --link-gb-s N" in " ".join(out.split())


def test_several_files_are_one_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(folder.glob("*.safetensors"))
    assert record_of(capsys, *files)["layers"] == 80
    assert record_of(capsys, *files[:2])["layers"] == 40


def test_garbage_is_collected_again_behind_a_plan(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_of(capsys, folder)
    assert gc.isenabled()
    error_of(capsys, "plan", str(folder / "gone"))
    assert gc.isenabled()


@pytest.mark.parametrize("columns", [40, 80])
def test_output_fits_the_terminal(
    columns: int,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(folder)
    options = ["--limit-gb=8", "--link-gb-s=3", "--store=disk", "--curve"]
    lines = output_of(capsys, ".", *options).splitlines()
    assert max(map(len, lines)) <= columns
    assert any("attn.to_q" in line for line in lines)


def test_pipe_that_closes_early_ends_it_quietly(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hookoffload", "plan", str(folder), "--curve"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (2, b"")


def test_path_that_does_not_exist_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in error_of(capsys, "plan", str(tmp_path / "gone"))


def test_folder_without_weights_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "readme.txt").touch()
    assert "readme.txt" in error_of(capsys, "plan", str(tmp_path))


def test_file_that_is_damaged_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sparse(tmp_path / "a.safetensors", {"w": ("F32", (1000,))})
    os.truncate(path, path.stat().st_size - 1)
    assert "fetch it again" in error_of(capsys, "plan", str(path))


def test_limit_that_cannot_work_is_told_with_the_smallest_that_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "plan", str(folder), "--limit-gb=0.1", "--device=cuda")
    smallest = error.split("Set limit_gb=")[1].split()[0]
    assert float(smallest) == 0.25
    record = record_of(capsys, folder, f"--limit-gb={smallest}", "--device=cuda")
    assert record["together_bytes"] == GIB // 4


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--limit-gb=-1", "'-1' should be a number, 0 or more"),
        ("--limit-gb=nan", "'nan' should be a number, 0 or more"),
        ("--limit-gb=much", "argument --limit-gb: 'much'"),
        ("--device=toaster", "toaster"),
        ("--device=meta", "meta"),
        ("--device=cuda:", "cuda:"),
        ("--device=cuda:one", "cuda:one"),
        ("--link-gb-s=0", "--link-gb-s"),
        ("--disk-gb-s=inf", "--disk-gb-s"),
        ("--compute-s=nan", "--compute-s"),
        ("--activations-gb=-1", "--activations-gb"),
        ("--store=cloud", "cloud"),
    ],
)
def test_option_that_makes_no_sense_is_told(
    option: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(capsys, "plan", str(folder), option)

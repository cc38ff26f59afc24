"""The benchmarks run without a GPU too, on a model that is small enough."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "examples" / "benchmarks"

TINY_DIT = ["--device=cpu", "--layers=4", "--heads=1", "--resolution=64"]


def test_dit_under_a_limit_gives_the_plain_model_s_output(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the model comes from diffusers")
    figures = tmp_path / "figures.json"
    ended = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "dit.py", *TINY_DIT, "--limits=0.5x"),
            *("--methods", "resident", "hookoffload"),
            *("--repeats=1", f"--json={figures}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        # A second thread has nothing to do here, and waits for it in a busy loop.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr

    plain, limited = json.loads(figures.read_text())["rows"]
    assert limited["one_checksum"]
    assert limited["checksum"] == plain["checksum"]
    assert 0 < limited["pass_bytes"] < limited["all_bytes"] == plain["weight_bytes"]

    table = [line for line in ended.stdout.splitlines() if line.endswith(" yes")]
    assert [line.split()[0] for line in table] == ["resident", "hookoffload"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rss", 1),
        ("steady", 1),
        ("tiers", 5),
        ("coded", 2),
        ("loading", 2),
        ("first", 1),
        ("others", 4),
    ],
)
def test_rows_of_the_disk_benchmark_measure_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    if name == "others":
        pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from disk_bench import Bench
    from disk_rows import ROWS

    options = argparse.Namespace(
        folder=tmp_path,
        size_gb=0.004,
        limit_gb=0.003,
        tokens=4,
        passes=1,
        device="cpu",
        dtype="float32",
        first_store="cpu",
    )
    bench = Bench(options)
    bench.checkpoint.write(alike=True)
    rows = ROWS[name](bench)
    assert len(rows) == count
    for row in rows:
        assert row.ratio > 0 and isinstance(row.kept, bool)
        assert len(f"{row.what:<41} {row.ours:>12}  {row.against:<36}") < 110
    json.dumps([row.notes for row in rows])

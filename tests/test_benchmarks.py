"""The benchmarks run without a GPU too, on a model that is small enough."""

from __future__ import annotations

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

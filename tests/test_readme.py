"""What the README shows is what works."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hookoffload
from hookoffload import cli, detach
from hookoffload.state_hooks import session_of

README = Path(__file__).parents[1] / "README.md"
WIDTH = 16


class MyModel(nn.Module):
    """What the README takes for granted."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class MyPipeline:
    """What a diffusers pipeline is to hookoffload."""

    def __init__(self) -> None:
        self.components = {
            "tokenizer": None,
            "text_encoder": MyModel(),
            "vae": MyModel(),
        }

    def __call__(self, prompt: str) -> SimpleNamespace:
        return SimpleNamespace(images=[self.components["vae"](torch.ones(1, WIDTH))])


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a working directory with the README's files."""
    save_file(MyModel().state_dict(), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_one_behind_the_other(folder: Path) -> None:
    names: dict[str, Any] = {
        "MyModel": MyModel,
        "x": torch.randn(2, WIDTH),
        "config": {"depth": 2},
        "pipe": MyPipeline(),
        "prompt": "a cat",
        "lora_state_dict": {
            "layers.0.lora_A.weight": torch.randn(4, WIDTH),
            "layers.0.lora_B.weight": torch.randn(WIDTH, 4),
        },
    }
    blocks = _blocks("python")
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (folder / "saved" / "model.safetensors").exists()
    assert session_of(names["model"]) is not None
    detach(names["model"])
    detach(names["pipe"])


def test_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = "".join(_blocks("sh")).splitlines()
    assert len(commands) >= 2
    for command in commands:
        program, *arguments = command.split()
        assert program == "hookoffload"
        assert cli.main(arguments) == 0, command
        assert capsys.readouterr().out


def test_set_up_commands_are_two() -> None:
    assert len("".join(_blocks("bash")).splitlines()) == 2


def test_public_names_that_are_mentioned_exist() -> None:
    mentioned = set(re.findall(r"`([a-z_]+)\(", README.read_text()))
    assert len(mentioned) >= 5
    others = {"clone", "max", "print", "state_dict"}  # of Python and torch
    assert mentioned <= {*hookoffload.__all__, *others}


def test_files_that_are_linked_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert len(links) >= 8
    for link in links:
        assert (README.parent / link).exists(), link


def test_every_example_is_named() -> None:
    text = README.read_text()
    for path in (README.parent / "examples").glob("*.py"):
        assert f"examples/{path.name}" in text


def _written(node: ast.expr) -> str | None:
    """Returns a string of the source with … for what is filled in later."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]|%[.\d]+[fg]|%g", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_written(part) or "…" for part in node.values)
    return None


def test_messages_that_are_explained_are_those_of_the_library() -> None:
    rows = re.findall(r"^\| `([^|]+)`(?: \(warning\))? \|", README.read_text(), re.M)
    messages = [row for row in rows if " " in row]
    assert len(messages) >= 20
    texts = {
        text
        for path in Path(hookoffload.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.expr) and (text := _written(node))
    }
    for message in messages:
        assert any(message in text for text in texts), message


def test_reference_is_what_the_docstrings_say() -> None:
    examples = README.parent / "examples"
    made = subprocess.run(
        [sys.executable, "-c", "import api_reference as a; print(a.reference())"],
        cwd=examples,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(README.parent), "."])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    written = (examples / "api.md").read_text(encoding="utf-8")
    assert made == f"{written}\n", "run python examples/api_reference.py"

"""What starts without torch: the package itself, and planning for checkpoints."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import hookoffload
from hookoffload.cli import main
from hookoffload.safetensors_header import ITEMSIZES
from hookoffload.torch_dtypes import DTYPES
from tests.sparse_checkpoints import write_sparse, write_sparse_shards
from tests.test_fuzz_reader import damaged_files

ROOT = Path(__file__).parents[1]
# As where torch is not installed: importing it raises.
NO_TORCH = "import sys; sys.modules['torch'] = None\n"
COMMAND = f"{NO_TORCH}from hookoffload.cli import main\nsys.exit(main(sys.argv[1:]))"


def run(code: str, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


# -- the package --------------------------------------------------------------------


def test_importing_the_package_imports_no_torch() -> None:
    names = "from hookoffload import BudgetExceededError, CheckpointError, Plan, Rates"
    ended = run(f"{NO_TORCH}import hookoffload\n{names}\nprint(dir(hookoffload))")
    assert ended.returncode == 0, ended.stderr
    assert set(hookoffload.__all__) <= set(ast.literal_eval(ended.stdout))


def test_each_public_name_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(hookoffload.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == hookoffload._MODULES
    assert sorted(seen) == hookoffload.__all__


def test_no_module_hides_a_public_name() -> None:
    for name in hookoffload.__all__:
        assert find_spec(f"hookoffload.{name}") is None
    for module in set(hookoffload._MODULES.values()):
        importlib.import_module(f"hookoffload.{module}")
    for name, module in hookoffload._MODULES.items():
        home = importlib.import_module(f"hookoffload.{module}")
        assert getattr(hookoffload, name) is getattr(home, name)


def test_star_takes_every_public_name() -> None:
    names: dict[str, Any] = {}
    exec("from hookoffload import *", names)
    assert set(hookoffload.__all__) <= names.keys()


def test_name_that_does_not_exist_is_told_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="'hookoffload' has no attribute 'nought'"):
        hookoffload.nought  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nought'"):
        exec("from hookoffload import nought")


def test_public_objects_can_be_pickled() -> None:
    for name in hookoffload.__all__:
        thing = getattr(hookoffload, name)
        assert pickle.loads(pickle.dumps(thing)) is thing


# -- the command --------------------------------------------------------------------


def test_plan_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    shape = ("F8_E4M3", (512, 512))
    tensors = {f"blocks.{i}.up.weight": shape for i in range(8)}
    path = write_sparse(tmp_path / "a.safetensors", tensors)
    rates = ("--link-gb-s=10", "--disk-gb-s=2", "--compute-s=0.1", "--curve")
    ended = run(COMMAND, "plan", path, "--limit-gb=0.001", *rates)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "blocks.0-7.up" in ended.stdout
    options = ("--limit-gb=0", "--device=cpu", "--store=disk", "--json")
    ended = run(COMMAND, "plan", path, *options)
    assert json.loads(ended.stdout)["disk_bytes"] == 8 * 512 * 512


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_only_tells_of_itself_needs_no_torch(option: str) -> None:
    ended = run(COMMAND, option)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint of 400 GB: 120 blocks in 80 files, all of it holes."""
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    tensors = {
        f"layers.{block}.{part}.weight": ("BF16", (16384, 14500))
        for block in range(120)
        for part in parts
    }
    return write_sparse_shards(tmp_path_factory.mktemp("huge"), tensors, 80)


def test_plan_of_400_gigabytes_takes_two_seconds_and_200_megabytes(huge: Path) -> None:
    # From a small process: a child begins with the peak of the one that it is forked
    # from. Seconds of the processor: how long others let it wait is not its doing.
    measured = (
        "import json, resource, subprocess, sys\n"
        "command = [sys.executable, '-m', 'hookoffload', 'plan', *sys.argv[1:]]\n"
        "record = json.loads(subprocess.check_output(command))\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "unit = 1 if sys.platform == 'darwin' else 1024\n"
        "moved = record['pass_bytes'] + record['resident_bytes']\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss * unit, moved)\n"
    )
    ended = run(measured, huge, "--limit-gb=8", "--json")
    assert ended.returncode == 0, ended.stderr
    seconds, peak_bytes, moved = map(float, ended.stdout.split())
    assert 390e9 < moved < 410e9
    assert seconds < 2
    assert peak_bytes < 200e6


@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=damaged_files())
def test_damaged_file_is_planned_for_or_told_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["plan", str(path), "--json"])
    if status == 0:
        assert json.loads(out.getvalue())["device"] == "cuda"
        assert err.getvalue() == ""
        return
    assert (status, out.getvalue()) == (2, "")
    assert err.getvalue().startswith("hookoffload: ")
    assert err.getvalue().count("\n") == 1
    assert str(path) in err.getvalue()


# -- the format's codes -------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_bytes_of_an_element_are_those_of_torch(code: str) -> None:
    assert ITEMSIZES[code] == DTYPES[code].itemsize


def test_every_code_that_torch_has_is_known_to_headers() -> None:
    assert DTYPES.keys() <= ITEMSIZES.keys()

"""The command line, and the demo that a newcomer runs first."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hookoffload import demo, demo_trial
from hookoffload.cli import main
from hookoffload.command_options import FAILED
from hookoffload.demo_model import Checkpoint, DemoTransformer, Shape
from hookoffload.demo_trial import Measurement, Trial
from hookoffload.measured_rates import default_cache_dir
from hookoffload.user_errors import one_line

GIB = 2**30
SMALL = Shape(width=64, blocks=2)
MEASURED = Measurement(
    digest="abc",
    peak_bytes=GIB,
    load_seconds=1.0,
    first_seconds=0.5,
    next_seconds=0.25,
)


def small_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, shape: Shape = SMALL
) -> Checkpoint:
    return Checkpoint(folder, shape, dtype)


def start_demo(cache: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hookoffload", "demo", "--device=cpu", *options],
        # A second thread has little to do here, and waits for it in a busy loop.
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


class Demo:
    """A demo of 0.05 GiB that ran as its user runs it, with its output in pipes."""

    def __init__(self, cache: Path) -> None:
        process = start_demo(cache, "--size-gb=0.05")
        self.out, self.err = process.communicate(timeout=300)
        self.status = process.returncode
        self.files = list(cache.rglob("*.*"))

    def figures(self, row: str) -> list[float]:
        """Returns the two numbers of a row of the table: plain, limited."""
        line = re.search(rf"^{re.escape(row)} +([\d.]+) +([\d.]+)$", self.out, re.M)
        assert line is not None, self.out
        return [float(cell) for cell in line.groups()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Replaces the two measured processes; returns the trials they were given."""
    trials: list[Trial] = []

    def measure(trial: Trial) -> Measurement:
        trials.append(trial)
        return MEASURED

    monkeypatch.setattr(demo, "measure_in_fresh_process", measure)
    return trials


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that shall fail; returns its only line on the standard error."""
    try:
        status: object = main(argv)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"hookoffload[^\n]+\n", err), err
    return err


def test_demo_ends_well_and_its_outputs_are_identical(ran: Demo) -> None:
    assert ran.status == 0, ran.err
    assert "outputs identical: True" in ran.out.splitlines()


def test_limited_run_of_the_demo_takes_less_than_half_of_the_plain(ran: Demo) -> None:
    plain, limited = ran.figures("peak memory (GiB)")
    assert 0.04 <= plain < 0.1
    assert 0 < limited < plain / 2


def test_demo_gives_both_times(ran: Demo) -> None:
    for row in ("load (s)", "first forward (s)", "next forwards (s)"):
        assert min(ran.figures(row)) >= 0


def test_demo_names_the_checkpoint_in_the_users_cache_folder(ran: Demo) -> None:
    path = Path(ran.out.splitlines()[-1].strip())
    assert path.parent.name == "hookoffload"
    assert ran.files == [path]


def test_demo_fits_80_columns(ran: Demo) -> None:
    *lines, _path = ran.out.splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", [40, 60])
def test_demo_fits_a_narrow_terminal(
    columns: int,
    tmp_path: Path,
    faked: list[Trial],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["demo", "--device=cpu", "--size-gb=0.01", f"--cache-dir={tmp_path}"])
    *lines, _path = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert any(re.fullmatch(r"limit \(GiB\) +none +0.001", line) for line in lines)


def test_demo_in_a_pipe_shows_no_progress_bar(ran: Demo) -> None:
    assert ran.err == ""
    assert "\r" not in ran.out


def test_checkpoint_is_used_again(
    tmp_path: Path, faked: list[Trial], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["demo", "--device=cpu", "--size-gb=0.01", f"--cache-dir={tmp_path}"]
    assert main(argv) == 0
    assert "Writing" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    before = path.stat()
    assert main(argv) == 0
    assert "Writing" not in capsys.readouterr().out
    assert path.stat() == before


def test_limit_is_an_eighth_of_the_model_by_default(
    tmp_path: Path, faked: list[Trial]
) -> None:
    main(["demo", "--device=cpu", "--size-gb=0.01", f"--cache-dir={tmp_path}"])
    limited, plain = faked
    assert plain.limit_gb is None
    with safe_open(limited.checkpoint, framework="pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert limited.limit_gb == size / 8 / GIB


def test_limit_that_is_given_is_used(tmp_path: Path, faked: list[Trial]) -> None:
    options = ["--size-gb=0.01", "--limit-gb=0.005", f"--cache-dir={tmp_path}"]
    main(["demo", "--device=cpu", *options])
    assert faked[0].limit_gb == 0.005


def test_outputs_that_differ_exit_with_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        demo,
        "measure_in_fresh_process",
        lambda trial: replace(MEASURED, digest=trial.name),
    )
    argv = ["demo", "--device=cpu", "--size-gb=0.01", f"--cache-dir={tmp_path}"]
    assert main(argv) == 1
    assert "outputs identical: False" in capsys.readouterr().out


def test_memory_that_the_system_does_not_tell_is_not_made_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        demo,
        "measure_in_fresh_process",
        lambda trial: replace(MEASURED, peak_bytes=None),
    )
    main(["demo", "--device=cpu", "--size-gb=0.01", f"--cache-dir={tmp_path}"])
    assert re.search(r"peak memory \(GiB\) +\? +\?", capsys.readouterr().out)


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1", "0.001"])
def test_size_that_makes_no_model_is_refused(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("demo", f"--size-gb={size}", f"--cache-dir={tmp_path}")
    assert "--size-gb" in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_size_that_is_no_number_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "--size-gb" in error_of(capsys, "demo", "--size-gb=large")


def test_limit_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("demo", "--device=cpu", "--limit-gb=-1", f"--cache-dir={tmp_path}")
    assert "argument --limit-gb: '-1'" in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_limit_too_small_for_the_model_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--size-gb=0.01", "--limit-gb=0.000001", f"--cache-dir={tmp_path}")
    assert "limit" in error_of(capsys, "demo", "--device=cpu", *options)


@pytest.mark.parametrize(
    ("device", "reason"),
    [("mps", "--device should be"), ("toaster", "'toaster' is no device (known:")],
)
def test_device_that_cannot_be_measured_is_refused(
    device: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("demo", f"--device={device}", f"--cache-dir={tmp_path}")
    assert reason in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "dance" in error_of(capsys, "dance")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo --cache-dir here",
        "plan .",
        "doctor",
        "bench . --limit-gb 1",
        "convert . to",
    ],
)
def test_closed_output_is_told_in_one_line_before_any_work(
    tmp_path: Path, command: str
) -> None:
    line = f"{sys.executable} -m hookoffload {command}"
    for closed, told in ((">&-", True), (">&- 2>&-", False)):
        ended = subprocess.run(
            ["sh", "-c", f"{line} {closed}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == FAILED
        errors = ended.stderr.splitlines()
        assert len(errors) == told, ended.stderr
        assert not told or "standard output is closed" in errors[0]
    assert not list(tmp_path.iterdir())


def test_wrong_option_with_closed_outputs_is_only_an_exit_status() -> None:
    line = f"{sys.executable} -m hookoffload plan --limit-gb x . >&- 2>&-"
    assert subprocess.run(["sh", "-c", line]).returncode == FAILED


def test_cache_folder_that_is_a_file_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    argv = ("demo", "--size-gb=0.01", f"--cache-dir={tmp_path / 'taken'}")
    assert "taken" in error_of(capsys, *argv)


def test_error_of_the_system_names_the_file_and_no_number() -> None:
    error = FileExistsError(17, "File exists", "/a/folder")
    assert one_line(error) == "/a/folder: File exists"
    assert one_line(OSError("no room\nleft")) == "no room left"


def test_without_a_command_the_help_names_the_demo(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("hookoffload")


def test_ctrl_c_ends_the_demo_quietly_with_130(tmp_path: Path) -> None:
    process = start_demo(tmp_path, "--size-gb=4")
    assert process.stdout is not None
    while "Writing" not in process.stdout.readline():
        pass
    # As a terminal does: to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_run_that_is_killed_is_told_with_its_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: killed)
    with pytest.raises(RuntimeError, match=r"plain run was ended by signal 9.*memory"):
        demo_trial.measure_in_fresh_process(trial_of("nowhere"))


def test_run_that_fails_gives_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"the plain run failed: .*nowhere"):
        demo_trial.measure_in_fresh_process(trial_of("nowhere"))


def trial_of(checkpoint: str) -> Trial:
    return Trial(
        checkpoint=checkpoint,
        width=SMALL.width,
        blocks=SMALL.blocks,
        dtype="float32",
        device="cpu",
        limit_gb=None,
    )


def test_measurement_is_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = small_checkpoint(tmp_path)
    checkpoint.write()
    trial = trial_of(str(checkpoint.path))
    assert demo_trial.main([json.dumps(vars(trial))]) == 0
    assert Measurement(**json.loads(capsys.readouterr().out)).load_seconds > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_holds_the_model_in_the_asked_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(tmp_path, dtype)
    checkpoint.write()
    model = DemoTransformer(width=SMALL.width, blocks=SMALL.blocks).state_dict()
    with safe_open(checkpoint.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in model.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert sum(t.nbytes for t in tensors.values()) == checkpoint.tensor_bytes


def test_checkpoint_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (small_checkpoint(tmp_path / name) for name in "ab")
    for checkpoint in (first, second):
        assert not checkpoint.exists()
        checkpoint.write()
        assert checkpoint.exists()
    assert first.path.read_bytes() == second.path.read_bytes()


def test_checkpoint_that_was_cut_short_counts_as_missing(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path)
    checkpoint.write()
    os.truncate(checkpoint.path, checkpoint.file_bytes - 1)
    assert not checkpoint.exists()


def test_writing_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object, **_options: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "randn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_checkpoint(tmp_path).write()
    assert list(tmp_path.iterdir()) == []


def test_disk_without_room_is_refused_with_the_figures(tmp_path: Path) -> None:
    huge = small_checkpoint(tmp_path, shape=Shape(width=2**20, blocks=2**10))
    with pytest.raises(OSError, match=r"takes \d+\.\d\d GiB, .* GiB free"):
        huge.write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size_gb", [0.01, 0.1, 1, 2, 40])
def test_model_has_about_the_size_that_was_asked_for(
    size_gb: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    shape = Shape.of_size(size_gb * GIB, dtype)
    size = small_checkpoint(tmp_path, dtype, shape).tensor_bytes
    assert abs(size - size_gb * GIB) < 0.05 * size_gb * GIB
    assert shape.blocks >= 12


def test_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/hookoffload")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "hookoffload"


def test_demo_tells_a_program_in_one_json_object(
    tmp_path: Path, faked: list[Trial], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--device=cpu", "--size-gb=0.01", f"--cache-dir={tmp_path}")
    assert main(["demo", "--json", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["identical"] is True
    assert record["limit_bytes"] == int(record["model_bytes"] / 8)
    assert record["limited"] == vars(MEASURED)
    assert Path(record["checkpoint"]).parent == tmp_path

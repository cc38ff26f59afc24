"""When a bar is shown: on a terminal, for what takes longer than a second."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tqdm import tqdm

from hookoffload import OffloadPolicy, attach_offload_hooks, detach
from hookoffload.progress import progress_bar, progress_shown

ROOT = Path(__file__).parents[1]
# In ten steps, so that the bar is asked while the work goes on.
WORK = """
import sys, time
from hookoffload.progress import progress_bar
seconds = float(sys.argv[1])
with progress_bar("reading", 100) as bar:
    for _ in range(10):
        time.sleep(seconds / 10)
        bar.update(10)
"""


def start(seconds: float, terminal: bool, **variables: str) -> tuple[Any, int]:
    """Starts the work with a terminal or a pipe as its standard error."""
    read, write = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(seconds)],
        stderr=write,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )
    os.close(write)
    return process, read


def seen(process: Any, descriptor: int) -> str:
    data = b""
    # Linux's terminals end with an error where a pipe ends with nothing.
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 4096):
            data += part
    os.close(descriptor)
    assert process.wait(30) == 0
    return data.decode()


def test_bar_is_shown_on_a_terminal_for_what_takes_longer_than_a_second() -> None:
    ways: dict[str, tuple[float, bool, dict[str, str]]] = {
        "long": (1.5, True, {}),
        "short": (0.2, True, {}),
        "long, in a pipe": (1.5, False, {}),
        "long, turned off": (1.5, True, {"TQDM_DISABLE": "1"}),
        "long, not turned off": (1.5, True, {"TQDM_DISABLE": "0"}),
    }
    started = {
        name: start(seconds, terminal, **variables)
        for name, (seconds, terminal, variables) in ways.items()
    }
    shown = {name: seen(*each) for name, each in started.items()}
    assert "hookoffload: reading" in shown["long"]
    assert "hookoffload: reading" in shown["long, not turned off"]
    # Nothing else either: not even an empty line.
    assert shown["short"].strip() == ""
    assert shown["long, in a pipe"] == shown["long, turned off"] == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, bool]]:
    """Returns the bars that are made from here on, and whether each is off."""
    bars: list[tuple[Any, bool]] = []
    init = tqdm.__init__

    def note(bar: Any, *args: Any, **options: Any) -> None:
        init(bar, *args, **options)
        bars.append((bar, bool(bar.disable)))

    monkeypatch.setattr(tqdm, "__init__", note)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return bars


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_attaching_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    made = bars_on_a_terminal(monkeypatch)
    policy = OffloadPolicy(compute_device="cpu", storage_dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    detach(attach_offload_hooks(model, policy, progress=shown))
    assert made
    assert {off for _, off in made} == {not shown}


def test_bar_of_casting_counts_the_bytes_that_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = bars_on_a_terminal(monkeypatch)
    policy = OffloadPolicy(compute_device="cpu", storage_dtype=torch.bfloat16)
    attach_offload_hooks(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), policy)
    ((bar, _),) = made
    assert bar.n == bar.total == 2 * (8 * 8 + 8) * 2


def test_what_is_turned_off_outside_stays_off_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = bars_on_a_terminal(monkeypatch)
    with progress_shown(False), progress_shown(True), progress_bar("reading", 1):
        pass
    assert [off for _, off in made] == [True]

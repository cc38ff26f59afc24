"""What all tests share: marks, Hypothesis profiles, seeds."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

from .coded_checkpoints import saved


class _TorchRandom:
    """Torch's default generator as Hypothesis wants it: the same in each example."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


# Hypothesis keeps only a weak reference.
_TORCH_RANDOM = _TorchRandom()
register_random(_TORCH_RANDOM)

# A loaded machine must not turn a slow example into a failure.
_PATIENT = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
# "default" and "ci" try the same examples each time; "long" looks for new ones and
# prints the blob and the seed that repeat what it finds.
settings.register_profile("default", _PATIENT, max_examples=25, derandomize=True)
settings.register_profile("ci", _PATIENT, max_examples=100, derandomize=True)
settings.register_profile("long", _PATIENT, max_examples=5000, derandomize=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--torch-seed",
        type=int,
        default=0,
        help="seed of random and torch before each test (default: 0)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    # A shell without job control has what it starts in the background ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The models of the tests are tiny: with several threads they wait for each other.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = "no CUDA device"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return [
        f"torch: {torch.__version__}, {device}, --torch-seed={_torch_seed(config)}",
        f"hypothesis: profile {settings.get_current_profile_name()}",
    ]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests look for spilled files that are left: other processes write some, too."""
    before = tempfile.tempdir
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))
    yield
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeps what is converted out of the home of whoever runs the tests."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seeds every generator that a test may use without naming it."""
    random.seed(_torch_seed(request.config))
    torch.manual_seed(_torch_seed(request.config))


def _torch_seed(config: pytest.Config) -> int:
    value = config.getoption("--torch-seed")
    assert isinstance(value, int)
    return value


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for no disk: only a loss of power tells."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def ids() -> torch.Tensor:
    """Tokens for the language model of `tests.test_lossless_offload`."""
    return torch.randint(0, 2000, (3, 7))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of that, with room for a cache of its codes beside it."""
    return saved(tmp_path / "checkpoint")

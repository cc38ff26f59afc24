"""What is said about page-locking; that it works, the GPU tests show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hookoffload.pinning import PageLock


def test_weights_that_are_not_locked_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    master: Any = SimpleNamespace(in_ram=True, count=1, pinned=False, nbytes=2**30)
    lock = PageLock(torch.device("cuda"), 0)
    for _ in range(3):  # as a model does that comes from disk each time
        lock.lock([master, master])
        lock.unlock([master])
    (told,) = caplog.messages
    assert "2.000 GiB of 2.000 GiB of weights in host RAM are not page-locked" in told
    assert "pin_limit_gb=" in told

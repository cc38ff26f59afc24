"""Two processes on one GPU: each keeps to its own limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

_LIMITS_MIB = (96, 160)
# Each process waits until both are attached, so that their forwards overlap.
_SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from torch import nn
from hookoffload import OffloadPolicy, attach_offload_hooks, offload_stats

here, there, limit = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) / 2**10
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
x = torch.randn(64, 2048, device="cuda")
model.cuda()
with torch.no_grad():
    want = model(x)
model.cpu()
torch.cuda.empty_cache()
policy = OffloadPolicy(limit_gb=limit, compute_device="cuda")
attach_offload_hooks(model, policy)
torch.cuda.reset_peak_memory_stats()
here.touch()
end = time.monotonic() + 60
while not there.exists() and time.monotonic() < end:
    time.sleep(0.01)
with torch.no_grad():
    equal = [torch.equal(model(x), want) for _ in range(50)]
stats = offload_stats(model)
print(json.dumps({
    "met": there.exists(),
    "equal": all(equal),
    "peak": max(stats.peak_bytes, torch.cuda.max_memory_allocated()) / 2**20,
    "moved": stats.bytes_moved,
}))
"""


def test_two_processes_on_one_gpu_each_keep_to_their_own_limit(tmp_path: Path) -> None:
    marks = [tmp_path / "one", tmp_path / "other"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, here, there, str(limit)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for here, there, limit in zip(marks, reversed(marks), _LIMITS_MIB, strict=True)
    ]
    for process, limit in zip(running, _LIMITS_MIB, strict=True):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        said = json.loads(output.splitlines()[-1])
        assert said["met"], "the processes did not run at the same time"
        assert said["equal"]
        assert said["moved"] > 0
        assert said["peak"] <= limit

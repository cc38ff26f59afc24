"""One measured run of the demo, in a process whose memory holds nothing else.

``python -m hookoffload.demo_trial TRIAL`` is that process: it takes a `Trial` as JSON
and answers a `Measurement`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass

import torch
from safetensors import safe_open
from torch import nn

from .demo_model import HEAD_WIDTH, SEED, DemoTransformer
from .loading import load_model
from .policy import OffloadPolicy
from .user_errors import EXPECTED_ERRORS, one_line

TOKENS = 128
NEXT_FORWARDS = 3
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run that is measured in a process of its own.

    Attributes:
        checkpoint: Path of the safetensors file.
        width: See `Shape`.
        blocks: See `Shape`.
        dtype: Name of the dtype of the weights.
        device: Where the forward is computed.
        limit_gb: The limit that the library gets, in GiB; None runs the plain model.
    """

    checkpoint: str
    width: int
    blocks: int
    dtype: str
    device: str
    limit_gb: float | None

    @property
    def name(self) -> str:
        """What the run is called."""
        return "plain" if self.limit_gb is None else "limited"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one trial showed.

    Attributes:
        digest: Hash of the output's bytes.
        peak_bytes: Most memory taken since before loading, in bytes; None where the
            system does not tell.
        load_seconds: From nothing to a model that is ready.
        first_seconds: The first forward.
        next_seconds: Median of the forwards after it.
    """

    digest: str
    peak_bytes: int | None
    load_seconds: float
    first_seconds: float
    next_seconds: float


class PeakMemory:
    """The most memory that a run takes on the device where it computes.

    On a GPU that is what PyTorch's allocator counts. On a CPU it is the process's
    anonymous memory (RssAnon) above what it had at the start: that leaves out mapped
    files and the page cache, which the system takes back when it needs them. As the
    kernel keeps no peak of it, a thread samples it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begins to watch."""
        self._device = device
        self._base = self._peak = _anonymous_bytes() or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if device.type == "cpu":
            self._thread.start()
        else:
            torch.get_device_module(device).reset_peak_memory_stats()

    def finish(self) -> int | None:
        """Ends the watch; returns the peak in bytes, None where nobody counts it."""
        if self._device.type != "cpu":
            return int(torch.get_device_module(self._device).max_memory_allocated())
        self._stop.set()
        self._thread.join()
        return self._peak - self._base if self._base else None

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(SAMPLE_SECONDS)
            self._peak = max(self._peak, _anonymous_bytes() or 0)


def _anonymous_bytes() -> int | None:
    """Returns the anonymous memory of this process; None where it is not told."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return None


def policy_of(device: torch.device, limit_gb: float) -> OffloadPolicy:
    """Returns the policy of the limited run: from disk without a GPU, else from RAM.

    Without a GPU, RAM is what the limit has to save.
    """
    if device.type == "cpu":
        return OffloadPolicy(limit_gb=limit_gb, compute_device=device, store="disk")
    return OffloadPolicy(limit_gb=limit_gb, compute_device=device)


def measure_in_fresh_process(trial: Trial) -> Measurement:
    """Runs the trial in a new interpreter, whose memory holds nothing else.

    Raises:
        RuntimeError: The run failed.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "hookoffload.demo_trial", json.dumps(asdict(trial))],
        capture_output=True,
        text=True,
    )
    if ended.returncode < 0:
        raise RuntimeError(
            f"the {trial.name} run was ended by signal {-ended.returncode}: if memory "
            "ran out, choose a smaller --size-gb"
        )
    answer = json.loads(ended.stdout) if ended.stdout else {}
    if "digest" not in answer:
        said = ended.stderr.strip().splitlines() or ["it said nothing"]
        reason = answer.get("error", said[-1])
        raise RuntimeError(f"the {trial.name} run failed: {reason}")
    return Measurement(**answer)


def measure(trial: Trial) -> Measurement:
    """Loads the model of the trial, runs it and measures it, in this process."""
    device = torch.device(trial.device)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(4 * trial.width, (1, TOKENS), generator=generator).to(device)
    _warm_up(device)
    peak = PeakMemory(device)

    began = time.perf_counter()
    model = _load(trial, device)
    seconds = [time.perf_counter() - began]
    for _ in range(1 + NEXT_FORWARDS):
        began = time.perf_counter()
        with torch.no_grad():
            # Bringing the output to the CPU waits for all that was computed.
            output = model(tokens).cpu()
        seconds.append(time.perf_counter() - began)

    peak_bytes = peak.finish()
    return Measurement(
        digest=hashlib.sha256(output.view(torch.uint8).numpy().data).hexdigest(),
        peak_bytes=peak_bytes,
        load_seconds=seconds[0],
        first_seconds=seconds[1],
        next_seconds=statistics.median(seconds[2:]),
    )


def _warm_up(device: torch.device) -> None:
    """Runs a tiny model: what PyTorch imports at first use is no model's memory."""
    with torch.device("meta"):
        model = DemoTransformer(width=HEAD_WIDTH, blocks=1)
    with torch.no_grad():
        model.to_empty(device=device)(torch.zeros(1, 1, dtype=torch.long).to(device))


def _load(trial: Trial, device: torch.device) -> nn.Module:
    shape = {"width": trial.width, "blocks": trial.blocks}
    if trial.limit_gb is not None:
        policy = policy_of(device, trial.limit_gb)
        return load_model(
            DemoTransformer, trial.checkpoint, policy=policy, config=shape
        )
    with torch.device("meta"):
        model = DemoTransformer(**shape)
    # Each tensor is read into the place where it stays: the least that a plain model
    # can take.
    model = model.to(getattr(torch, trial.dtype)).to_empty(device=device)
    with safe_open(trial.checkpoint, framework="pt") as file, torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(file.get_tensor(name))
    return model


def main(argv: list[str]) -> int:
    """Measures the trial in `argv`, as JSON, and writes the answer as JSON."""
    try:
        answer = asdict(measure(Trial(**json.loads(argv[0]))))
    except EXPECTED_ERRORS as error:
        answer = {"error": one_line(error)}
    sys.stdout.write(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A transformer run plain and under a limit, side by side: the newcomer's first look.

``python -m hookoffload demo`` writes a checkpoint once, runs it twice, each time in a
process of its own, and compares memory, time and output.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .budget import GIB
from .demo_model import Checkpoint, Shape
from .demo_trial import (
    SAMPLE_SECONDS,
    Measurement,
    Trial,
    measure_in_fresh_process,
    policy_of,
)
from .measured_rates import default_cache_dir

# Below this the activations outweigh the model, and a limit shows nothing.
SMALLEST_GB = 0.01

_LABEL = 22

# GPUs whose allocator keeps a peak.
_GPUS = ("cuda", "xpu")


def best_device() -> torch.device:
    """Returns a GPU if there is one, else the CPU."""
    for kind in _GPUS:
        if torch.get_device_module(kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """What the demo measured.

    Attributes:
        device: Where it computed.
        dtype: The dtype of the weights, by torch's name.
        model_bytes: Size of the model.
        limit_bytes: The limit of the limited run.
        plain: The run without a limit.
        limited: The run with one.
        identical: Whether both gave the same bits.
        checkpoint: The file, which is kept for the next time.
    """

    device: str
    dtype: str
    model_bytes: int
    limit_bytes: int
    plain: Measurement
    limited: Measurement
    identical: bool
    checkpoint: str


def run_demo(
    *,
    size_gb: float,
    limit_gb: float | None,
    cache_dir: Path | None,
    device: str | None,
    say: Callable[[str], object],
) -> DemoRun:
    """Runs the demo.

    Args:
        size_gb: About how large the model is, in GiB.
        limit_gb: The limit of the limited run, in GiB; None is an eighth of the model.
        cache_dir: Where the checkpoint is kept; None is the user's cache folder.
        device: Where to compute; None is the best device there.
        say: Told what is done at the moment, a line at a time.

    Raises:
        ValueError: The size or the limit makes no sense.
        RuntimeError: A run failed.
        OSError: The checkpoint cannot be written.
    """
    if not (math.isfinite(size_gb) and size_gb >= SMALLEST_GB):
        raise ValueError(f"--size-gb should be at least {SMALLEST_GB}, got {size_gb}")
    where = best_device() if device is None else torch.device(device)
    if where.type not in ("cpu", *_GPUS):
        raise ValueError(f"--device should be cpu, {' or '.join(_GPUS)}, got {where}")
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    shape = Shape.of_size(size_gb * GIB, dtype)
    checkpoint = Checkpoint(cache_dir or default_cache_dir(), shape, dtype)
    limit = checkpoint.tensor_bytes / 8 / GIB if limit_gb is None else limit_gb
    # A device or a limit that cannot be is refused before anything is written.
    limit_bytes = policy_of(where, limit).resolve().limit_bytes
    assert limit_bytes is not None, "the limited run has a limit"

    kind = str(dtype).removeprefix("torch.")
    say(
        f"hookoffload demo: a transformer of {checkpoint.tensor_bytes / GIB:.3g} GiB "
        f"({kind}) on {where}"
    )
    if not checkpoint.exists():
        say("Writing its checkpoint, this once ...")
        checkpoint.write()

    # The limited run is first: what it cannot do shows at once, and should the file not
    # be in the page cache yet, the plain run gets the advantage.
    store = "on disk" if where.type == "cpu" else "in RAM"
    within = f"in {limit:.3g} GiB, its weights {store}"
    measured: dict[str, Measurement] = {}
    for how, trial_limit in ((within, limit), ("plain", None)):
        trial = Trial(
            checkpoint=str(checkpoint.path),
            width=shape.width,
            blocks=shape.blocks,
            dtype=kind,
            device=str(where),
            limit_gb=trial_limit,
        )
        say(f"Running it {how} ...")
        measured[trial.name] = measure_in_fresh_process(trial)

    plain, limited = measured["plain"], measured["limited"]
    return DemoRun(
        device=str(where),
        dtype=kind,
        model_bytes=checkpoint.tensor_bytes,
        limit_bytes=limit_bytes,
        plain=plain,
        limited=limited,
        identical=plain.digest == limited.digest,
        checkpoint=str(checkpoint.path),
    )


def format_demo(run: DemoRun, width: int = 80) -> str:
    """Writes what the demo measured, for a reader; the path may be wider."""
    note = _memory_note(torch.device(run.device), run.plain)
    return "\n".join(
        [
            *_table(run.limit_bytes / GIB, run.plain, run.limited, width),
            f"outputs identical: {run.identical}",
            "",
            *textwrap.wrap(note, width),
            *textwrap.wrap("The checkpoint is kept for the next time:", width),
            f"  {run.checkpoint}",
        ]
    )


def _table(
    limit_gb: float, plain: Measurement, limited: Measurement, width: int
) -> list[str]:
    cell_width = min(12, max((width - _LABEL) // 2, 8))

    def row(name: str, *cells: float | str | None) -> str:
        texts = (
            cell if isinstance(cell, str) else "?" if cell is None else f"{cell:.3f}"
            for cell in cells
        )
        return f"{name:<{_LABEL}}" + "".join(f"{text:>{cell_width}}" for text in texts)

    def gib(count: int | None) -> float | None:
        return None if count is None else count / GIB

    return [
        row("", "plain", "limited"),
        row("limit (GiB)", "none", limit_gb),
        row("peak memory (GiB)", gib(plain.peak_bytes), gib(limited.peak_bytes)),
        row("load (s)", plain.load_seconds, limited.load_seconds),
        row("first forward (s)", plain.first_seconds, limited.first_seconds),
        row("next forwards (s)", plain.next_seconds, limited.next_seconds),
    ]


def _memory_note(device: torch.device, plain: Measurement) -> str:
    if device.type != "cpu":
        return "Peak memory is what PyTorch allocated on the device."
    if plain.peak_bytes is None:
        return "This system does not tell the peak memory of a process."
    return (
        "Peak memory is the process's own (RssAnon, sampled every "
        f"{SAMPLE_SECONDS * 1000:.0f} ms), above what it had before loading; the page "
        "cache is not counted. On a CPU the limit bounds what hookoffload holds: the "
        "activations come on top."
    )

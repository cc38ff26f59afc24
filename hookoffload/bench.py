"""``hookoffload bench``: seconds over limit, measured against predicted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attach import detach
from .bench_model import Inputs, Recipe, make_input, recipe_for, run_forward
from .budget import GIB, format_gib
from .checkpoint import open_checkpoint
from .cost import Rates
from .importing import explained
from .loading import load_model
from .machine import measure_file, measure_link
from .plan import Plan
from .policy import OffloadPolicy
from .steering import set_limit
from .telling import offload_plan, offload_stats
from .user_errors import EXPECTED_ERRORS

# The first pass looks at the model and measures activations, the second brings in what
# stays.
_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a checkpoint does at one limit.

    Attributes:
        limit_bytes: The limit.
        seconds: Median of the timed passes, each until its output was there.
        stall_seconds: For which a pass waited for copies, on average.
        predicted_seconds: What the cost model says for the plan that stood.
        peak_bytes: As in `OffloadStats`.
        resident_bytes: Bytes of the layers that stayed.
        pass_bytes: Bytes that were to be copied in each pass.
    """

    limit_bytes: int
    seconds: float
    stall_seconds: float
    predicted_seconds: float
    peak_bytes: int
    resident_bytes: int
    pass_bytes: int

    @property
    def off(self) -> float:
        """By which part of the measured seconds the prediction is off."""
        return self.predicted_seconds / self.seconds - 1


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured, and with what it was predicted.

    Attributes:
        model: Name of the class.
        weight_bytes: Size of the checkpoint's tensors.
        device: Where it computed.
        store: Where the weights rested.
        rates: The link was measured before the model was loaded. The disk is how fast
            the checkpoint's largest file was read after the passes, from its disk or
            from the page cache. Compute is what a pass took at a limit with room for
            everything; without one, the least that any took without its stalls.
        trials: One a limit, the smallest first.
    """

    model: str
    weight_bytes: int
    device: str
    store: str
    rates: Rates
    trials: tuple[Trial, ...]


def run_bench(
    folder: Path,
    limits_gb: Sequence[float],
    *,
    class_name: str | None = None,
    input_name: str | None = None,
    device: str | None = None,
    store: str | None = None,
    passes: int = 3,
    say: Callable[[str], None],
) -> Bench:
    """Loads a checkpoint and times it at several limits, in this process.

    Args:
        folder: With config.json and safetensors files.
        limits_gb: In GiB.
        class_name: See `recipe_for`.
        input_name: See `make_input`.
        device: Where to compute; None is the accelerator if there is one.
        store: "cpu" or "disk"; None is the disk where the CPU computes, else RAM.
        passes: How many forwards are timed at each limit.
        say: Called with a line before what takes long.

    Raises:
        ValueError: The model cannot be made, or an option makes no sense.
        BudgetExceededError: The smallest limit is below the least.
        RuntimeError: The forward failed.
    """
    limits = sorted(set(limits_gb))
    smallest = OffloadPolicy(limit_gb=limits[0], compute_device=device)
    where = smallest.resolve().compute_device
    store = store or ("disk" if where.type == "cpu" else "cpu")
    policy = replace(smallest, compute_device=where, store=store)  # type: ignore[arg-type]
    recipe = recipe_for(folder, class_name)
    files = _files(folder)
    link = measure_link(where)
    say(f"Loading {recipe.name} from {folder} ...")
    model = _loaded(recipe, folder, policy)
    try:
        inputs = make_input(model, input_name)
        timed = []
        for limit in limits:
            say(f"Running it in {limit:g} GiB ...")
            set_limit(model, limit)
            timed.append(_timed(model, inputs, where, passes))
        disk = measure_file(max(files, key=lambda f: files[f]))
    finally:
        detach(model)
    rates = Rates(
        link_bytes_per_second=None if link is None else link.bytes_per_second,
        disk_bytes_per_second=disk if store == "disk" else None,
        compute_seconds=_compute_seconds([trial for trial, _ in timed]),
    )
    return Bench(
        model=recipe.name,
        weight_bytes=sum(files.values()),
        device=str(where),
        store=store,
        rates=rates,
        trials=tuple(_predicted(trial, plan, rates) for trial, plan in timed),
    )


def _loaded(recipe: Recipe, folder: Path, policy: OffloadPolicy) -> nn.Module:
    try:
        return load_model(recipe.factory, folder, policy, config=recipe.config)
    except EXPECTED_ERRORS:
        raise
    except Exception as error:  # of the class's own code
        raise ValueError(f"{recipe.name} cannot be made: {explained(error)}") from error


def _files(folder: Path) -> dict[Path, int]:
    """Returns the files of a checkpoint and how many bytes of tensors each holds."""
    sizes: dict[Path, int] = {}
    for location in open_checkpoint(folder).values():
        path = location.file.path
        sizes[path] = sizes.get(path, 0) + location.nbytes
        location.file.close()
    return sizes


def _timed(
    model: nn.Module, inputs: Inputs, device: torch.device, passes: int
) -> tuple[Trial, Plan]:
    for _ in range(_WARM_UP):
        run_forward(model, inputs)
    _wait_for_output(device)
    stalled = offload_stats(model).stall_seconds
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        run_forward(model, inputs)
        # As who uses the output: what comes ahead for the next pass goes on.
        _wait_for_output(device)
        seconds.append(time.perf_counter() - began)
    stats, plan = offload_stats(model), offload_plan(model)
    trial = Trial(
        limit_bytes=stats.limit_bytes or 0,
        seconds=statistics.median(seconds),
        stall_seconds=(stats.stall_seconds - stalled) / passes,
        predicted_seconds=0.0,
        peak_bytes=stats.peak_bytes,
        resident_bytes=plan.resident_bytes,
        pass_bytes=plan.pass_bytes,
    )
    return trial, plan


def _compute_seconds(trials: Sequence[Trial]) -> float:
    # Without stalls, what a pass takes is not all there is: the host may take longer
    # to ask for a small model's forward, behind the stalls where there are any.
    whole = [trial.seconds for trial in trials if not trial.pass_bytes]
    return min(whole or (max(t.seconds - t.stall_seconds, 0.0) for t in trials))


def _wait_for_output(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.current_stream(device.index).synchronize()


def _predicted(trial: Trial, plan: Plan, rates: Rates) -> Trial:
    prediction = plan.predict(rates)
    assert prediction is not None, "there are rates"
    return replace(trial, predicted_seconds=prediction.seconds)


def bench_record(bench: Bench) -> dict[str, Any]:
    """Returns a bench as JSON takes it; sizes in bytes."""
    return asdict(bench)


def format_bench(bench: Bench, width: int = 80) -> str:
    """Writes seconds over limit as a table with bars; sizes in GiB."""
    longest = max(trial.seconds for trial in bench.trials)
    wide = width >= 64
    head = f"{'limit':>11} {'measured':>9} {'predicted':>9}"
    if wide:
        head += f" {'off':>6} {'resident':>11} {'peak':>11}"
    lines = [head]
    for trial in bench.trials:
        line = (
            f"{format_gib(trial.limit_bytes):>11} {trial.seconds:>9.3f} "
            f"{trial.predicted_seconds:>9.3f}"
        )
        if wide:
            line += (
                f" {trial.off:>+6.0%} {format_gib(trial.resident_bytes):>11} "
                f"{format_gib(trial.peak_bytes):>11}"
            )
        room = max(width - len(line) - 1, 0)
        bar = "#" * round(room * trial.seconds / longest)
        lines.append(f"{line} {bar}".rstrip())
    return "\n".join(lines)


def describe_bench(bench: Bench) -> str:
    """Says in words what the table is of, and where its predictions come from."""
    rates = bench.rates
    place = "on disk" if bench.store == "disk" else "in RAM"
    parts = [
        f"{bench.model}, {format_gib(bench.weight_bytes)} of weights {place}, on "
        f"{bench.device}; seconds per forward.",
        "Predicted from",
    ]
    known = []
    if rates.link_bytes_per_second:
        known.append(f"a link of {rates.link_bytes_per_second / GIB:.1f} GiB/s")
    if rates.disk_bytes_per_second:
        each = rates.disk_bytes_per_second / GIB
        known.append(f"files read at {each:.2f} GiB/s (disk or page cache)")
    known.append(f"{rates.compute_seconds:.3f} s of compute ({_origin(bench.trials)})")
    return " ".join([*parts, ", ".join(known) + "."])


def _origin(trials: Sequence[Trial]) -> str:
    if any(not trial.pass_bytes for trial in trials):
        return "a pass with room for everything"
    return "the least of a pass without stalls"

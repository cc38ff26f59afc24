"""A bench as a picture; needs matplotlib, which nothing else here does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .aside import checked_target, written_aside
from .bench import Bench
from .budget import GIB
from .report_plot import picture_format


def check_picture(path: Path) -> None:
    """Looks whether a picture can be drawn into a file, before what takes long.

    Raises:
        ValueError: There is no matplotlib, the file's ending names no kind of picture,
            or there is no such folder.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: "
            "pip install 'hookoffload[plot]'"
        )
    picture_format(path)
    checked_target(path)


def plot_bench(bench: Bench, path: Path) -> None:
    """Draws seconds over limit into a file, measured and predicted.

    Raises:
        ValueError: See `check_picture`.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    limits = [trial.limit_bytes / GIB for trial in bench.trials]
    axes.plot(limits, [t.seconds for t in bench.trials], "o-", label="measured")
    predicted = [t.predicted_seconds for t in bench.trials]
    axes.plot(limits, predicted, "s--", label="predicted")
    axes.set_xlabel("limit (GiB)")
    axes.set_ylabel("seconds per forward")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{bench.model} on {bench.device}")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as file:
        figure.savefig(file, format=picture_format(path), dpi=150)

"""A bench as a picture; needs matplotlib, which nothing else here does."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .bench import Bench
from .budget import GIB


def require_matplotlib() -> None:
    """Raises `ValueError` where there is none."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: "
            "pip install 'hookoffload[plot]'"
        )


def plot_bench(bench: Bench, path: Path) -> None:
    """Draws seconds over limit into a file, measured and predicted.

    Raises:
        ValueError: The file's ending names no kind of picture.
        OSError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.savefig(path, dpi=150)

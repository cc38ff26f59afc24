"""Ranges with the names of layers, for torch's own profiler.

They exist only while a profiler runs (``torch.profiler.profile``, ``emit_nvtx``);
otherwise each costs a look at one variable.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING = nullcontext()


def profiler_range(what: str, name: str) -> AbstractContextManager[object]:
    """Name what is done inside a ``with`` block.

    Args:
        what: One word for it: "wait", "copy".
        name: Full name of the layer.
    """
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(f"hookoffload::{what} {name}")


class LayerRanges:
    """The ranges of the layers whose forwards are under way."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[str, profiler.record_function] = {}

    def begin(self, name: str) -> None:
        """Begin the range of a layer."""
        if profiler._is_profiler_enabled and name not in self._open:
            opened = profiler.record_function(f"hookoffload::layer {name}")
            opened.__enter__()
            self._open[name] = opened

    def end(self, name: str) -> None:
        """End it, if it was begun."""
        if self._open:
            opened = self._open.pop(name, None)
            if opened is not None:
                opened.__exit__(None, None, None)

    def forget(self) -> None:
        """End all, behind a forward that was interrupted."""
        while self._open:
            self._open.popitem()[1].__exit__(None, None, None)

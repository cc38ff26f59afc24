"""A copy of a layer, and what a copy engine does with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from .master import Master
from .moves import Moves
from .staging import Coming

if TYPE_CHECKING:
    from .entries import CopyEntry

POISON = 0xFF  # as a float of any width: NaN


class Copy:
    """One layer's bytes on their way to the compute device.

    Args:
        name: full name of the layer.
        pieces: masters and the flat ``uint8`` tensors that take their bytes.
        nbytes: of all pieces.
        after: tokens that must be waited for before the first byte is written.
        moves: destinations and sources of the same bytes, if all of them are
            page-locked; None: those of the pieces, one by one.

    Attributes:
        ready: behind the last byte, on an accelerator.
        queued: set when a worker has queued (on a CPU: performed) the copy; None if no
            worker has to.
        process: the one whose worker has to; a fork does not take the worker along.
        error: what went wrong in the worker.
    """

    __slots__ = (
        "after",
        "entry",
        "error",
        "moves",
        "name",
        "nbytes",
        "pieces",
        "process",
        "queued",
        "ready",
    )

    def __init__(
        self,
        name: str,
        pieces: Sequence[tuple[Master, torch.Tensor]],
        nbytes: int,
        after: tuple[object, ...],
        moves: Moves | None = None,
    ) -> None:
        self.name = name
        self.moves = moves
        self.pieces = pieces
        self.after = after
        self.nbytes = nbytes
        self.ready: torch.Event | None = None
        self.queued: threading.Event | None = None
        self.process = 0
        self.error: BaseException | None = None
        self.entry: CopyEntry | None = None  # only while a recorder notes copies

    @property
    def is_left_behind(self) -> bool:
        """Whether a worker has to perform it that was not forked with this process."""
        unperformed = self.queued is not None and not self.queued.is_set()
        return unperformed and self.process != os.getpid()

    def finish(self) -> None:
        """Tell who waits that a worker has done with it."""
        assert self.queued is not None, "`put` made it"
        self.queued.set()


class CopyEngine(Protocol):
    """A copy is two verbs: `start` returns at once, `wait` makes it usable."""

    def start(self, copy: Copy) -> None:
        """Begin a copy."""

    def wait(self, copy: Copy) -> None:
        """Let the work that is queued from now on see the copied bytes."""

    def expect(self, coming: Sequence[Coming], nbytes: int) -> None:
        """Read ahead in this order, round and round.

        Args:
            coming: for each layer what is not page-locked of it, and whether it will
                be brought in once only.
            nbytes: the most host RAM to take for it.
        """

    def staging_bytes(self) -> int:
        """Host RAM that is taken for what is read ahead."""

    def done(self) -> object | None:
        """Return a token for "the forward that ends now has ended"."""

    def computed(self) -> object | None:
        """Return a token like `done`, for memory that compute alone uses."""

    def order_after(self, tokens: Sequence[object]) -> None:
        """Let compute that is queued from now on run after tokens of `computed`."""

    def note_filled(self) -> None:
        """Note that residents hold what the current stream has waited for or made."""

    def see_filled(self) -> None:
        """Let what is queued from now on see what `note_filled` noted elsewhere."""

    def fence(self) -> None:
        """Let later copies run after all compute queued so far (new memory)."""

    def poison(self, destination: torch.Tensor, token: object | None) -> None:
        """Overwrite released memory, so that a late reader computes NaN."""

    def drain(self) -> None:
        """Return when no copy is under way."""

    def stall_seconds(self) -> float:
        """Seconds for which compute has waited for copies, so far."""

    def close(self) -> None:
        """End the worker thread."""

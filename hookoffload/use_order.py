"""Which of several models is needed soonest: from the order seen over whole runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

# A denoising loop that switches between two models fills it with a hundred a picture.
_TURNS_KEPT = 4096


class _Turn:
    """One model's forwards, until another one's turn comes."""

    __slots__ = ("most", "name", "seen")

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, int] = {}  # how often each of its modules was called
        self.most = 0

    def note(self, entry: str) -> None:
        self.seen[entry] = count = self.seen.get(entry, 0) + 1
        self.most = max(self.most, count)


class UseOrder:
    """Notes the turns of several models and tells whose comes next.

    Example:
        >>> order = UseOrder()
        >>> for name in ("text", "unet", "unet", "vae", "text", "unet"):
        ...     order.note(name)
        >>> order.repeats("unet"), order.split("unet", ["text", "vae"])
        (True, ([], ['vae', 'text']))
    """

    __slots__ = ("_last", "_turns")

    def __init__(self) -> None:
        self._turns: deque[_Turn] = deque(maxlen=_TURNS_KEPT)
        self._last: dict[str, int] = {}  # calls of one module in each's last turn

    def note(self, name: str, entry: str = "") -> None:
        """Notes a forward.

        Args:
            name: The model.
            entry: The module of it that was called by itself; empty for the whole.
        """
        if not self._turns or self._turns[-1].name != name:
            if self._turns:
                self._last[self._turns[-1].name] = self._turns[-1].most
            self._turns.append(_Turn(name))
        self._turns[-1].note(entry)

    def repeats(self, name: str) -> bool:
        """Tells whether the model whose turn it is will be called again in it.

        Args:
            name: The model.
        """
        turn = self._turns[-1] if self._turns else None
        here = turn.most if turn is not None and turn.name == name else 0
        return max(here, self._last.get(name, 0)) > 1

    def split(self, name: str, others: Iterable[str]) -> tuple[list[str], list[str]]:
        """Divides models by whether they are needed before a model's own next forward.

        Args:
            name: The model whose turn it is.
            others: The models to divide.

        Returns:
            Those that are, and those that are not or of which nothing is known; both
            with the one that is needed soonest first.
        """
        left = list(dict.fromkeys(others))
        sooner: list[str] = []
        later: list[str] = []
        names = [turn.name for turn in self._turns]
        begin = _same_place(names, name)
        if begin is not None:
            found = later if self.repeats(name) else sooner
            for coming in names[begin:]:
                if coming == name:
                    found = later
                elif coming in left:
                    left.remove(coming)
                    found.append(coming)
                if not left:
                    break
        return sooner, [*later, *left]


def _same_place(names: list[str], name: str) -> int | None:
    """Finds where the turns went on behind an earlier turn that was like this one.

    Like it is one of the same model behind the same one, else one of the same model;
    of several the one behind which the model's own next turn came soonest. For in a
    loop of two models only the last turns went on otherwise.
    """
    if not names or names[-1] != name:
        return None
    before = names[-2] if len(names) > 1 else None
    following = len(names) - 1
    found: int | None = None
    best: tuple[bool, int] | None = None
    for index in range(len(names) - 2, -1, -1):
        if names[index] != name:
            continue
        other = index == 0 or names[index - 1] != before
        rank = (other, following - index)
        if best is None or rank < best:
            found, best = index + 1, rank
        following = index
    return found

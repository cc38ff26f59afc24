"""Whether a program holds the bytes that a weight had, beside the library itself.

[Note: who holds the bytes] ``weight.data = new`` leaves the bytes before to whoever
kept them (``old = weight.data``, a state dict), and the new ones may be those of
another weight. Where neither is so, the new values go to where the weight rests, and
its layer stays as it is. PyTorch counts the references to a storage; those of the
library are known. In doubt somebody holds the bytes: then the weight gets a master of
its own, which is right and takes longer.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from .master import Master
from .member import Member

_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class Holders:
    """Looks who holds the bytes of masters, all at one moment.

    Args:
        masters: those that there are.
    """

    def __init__(self, masters: Iterable[Master]) -> None:
        self._ours: dict[int, set[int]] = defaultdict(set)  # ids of tensors, by storage
        self._masters: set[int] = set()  # their storages
        for master in masters:
            self._masters.add(_storage(master.flat))
            own = [master.flat, master.flat._base, master.bytes]
            for member in master.members:
                own += [member.rest, member.tensor]
            for tensor in own:
                if tensor is not None:
                    self._ours[_storage(tensor)].add(id(tensor))

    def are_of_a_master(self, tensor: torch.Tensor) -> bool:
        """Tell whether the bytes of a tensor are what some master rests in."""
        return _storage(tensor) in self._masters

    def holds(self, master: Master, member: Member) -> bool:
        """Tell whether a program may hold the bytes that a member rested in."""
        # Its own attribute and the argument; a state dict has the object itself.
        if _count is None or sys.getrefcount(member.rest) > 2:
            return True
        storage = master.flat.untyped_storage()  # one reference more
        return _count(storage._cdata) > len(self._ours[storage._cdata]) + 1


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

"""What was registered in a model when it was attached, to notice what became of it."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from .master import Master
from .member import Member, version_of
from .tensor_geometry import TensorGeometry


class Inventory:
    """The registered tensors and modules, and where the tensors' bytes were last seen.

    Looked at before every pass, for thousands of tensors: what is nearly always found
    unchanged is compared without a line of Python for each.

    Attributes:
        has_packed: whether some are packed, see [Note: packed tensors].
        holders: ids of what is registered.
    """

    def __init__(self) -> None:
        self.has_packed = False
        self.holders: frozenset[int] = frozenset()
        self._managed: dict[int, tuple[Master, Member]] = {}
        self._tensors: list[torch.Tensor] = []
        # Where and how they lay when all was in order.
        self._pointers: list[int] = []
        self._geometry = TensorGeometry([])
        self._registries: list[dict[str, Any]] = []
        self._filled: list[dict[str, Any]] = []  # those of them that are not empty
        self._registered: list[Any] = []
        # Masters that a state dict handed out while a copy was in use, and how often
        # they had been written to.
        self._handed_out: dict[int, tuple[Master, Member, int]] = {}

    def renew(self, model: nn.Module, masters: Iterable[Master]) -> None:
        """Take what there is now for what there has to be."""
        managed = {
            id(member.tensor): (master, member)
            for master in masters
            for member in master.members
        }
        tensors = [member.tensor for _, member in managed.values()]
        registries = [
            registry
            for module in model.modules()
            for registry in (module._parameters, module._buffers, module._modules)
            if isinstance(registry, dict)  # those of scripted modules are not
        ]
        # All at once: Ctrl-C must not leave some of it old.
        self._pointers, self._handed_out = [], {}
        self._geometry = TensorGeometry(tensors)
        self._registries, self._registered = registries, list(_values(registries))
        self._filled = [registry for registry in registries if registry]
        self._managed, self._tensors = managed, tensors
        members = [member for _, member in managed.values()]
        self.has_packed = any(member.is_packed for member in members)
        self.holders = frozenset(id(h) for member in members for h in member.holders)

    def forget(self) -> None:
        """Drop what refers to tensors."""
        self._managed, self._tensors, self._pointers = {}, [], []
        self._geometry = TensorGeometry([])
        self._registries, self._filled, self._registered = [], [], []
        self._handed_out = {}

    def __iter__(self) -> Iterator[Member]:
        """Yield every member of every master."""
        return (member for _, member in self._managed.values())

    def find(self, tensor: torch.Tensor) -> tuple[Master, Member] | None:
        """Return what manages a tensor object, None if nothing does."""
        return self._managed.get(id(tensor))

    def hand_out(self, master: Master, member: Member) -> torch.Tensor:
        """Return a member's value at rest for a state dict, and watch what is done."""
        rest = member.rest
        self._handed_out[id(rest)] = (master, member, version_of(rest))
        return rest

    @property
    def is_watched(self) -> bool:
        """Whether somebody may hold a state dict, and write to it."""
        return bool(self._handed_out)

    def written_by_holders(self) -> list[Master]:
        """Return masters that whoever has a state dict wrote to since the last look."""
        written = []
        for key, (master, member, version) in list(self._handed_out.items()):
            if id(member.rest) != key:
                del self._handed_out[key]  # it rests somewhere else now
            elif version_of(member.rest) != version:
                self._handed_out[key] = (master, member, version_of(member.rest))
                written.append(master)
        return written

    def compute_dtypes(self) -> dict[int, torch.dtype]:
        """Return what the tensors are inside forwards, by the ids of the objects."""
        return {
            key: member.dtype if master.mixed else master.codec.value_dtype
            for key, (master, member) in self._managed.items()
        }

    def replaced(self) -> bool:
        """Tell whether another tensor or module is registered than there was."""
        if sum(map(len, self._registries)) != len(self._registered):
            return True
        return not all(map(is_, _values(self._filled), self._registered))

    def given_other_data(self) -> list[tuple[Master, Member]]:
        """Return the tensors that were given other bytes (``tensor.data = new``)."""
        tensors = self._tensors
        pointers = list(map(torch.Tensor.data_ptr, tensors))
        # ``p.data = p.data.t()`` and ``p.data[:10]`` begin where the others did.
        if pointers == self._pointers and self._geometry.is_unchanged():
            return []
        others = []
        for (master, member), pointer in zip(
            self._managed.values(), pointers, strict=True
        ):
            known = pointer in (member.rest_pointer, member.bound_pointer)
            if not known and member.was_cast_by_its_forward():
                member.set_data(member.rest)
                continue
            if not known or not member.lies_as_before():
                others.append((master, member))
        if not others:
            self._pointers = pointers
            if not self._geometry.is_unchanged():
                self._geometry = TensorGeometry(tensors)
        return others

    def take_apart(self, given: Sequence[tuple[Master, Member]]) -> None:
        """Copy data that members were given and that belongs to others among them.

        ``a.data, b.data = b.data, a.data`` exchanges two weights. What goes into the
        master of one must not be over what the other is still to be read from.
        """
        masters = {id(master): master for master, _ in given}
        spans = sorted(
            (m.flat.data_ptr(), m.plain_bytes, k) for k, m in masters.items()
        )
        bound = {member.bound_pointer for _, member in given}
        for master, member in given:
            pointer = member.tensor.data_ptr()
            place = bisect_right(spans, (pointer, sys.maxsize)) - 1
            start, size, owner = spans[place]
            theirs = place >= 0 and pointer < start + size
            if theirs and owner == id(master):
                theirs = len(master.members) > 1
            if theirs or (pointer in bound and pointer != member.bound_pointer):
                value = member.tensor.data.to(member.rest.device, copy=True)
                member.set_data(value)


def _values(registries: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, registries))

"""What was registered in a model when it was attached, to notice what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn

from .master import Master, Member


class Inventory:
    """The registered tensors and modules, and where the tensors' bytes were last seen.

    Looked at before every pass, for thousands of tensors: what is nearly always found
    unchanged is compared without a line of Python for each.
    """

    def __init__(self) -> None:
        self._managed: dict[int, tuple[Master, Member]] = {}
        self._tensors: list[torch.Tensor] = []
        self._pointers: list[int] = []  # where they were when all was in order
        self._registries: list[dict[str, Any]] = []
        self._registered: list[Any] = []

    def renew(self, model: nn.Module, masters: Iterable[Master]) -> None:
        """Take what there is now for what there has to be."""
        self._managed = {
            id(member.tensor): (master, member)
            for master in masters
            for member in master.members
        }
        self._tensors = [member.tensor for _, member in self._managed.values()]
        self._pointers = []
        self._registries = [
            registry
            for module in model.modules()
            for registry in (module._parameters, module._buffers, module._modules)
            if isinstance(registry, dict)  # those of scripted modules are not
        ]
        self._registered = list(self._values())

    def forget(self) -> None:
        """Drop what refers to tensors."""
        self._managed, self._tensors, self._pointers = {}, [], []
        self._registries, self._registered = [], []

    def __iter__(self) -> Iterator[Member]:
        """Yield every member of every master."""
        return (member for _, member in self._managed.values())

    def find(self, tensor: torch.Tensor) -> tuple[Master, Member] | None:
        """Return what manages a tensor object, None if nothing does."""
        return self._managed.get(id(tensor))

    def compute_dtypes(self) -> dict[int, torch.dtype]:
        """Return what the tensors are inside forwards, by the ids of the objects."""
        return {
            key: member.dtype if master.mixed else master.codec.compute
            for key, (master, member) in self._managed.items()
        }

    def replaced(self) -> bool:
        """Tell whether another tensor or module is registered than there was."""
        if sum(map(len, self._registries)) != len(self._registered):
            return True
        return not all(map(is_, self._values(), self._registered))

    def given_other_data(self) -> list[tuple[Master, Member]]:
        """Return the tensors that were given other bytes (``tensor.data = new``)."""
        pointers = list(map(torch.Tensor.data_ptr, self._tensors))
        if pointers == self._pointers:
            return []
        others = []
        for (master, member), pointer in zip(
            self._managed.values(), pointers, strict=True
        ):
            if pointer not in (member.rest_pointer, member.bound_pointer):
                others.append((master, member))
        if not others:
            self._pointers = pointers
        return others

    def _values(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._registries))

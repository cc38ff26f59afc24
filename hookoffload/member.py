"""The tensor objects of a model, whose bytes the library swaps.

[Note: in-place moves]
A module is never replaced and neither is a Parameter: the library assigns
``tensor.data``, which swaps the bytes, sizes and dtype under an object that the user,
the optimizer and tied modules go on holding. Three values take turns there:

* at rest, a view of the master (``Member.rest``). Whatever reads or writes the tensor
  then (``state_dict``, ``load_state_dict``, a user's edit) works on the master itself;
* inside a forward, a view in the window, in the scratch or in a resident block. It is
  a copy: release swaps the pointer back and the copied bytes are forgotten, unless
  ``_version`` says that the forward wrote to them;
* for a resident whose dtype needs no cast, the resident block, also between passes.

``.data`` keeps the version counter of the object, so one counter tells of writes to
any of the three. Writes through ``tensor.data.mul_()`` escape it: PyTorch gives
``.data`` a counter of its own. They are safe behind ``offload(model)``, when
everything rests and nothing has been copied ahead; otherwise they may be lost. Those of
peft's merges are noticed by what peft says of them, see [Note: merges].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch

from .codec import is_movable
from .registered import ManagedTensor


class Member:
    """One tensor object of a master, and where it lies in the master's bytes."""

    __slots__ = (
        "bound_pointer",
        "castable",
        "device",
        "dtype",
        "former_pointer",
        "holders",
        "location_in_master",
        "merges",
        "name",
        "rest",
        "rest_pointer",
        "shape",
        "stays",
        "stays_by_class",
        "stride",
        "tensor",
        "version",
        "wrappers",
    )

    def __init__(self, managed: ManagedTensor, low: int) -> None:
        tensor = managed.tensor
        self.name = managed.name
        self.tensor = tensor
        self.castable = managed.castable
        self.stays = self.stays_by_class = managed.stays
        self.merges = managed.merges
        # What is registered: itself, unless it is a part, see [Note: packed tensors].
        self.holders = tuple(managed.holders)
        self.wrappers = managed.wrappers
        self.device = tensor.device
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        # In elements of its own dtype: casts keep the count, not the bytes.
        offset = tensor.storage_offset() * tensor.itemsize - low
        self.location_in_master = offset // tensor.itemsize
        self.rest = tensor.data
        self.rest_pointer = self.rest.data_ptr()
        self.bound_pointer = 0
        self.former_pointer = 0  # where it rested, until it is where it rests now
        self.version = version_of(tensor)

    @property
    def is_packed(self) -> bool:
        """Whether its class makes state dicts by itself; see [Note: packed tensors]."""
        itself = any(holder is self.tensor for holder in self.holders)
        return not itself or not is_movable(self.tensor) or not self.stays_by_class

    def set_data(self, value: torch.Tensor) -> None:
        """Have the tensor be at ``value``, and what wraps it say so."""
        self.tensor.data = value
        self.tell_wrappers()

    def tell_wrappers(self) -> None:
        """Have what wraps the tensor say where it is."""
        for wrapper in self.wrappers:
            wrapper.follow(self.tensor.device)

    def view(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return this member over the storage of a flat tensor.

        Args:
            base: the flat tensor.
            start: the element of the storage, not of the tensor, where its master
                begins.
        """
        return base.as_strided(self.shape, self.stride, start + self.location_in_master)

    def was_cast_by_its_forward(self) -> bool:
        """Tell whether it was given its own value in another dtype.

        That is what forwards do where `stays` is false, also to what nobody moves.
        """
        now, rest = self.tensor, self.rest
        if self.stays or (now.shape, now.device) != (rest.shape, rest.device):
            return False
        return now.dtype != rest.dtype and torch.equal(now.data, rest.to(now.dtype))

    def is_same(self) -> bool:
        """Tell whether the tensor has the shape and dtype that it has at rest."""
        tensor = self.tensor
        same = (tensor.shape, tensor.dtype) == (self.shape, self.rest.dtype)
        return same and not tensor.is_meta

    def is_resized(self) -> bool:
        """Tell whether it was given data of another shape, otherwise as at rest.

        That is how token embeddings grow. A part of a packed tensor has the shape that
        its wrapper says.
        """
        tensor = self.tensor
        itself = any(holder is tensor for holder in self.holders)
        alike = tensor.dtype == self.rest.dtype and not tensor.is_meta
        return itself and alike and tensor.shape != self.shape

    def has_data_of_its_own(self) -> bool:
        """Tell whether it was given data that may become what it rests in."""
        tensor = self.tensor
        itself = any(holder is tensor for holder in self.holders)
        there = tensor.device == self.rest.device
        # It is not the program's if an interrupt came before it was at its new place.
        theirs = there and tensor.data_ptr() != self.former_pointer
        return (itself and theirs and self.is_same()) or self.is_resized()

    def require_unmoved(self) -> None:
        """Raise if the tensor, which is bound between passes, was moved or cast."""
        if not self.is_same() and not self.is_resized():
            self.refuse_move()

    def refuse_move(self) -> NoReturn:
        """Raise, saying what the tensor is and what it was."""
        tensor, rest = self.tensor, self.rest
        raise RuntimeError(
            f"{self.name} was moved or cast while offload hooks are attached: it is "
            f"{tensor.dtype} on {tensor.device} with shape {tuple(tensor.shape)}, and "
            f"was {rest.dtype} on {rest.device} with shape {tuple(rest.shape)}. Call "
            "detach(model) before model.to(), .half(), .cuda() and the like, and "
            "attach again after"
        )

    def lies_as_before(self) -> bool:
        """Tell whether the tensor has the shape, strides and dtype that it rests in."""
        tensor = self.tensor
        same = tensor.shape == self.shape and tensor.stride() == self.stride
        return same and tensor.dtype == self.rest.dtype

    def set_rest(self, rest: torch.Tensor) -> None:
        """Make ``rest`` the value at rest (does not touch the tensor)."""
        self.former_pointer = self.rest_pointer
        self.rest = rest
        self.rest_pointer = rest.data_ptr()


# Every pass goes through every member of what streams, a few thousand of them: in these
# three no call is made for each that is not one of PyTorch's.


def bind_members(values: Iterable[tuple[Member, torch.Tensor, int]]) -> None:
    """Point members at their values, whose addresses are given.

    What ``_version`` counts are writes: it stays when ``.data`` is swapped.
    """
    for member, value, pointer in values:
        member.tensor.data = value
        member.bound_pointer = pointer
        if member.wrappers:
            member.tell_wrappers()


def rest_members(members: Iterable[Member]) -> None:
    """Point members at their masters."""
    for member in members:
        tensor = member.tensor
        tensor.data = member.rest
        member.bound_pointer = 0
        try:
            member.version = tensor._version
        except RuntimeError:
            member.version = 0  # see `version_of`
        if member.wrappers:
            member.tell_wrappers()


def are_untouched(members: Iterable[Member], *, bound: bool) -> bool:
    """Tell whether members are where they were put, and were not written to.

    Args:
        members: the members.
        bound: they were bound; otherwise they rest.
    """
    for member in members:
        tensor = member.tensor
        try:
            version = tensor._version
        except RuntimeError:
            version = 0  # see `version_of`
        place = member.bound_pointer if bound else member.rest_pointer
        if version != member.version or tensor.data_ptr() != place:
            return False
    return True


def version_of(tensor: torch.Tensor) -> int:
    """Return the in-place version, 0 for tensors made in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return 0  # they keep none

"""What a converter does to tensors, found out on stand-ins and done later in parts.

[Note: traced conversion]
A converter is called once, with tensors on the meta device: shapes without values. A
dispatch mode notes every operation, and each tensor as the place that it takes in a
storage. Views need no note of their own then: they are other places in the same
storage. What comes back is one of

* a contiguous place in a storage of the checkpoint that nothing wrote to: a tensor
  renamed, or a part of one, or a copy of such a place that nothing wrote to either
  (``torch.cat([part])``). It is read from the file where it lies;
* anything else: computed. Storages that an operation connects form a *group*; groups
  are computed one after the other, so that the memory this takes is that of the
  largest group and not that of the model. A storage of the checkpoint connects nothing
  as long as it is only read.

A converter that needs values (``.item()``, ``.numpy()``) raises on stand-ins. It is
then called with all of the real tensors at once, and `Writes` tells which of them it
changed, or may have changed behind PyTorch's back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_META, _CPU = torch.device("meta"), torch.device("cpu")

# Operators that give a copy, if they are given one tensor.
_COPIES = frozenset({torch.ops.aten.cat.default, torch.ops.aten.clone.default})

# What gives a tensor's memory to code that PyTorch does not see.
_EXPORTS = frozenset(
    {
        "numpy",
        "__array__",
        "data_ptr",
        "__dlpack__",
        "storage",
        "_typed_storage",
        "untyped_storage",
    }
)


@dataclass(frozen=True)
class Place:
    """Where a tensor's elements lie in a storage.

    Attributes:
        storage: what tells storages apart.
        dtype: the tensor's dtype.
        shape: its shape.
        stride: its strides, in elements.
        offset: its first element, counted from the start of the storage.
    """

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Place:
        """Return the place of a tensor; its storage must be kept alive meanwhile."""
        return cls(
            _storage_of(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
        )

    @property
    def start(self) -> int:
        """The first byte, counted from the start of the storage."""
        return self.offset * self.dtype.itemsize

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the tensor that takes this place in another storage."""
        tensor = torch.empty(0, dtype=self.dtype)
        return tensor.set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Operation:
    """One call of an operator.

    Attributes:
        function: the operator.
        args: its arguments, tensors given as places.
        kwargs: its keyword arguments, likewise.
        reads: the storages of the tensors that it was given.
        writes: those that it writes to.
        makes: the results that have new storages, by their index in the result.
    """

    function: Any
    args: Any
    kwargs: Any
    reads: frozenset[int]
    writes: frozenset[int]
    makes: tuple[tuple[int, Place], ...]


class Writes(TorchDispatchMode):
    """Notes the storages that operators write to, while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.written |= _written_by(func, args, kwargs)
        return func(*args, **kwargs)


class Exports(TorchFunctionMode):
    """Notes the storages whose memory was handed to others, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.exported: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _EXPORTS:
            self.exported |= {_storage_of(tensor) for tensor in _tensors(args)}
        return func(*args, **(kwargs or {}))


class Trace(TorchDispatchMode):
    """Notes what is done with tensors on the meta device, while it is entered."""

    def __init__(self, stand_ins: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = {_storage_of(t): name for name, t in stand_ins.items()}
        self.written: set[int] = set()
        self.operations: list[_Operation] = []
        self.untraceable = ""
        # An address is that of one storage as long as no noted one is freed.
        self._alive: list[torch.Tensor] = list(stand_ins.values())
        self._known = set(self.sources)
        # What was copied as it is, by the storage of the copy.
        self._copied: dict[int, Place] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in _tensors((args, kwargs)) if t.is_meta]
        self._alive += inputs
        # Before the call: an operator such as `t_` changes its argument's place.
        noted_args, noted_kwargs = tree_map_only(
            torch.Tensor, self._note, (args, kwargs)
        )
        result = func(*args, **kwargs)
        outputs = [
            (index, tensor)
            for index, tensor in enumerate(tree_leaves(result))
            if isinstance(tensor, torch.Tensor) and tensor.is_meta
        ]
        if not inputs and not outputs:
            return result  # values of its own, which it has now
        self._alive += [tensor for _, tensor in outputs]
        if not all(is_plain(tensor) for _, tensor in outputs):
            self.untraceable = f"{func} gives a tensor that is not plain"
        writes = _written_by(func, args, kwargs)
        if not writes <= self._known:
            self.untraceable = f"{func} writes to a tensor that is not a stand-in"
        if writes and torch.Tag.inplace_view in func.tags:
            if func.overloadpacket.__name__ in ("set_", "resize_", "resize_as_"):
                self.untraceable = f"{func} gives a tensor other memory"
            writes = frozenset()
        makes = tuple(
            (index, place)
            for index, tensor in outputs
            if (place := Place.of(tensor)).storage not in self._known
        )
        if writes or makes:
            reads = frozenset(map(_storage_of, inputs))
            self.operations.append(
                _Operation(func, noted_args, noted_kwargs, reads, writes, makes)
            )
            self.written |= writes
            self._known |= {place.storage for _, place in makes}
        one = func in _COPIES and len(inputs) == len(makes) == 1
        if one and inputs[0].is_contiguous() and result.is_contiguous():
            self._copied[makes[0][1].storage] = Place.of(inputs[0])
        return result

    def _note(self, tensor: torch.Tensor) -> object:
        if tensor.is_meta:
            return Place.of(tensor)
        return tensor.detach().clone()  # its value now; it may change later

    def source_of(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """Return the name whose bytes a returned tensor is, and the first of them."""
        if not tensor.is_meta or not is_plain(tensor) or not tensor.is_contiguous():
            return None
        place = Place.of(tensor)
        start = place.start
        while place.storage not in self.written:
            name = self.sources.get(place.storage)
            if name is not None:
                return name, start
            copied = self._copied.get(place.storage)
            if copied is None:
                return None
            place = copied
            start += place.start
        return None

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Tell whether a returned tensor can be computed from what was noted."""
        return is_plain(tensor) and (
            not tensor.is_meta or _storage_of(tensor) in self._known
        )

    def groups(self, places: Mapping[str, Place]) -> Iterable[Group]:
        """Divide what is to be computed into groups that have no storage in common."""
        parent: dict[int, int] = {}

        def root(storage: int) -> int:
            while parent.setdefault(storage, storage) != storage:
                parent[storage] = storage = parent[parent[storage]]
            return storage

        shared = self.sources.keys() - self.written
        for operation in self.operations:
            touched = operation.reads | operation.writes
            touched |= {place.storage for _, place in operation.makes}
            first, *others = sorted(touched - shared)
            for other in others:
                parent[root(other)] = root(first)
        groups: dict[int, Group] = {}
        for name, place in places.items():
            key = root(place.storage)
            groups.setdefault(key, Group([], {})).places[name] = place
        for operation in self.operations:
            made = operation.writes | {place.storage for _, place in operation.makes}
            group = groups.get(root(min(made)))
            if group is not None:
                group.operations.append(operation)
        return groups.values()


@dataclass(frozen=True)
class Group:
    """Operations that have to be done together, and what they are done for.

    Attributes:
        operations: in the order in which the converter did them.
        places: what is wanted of their results, by name.
    """

    operations: list[_Operation]
    places: dict[str, Place]

    def sources(self) -> tuple[set[int], set[int]]:
        """Return the storages that are read, and those that are written to."""
        writes = {s for operation in self.operations for s in operation.writes}
        reads = {s for operation in self.operations for s in operation.reads}
        return reads | {place.storage for place in self.places.values()}, writes

    def compute(
        self, storages: dict[int, torch.UntypedStorage]
    ) -> dict[str, torch.Tensor]:
        """Do the operations on real tensors.

        Args:
            storages: the real storages of the checkpoint's tensors by those of their
                stand-ins; takes what is computed as well.
        """

        def real(noted: Any) -> Any:
            return noted.over(storages[noted.storage])

        for operation in self.operations:
            noted = (operation.args, operation.kwargs)
            args, kwargs = tree_map_only(
                torch.device, _real_device, tree_map_only(Place, real, noted)
            )
            leaves = tree_leaves(operation.function(*args, **kwargs))
            for index, place in operation.makes:
                storages[place.storage] = _in_place(leaves[index], place)
        return {name: real(place) for name, place in self.places.items()}


def _real_device(device: torch.device) -> torch.device:
    return _CPU if device == _META else device


def _in_place(tensor: torch.Tensor, place: Place) -> torch.UntypedStorage:
    """Return a storage in which a tensor has its place; the kernels may differ."""
    if replace(Place.of(tensor), storage=place.storage) == place:
        return tensor.untyped_storage()
    last = sum((n - 1) * s for n, s in zip(place.shape, place.stride, strict=True))
    base = torch.empty(place.offset + last + 1, dtype=place.dtype)
    place.over(base.untyped_storage()).copy_(tensor)
    return base.untyped_storage()


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's elements are what its storage holds at its place."""
    strided = tensor.layout is torch.strided and not tensor.is_quantized
    return strided and not tensor.is_conj() and not tensor.is_neg()


def _storage_of(tensor: torch.Tensor) -> int:
    """Return what tells storages apart; 0 for tensors that have none (sparse ones)."""
    if tensor.layout is not torch.strided:
        return 0
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _written_by(func: Any, args: Any, kwargs: Any) -> frozenset[int]:
    """Return the storages that an operator's schema says it writes to."""
    written: set[int] = set()
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        written |= {_storage_of(tensor) for tensor in _tensors(given)}
    return frozenset(written)

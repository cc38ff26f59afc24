"""Did tensors change their shapes or dtypes? Asked of thousands before each pass."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, eq, is_
from typing import Any

import torch

try:
    from torch._C._dynamo import guards as _guards
except ImportError:  # what Dynamo guards its graphs with belongs to PyTorch alone
    _guards = None  # type: ignore[assignment]


class TensorGeometry:
    """The shapes, strides and dtypes of tensors, as they are now.

    The answer is nearly always that nothing has changed. TorchDynamo's guards compare
    all tensors in one call, at a third of what one line of Python for each of them
    costs. They are stricter than is asked for here (``requires_grad``, inference mode),
    so what they find changed is looked at again; what they pass is the same.

    Args:
        tensors: what to look at.
    """

    __slots__ = ("_dtypes", "_guards", "_sizes", "_strides", "_tensors")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._sizes = list(map(torch.Tensor.size, tensors))
        self._strides = list(map(torch.Tensor.stride, tensors))
        self._dtypes = list(map(_dtype_of, tensors))
        self._guards = _make_guards(tensors)

    def is_unchanged(self) -> bool:
        """Tell whether every tensor has the shape, strides and dtype that it had."""
        tensors = self._tensors
        if self._guards is not None and self._guards.check(*tensors):
            return True
        # One after the other, without a list of them all: thousands of new containers
        # in each pass would have Python's collector look at the whole heap.
        sizes = map(eq, self._sizes, map(torch.Tensor.size, tensors))
        strides = map(eq, self._strides, map(torch.Tensor.stride, tensors))
        dtypes = map(is_, self._dtypes, map(_dtype_of, tensors))
        unchanged = all(sizes) and all(strides) and all(dtypes)
        if unchanged:
            self._guards = _make_guards(tensors)  # for the mode that is on now
        return unchanged


_dtype_of = attrgetter("dtype")


def _make_guards(tensors: Sequence[torch.Tensor]) -> Any:
    make = getattr(_guards, "TensorGuards", None)
    if make is None or not tensors:
        return None
    try:
        return make(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (RuntimeError, TypeError, ValueError):
        return None  # another version's, or tensors that it does not know

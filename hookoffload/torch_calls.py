"""What calls of torch functions do to the tensors that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Reading these needs no bytes.
METADATA = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__"),
        *("storage_offset", "element_size", "is_contiguous", "is_floating_point"),
        *("is_complex", "is_pinned", "is_shared", "is_set_to", "is_same_size"),
        *("get_device", "data_ptr", "untyped_storage", "_typed_storage", "__hash__"),
        *("requires_grad_", "register_hook", "retain_grad", "is_inference"),
    }
)
# Properties that look at bytes.
VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})

# Operators in place: __iadd__ and its like, and what indexing on the left side calls.
_IN_PLACE = frozenset(
    {
        *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"),
        *("__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__"),
        *("__irshift__", "__setitem__"),
    }
)


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function; that of a property's getter is __get__."""
    return getattr(func, "__name__", "")


def property_of(func: Callable[..., Any]) -> str:
    """Return the name of the property whose getter or setter a function is."""
    return getattr(getattr(func, "__self__", None), "__name__", "")


def writes(func: Callable[..., Any]) -> bool:
    """Tell whether a function changes the value of its first argument."""
    name = name_of(func)
    if name == "__set__":
        return property_of(func) == "data"
    if name in METADATA:
        return False
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))

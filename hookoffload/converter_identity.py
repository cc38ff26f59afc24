"""Telling converters apart, so that one's results are not taken for another's.

The identity is made of what a function does, not of where it stands: its bytecode,
its defaults, what it holds in its closure, and the functions and values that it finds
in its module. Source text is not used: after an edit it is not that of the function
which is running. Of other modules only the file counts as a whole. What it asks the
system for (environment variables, the time) is not in it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PLAIN = (
    type(None),
    type(Ellipsis),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    torch.dtype,
    torch.device,
    torch.memory_format,
    re.Pattern,
    Path,
)


class _UnknownError(Exception):
    """Something that cannot be recognised in another process."""


def identity_of(converter: Callable[..., Any]) -> str | None:
    """Return a digest that changes when what a converter does may have changed.

    Args:
        converter: a function, method, class, partial or object that can be called.

    Returns:
        The digest; None if the converter holds something that cannot be recognised
        again, such as a tensor or an open file.

    Example:
        >>> scale = 2
        >>> double = lambda state: {name: t * scale for name, t in state.items()}
        >>> before = identity_of(double)
        >>> before == identity_of(double)
        True
        >>> identity_of(lambda state: state) == before
        False
    """
    try:
        description = _Description().of(converter)
    except _UnknownError:
        return None
    # Bytecode differs between versions of Python, and what operators do between
    # versions of torch.
    versions = (sys.implementation.cache_tag, torch.__version__)
    return hashlib.sha256(repr((versions, description)).encode()).hexdigest()


class _Description:
    """Describes values as nested tuples of text that are equal if the values are."""

    def __init__(self) -> None:
        self._met: dict[int, int] = {}  # functions and objects by the order of meeting
        self._alive: list[object] = []  # an id is that of one object while it lives
        self._package = ""

    def of(self, value: Any) -> object:
        if isinstance(value, _PLAIN):
            return (type(value).__name__, repr(value))
        if id(value) in self._met:
            return ("met", self._met[id(value)])
        self._met[id(value)] = len(self._met)
        self._alive.append(value)
        return (type(value).__qualname__, self._inside(value))

    def _inside(self, value: Any) -> object:
        if isinstance(value, (tuple, list)):
            return [self.of(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return [self.of(item) for item in sorted(value, key=repr)]
        if isinstance(value, dict):
            return [(self.of(key), self.of(item)) for key, item in value.items()]
        if isinstance(value, types.FunctionType) and self._is_near(value):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.MethodType):
            return (self.of(value.__self__), self.of(value.__func__))
        if isinstance(value, functools.partial):
            return [self.of(p) for p in (value.func, value.args, value.keywords)]
        if isinstance(value, types.ModuleType):
            return _module(value)
        if isinstance(value, (type, types.FunctionType)):
            module = sys.modules.get(value.__module__)
            return (value.__qualname__, module and _module(module), self._values(value))
        if isinstance(value, logging.Logger):
            return value.name
        if callable(value) and isinstance(getattr(value, "__name__", None), str):
            return (getattr(value, "__module__", None), value.__name__)  # a builtin
        return self._object(value)

    def _is_near(self, function: types.FunctionType) -> bool:
        """Tell whether a function is of the package of the first one that was met.

        Others are described by their module's file: what they call is their own
        affair, and leads far.
        """
        package = str(function.__module__).partition(".")[0]
        self._package = self._package or package
        return package == self._package

    def _function(self, function: types.FunctionType) -> object:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents))
            except ValueError:  # not assigned yet
                cells.append("empty")
        found = function.__globals__
        names = sorted(name for name in _names(function.__code__) if name in found)
        return (
            function.__qualname__,
            self.of(function.__code__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            cells,
            [(name, self.of(found[name])) for name in names],
        )

    def _values(self, kind: type | types.FunctionType) -> object:
        """Describe what a class of the converter's package holds: it can be changed."""
        near = str(kind.__module__).partition(".")[0] == self._package
        if not near or not isinstance(kind, type):
            return ()
        plain = (*_PLAIN, tuple, list, dict, set, frozenset)
        return [
            (name, self.of(value))
            for name, value in vars(kind).items()
            if not name.startswith("__") and isinstance(value, plain)
        ]

    def _code(self, code: types.CodeType) -> object:
        return (
            code.co_code.hex(),
            getattr(code, "co_exceptiontable", b"").hex(),
            (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
            (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
            code.co_flags,
            [self.of(constant) for constant in code.co_consts],
        )

    def _object(self, value: Any) -> object:
        if isinstance(value, torch.Tensor):
            raise _UnknownError
        try:
            how, args, *state = value.__reduce_ex__(2)
        except Exception as error:  # it has its own ways to say that it cannot
            raise _UnknownError from error
        state, items = state[:1], [list(part or ()) for part in state[1:3]]
        made_by = getattr(how, "__qualname__", repr(how))
        return [made_by, *(self.of(part) for part in (args, state, items))]


def _names(code: types.CodeType) -> set[str]:
    """Return the global names that a function and those inside it may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _module(module: types.ModuleType) -> object:
    path = getattr(module, "__file__", None)
    try:
        content = Path(path).read_bytes() if path else b""
    except OSError:
        content = b""
    version = getattr(module, "__version__", None)
    return (module.__name__, str(version), hashlib.sha256(content).hexdigest())

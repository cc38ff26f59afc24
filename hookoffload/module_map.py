"""Which modules move as a layer, by class or by dotted name."""

from __future__ import annotations

import difflib
import logging
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

logger = logging.getLogger(__name__)

Kind = Literal["layer", "atomic"]
_Key = type[nn.Module] | str

# "linear", "module" and "nonrecurse" are the seed system's words. It never enters a
# module that it matched, but for the last kind.
_KINDS: dict[str, Kind] = {
    "layer": "layer",
    "atomic": "atomic",
    "linear": "atomic",
    "module": "atomic",
    "nonrecurse": "layer",
}
_WRAPPERS: dict[str, Kind] = {
    "AutoWrappedLinear": "atomic",
    "AutoWrappedModule": "atomic",
    "AutoWrappedNonRecurseModule": "layer",
}

_QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl."
# Old name -> new name of classes that a package renamed: a map written for one version
# must match in the other. Both are renames in transformers 5.
_RENAMED = {
    f"{_QWEN}Qwen2RMSNorm": f"{_QWEN}Qwen2_5_VLRMSNorm",
    f"{_QWEN}Qwen2_5_VisionRotaryEmbedding": f"{_QWEN}Qwen2_5_VLVisionRotaryEmbedding",
}


class ModuleMap:
    """A user's module map, checked and ready to be asked.

    A *flat* map is `{class or dotted name: kind}`. A *registry* is
    `{model class or dotted name: flat map}`, from which `for_model` takes the one that
    fits. Kinds are "layer" (the module's own direct tensors move as one; its children
    are looked at in turn) and "atomic" (the whole subtree moves as one). "linear" and
    "module" are accepted for "atomic", "nonrecurse" for "layer", and so are
    `AutoWrappedLinear`, `AutoWrappedModule` and `AutoWrappedNonRecurseModule`, as
    classes or as dotted names.

    A dotted name is compared with the names of a module's class and its bases, or with
    what stands under that name in a module that is imported already. Nothing is
    imported to find out.

    Args:
        source: The map as the user wrote it; None is an empty one.

    Raises:
        ValueError: A key is neither a subclass of `nn.Module` nor a string, a kind is
            unknown, or flat and nested entries are mixed.

    Example:
        >>> from torch import nn
        >>> module_map = ModuleMap({"torch.nn.Linear": "layer", nn.LSTM: "atomic"})
        >>> module_map.kind_of(nn.Linear(2, 2))
        'layer'
        >>> module_map.kind_of(nn.ReLU()) is None
        True
    """

    __slots__ = ("_cache", "_entries", "_models")

    def __init__(self, source: Mapping[Any, Any] | ModuleMap | None = None) -> None:
        """See the class."""
        self._entries: tuple[tuple[_Key, Kind], ...] = ()
        self._models: tuple[tuple[_Key, ModuleMap], ...] = ()
        # A dotted name may match more once more is imported, so the cache must not
        # outlive the work on one model; for_model starts a new one.
        self._cache: dict[type[nn.Module], Kind | None] = {}
        if isinstance(source, ModuleMap):
            self._entries = source._entries
            self._models = source._models
            return
        if source is None:
            return
        if not isinstance(source, Mapping):
            raise ValueError(
                f"module_map={source!r} is not a mapping; give a dictionary such as "
                '{"torch.nn.Linear": "layer"}'
            )
        nested = [key for key, value in source.items() if isinstance(value, Mapping)]
        if not nested:
            self._entries = tuple(
                (_checked_key(key), _checked_kind(key, value))
                for key, value in source.items()
            )
        elif len(nested) == len(source):
            self._models = tuple(
                (_checked_key(key), _checked_flat(key, value))
                for key, value in source.items()
            )
        else:
            flat = next(key for key in source if key not in nested)
            raise ValueError(
                f"module_map mixes a registry entry ({_key_name(nested[0])}: a map of "
                f"its own) with a kind ({_key_name(flat)}: {source[flat]!r}); give "
                "either one flat map or one map for each model class"
            )

    @property
    def is_registry(self) -> bool:
        """Whether this holds one map for each model class."""
        return bool(self._models)

    def kind_of(self, module: nn.Module) -> Kind | None:
        """Returns the kind of the first entry that matches a module's class.

        Args:
            module: Any module; only its class is looked at.

        Returns:
            The kind, or None where no entry matches.

        Raises:
            RuntimeError: This is a registry; ask what `for_model` returns instead.
        """
        self._require_flat("kind_of")
        cls = type(module)
        if cls not in self._cache:
            self._cache[cls] = next(
                (kind for key, kind in self._entries if _matches(key, cls)), None
            )
        return self._cache[cls]

    def for_model(self, model: nn.Module) -> ModuleMap:
        """Returns the flat map for a model.

        A registry's entry for the model's own class goes before those for its base
        classes. Where none fits, the map is empty and a warning is logged.

        Args:
            model: The root module.

        Returns:
            A flat map, equal to this one if this one is flat.
        """
        if not self.is_registry:
            return ModuleMap(self)
        for cls in type(model).__mro__:
            for key, entry in self._models:
                if _is_class(key, cls):
                    return ModuleMap(entry)
        names = [_key_name(key) for key, _ in self._models]
        logger.warning(
            "module_map has no entry for %s, so the default layers are used; "
            "near names in the map: %s",
            _class_name(type(model)),
            ", ".join(_near(_class_name(type(model)), names)) or "none",
        )
        return ModuleMap()

    def unmatched(self, modules: Iterable[nn.Module]) -> list[tuple[str, list[str]]]:
        """Returns the keys that match none of the modules.

        A key that matches a module counts as matched even if an earlier key decides
        that module's kind.

        Args:
            modules: The modules of one model, `model.modules()`.

        Returns:
            For each such key, in the map's order, its name and up to 3 names of
            classes near it that do occur.

        Raises:
            RuntimeError: This is a registry; ask what `for_model` returns instead.
        """
        self._require_flat("unmatched")
        classes = list(dict.fromkeys(type(module) for module in modules))
        names = [_class_name(cls) for cls in classes]
        return [
            (_key_name(key), _near(_key_name(key), names))
            for key, _ in self._entries
            if not any(_matches(key, cls) for cls in classes)
        ]

    def _require_flat(self, method: str) -> None:
        if self.is_registry:
            raise RuntimeError(
                f"ModuleMap.{method} was called on a registry of "
                f"{len(self._models)} model classes; call for_model(model) first and "
                f"{method} on what it returns"
            )

    def __len__(self) -> int:
        """Returns the number of entries."""
        return len(self._entries) + len(self._models)

    def __eq__(self, other: object) -> bool:
        """Returns whether the other has the same entries in the same order."""
        if not isinstance(other, ModuleMap):
            return NotImplemented
        return self._entries == other._entries and self._models == other._models

    def __hash__(self) -> int:
        """Returns a hash of the entries."""
        return hash((self._entries, self._models))

    def __repr__(self) -> str:
        """Returns the entries, with dotted names for the classes."""
        entries: list[tuple[_Key, Any]] = [*self._entries, *self._models]
        shown = ", ".join(f"{_key_name(key)!r}: {value!r}" for key, value in entries)
        return f"ModuleMap({{{shown}}})"


def _checked_key(key: object) -> _Key:
    if isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module)):
        return key
    raise ValueError(
        f"module_map key {key!r} is neither a subclass of torch.nn.Module nor a dotted "
        'name such as "torch.nn.Linear"'
    )


def _checked_kind(key: object, value: object) -> Kind:
    word = value.__name__ if isinstance(value, type) else value
    if isinstance(word, str):
        if word in _KINDS:
            return _KINDS[word]
        for suffix, kind in _WRAPPERS.items():
            if word.endswith(suffix):
                return kind
    raise ValueError(
        f"module_map[{_key_name(key)!r}] = {value!r} is no kind; use 'layer' (the "
        "module's own tensors move as one) or 'atomic' (its whole subtree does); also "
        f"accepted: {', '.join([*list(_KINDS)[2:], *_WRAPPERS])}"
    )


def _checked_flat(key: object, source: Mapping[Any, Any]) -> ModuleMap:
    try:
        flat = ModuleMap(source)
    except ValueError as error:
        raise ValueError(f"in the entry for {_key_name(key)}: {error}") from error
    if flat.is_registry:
        raise ValueError(
            f"module_map[{_key_name(key)!r}] is a registry inside a registry; its "
            "values must be kinds"
        )
    return flat


def _matches(key: _Key, cls: type[nn.Module]) -> bool:
    return any(_is_class(key, base) for base in cls.__mro__)


def _is_class(key: _Key, cls: type) -> bool:
    if not isinstance(key, str):
        return cls is key
    name = _class_name(cls)
    if _RENAMED.get(key, key) == _RENAMED.get(name, name):
        return True
    return any(_imported(spelling) is cls for spelling in _spellings(key))


def _spellings(name: str) -> list[str]:
    new = _RENAMED.get(name, name)
    return [new, *(old for old, renamed in _RENAMED.items() if renamed == new)]


def _imported(dotted: str) -> object:
    """Returns what stands under a dotted name in the imported modules, or None."""
    parts = dotted.split(".")
    for split in range(len(parts) - 1, 0, -1):
        found: object = sys.modules.get(".".join(parts[:split]))
        for part in parts[split:]:
            # Not getattr: a package that loads lazily would import on it.
            is_scope = isinstance(found, types.ModuleType | type)
            found = vars(found).get(part) if is_scope else None
        if found is not None:
            return found
    return None


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _key_name(key: object) -> str:
    if isinstance(key, type):
        return _class_name(key)
    return key if isinstance(key, str) else repr(key)


def _near(name: str, candidates: Iterable[str]) -> list[str]:
    """Returns up to 3 of the dotted names whose last part is most like a name's."""
    by_last: dict[str, list[str]] = {}
    for candidate in dict.fromkeys(candidates):
        by_last.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    near = difflib.get_close_matches(name.rpartition(".")[2], by_last)
    return [candidate for last in near for candidate in by_last[last]][:3]

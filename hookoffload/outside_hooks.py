"""Hooks of modules that may have none of their own: PyTorch's global ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle


class HookPair(Protocol):
    """The hooks of one module."""

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before the forward; returns inputs that take the place of these."""

    def post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Run behind the forward; returns an output that takes the place of this."""


class OutsideHooks:
    """PyTorch's global module hooks, for modules that may not have hooks of their own.

    They exist for as long as such a module is attached, and look at one dictionary
    for every module that is called anywhere.
    """

    __slots__ = ("_sites",)

    def __init__(self, sites: Mapping[int, HookPair]) -> None:
        self._sites = sites

    def register(self, handles: list[RemovableHandle]) -> None:
        """Register with PyTorch; adds the handles that undo it to ``handles``."""
        handles.append(torch_module.register_module_forward_pre_hook(self._pre))
        # Without kwargs: PyTorch never forgets that a global hook wanted them.
        handles.append(
            torch_module.register_module_forward_hook(self._post, always_call=True)
        )

    def _pre(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        site = self._sites.get(id(module))
        if site is None:
            return None
        moved = site.pre(module, args, {})
        return None if moved is None else moved[0]

    def _post(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> Any:
        site = self._sites.get(id(module))
        if site is None:
            return None
        return site.post(module, args, {}, output)

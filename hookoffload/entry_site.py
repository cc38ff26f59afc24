"""Modules that a program calls by themselves, around the layers inside them."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from .compiling import dynamo_is_at_work, outside_graphs
from .hooks import Site


class EntrySite(Site):
    """A child of the root that owns no tensors, and may be called by itself.

    ``vae.decode`` calls the decoder and not the root. The decoder's call is then what a
    forward of the root is otherwise: it is around all layers and all activations, which
    the limit must have room for. Inside of another call there is nothing to do.
    """

    __slots__ = ()

    @property
    def can_stand_by(self) -> bool:
        """Never: it does no more than that anyway."""
        return False

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin the call of a part, unless this thread is inside the model."""
        if dynamo_is_at_work():
            return outside_graphs(self.pre)(module, args, kwargs)
        inside = self.session.calls.owner == threading.get_ident()
        if inside and not self.active and module is self.module:
            return None
        return super().pre(module, args, kwargs)

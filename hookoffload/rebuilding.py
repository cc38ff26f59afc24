"""Layers that are made anew while they are attached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from .master import Master
from .partition import partition

if TYPE_CHECKING:
    from .session import Session


class Rebuilding:
    """Makes the layers and sites of one session anew, from the model as it is now."""

    __slots__ = ("_half_done", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._half_done = False  # an interrupt came in the middle

    def rebuild(self) -> None:
        """Make layers and sites anew.

        Raises:
            BudgetExceededError: The limit is below the least; the old ones stand.
        """
        session = self._session
        self._half_done = True
        try:
            self._rebuild()
        except BaseException as error:
            # What fails has changed nothing yet; Ctrl-C comes anywhere.
            self._half_done = not isinstance(error, Exception)
            session.placement.onloaded = False
            session.hooks.hang_all()  # a part may be called by itself
            raise
        self._half_done = False

    def finish(self) -> bool:
        """Make layers anew if an interrupt fell into that; tell whether it did."""
        if not self._half_done:
            return False
        session = self._session
        session.units.forget()
        session.mover.set_layers(session.layers, ())  # the order may be of other layers
        with torch.inference_mode(False):
            self.rebuild()
        return True

    def _rebuild(self) -> None:
        session = self._session
        session.hooks.take_off()
        session.mover.drop_all()
        session.always.release()
        order = session.mover.order
        seen = self._masters_in(order.whole) if order.is_known else []
        units = session.units.now
        joined = session.passes.joined
        found = partition(
            session.model, session.map, joined, units.bundles, units.whole
        )
        session.build(found)
        if seen:
            session.mover.expect_order(self._layers_of(seen))
        session.hooks.hang_all()
        session.take_stock()
        if session.placement.onloaded:
            session.always.onload()

    def _masters_in(self, layers: Sequence[int]) -> list[Master]:
        return [self._session.layers[index].masters[0] for index in layers]

    def _layers_of(self, masters: Sequence[Master]) -> list[int]:
        """List the layers to which masters belong by now, one behind the other."""
        layers = self._session.layers
        owners = {id(m): layer.index for layer in layers for m in layer.masters}
        indices = [owners[id(m)] for m in masters if id(m) in owners]
        return [index for index, _ in groupby(indices)]

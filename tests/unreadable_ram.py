"""A CPU that computes as if it could not read host RAM."""

from __future__ import annotations

from typing import Any

import pytest

from hookoffload.layer import Layer


def have_ram_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layers pass through the window that a CPU would read where they rest."""
    measure = Layer.measure

    def unreadable(self: Layer, *args: Any, may_stay: bool) -> None:
        tiers = [master.on_disk for master in self.masters]
        for master in self.masters:
            master.on_disk = True
        measure(self, *args, may_stay=may_stay)
        for master, tier in zip(self.masters, tiers, strict=True):
            master.on_disk = tier

    monkeypatch.setattr(Layer, "measure", unreadable)

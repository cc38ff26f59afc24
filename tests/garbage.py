"""Collections of garbage that take no time."""

from __future__ import annotations

import gc


def freeze_old_objects() -> None:
    """Keep later collections from looking at what lives already.

    That is mostly what imports have made: several hundred thousand objects, which take
    a collection a third of a second.
    """
    gc.collect()
    gc.freeze()

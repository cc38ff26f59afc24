"""The seed system's spelling of placements, DiffSynth-Studio's `vram_config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .placement import (
    Placement,
    checked_device,
    checked_dtype,
    checked_place,
    default_device,
)

_STATES = ("offload", "onload", "preparing", "computation")
_KEYS = [f"{state}_{what}" for state in _STATES for what in ("dtype", "device")]


def placements_in(vram_config: Mapping[str, Any]) -> dict[str, Placement]:
    """Returns the placement of each state, with nothing left open.

    Raises:
        ValueError: A key is unknown, or a value is not legal.
    """
    if not isinstance(vram_config, Mapping):
        raise ValueError(f"vram_config={vram_config!r} is not a mapping")
    for key in vram_config:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=3)
            raise ValueError(
                f"vram_config has the unknown key {key!r}; "
                f"use one of {', '.join(near or _KEYS)}"
            )
    values = dict.fromkeys(_KEYS) | dict(vram_config)
    main_dtype = checked_dtype(
        "vram_config['computation_dtype']", values["computation_dtype"]
    )
    main_device = checked_device(
        "vram_config['computation_device']", values["computation_device"]
    )
    main_device = main_device or default_device()
    placements = {}
    for state in _STATES[:-1]:
        key = f"{state}_device"
        device = checked_place(f"vram_config[{key!r}]", values[key])
        key = f"{state}_dtype"
        dtype = values[key]
        if dtype == "disk":
            device, dtype = "disk", None
        dtype = checked_dtype(f"vram_config[{key!r}]", dtype, disk=True)
        if device != "disk":
            dtype = dtype or main_dtype
        placements[state] = Placement(device=device or main_device, dtype=dtype)
    placements["computation"] = Placement(device=main_device, dtype=main_dtype)
    return placements

"""Placements, and the checks of the values that a policy is made of."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from .device_kinds import LISTED

Place = torch.device | Literal["disk"]

CPU = torch.device("cpu")
# torch counts these as floating, but no cast carries a weight over: one packs two
# values into an element, the other is an exponent without a sign.
_NOT_CASTABLE = ("torch.float4_e2m1fn_x2", "torch.float8_e8m0fnu")


@dataclass(frozen=True, kw_only=True, init=False)
class Placement:
    """Where a layer's bytes lie in one of its states, and as what.

    Attributes:
        device: A device, "disk", or None where nothing is said (the policy fills it
            in). The CPU is kept without an index.
        dtype: The dtype of floating tensors; other tensors keep theirs. None is each
            tensor's own dtype. On disk, it is that of the bytes in the file.

    Example:
        >>> Placement(dtype="disk")
        Placement(device='disk', dtype=None)
    """

    device: torch.device | Literal["disk"] | None
    dtype: torch.dtype | None

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Checks and normalises both.

        Args:
            device: A device or "disk"; None says nothing.
            dtype: A floating dtype; None is each tensor's own. The word "disk" puts
                the placement on disk, whatever `device` says.

        Raises:
            ValueError: The device or the dtype cannot hold weights.
        """
        place = checked_place("device", device)
        if dtype == "disk":
            place, dtype = "disk", None
        # Frozen: there is no other way to set a field.
        object.__setattr__(self, "device", place)
        object.__setattr__(self, "dtype", checked_dtype("dtype", dtype, disk=True))

    @property
    def on_disk(self) -> bool:
        """Whether the bytes lie in a file."""
        return self.device == "disk"


def checked_place(field: str, value: object) -> Place | None:
    """Returns a value as a device or the disk."""
    return "disk" if value == "disk" else checked_device(field, value, disk=True)


def checked_device(
    field: str, value: object, *, disk: bool = False
) -> torch.device | None:
    """Returns a value as a device; `disk` only adds that word to the error."""
    if value is None:
        return None
    if isinstance(value, str | torch.device):
        with contextlib.suppress(RuntimeError):
            device = torch.device(value)
            # Meta tensors have no bytes to bring in.
            if device.type != "meta":
                return CPU if device.type == "cpu" else device
    raise ValueError(
        f"{field}={value!r} is no device that can be used here; give its kind, and "
        "its index if there are several, such as 'cuda:1' (known kinds: "
        f"{LISTED}{', disk' if disk else ''})"
    )


def checked_dtype(
    field: str, value: object, *, disk: bool = False
) -> torch.dtype | None:
    """Returns a value as a dtype; `disk` only adds that word to the error."""
    if value is None:
        return None
    if (
        isinstance(value, torch.dtype)
        and value.is_floating_point
        and str(value) not in _NOT_CASTABLE
    ):
        return value
    raise ValueError(
        f"{field}={value!r} is no dtype that weights can be cast to; use a floating "
        f"one such as torch.bfloat16{', the word disk' if disk else ''} or None"
    )


def distance(place: Place) -> int:
    """Returns how far a place is from where layers compute."""
    if place == "disk":
        return 2
    return 1 if place == CPU else 0


def may_be_same(one: Place, other: torch.device) -> bool:
    """Returns whether two devices are one; without an index any of its kind fits."""
    if isinstance(one, str) or one.type != other.type:
        return False
    return one.index is None or other.index is None or one.index == other.index


def default_device() -> torch.device:
    """Returns where layers compute by default: the accelerator if there is one."""
    accelerator = _accelerator()
    return CPU if accelerator is None else torch.device(accelerator.type)


def _accelerator() -> torch.device | None:
    # Some versions name an accelerator that they were built for and that is not there.
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator()


def present_device(field: str, wanted: torch.device) -> torch.device:
    """Returns a device with its index, or raises if this machine has none such."""
    if wanted == CPU:
        return CPU
    accelerator = _accelerator()
    present: list[torch.device] = []
    if accelerator is not None:
        present = [
            torch.device(accelerator.type, index)
            for index in range(torch.accelerator.device_count())
        ]
        if wanted == torch.device(accelerator.type):
            wanted = torch.device(accelerator.type, _current_index())
    if wanted in present:
        return wanted
    available = ", ".join(str(device) for device in [*present, CPU])
    raise ValueError(
        f"{field}={str(wanted)!r} but this machine has no such device; "
        f"available: {available}"
    )


def _current_index() -> int:
    # The first releases that this supports have it under its older name only.
    current = getattr(torch.accelerator, "current_device_index", None)
    return int((current or torch.accelerator.current_device_idx)())

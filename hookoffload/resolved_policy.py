"""A policy with nothing left open: what the library works with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .module_map import ModuleMap
from .placement import CPU, Place, Placement

if TYPE_CHECKING:
    from .policy import OffloadPolicy


@dataclass(frozen=True, kw_only=True)
class ResolvedPolicy:
    """A policy with nothing left open, for the machine on which it was resolved.

    Attributes:
        limit_bytes: The limit in bytes; None is unlimited, 0 as little as possible.
        compute_device: With its index, if it is an accelerator, so that equal devices
            compare equal.
        compute_dtype: None computes in each tensor's own dtype.
        offload: Where a layer rests; its device is the CPU, the disk or the compute
            device.
        onload: Where a layer waits while its model is in use; same devices.
        preparing: Where a resident lies, always on the compute device; None where no
            layer may stay resident. A dtype of None is decided for each tensor: the
            smaller of the storage and the computation dtype.
        disk_dir: The folder for files on disk; None is the system's temporary one.
        module_map: The user's map, empty if there is none.
        pin_limit_bytes: The most memory to page-lock; None: what this machine can.
        host_limit_bytes: The most host RAM for weights, where the others wait on disk;
            None: all wait where `onload` says.
        record: Whether to note what happens in a run.
        codec: How weights that wait are coded: "lossless", "auto" or None.
        asked: The policy that was resolved.
    """

    limit_bytes: int | None
    compute_device: torch.device
    compute_dtype: torch.dtype | None
    offload: Placement
    onload: Placement
    preparing: Placement | None
    disk_dir: Path | None
    module_map: ModuleMap
    pin_limit_bytes: int | None
    host_limit_bytes: int | None
    record: bool
    codec: Literal["lossless", "auto"] | None = None
    asked: OffloadPolicy = field(compare=False, repr=False)

    def with_limits(
        self,
        limit_gb: float | Literal["auto", "same"] | None,
        host_limit_gb: float | Literal["same"] | None,
    ) -> ResolvedPolicy:
        """Returns the policy with other limits; "same" keeps one.

        Raises:
            ValueError: A limit is no size, or contradicts what else was asked for.
        """
        wanted: dict[str, Any] = {}
        if limit_gb != "same":
            wanted["limit_gb"] = limit_gb
        if host_limit_gb != "same":
            wanted["host_limit_gb"] = host_limit_gb
        # The device is that of before, whichever the default has become; a folder is
        # no contradiction where nothing is on disk any more.
        asked = replace(self.asked, compute_device=self.compute_device, disk_dir=None)
        asked = replace(asked, **wanted)
        found = asked.resolve()
        same = limit_gb == "same"
        return replace(
            self,
            limit_bytes=self.limit_bytes if same else found.limit_bytes,
            host_limit_bytes=found.host_limit_bytes,
            offload=found.offload,
            onload=found.onload,
            asked=asked,
        )

    def rests(self, *, on_disk: bool) -> Placement:
        """Returns where a master rests while its model is not needed.

        Args:
            on_disk: Whether it is one that waits on disk.
        """
        if self.host_limit_bytes is None:
            return self.offload
        # What waits in RAM leaves it only where `onload` says that it comes into it.
        stays = not on_disk and self.onload.on_disk
        return self.waits(on_disk=on_disk) if stays else self.offload

    def waits(self, *, on_disk: bool) -> Placement:
        """Returns where a master waits while its model is in use."""
        if self.host_limit_bytes is None:
            return self.onload
        device: Place = "disk" if on_disk else CPU
        return Placement(device=device, dtype=self.onload.dtype)

    @property
    def waits_where_it_rests(self) -> bool:
        """Whether bringing the model near moves no master."""
        return all(
            _same_place(self.rests(on_disk=tier), self.waits(on_disk=tier))
            for tier in (False, True)
        )


def _same_place(rests: Placement, waits: Placement) -> bool:
    if rests.on_disk or waits.on_disk:
        return rests.on_disk == waits.on_disk  # a file has one dtype
    return rests.dtype == waits.dtype

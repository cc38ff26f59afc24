"""What the user asks for: where layers rest, wait and compute, and within how much."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .agreement import (
    agreed_compute_device,
    agreed_dtype,
    agreed_placements,
    compute_field,
)
from .device_kinds import LISTED
from .host_memory import automatic_limit
from .limits import checked_limit, to_bytes
from .module_map import ModuleMap
from .placement import (
    Placement,
    checked_device,
    checked_dtype,
    default_device,
    present_device,
)
from .resolved_policy import ResolvedPolicy
from .vram_config import placements_in

_STATES = ("offload", "onload", "preparing", "computation")


@dataclass(frozen=True, kw_only=True)
class OffloadPolicy:
    """How much memory a model may take, and where its layers are kept meanwhile.

    The short fields are enough for most uses. The four placements say the same in
    full, and more; where both speak of one thing, they must agree.

    Attributes:
        limit_gb: The limit in GiB (2 is 2 * 2**30 bytes). None is unlimited, 0 is as
            little as possible, "auto" what is free on the compute device when hooks
            are attached, less a tenth for other programs.
        compute_device: Where layers compute. Default: the accelerator, if there is
            one, else the CPU. Same as `computation.device`.
        compute_dtype: In which floating dtype. Default: each tensor's own. Same as
            `computation.dtype`. One of 8 bits, such as `torch.float8_e4m3fn`, is for
            Linear layers: they multiply in it, with a scale for each row, and return
            what their input is. Everything else computes in its own dtype, and so do
            Linear layers that cannot (a log line says which and why).
        storage_dtype: The floating dtype at rest and while waiting, in memory or on
            disk. Default: each tensor's own. Same as the dtype of `offload` and
            `onload`.
        store: Where layers rest and wait, "cpu" or "disk". Same as the device of
            `offload` and `onload`. None, the default, is "cpu" where these do not say.
        disk_dir: The folder for files on disk. Default: the system's temporary one.
        module_map: Which modules move as a layer: `{class or dotted name: "layer" or
            "atomic"}`, or one such map for each model class. Kept as a checked copy.
        offload: Where a layer rests while its model is not needed. Default device:
            what `store` says; without it the disk, if `onload` is on disk.
        onload: Where a layer waits while its model is in use. It must not be further
            away than `offload`. A dtype not given is that of `offload`.
        preparing: Where a resident lies between passes: the compute device, which is
            the default, or "disk" for no residents. A dtype not given is, for each
            tensor, the smaller of the storage and the computation dtype. One of 8
            bits beside such a computation dtype is for Linear layers, too.
        computation: Where and as what a layer computes.
        pin_limit_gb: The most host memory to page-lock, in GiB: what is locked is
            copied at the speed of the link. Default: what this machine can. 0: none.
        host_limit_gb: The most host RAM, in GiB, for weights that wait for their
            forwards and for what is read ahead of them. As many layers as fit wait in
            RAM, spread evenly over the model; the others wait in their files, as with
            `store="disk"`. Models that are attached as one share it by their sizes.
            Default: no such division. 0: all wait on disk.
        debug: Overwrite memory with NaN when a layer is released, so that code which
            keeps a streamed weight beyond its forward computes NaN. Slow.
        record: Note what happens in each pass, for `report(model)`. It costs under 2%
            where layers take about a millisecond or more: 8 to 19 us each on a CPU.
        codec: "lossless" codes bf16 weights that wait in host RAM in 12 bits (fp32 in
            28) and decodes them on the compute device, bit for bit: a quarter less to
            copy. What waits on disk is read so where `load_model` keeps the codes
            (`cache_codes=True`), and otherwise as it is. Where not all layers fit the
            limit, those that stay on the compute device are coded there, too, so that
            more of them do. Those of `load_model` take a quarter less RAM as well; a
            tensor that is in RAM at attach stays there, beside its code (with a host
            limit it gets none). "auto" measures a forward, and does so for as many
            layers as the link has too little time for; of `load_model`, at first for
            all that stream. It leaves alone what waits on disk.

    Raises:
        ValueError: A value is not legal, or two of them contradict each other.

    Example:
        >>> policy = OffloadPolicy(limit_gb=2, compute_device="cpu")
        >>> policy.resolve().limit_bytes
        2147483648
    """

    limit_gb: float | Literal["auto"] | None = None
    compute_device: torch.device | str | None = None
    compute_dtype: torch.dtype | None = None
    storage_dtype: torch.dtype | None = None
    store: Literal["cpu", "disk"] | None = None
    disk_dir: str | os.PathLike[str] | None = None
    module_map: Mapping[Any, Any] | ModuleMap | None = None
    offload: Placement | None = None
    onload: Placement | None = None
    preparing: Placement | None = None
    computation: Placement | None = None
    pin_limit_gb: float | None = None
    host_limit_gb: float | None = None
    debug: bool = False
    record: bool = False
    codec: Literal["lossless", "auto"] | None = None

    def __post_init__(self) -> None:
        """Checks every field, then the fields against each other."""
        normal: dict[str, Any] = {
            "limit_gb": (
                self.limit_gb
                if self.limit_gb == "auto"
                else checked_limit("limit_gb", self.limit_gb)
            ),
            "compute_device": checked_device("compute_device", self.compute_device),
            "pin_limit_gb": checked_limit("pin_limit_gb", self.pin_limit_gb),
            "host_limit_gb": checked_limit("host_limit_gb", self.host_limit_gb),
        }
        if not isinstance(self.debug, bool):
            raise ValueError(f"debug={self.debug!r} must be True or False")
        if not isinstance(self.record, bool):
            raise ValueError(f"record={self.record!r} must be True or False")
        if self.codec not in (None, "lossless", "auto"):
            raise ValueError(
                f"codec={self.codec!r} is unknown; use 'lossless', 'auto' or None"
            )
        checked_dtype("compute_dtype", self.compute_dtype)
        checked_dtype("storage_dtype", self.storage_dtype)
        if self.store not in (None, "cpu", "disk"):
            raise ValueError(f"store={self.store!r} is unknown; use 'cpu' or 'disk'")
        _check_folder(self.disk_dir)
        if self.module_map is not None:
            normal["module_map"] = ModuleMap(self.module_map)
        for state in _STATES:
            placement = getattr(self, state)
            if placement is not None and not isinstance(placement, Placement):
                raise ValueError(
                    f"{state}={placement!r} is not a Placement; write "
                    f'{state}=Placement(device="cpu")'
                )
        if self.computation is not None and self.computation.on_disk:
            raise ValueError(
                f"computation={self.computation!r} is on disk, and nothing computes "
                f"there; known kinds of devices: {LISTED}"
            )
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        agreed_dtype(self, "compute_dtype", "computation")
        # A device that is only known on the machine is checked in resolve.
        agreed_placements(self, agreed_compute_device(self))

    @classmethod
    def from_vram_config(
        cls,
        vram_config: Mapping[str, Any],
        *,
        vram_limit: float | None = None,
        module_map: Mapping[Any, Any] | ModuleMap | None = None,
    ) -> OffloadPolicy:
        """Makes a policy from a DiffSynth-Studio `vram_config`.

        A missing dtype is `computation_dtype`, or that of the file for a state on disk.
        A missing device is "disk" if the state's dtype is, else `computation_device`.
        A missing `computation_device` is this machine's default device, and a missing
        `computation_dtype` each tensor's own. None counts as missing.

        Args:
            vram_config: `offload_`, `onload_`, `preparing_` and `computation_`, each
                with `dtype` and `device`.
            vram_limit: The limit in GiB, as `limit_gb`.
            module_map: As the field.

        Raises:
            ValueError: A key is unknown, or a value is not legal.

        Example:
            >>> policy = OffloadPolicy.from_vram_config(
            ...     {"offload_dtype": "disk", "computation_device": "cpu"}, vram_limit=2
            ... )
            >>> policy.offload
            Placement(device='disk', dtype=None)
        """
        placements = placements_in(vram_config)
        limit = checked_limit("vram_limit", vram_limit)
        return cls(
            limit_gb=limit,
            module_map=module_map,
            offload=placements["offload"],
            onload=placements["onload"],
            preparing=placements["preparing"],
            computation=placements["computation"],
        )

    def resolve(self, *, here: bool = True) -> ResolvedPolicy:
        """Fills in every default and finds the devices on this machine.

        Args:
            here: False takes the devices as they are named, also where this machine
                has no such: to plan for another one.

        Raises:
            ValueError: This machine has no such device, the default device contradicts
                a placement, or `disk_dir` is a file.
        """
        wanted = agreed_compute_device(self) or default_device()
        compute = present_device(compute_field(self), wanted) if here else wanted
        offload, onload, preparing = agreed_placements(self, compute)
        folder = None
        if self.disk_dir is not None:  # absolute: the program may change its folder
            folder = Path(self.disk_dir).expanduser().absolute()
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"disk_dir={str(folder)!r} is not a folder")
        limit, pinned, host = self.limit_gb, self.pin_limit_gb, self.host_limit_gb
        return ResolvedPolicy(
            limit_bytes=_limit_bytes(limit, compute),
            compute_device=compute,
            compute_dtype=agreed_dtype(self, "compute_dtype", "computation"),
            offload=offload,
            onload=onload,
            preparing=None if preparing.on_disk else preparing,
            disk_dir=folder,
            module_map=ModuleMap(self.module_map),
            pin_limit_bytes=None if pinned is None else to_bytes(pinned),
            host_limit_bytes=None if host is None else to_bytes(host),
            record=self.record,
            codec=self.codec,
            asked=self,
        )


def _check_folder(value: object) -> None:
    if value is None:
        return
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    # An empty path would be the working directory, which nobody means by it.
    if not isinstance(path, str) or not path:
        raise ValueError(f"disk_dir={value!r} is not the path of a folder")


def _limit_bytes(limit: float | Literal["auto"] | None, device: Any) -> int | None:
    if limit == "auto":
        return automatic_limit(device)
    return None if limit is None else to_bytes(limit)

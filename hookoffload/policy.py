"""What the user asks for: where layers rest, wait and compute, and within how much."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .device_kinds import LISTED
from .host_memory import automatic_limit
from .limits import checked_limit, to_bytes
from .module_map import ModuleMap
from .placement import (
    CPU,
    Place,
    Placement,
    checked_device,
    checked_dtype,
    checked_place,
    default_device,
    distance,
    may_be_same,
    present_device,
)
from .resolved_policy import ResolvedPolicy

_STATES = ("offload", "onload", "preparing", "computation")
_SEED_KEYS = [f"{state}_{what}" for state in _STATES for what in ("dtype", "device")]


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
        record: Note what happens in each pass, for `report(model)`. Costs little.
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
        self._said_dtype("compute_dtype", "computation")
        # A device that is only known on the machine is checked in resolve.
        self._placements(self._said_compute_device())

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
        if not isinstance(vram_config, Mapping):
            raise ValueError(f"vram_config={vram_config!r} is not a mapping")
        for key in vram_config:
            if key not in _SEED_KEYS:
                near = difflib.get_close_matches(str(key), _SEED_KEYS, n=3)
                raise ValueError(
                    f"vram_config has the unknown key {key!r}; "
                    f"use one of {', '.join(near or _SEED_KEYS)}"
                )
        values = dict.fromkeys(_SEED_KEYS) | dict(vram_config)
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
        return cls(
            limit_gb=checked_limit("vram_limit", vram_limit),
            module_map=module_map,
            offload=placements["offload"],
            onload=placements["onload"],
            preparing=placements["preparing"],
            computation=Placement(device=main_device, dtype=main_dtype),
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
        wanted = self._said_compute_device() or default_device()
        compute = present_device(self._compute_field(), wanted) if here else wanted
        offload, onload, preparing = self._placements(compute)
        folder = None
        if self.disk_dir is not None:  # absolute: the program may change its folder
            folder = Path(self.disk_dir).expanduser().absolute()
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"disk_dir={str(folder)!r} is not a folder")
        limit, pinned, host = self.limit_gb, self.pin_limit_gb, self.host_limit_gb
        return ResolvedPolicy(
            limit_bytes=_limit_bytes(limit, compute),
            compute_device=compute,
            compute_dtype=self._said_dtype("compute_dtype", "computation"),
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

    def _placements(
        self, compute: torch.device | None
    ) -> tuple[Placement, Placement, Placement]:
        """Returns offload, onload and preparing, checked against each other."""
        offload: Place | None
        onload: Place | None
        offload, onload = self._storage_devices()
        offload_dtype = self._said_dtype("storage_dtype", "offload")
        onload_dtype = self._said_dtype("storage_dtype", "onload") or offload_dtype
        divided = self.host_limit_gb is not None
        if onload == "disk" or divided:
            if offload_dtype not in (None, onload_dtype):
                why = (
                    f"with host_limit_gb={self.host_limit_gb}, " if divided else "but "
                )
                raise ValueError(
                    f"offload.dtype={offload_dtype} and onload.dtype={onload_dtype} "
                    f"differ, {why}on disk a layer has one file; give the same dtype"
                )
            offload_dtype = onload_dtype
        offload = self._settled("offload", offload, compute)
        onload = self._settled("onload", onload, compute)
        preparing = self.preparing or Placement()
        resident = self._settled("preparing", preparing.device, compute)
        return (
            Placement(device=offload, dtype=offload_dtype),
            Placement(device=onload, dtype=onload_dtype),
            Placement(device=resident, dtype=preparing.dtype),
        )

    def _storage_devices(self) -> tuple[Place, Place]:
        """Returns where a layer rests and where it waits."""
        said: list[Place | None] = []
        for state, placement in (("offload", self.offload), ("onload", self.onload)):
            device = None if placement is None else placement.device
            store = checked_place("store", self.store)
            if None not in (device, store) and device != store:
                raise ValueError(
                    f"store={self.store!r} contradicts {state}.device={str(device)!r}; "
                    "leave store out, or make them agree"
                )
            said.append(device or store)
        offload, onload = said
        if self.host_limit_gb is not None:
            self._check_host_limit(offload, onload)
            if onload is None:
                onload = CPU if offload == "disk" else "disk"
            offload = "disk"
        if offload is None:
            offload = "disk" if onload == "disk" else CPU
        if onload is None:
            onload = CPU if offload == "disk" else offload
        if distance(onload) > distance(offload):
            raise ValueError(
                f"onload.device={str(onload)!r} is further away than "
                f"offload.device={str(offload)!r}, but a layer cannot wait further "
                "away than it rests; move offload there too, or onload nearer"
            )
        if self.disk_dir is not None and offload != "disk":
            raise ValueError(
                f"disk_dir={self.disk_dir!r} is given, but nothing is on disk: "
                f"store={self.store!r}, offload.device={str(offload)!r}; give "
                'store="disk", or leave disk_dir out'
            )
        return offload, onload

    def _check_host_limit(self, offload: Place | None, onload: Place | None) -> None:
        """Raises if a placement leaves no layer to wait on disk, or none in RAM."""
        what = f"host_limit_gb={self.host_limit_gb:g} keeps in files what is beyond it"
        if self.store == "cpu":
            raise ValueError(
                f"{what}, which contradicts store='cpu'; leave store out, or leave "
                "host_limit_gb out to have all of the model in RAM"
            )
        if offload not in (None, "disk"):
            raise ValueError(
                f"{what}, which contradicts offload.device={str(offload)!r}; offload "
                "to 'disk', or leave host_limit_gb out"
            )
        if onload not in (None, "disk", CPU):
            raise ValueError(
                f"{what} and the rest in host RAM, which contradicts "
                f"onload.device={str(onload)!r}; onload to 'cpu' or 'disk', or leave "
                "host_limit_gb out"
            )

    def _settled(
        self, state: str, device: Place | None, compute: torch.device | None
    ) -> Place | None:
        """Returns a state's device in full, as far as the compute device is known."""
        if compute is None or device == "disk":
            return device
        if device is None or (device != CPU and may_be_same(device, compute)):
            return compute
        if device == CPU and (state != "preparing" or compute == CPU):
            return device
        field, name = self._compute_field(), str(compute)
        raise ValueError(
            f"{state}.device={str(device)!r} does not go with {field}={name!r}; "
            f"use {name!r}{'' if state == 'preparing' else ', cpu'} or disk"
        )

    def _compute_field(self) -> str:
        """Returns the field that says where layers compute, for errors."""
        if self.computation is None or self.computation.device is None:
            return "compute_device"
        return "computation.device"

    def _said_compute_device(self) -> torch.device | None:
        short = checked_device("compute_device", self.compute_device)
        long = None
        if self.computation is not None:
            long = checked_device("computation.device", self.computation.device)
        if short is None or long is None:
            return short or long
        if not may_be_same(short, long):
            raise ValueError(
                f"compute_device={str(short)!r} contradicts "
                f"computation.device={str(long)!r}; give one of them"
            )
        return long if short.index is None else short

    def _said_dtype(self, short_field: str, state: str) -> torch.dtype | None:
        short: torch.dtype | None = getattr(self, short_field)
        placement: Placement | None = getattr(self, state)
        long = None if placement is None else placement.dtype
        if None not in (short, long) and short != long:
            raise ValueError(
                f"{short_field}={short} contradicts {state}.dtype={long}; "
                "give one of them"
            )
        return long if short is None else short


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

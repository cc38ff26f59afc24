"""Where two fields of a policy speak of one thing, what they say together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .placement import (
    CPU,
    Place,
    Placement,
    checked_device,
    checked_place,
    distance,
    may_be_same,
)

if TYPE_CHECKING:
    from .policy import OffloadPolicy


def compute_field(policy: OffloadPolicy) -> str:
    """Returns the field that says where layers compute, for errors."""
    if policy.computation is None or policy.computation.device is None:
        return "compute_device"
    return "computation.device"


def agreed_compute_device(policy: OffloadPolicy) -> torch.device | None:
    """Returns where layers compute, None if nothing is said.

    Raises:
        ValueError: It is said in two ways that differ.
    """
    short = checked_device("compute_device", policy.compute_device)
    long = None
    if policy.computation is not None:
        long = checked_device("computation.device", policy.computation.device)
    if short is None or long is None:
        return short or long
    if not may_be_same(short, long):
        raise ValueError(
            f"compute_device={str(short)!r} contradicts "
            f"computation.device={str(long)!r}; give one of them"
        )
    return long if short.index is None else short


def agreed_dtype(
    policy: OffloadPolicy, short_field: str, state: str
) -> torch.dtype | None:
    """Returns the dtype of a state, None if nothing is said.

    Args:
        policy: What the user wants.
        short_field: The field that says it without a placement.
        state: The field of the placement.

    Raises:
        ValueError: It is said in two ways that differ.
    """
    short: torch.dtype | None = getattr(policy, short_field)
    placement: Placement | None = getattr(policy, state)
    long = None if placement is None else placement.dtype
    if None not in (short, long) and short != long:
        raise ValueError(
            f"{short_field}={short} contradicts {state}.dtype={long}; give one of them"
        )
    return long if short is None else short


def agreed_placements(
    policy: OffloadPolicy, compute: torch.device | None
) -> tuple[Placement, Placement, Placement]:
    """Returns offload, onload and preparing, checked against each other.

    Args:
        policy: What the user wants.
        compute: Where layers compute, as far as that is known.

    Raises:
        ValueError: What is said contradicts itself.
    """
    offload: Place | None
    onload: Place | None
    offload, onload = _storage_devices(policy)
    offload_dtype = agreed_dtype(policy, "storage_dtype", "offload")
    onload_dtype = agreed_dtype(policy, "storage_dtype", "onload") or offload_dtype
    divided = policy.host_limit_gb is not None
    if onload == "disk" or divided:
        if offload_dtype not in (None, onload_dtype):
            why = f"with host_limit_gb={policy.host_limit_gb}, " if divided else "but "
            raise ValueError(
                f"offload.dtype={offload_dtype} and onload.dtype={onload_dtype} "
                f"differ, {why}on disk a layer has one file; give the same dtype"
            )
        offload_dtype = onload_dtype
    offload = _settled(policy, "offload", offload, compute)
    onload = _settled(policy, "onload", onload, compute)
    preparing = policy.preparing or Placement()
    resident = _settled(policy, "preparing", preparing.device, compute)
    return (
        Placement(device=offload, dtype=offload_dtype),
        Placement(device=onload, dtype=onload_dtype),
        Placement(device=resident, dtype=preparing.dtype),
    )


def _storage_devices(policy: OffloadPolicy) -> tuple[Place, Place]:
    """Returns where a layer rests and where it waits."""
    said: list[Place | None] = []
    for state, placement in (("offload", policy.offload), ("onload", policy.onload)):
        device = None if placement is None else placement.device
        store = checked_place("store", policy.store)
        if None not in (device, store) and device != store:
            raise ValueError(
                f"store={policy.store!r} contradicts {state}.device={str(device)!r}; "
                "leave store out, or make them agree"
            )
        said.append(device or store)
    offload, onload = said
    if policy.host_limit_gb is not None:
        _check_host_limit(policy, offload, onload)
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
    if policy.disk_dir is not None and offload != "disk":
        raise ValueError(
            f"disk_dir={policy.disk_dir!r} is given, but nothing is on disk: "
            f"store={policy.store!r}, offload.device={str(offload)!r}; give "
            'store="disk", or leave disk_dir out'
        )
    return offload, onload


def _check_host_limit(
    policy: OffloadPolicy, offload: Place | None, onload: Place | None
) -> None:
    """Raises if a placement leaves no layer to wait on disk, or none in RAM."""
    what = f"host_limit_gb={policy.host_limit_gb:g} keeps in files what is beyond it"
    if policy.store == "cpu":
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
    policy: OffloadPolicy,
    state: str,
    device: Place | None,
    compute: torch.device | None,
) -> Place | None:
    """Returns a state's device in full, as far as the compute device is known."""
    if compute is None or device == "disk":
        return device
    if device is None or (device != CPU and may_be_same(device, compute)):
        return compute
    if device == CPU and (state != "preparing" or compute == CPU):
        return device
    field, name = compute_field(policy), str(compute)
    raise ValueError(
        f"{state}.device={str(device)!r} does not go with {field}={name!r}; "
        f"use {name!r}{'' if state == 'preparing' else ', cpu'} or disk"
    )

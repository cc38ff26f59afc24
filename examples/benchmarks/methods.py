"""The ways of running a model that are compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hookoffload import OffloadPolicy, attach_offload_hooks


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a method is told.

    Attributes:
        device: Where to compute.
        limit_gb: Memory to take, in GiB; None for a method that cannot be told.
        storage: Floating dtype of weights at rest; None keeps theirs.
        store: Where hookoffload keeps weights: "cpu" or "disk".
    """

    device: torch.device
    limit_gb: float | None
    storage: torch.dtype | None
    store: str

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        if self.limit_gb is None:
            raise ValueError("this method needs a limit: give --limits")
        return int(self.limit_gb * 2**30)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of running a model.

    Attributes:
        attach: Prepares the model; what it returns is kept as long as the model runs.
        limited: Whether it can be told how much memory to take.
        warm_ups: Forwards between the first and those that are timed.
    """

    attach: Callable[[nn.Module, Way], object]
    limited: bool
    warm_ups: int = 2


def policy_of(
    way: Way, codec: Literal["lossless", "auto"] | None = None
) -> OffloadPolicy:
    """Returns what hookoffload is told."""
    return OffloadPolicy(
        codec=codec,
        limit_gb=way.limit_gb,
        compute_device=way.device,
        storage_dtype=way.storage,
        store="disk" if way.store == "disk" else "cpu",
    )


def _resident(model: nn.Module, way: Way) -> object:
    model.to(way.device)
    if way.storage is not None:
        # What a smaller dtype at rest does to the values, and nothing else.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(way.storage).to(parameter.dtype)
    return None


def _hookoffload(model: nn.Module, way: Way) -> object:
    return attach_offload_hooks(model, policy_of(way))


def _hookoffload_lossless(model: nn.Module, way: Way) -> object:
    return attach_offload_hooks(model, policy_of(way, "lossless"))


def _hookoffload_auto(model: nn.Module, way: Way) -> object:
    return attach_offload_hooks(model, policy_of(way, "auto"))


def _accelerate_cpu_offload(model: nn.Module, way: Way) -> object:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=way.device)


def _accelerate_dispatch(model: nn.Module, way: Way) -> object:
    from accelerate import dispatch_model, infer_auto_device_map

    index = way.device.index or 0
    device_map = infer_auto_device_map(
        model,
        max_memory={index: way.limit_bytes, "cpu": 2**50},
        no_split_module_classes=list(getattr(model, "_no_split_modules", None) or ()),
    )
    return dispatch_model(model, device_map, force_hooks=True)


def _diffusers_leaf(model: nn.Module, way: Way) -> object:
    return _diffusers(model, way, offload_type="leaf_level")


def _diffusers_block(model: nn.Module, way: Way) -> object:
    return _diffusers(model, way, offload_type="block_level", num_blocks_per_group=1)


def _diffusers(model: nn.Module, way: Way, **how: Any) -> object:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=way.device,
        offload_device=torch.device("cpu"),
        use_stream=True,
        record_stream=True,
        **how,
    )
    return None


def _mmgp(model: nn.Module, way: Way) -> object:
    from mmgp import offload

    try:
        return offload.all(
            {"transformer": model},
            pinnedMemory=True,
            quantizeTransformer=False,
            # Only a budget of a model by its name counts, in MiB.
            budgets={"transformer": int(way.limit_bytes / 2**20)},
            perc_reserved_mem_max=0.9,
            verboseLevel=0,
        )
    finally:
        torch.set_default_device(None)  # it leaves "cuda" behind


METHODS: dict[str, Method] = {
    "resident": Method(attach=_resident, limited=False),
    "hookoffload": Method(attach=_hookoffload, limited=True),
    # These measure forwards; one encodes behind that, the other decodes residents.
    "hookoffload_lossless": Method(
        attach=_hookoffload_lossless, limited=True, warm_ups=10
    ),
    "hookoffload_auto": Method(attach=_hookoffload_auto, limited=True, warm_ups=10),
    "accelerate_cpu_offload": Method(attach=_accelerate_cpu_offload, limited=False),
    "accelerate_dispatch": Method(attach=_accelerate_dispatch, limited=True),
    "diffusers_leaf": Method(attach=_diffusers_leaf, limited=False),
    "diffusers_block": Method(attach=_diffusers_block, limited=False),
    "mmgp": Method(attach=_mmgp, limited=True),
}


def way_of(
    options: argparse.Namespace, limit_gb: float | None, storage: str | None
) -> Way:
    """Returns what a method is told in a run with these options."""
    return Way(
        device=torch.device(options.device),
        limit_gb=limit_gb,
        storage=None if storage is None else getattr(torch, storage),
        store=options.store,
    )

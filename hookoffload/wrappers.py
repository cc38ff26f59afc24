"""What other libraries wrap models in, where they move or divide the same tensors."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .adapter_layers import replaces_weights


def require_undivided(model: nn.Module) -> None:
    """Refuse a model whose tensors another library divides or moves.

    [Note: models that are wrapped] ``DistributedDataParallel`` and what
    ``Accelerator.prepare`` makes without it leave parameters alone between forwards.
    They may be attached, and may wrap what is attached. FSDP, tensor parallelism and
    DeepSpeed's ZeRO keep a part of each parameter in a process, and put the whole in
    its place for a forward; ``nn.DataParallel`` copies modules to other devices.

    Nothing is imported for it: a library that is not imported has wrapped nothing.

    Raises:
        RuntimeError: It is wrapped, before or since it was attached.
    """
    engines = _known("deepspeed", "DeepSpeedEngine", "InferenceEngine")
    parts = _known("torch.distributed.tensor", "DTensor")
    for name, module in model.named_modules():
        what = name or type(model).__name__
        if is_under_fsdp(module):
            raise RuntimeError(
                f"{what} ({type(module).__name__}) is managed by FSDP, which divides "
                "its parameters among processes and gathers them for each forward. Use "
                "one of the two: offload hooks on a model without fully_shard and "
                "FullyShardedDataParallel, or FSDP's own offloading (CPUOffloadPolicy, "
                "CPUOffload) on a model without offload hooks"
            )
        if isinstance(module, engines):
            raise RuntimeError(
                f"{what} is a DeepSpeed {type(module).__name__}, which moves and "
                "divides its parameters. Use one of the two: offload hooks on a "
                "model that was not given to DeepSpeed, or DeepSpeed's own offloading "
                '(offload_param={"device": "cpu"} of ZeRO 3)'
            )
        if isinstance(module, nn.DataParallel) and module.device_ids:
            raise RuntimeError(
                f"{what} is an nn.DataParallel, which wants all parameters on the "
                "compute device and copies them to others in each forward. Attach to "
                "its .module and call that; for several GPUs run one process a GPU, "
                "for example with DistributedDataParallel"
            )
        if replaces_weights(module):
            raise RuntimeError(
                f"{what} is peft's layer of adapters around an nn.MultiheadAttention, "
                "which puts new parameters in the place of the model's in each "
                "forward. Merge and unload the adapters (merge_and_unload()) first, "
                "or leave the attention out of target_modules"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, parts):
            raise RuntimeError(
                f"{name} is a DTensor, of which this process holds a part (tensor "
                "parallelism, tp_plan=, parallelize_module). Load or make the model "
                "without it, and attach offload hooks to that"
            )
        if getattr(parameter, "ds_id", None) is not None:
            raise RuntimeError(
                f"{name} is divided by DeepSpeed's ZeRO 3. Make the model outside of "
                "deepspeed.zero.Init, and without a ZeRO 3 config in transformers, and "
                "attach offload hooks to that; or let DeepSpeed offload"
            )


def is_under_fsdp(module: nn.Module) -> bool:
    """Tell whether a module is wrapped by FSDP, or was given to ``fully_shard``."""
    # Both of its generations mark modules so, for TorchDynamo.
    return "_is_fsdp_managed_module" in module.__dict__


def _known(library: str, *names: str) -> tuple[type[Any], ...]:
    """Return classes of a library, none if it is not imported."""
    found = (getattr(sys.modules.get(library), name, None) for name in names)
    return tuple(cls for cls in found if isinstance(cls, type))

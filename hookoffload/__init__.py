"""Run PyTorch models that do not fit the GPU, through forward hooks.

`attach_offload_hooks` hangs hooks on a model's layers; they bring weights from disk or
host RAM to the compute device for each forward, and an accountant keeps the whole run
under a limit in GiB. `detach` leaves no trace.
"""

from .attach import (
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
    set_limit,
)
from .budget import BudgetExceededError
from .loading import load_model
from .placement import Placement
from .plan import Plan
from .policy import OffloadPolicy
from .report import OffloadStats
from .safetensors_header import CheckpointError

__all__ = [
    "BudgetExceededError",
    "CheckpointError",
    "OffloadPolicy",
    "OffloadStats",
    "Placement",
    "Plan",
    "attach_offload_hooks",
    "detach",
    "load_model",
    "offload",
    "offload_plan",
    "offload_stats",
    "offloaded",
    "onload",
    "set_limit",
]

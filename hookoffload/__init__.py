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
    report,
    set_limit,
)
from .budget import BudgetExceededError
from .cost import Rates
from .loading import load_model
from .lora import add_lora, clear_lora
from .machine import measure_rates
from .placement import Placement
from .plan import Plan
from .policy import OffloadPolicy
from .run_report import Report
from .safetensors_header import CheckpointError
from .saving import save_model
from .stats import OffloadStats

__all__ = [
    "BudgetExceededError",
    "CheckpointError",
    "OffloadPolicy",
    "OffloadStats",
    "Placement",
    "Plan",
    "Rates",
    "Report",
    "add_lora",
    "attach_offload_hooks",
    "clear_lora",
    "detach",
    "load_model",
    "measure_rates",
    "offload",
    "offload_plan",
    "offload_stats",
    "offloaded",
    "onload",
    "report",
    "save_model",
    "set_limit",
]

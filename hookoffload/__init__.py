"""Run PyTorch models that do not fit the GPU, through forward hooks.

`attach_offload_hooks` hangs hooks on a model's layers; they bring weights from disk or
host RAM to the compute device for each forward, and an accountant keeps the whole run
under a limit in GiB. `detach` leaves no trace.

Each name is imported when it is first used, so that what does without torch, such as
``hookoffload plan``, starts without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import attach_offload_hooks, detach, offloaded
    from .budget import BudgetExceededError
    from .cost import Rates
    from .loading import load_model
    from .lora import add_lora, clear_lora
    from .machine import measure_rates
    from .placement import Placement
    from .plan import Plan, Plans
    from .policy import OffloadPolicy
    from .run_report import Report
    from .safetensors_header import CheckpointError
    from .saving import save_model
    from .stats import OffloadStats
    from .steering import activate, offload, onload, set_limit
    from .telling import offload_plan, offload_stats, report

__all__ = [
    "BudgetExceededError",
    "CheckpointError",
    "OffloadPolicy",
    "OffloadStats",
    "Placement",
    "Plan",
    "Plans",
    "Rates",
    "Report",
    "activate",
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

_MODULES = {
    "BudgetExceededError": "budget",
    "CheckpointError": "safetensors_header",
    "OffloadPolicy": "policy",
    "OffloadStats": "stats",
    "Placement": "placement",
    "Plan": "plan",
    "Plans": "plan",
    "Rates": "cost",
    "Report": "run_report",
    "activate": "steering",
    "add_lora": "lora",
    "attach_offload_hooks": "attach",
    "clear_lora": "lora",
    "detach": "attach",
    "load_model": "loading",
    "measure_rates": "machine",
    "offload": "steering",
    "offload_plan": "telling",
    "offload_stats": "telling",
    "offloaded": "attach",
    "onload": "steering",
    "report": "telling",
    "save_model": "saving",
    "set_limit": "steering",
}


if not TYPE_CHECKING:  # or type checkers would take every name for one of these

    def __getattr__(name: str) -> Any:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{module}", __name__), name)
        globals()[name] = value  # the next time it is an attribute as any other
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

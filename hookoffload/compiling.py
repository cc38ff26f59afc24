"""Keeps TorchDynamo out of the hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

HookT = TypeVar("HookT", bound=Callable[..., Any])


# PyTorch shows it where a graph may not end (fullgraph=True).
_REASON = (
    "hookoffload moves the weights of an attached model in hooks, and graphs end at "
    "these. Leave fullgraph=True out, or put compiled blocks in the place of blocks, "
    "around which the hooks are: model.blocks[i] = torch.compile(model.blocks[i], "
    "fullgraph=True)"
)


def outside_graphs(hook: HookT) -> HookT:
    """Return a hook that runs uncompiled, with everything that it calls.

    Raises:
        RuntimeError: It is being exported, when called.
    """
    outside: Any = partial(_outside, hook)
    return cast("HookT", outside)


def _call(hook: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():  # although nothing here is compiled
        raise RuntimeError(
            "the model has offload hooks attached, and its weights cannot be "
            "exported or traced through them. Call detach(model) first"
        )
    return hook(*args)


_takes_reason = "reason" in signature(torch.compiler.disable).parameters
_outside: Callable[..., Any] = torch.compiler.disable(
    _call, **({"reason": _REASON} if _takes_reason else {})
)


def run_uncompiled(model: nn.Module) -> AbstractContextManager[Any] | None:
    """Have parts that were compiled run as they were written, until it is left.

    Dynamo would trace a probe into its graphs, and around their ends it mixes up modes
    of PyTorch that are active: results were wrong.

    Returns:
        What to leave by its ``__exit__``; None if there is nothing to be done.
    """
    if dynamo_is_at_work():  # a whole model is compiled, and it is too late
        return None
    if all(module._compiled_call_impl is None for module in model.modules()):
        return None
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def captures_cuda_graphs(module: nn.Module) -> bool:
    """Tell whether a module was compiled in place to replay CUDA graphs."""
    compiled: Any = module._compiled_call_impl
    about = getattr(compiled, "get_compiler_config", None)
    config = None if about is None else about()
    return bool(config and config.get("triton.cudagraphs"))


def dynamo_is_at_work() -> bool:
    """Tell whether Dynamo traces this, or compiles what runs between two graphs."""
    if torch.compiler.is_compiling():
        return True
    # Asked by setting it: get_eval_frame_callback() of torch 2.6 gives away a reference
    # to None that it does not have, and the interpreter dies when none is left.
    callback = set_eval_frame(None)
    if callback is None:
        return False
    set_eval_frame(callback)
    return True

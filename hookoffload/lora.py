"""LoRAs on attached models, without touching their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from .adapters import ADAPTABLE, Adapter, ConvAdapter, LinearAdapter
from .attached import one_session
from .lora_keys import LowRank, listed, match_layers, read_adapters

if TYPE_CHECKING:
    from .session import Session


def add_lora(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    scale: float = 1.0,
    *,
    network_alphas: Mapping[str, float] | None = None,
) -> None:
    """Add a LoRA to the layers of an attached model, at once and beside those before.

    Takes the keys of peft and diffusers (``lora_A``/``lora_B``), of diffusers' older
    files and of kohya's tools (``lora_down``/``lora_up``, ``lora_unet_...`` where only
    one layer can be meant), with the prefixes that they write. Weights are not
    touched, wherever they rest and however they are packed: each layer's output gets
    ``scale * alpha / rank * up(down(x))`` added, computed in the layer's dtype. That is
    a LoRA that is not merged, up to rounding. peft keeps ``lora_alpha`` beside its
    files, in adapter_config.json: pass ``scale=lora_alpha / r`` for those.

    The factors are copied. On the compute device they count against the limit, and
    layers that were kept there give way; `offload` brings them to host RAM.

    Args:
        model: an attached model.
        state_dict: the tensors of a LoRA, by their keys.
        scale: how much of it; 1 is all.
        network_alphas: alphas by layer, for files that have none.

    Raises:
        ValueError: A key, a layer or a shape is wrong; nothing was applied.
        BudgetExceededError: The limit has no room for it; nothing was applied. The
            message says the least limit that has.
        RuntimeError: The model is not attached, or is running.

    Example:
        >>> from hookoffload import attach_offload_hooks, detach
        >>> model = attach_offload_hooks(torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> factors = {"0.lora_A.weight": torch.ones(1, 8),
        ...            "0.lora_B.weight": torch.ones(8, 1)}
        >>> x = torch.ones(1, 8)
        >>> with torch.no_grad():
        ...     before = model(x)
        ...     add_lora(model, factors, scale=0.5)
        ...     (model(x) - before).mean().round().item()
        4.0
        >>> clear_lora(model)
        >>> model = detach(model)
    """
    session = one_session(model, "add_lora")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a number, not {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale!r}")
    found = read_adapters(state_dict, network_alphas)
    with session.ownership.by_hand("add_lora"), torch.inference_mode(False):
        session.adapters.add(_fit(session, found, scale))


def clear_lora(model: nn.Module) -> None:
    """Take every LoRA off that `add_lora` added, without a trace.

    Args:
        model: an attached model, with or without LoRAs.

    Raises:
        RuntimeError: The model is not attached, or is running.
    """
    session = one_session(model, "clear_lora")
    with session.ownership.by_hand("clear_lora"), torch.inference_mode(False):
        session.adapters.clear()


def _fit(session: Session, found: dict[str, LowRank], scale: float) -> list[Adapter]:
    """Find the layers of a LoRA and bring its factors into their shape and dtype.

    Raises:
        ValueError: Something does not fit.
    """
    modules = dict(session.model.named_modules(remove_duplicate=False))
    adaptable = [name for name, m in modules.items() if isinstance(m, ADAPTABLE)]
    names = match_layers(found, modules, adaptable)
    reasons = [
        f"{name} ({reason})"
        for name in names.values()
        if (reason := _reason_against(session, name, modules))
    ]
    if reasons:
        raise ValueError(f"no LoRA can be added to {listed(reasons)}")
    fitting: dict[int, tuple[str, LowRank]] = {}
    misfits: list[str] = []
    for key, low_rank in found.items():
        module = modules[names[key]]
        known = fitting.get(id(module))
        if known is not None and not known[1].equals(low_rank):
            raise ValueError(
                f"{known[0]} and {key} are adapters for one layer, {names[key]}; add "
                "them one after another"
            )
        fitting[id(module)] = key, low_rank
        if misfit := _misfit(module, low_rank):
            misfits.append(f"{key}: {misfit}")
    if misfits:
        raise ValueError(
            "the LoRA was made for layers of other sizes: "
            + "; ".join(misfits[:10])
            + (f"; and {len(misfits) - 10} more" if len(misfits) > 10 else "")
        )
    dtypes = session.inventory.compute_dtypes()
    return [
        _adapter(session, modules[names[key]], low_rank, scale, dtypes)
        for key, low_rank in fitting.values()
    ]


def _reason_against(
    session: Session, name: str, modules: dict[str, nn.Module]
) -> str | None:
    module = modules[name]
    if not isinstance(module, ADAPTABLE):
        return f"a {type(module).__name__}, neither Linear nor Conv1d, 2d or 3d"
    parent = modules[name.rpartition(".")[0]] if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if f"{name}.weight" in {name for _, name in session.passes.joined}:
        return "its weight is read by another module, without calling it"
    return None


def _misfit(module: nn.Module, low_rank: LowRank) -> str | None:
    """Tell in words why two factors are none of a layer's, None if they are."""
    down, up = tuple(low_rank.down.shape), tuple(low_rank.up.shape)
    rank = low_rank.rank
    outer, inner, kernel, groups = _sizes(module)
    ones = (1,) * len(kernel)
    downs = [(rank, inner, *kernel)]
    ups = [(outer, rank, *ones)]
    if set(kernel) <= {1}:  # a product of matrices in either form
        downs += [(rank, inner), (rank, inner, 1, 1)]
        ups += [(outer, rank), (outer, rank, 1, 1)]
    if groups > 1 and rank % groups == 0:
        ups.append((outer, rank // groups, *ones))
    if rank and down in downs and up in ups:
        return None
    return (
        f"down {down} and up {up}, and the layer needs {downs[0]} and {ups[0]}"
        if rank
        else "its rank is 0"
    )


def _sizes(module: nn.Module) -> tuple[int, int, tuple[int, ...], int]:
    """Return a layer's outputs, inputs, kernel and groups."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, (), 1
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return (
        module.out_channels,
        module.in_channels,
        tuple(module.kernel_size),
        module.groups,
    )


def _adapter(
    session: Session,
    module: nn.Module,
    low_rank: LowRank,
    scale: float,
    dtypes: dict[int, torch.dtype],
) -> Adapter:
    """Make what a layer computes with of factors that fit it."""
    dtype = _dtype_of(session, module, low_rank, dtypes)
    outer, inner, kernel, groups = _sizes(module)
    rank = low_rank.rank
    alpha = rank if low_rank.alpha is None else low_rank.alpha
    precise = torch.promote_types(dtype, torch.float32)
    down = low_rank.down.to("cpu", dtype, copy=True)
    # Multiplied before it is rounded: see [Note: numerics of adapters].
    up = low_rank.up.to("cpu", precise).flatten(1) * (scale * alpha / rank)
    if up.shape[1] != rank:
        # As peft has it for groups: each one's outputs read their own part of `down`.
        up = torch.block_diag(*up.chunk(groups))
    up = up.to(dtype)
    if isinstance(module, nn.Linear):
        return LinearAdapter(session, module, down.reshape(rank, inner), up.t().clone())
    ones = (1,) * len(kernel)
    return ConvAdapter(
        session,
        module,
        down.reshape(rank, inner, *kernel),
        up.reshape(outer, rank, *ones).clone(),
    )


def _dtype_of(
    session: Session,
    module: nn.Module,
    low_rank: LowRank,
    dtypes: dict[int, torch.dtype],
) -> torch.dtype:
    """Choose the dtype of the product: the layer's, the policy's or the LoRA's own.

    Packed weights have integers, and 8-bit floats are for storage: neither computes.
    """
    own = [dtypes.get(id(p), p.dtype) for p in module.parameters()]
    for dtype in (*own, session.policy.compute_dtype, low_rank.up.dtype):
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32

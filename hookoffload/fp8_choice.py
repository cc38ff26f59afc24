"""Which weights multiply in 8 bits, and what is said of the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from .fp8 import is_fp8, why_not
from .registered import TensorGroup
from .resolved_policy import ResolvedPolicy

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)


def multiplies_in_fp8(group: TensorGroup, policy: ResolvedPolicy) -> bool:
    """Tell whether a group is a Linear's weight that is to multiply in 8 bits.

    Args:
        group: the tensors that share bytes.
        policy: where they compute, and as what.
    """
    first, *others = group.members
    dtype = policy.compute_dtype
    if dtype is None or not is_fp8(dtype):
        return False
    if others or not (first.multiplies and first.castable and first.tensor.dim() == 2):
        return False
    return why_not(first.tensor, policy.compute_device, dtype) is None


def tell_of_wide_linears(sessions: Sequence[Session]) -> None:
    """Say once how many Linear layers do not multiply in 8 bits, and why."""
    dtype = sessions[0].policy.compute_dtype
    if dtype is None or not is_fp8(dtype):
        return
    scaled, wide = 0, []
    for session in sessions:
        for name, module in session.model.named_modules():
            weight = module._parameters.get("weight")
            master = session.masters.get(id(weight))
            if not isinstance(module, nn.Linear) or weight is None or master is None:
                continue
            if master.codec.scaled:
                scaled += 1
            elif master.castable:
                reason = why_not(weight, session.policy.compute_device, dtype)
                wide.append((name, reason or "others read it, too"))
    if wide:
        logger.log(
            logging.INFO if scaled else logging.WARNING,
            "%d of %d Linear layers compute in their own dtype and not in %s, such as "
            "%s: %s",
            len(wide),
            len(wide) + scaled,
            dtype,
            *wide[0],
        )

"""What a checkpoint has in forms of other libraries; see [Note: saved forms]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .safetensors_file import TensorLocation
from .saved_bitsandbytes import find_bitsandbytes
from .saved_gguf import find_gguf
from .saved_torchao import find_torchao
from .saved_weight import SavedWeight


def find_saved_weights(
    model: nn.Module,
    locations: Mapping[str, TensorLocation],
    compute_dtype: torch.dtype | None,
) -> list[SavedWeight]:
    """Find packed weights that have to be made from what a checkpoint has.

    Plain linear layers that cannot compute with theirs are replaced in the model.

    Args:
        model: the model without values.
        locations: the checkpoint's tensors, under the model's names.
        compute_dtype: what layers compute in whose form does not say it.

    Raises:
        CheckpointError: They do not fit the model.
        ModuleNotFoundError: The library that packed them is not installed.
    """
    return [
        *find_bitsandbytes(model, locations),
        *find_torchao(model, locations),
        *find_gguf(model, locations, compute_dtype),
    ]

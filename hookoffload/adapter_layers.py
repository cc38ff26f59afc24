"""Layers that peft makes around others, known by what they have: it is not imported."""

from __future__ import annotations

from torch import nn

# The child of a layer of adapters that it was made around.
BASE = "base_layer"


def has_merges(module: nn.Module) -> bool:
    """Tell whether a module is a layer of adapters, which merge into its base."""
    return hasattr(type(module), "merged_adapters") and BASE in module._modules


def replaces_weights(module: nn.Module) -> bool:
    """Tell whether a layer of adapters has its base compute with other parameters.

    That of ``nn.MultiheadAttention``, whose forward reads its weights from no child,
    registers the sum in each forward, and new parameters behind it.
    """
    return has_merges(module) and isinstance(
        module._modules[BASE], nn.MultiheadAttention
    )


def modules_that_merge(model: nn.Module) -> frozenset[int]:
    """Return the ids of the layers of adapters in a model, and of all inside them."""
    layers = filter(has_merges, model.modules())
    return frozenset(id(module) for layer in layers for module in layer.modules())

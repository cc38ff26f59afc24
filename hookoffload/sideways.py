"""What is made of reads sideways: guesses of further ones, and hints in errors."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

# In what PyTorch says when tensors do not go together.
_MISMATCHES = ("same device", "same dtype", "dtype", "scalar type", "devices")


def hint_at_sideways_reads(error: BaseException) -> None:
    """Say in an error what it may come from, if it speaks of devices or dtypes.

    The probe does not look at every pass. What a later one reads sideways, on a path
    that none took before, is a tensor at rest.
    """
    text = str(error).lower()
    if not isinstance(error, RuntimeError) or not any(w in text for w in _MISMATCHES):
        return
    hint = (
        " [hookoffload: perhaps a module read a weight of another one, on a path that "
        "no forward took before. The next forward looks for that: call the model again]"
    )
    error.args = (f"{error}{hint}", *error.args[1:])


def reads_of_siblings(
    model: nn.Module, joined: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Return what modules of the same classes as some readers are likely to read.

    A pass that ends early has seen the first block only, and the others do the same.
    """
    modules = dict(model.named_modules())
    reads: dict[type[nn.Module], set[str]] = defaultdict(set)
    for user, tensor in joined:
        if user and tensor.startswith(f"{user}."):
            reads[type(modules[user])].add(tensor[len(user) + 1 :])
    found = []
    for name, module in modules.items():
        for path in reads.get(type(module), ()):
            owner, _, key = path.rpartition(".")
            holder = modules.get(f"{name}.{owner}" if owner else name)
            if holder is not None and holder._parameters.get(key) is not None:
                found.append((name, f"{name}.{path}"))
    return found

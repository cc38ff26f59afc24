"""What a model and its surroundings are at one moment, and whether they still are."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, so that NaNs and signed zeros compare too."""
    plain = tensor.detach().cpu()
    if plain.is_quantized:
        plain = plain.int_repr()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    plain = plain.resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(bits(one), bits(other))
    )


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers under all their names, the user's own objects."""
    return {
        f"{prefix}.{key}" if prefix else key: tensor
        for prefix, module in model.named_modules(remove_duplicate=False)
        for registry in (module._parameters, module._buffers)
        for key, tensor in registry.items()
        if tensor is not None
    }


@dataclass
class _Tensor:
    tensor: torch.Tensor
    value: torch.Tensor
    pointer: int
    about: tuple[Any, ...]


class Snapshot:
    """Everything that must be as before when an operation failed or was undone.

    Args:
        model: its tensors, modes, attributes and hooks.
        folder: the files in it, and those of them that this process holds open.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        self.folder = folder
        self.tensors = {
            name: _Tensor(
                tensor, tensor.detach().clone(), _pointer(tensor), _about(tensor)
            )
            for name, tensor in tensors_of(model).items()
            if not tensor.is_meta
        }
        self.modules = _modules(model)
        self.surroundings = _surroundings()
        self.threads = set(threading.enumerate())
        self.files = _files(folder)
        self.held = _held_files(folder)


def assert_untouched(
    model: nn.Module, before: Snapshot, *, same_memory: bool = True
) -> None:
    """Fail unless the model and what is around it are as they were.

    Args:
        model: the model of the snapshot.
        before: the snapshot.
        same_memory: each tensor must lie where it lay; False allows that its bytes
            went elsewhere and came back.
    """
    now = {name: t for name, t in tensors_of(model).items() if not t.is_meta}
    assert list(now) == list(before.tensors)
    for name, then in before.tensors.items():
        tensor = now[name]
        assert tensor is then.tensor, f"{name} is another object"
        assert _about(tensor) == then.about, f"{name} is of another kind"
        assert same_bits(tensor, then.value), f"{name} has another value"
        if same_memory:
            assert _pointer(tensor) == then.pointer, f"{name} lies elsewhere"
    modules = _modules(model)
    assert list(modules) == list(before.modules), "there are other modules"
    changed = [name for name in modules if modules[name] != before.modules[name]]
    assert not changed, f"hooks, attributes or modes changed in {changed}"
    surroundings = _surroundings()
    assert surroundings == before.surroundings, f"global state is {surroundings}"
    assert_same_surroundings(before)


def assert_same_surroundings(before: Snapshot) -> None:
    """Fail unless threads and files are as they were, whatever the model is."""
    left = _threads_left(before.threads)
    assert not left, f"threads were left behind: {left}"
    assert _files(before.folder) == before.files, "files"
    assert _held_files(before.folder) == before.held, "files were left open or mapped"


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


def _about(tensor: torch.Tensor) -> tuple[Any, ...]:
    strided = tensor.layout is torch.strided
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride() if strided else tensor.layout,
        tensor.requires_grad,
        tensor.grad is None,
    )


def _modules(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return each module's identity, mode, attributes and hooks."""
    return {
        name: (
            id(module),
            type(module),
            module.training,
            sorted(module.__dict__),
            {
                key: [(number, id(hook)) for number, hook in hooks.items()]
                for key, hooks in module.__dict__.items()
                if "hook" in key and isinstance(hooks, dict)
            },
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _surroundings() -> tuple[Any, ...]:
    hooks = {key: list(getattr(torch_module, key)) for key in _GLOBAL_HOOKS}
    modes = [type(m) for m in torch.overrides._get_current_function_mode_stack()]
    return hooks, modes, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _threads_left(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return threads that are new, after a moment for those that are ending."""
    deadline = time.monotonic() + 2
    while left := set(threading.enumerate()) - before:
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    return left


def _files(folder: Path | None) -> dict[str, tuple[int, int]]:
    """Return size and time of every file in the folder and the temporary one."""
    folders = [Path(tempfile.gettempdir())] if folder is None else [folder]
    pattern = "hookoffload-*" if folder is None else "**/*"
    found = {}
    for path in (p for f in folders for p in f.glob(pattern)):
        about = path.stat()
        is_file = path.is_file()
        found[str(path)] = (about.st_size, about.st_mtime_ns) if is_file else (0, 0)
    return found


def _held_files(folder: Path | None) -> list[str]:
    """Return the files of the folder that are open or mapped, where Linux tells."""
    if folder is None or not os.path.isdir("/proc/self/fd"):
        return []
    held = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            held.append("open " + os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue  # the listing's own descriptor
    name = str(folder)[1:]
    with open("/proc/self/maps") as maps:
        held += ["mapped " + line.partition("/")[2] for line in maps if name in line]
    return sorted(line for line in held if name in line)

"""What a user attaches: a module, several by name, or a pipeline of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Protocol, TypeGuard

from torch import nn
from torch.nn.parameter import is_lazy

from .codec import is_movable
from .group import Group
from .registered import plain_tensors
from .state_hooks import session_of


class Pipeline(Protocol):
    """Anything that names its models, as diffusers' pipelines do."""

    @property
    def components(self) -> Mapping[str, Any]:
        """The models, among other things."""


Models = nn.Module | Mapping[str, Any] | Pipeline


def are_several(models: object) -> TypeGuard[Mapping[str, Any] | Pipeline]:
    """Tell whether something holds models and is none itself."""
    if isinstance(models, nn.Module):
        return False
    if isinstance(models, Mapping):
        return True
    return isinstance(getattr(models, "components", None), Mapping)


def members_of(models: Mapping[str, Any] | Pipeline) -> dict[str, nn.Module]:
    """Return the models of a mapping or a pipeline, by name.

    Modules without a tensor need nothing, and are left out.

    Raises:
        ValueError: There are none, or a mapping has something else.
    """
    given = isinstance(models, Mapping)
    found = models if isinstance(models, Mapping) else models.components
    members: dict[str, nn.Module] = {}
    for name, value in found.items():
        if isinstance(value, nn.Module):
            if any(True for _ in chain(value.parameters(), value.buffers())):
                members[str(name)] = value
        elif given and value is not None:
            raise ValueError(
                f"{name!r} is a {type(value).__name__} and not a torch.nn.Module. Pass "
                "the pipeline itself, or leave it out"
            )
    if not members:
        raise ValueError(
            f"{type(models).__name__} holds no torch.nn.Module with weights: "
            f"{', '.join(map(str, found)) or 'it is empty'}"
        )
    return members


def distinct(members: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the members without second names of the same module.

    Raises:
        ValueError: Two of them share a part of themselves, or a tensor.
    """
    different: dict[str, nn.Module] = {}
    modules: dict[Any, tuple[str, str]] = {}
    tensors: dict[Any, tuple[str, str]] = {}
    for name, model in members.items():
        if any(model is other for other in different.values()):
            continue
        different[name] = model
        for part, module in model.named_modules():
            _claim(modules, id(module), name, f"{name}.{part}" if part else name)
        for part, tensor in plain_tensors(model):
            if is_lazy(tensor) or not is_movable(tensor):
                continue  # `check_tensors` refuses it, and names it
            storage = tensor.untyped_storage()
            if storage.nbytes() and not tensor.is_meta:
                key = (tensor.device, storage.data_ptr())
                _claim(tensors, key, name, f"{name}.{part}")
    return different


def _claim(owners: dict[Any, tuple[str, str]], key: Any, name: str, path: str) -> None:
    owner, other = owners.setdefault(key, (name, path))
    if owner != name:
        raise ValueError(
            f"{path} and {other} are the same, or share memory, and two models cannot "
            "both move it. Attach one torch.nn.Module that holds both models"
        )


def group_of(models: Mapping[str, Any] | Pipeline) -> Group | None:
    """Return the group that a mapping or a pipeline is attached as, None without one.

    Raises:
        RuntimeError: Its models are attached by themselves, or not together.
    """
    groups: dict[int, Group] = {}
    alone: list[str] = []
    for name, model in members_of(models).items():
        session = session_of(model)
        if session is None:
            continue
        if session.group is None:
            alone.append(name)
        else:
            groups[id(session.group)] = session.group
    if len(groups) + len(alone) > 1 or alone:
        together = [", ".join(group.members) for group in groups.values()]
        raise RuntimeError(
            f"the models of this {type(models).__name__} are not attached as one: "
            f"{'; '.join([*alone, *together])}. Call detach on each of these; what "
            "load_model attached may stay: attach_offload_hooks, given all, takes it in"
        )
    return next(iter(groups.values()), None)

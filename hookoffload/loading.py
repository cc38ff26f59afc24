"""Checkpoint -> attached model: nothing is initialised, nothing is read too early."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn

from .attach import _attach
from .checkpoint import open_checkpoint
from .policy import OffloadPolicy
from .progress import progress_bar
from .safetensors_file import TensorLocation
from .safetensors_header import CheckpointError

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Converter = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]

_NAMES_SHOWN = 8


def load_model(
    model_class_or_factory: Callable[..., ModuleT],
    checkpoint: str | Path | list[str | Path],
    policy: OffloadPolicy | None = None,
    *,
    config: Any = None,
    state_dict_converter: Converter | None = None,
) -> ModuleT:
    """Build a model without initialising it, give it a checkpoint, attach the hooks.

    With weights offloaded to disk (``store="disk"``) the files stay where the weights
    are, and a layer's bytes are read when the layer needs them. Otherwise they are
    read once, into host RAM. Tensors keep the dtype that the files have.

    Args:
        model_class_or_factory: called to make the model.
        checkpoint: a safetensors file, several (a later one wins), or a folder with
            an index.
        policy: as for `attach_offload_hooks`.
        config: None calls the factory without arguments, a mapping with these
            keyword arguments, anything else (a transformers config) with this one.
        state_dict_converter: from the checkpoint's names and tensors to the model's.
            If it only renames and drops, the files are still read in place; what it
            computes is computed now and kept in RAM, or in a file of its own under
            ``disk_dir``.

    Returns:
        The model, attached and in eval mode.

    Raises:
        CheckpointError: A file is missing or damaged, or its tensors are not those of
            the model.
        ValueError: The policy does not fit this model or machine.
        BudgetExceededError: The limit is below the least that the model needs.

    Example:
        >>> from safetensors.torch import save_file
        >>> source = torch.nn.Linear(4, 4)
        >>> folder = getfixture("tmp_path")
        >>> save_file(source.state_dict(), folder / "model.safetensors")
        >>> model = load_model(
        ...     torch.nn.Linear,
        ...     folder / "model.safetensors",
        ...     OffloadPolicy(store="disk", limit_gb=1),
        ...     config={"in_features": 4, "out_features": 4},
        ... )
        >>> torch.equal(model.weight, source.weight)
        True
    """
    policy = policy or OffloadPolicy()
    on_disk = policy.resolve().offload.on_disk
    values = _Values(open_checkpoint(checkpoint))
    try:
        if state_dict_converter is not None:
            values = values.converted(state_dict_converter)
        with init_empty_weights(include_buffers=False):
            model = _build(model_class_or_factory, config)
        model.eval()
        slots = _slots(model)
        _check_names_and_shapes(slots, values, checkpoint)
        locations = _assign(slots, values, on_disk=on_disk)
        return _attach(model, policy, locations)
    except BaseException:
        values.close()
        raise


def _build(factory: Callable[..., ModuleT], config: Any) -> ModuleT:
    if config is None:
        model = factory()
    elif isinstance(config, Mapping):
        model = factory(**config)
    else:
        model = factory(config)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{getattr(factory, '__name__', factory)!r} returned a "
            f"{type(model).__name__}, not a torch.nn.Module"
        )
    return model


class _Values:
    """The checkpoint's tensors by the model's names: in their files, or computed."""

    def __init__(
        self,
        locations: dict[str, TensorLocation],
        computed: dict[str, torch.Tensor] | None = None,
        files: Iterable[Any] = (),
    ) -> None:
        self.locations = locations
        self.computed = computed or {}
        self.files = {*files, *(location.file for location in locations.values())}

    def names(self) -> set[str]:
        return self.locations.keys() | self.computed.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.locations:
            return self.locations[name].shape
        return tuple(self.computed[name].shape)

    def converted(self, converter: Converter) -> _Values:
        """Apply a converter: to stand-ins if it only renames, else to the tensors."""
        stand_ins = {
            name: torch.empty(location.shape, dtype=location.dtype, device="meta")
            for name, location in self.locations.items()
        }
        named = {id(tensor): name for name, tensor in stand_ins.items()}
        try:
            result = _checked(converter(dict(stand_ins)))
            if all(id(tensor) in named for tensor in result.values()):
                renamed = {
                    new: self.locations[named[id(tensor)]]
                    for new, tensor in result.items()
                }
                return _Values(renamed, files=self.files)
        except Exception as error:
            # It reads values: stand-ins have none.
            logger.debug("the converter does not run on stand-ins: %s", error)
        tensors = {name: at.file.mapped(at) for name, at in self.locations.items()}
        named = {id(tensor): name for name, tensor in tensors.items()}
        result = _checked(converter(dict(tensors)))
        kept = {
            new: self.locations[named[id(tensor)]]
            for new, tensor in result.items()
            if id(tensor) in named
        }
        computed = {
            new: tensor.contiguous().clone()
            for new, tensor in result.items()
            if id(tensor) not in named
        }
        return _Values(kept, computed, self.files)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _checked(converted: object) -> dict[str, torch.Tensor]:
    """Return what a converter returned, if it is names and tensors."""
    if not isinstance(converted, Mapping):
        raise ValueError(
            f"state_dict_converter returned a {type(converted).__name__}; it must "
            "return a mapping of names to tensors"
        )
    for name, tensor in converted.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"state_dict_converter returned a {type(tensor).__name__} for "
                f"{name!r}; it must return a mapping of names to tensors"
            )
    return dict(converted)


@dataclass
class _Slot:
    """One tensor of the model, wherever it is registered.

    Attributes:
        names: its full names.
        places: the registries and keys that hold it.
        tensor: the tensor without values (or the buffer with its initial ones).
    """

    names: list[str]
    places: list[tuple[dict[str, Any], str]]
    tensor: torch.Tensor


def _slots(model: nn.Module) -> list[_Slot]:
    """List what a checkpoint has to fill: parameters and persistent buffers.

    Tied parameters are one slot. Accelerate wraps a parameter that is assigned a
    second time in a new object over the same storage, so the storage tells.
    """
    slots: dict[object, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        volatile = module._non_persistent_buffers_set
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is None or (registry is module._buffers and key in volatile):
                    continue
                empty = tensor.numel() == 0
                same = id(tensor) if empty else tensor.untyped_storage()._cdata
                slot = slots.setdefault((same, tensor.shape), _Slot([], [], tensor))
                slot.names.append(dot + key)
                slot.places.append((registry, key))
    return list(slots.values())


def _check_names_and_shapes(
    slots: list[_Slot], values: _Values, checkpoint: object
) -> None:
    have = values.names()
    known = {name for slot in slots for name in slot.names}
    missing = [s.names[0] for s in slots if not have.intersection(s.names)]
    extra = sorted(have - known)
    misshapen = [
        f"{name} has shape {values.shape(name)}, the model needs "
        f"{tuple(slot.tensor.shape)}"
        for slot in slots
        for name in slot.names
        if name in have and values.shape(name) != tuple(slot.tensor.shape)
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if extra:
        problems.append(f"{len(extra)} that the model does not have: {_some(extra)}")
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape: {_some(misshapen)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint}: the tensors are not those of the model: "
            f"{'; '.join(problems)}. Pass the config that the checkpoint was saved "
            "with, or a state_dict_converter that renames or drops tensors"
        )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _assign(
    slots: list[_Slot], values: _Values, *, on_disk: bool
) -> dict[str, TensorLocation]:
    """Register tensors with values in place of those without.

    Returns:
        Where the bytes of parameters lie that were not read.
    """
    stay: dict[str, TensorLocation] = {}
    total = sum(location.nbytes for location in values.locations.values())
    used: dict[object, int] = defaultdict(int)
    with progress_bar("reading weights", 0 if on_disk else total) as bar:
        for slot in slots:
            name = next(n for n in slot.names if n in values.names())
            is_parameter = isinstance(slot.tensor, nn.Parameter)
            location = values.locations.get(name)
            if location is None:
                tensor = values.computed[name]
            elif on_disk and is_parameter:
                tensor = location.file.mapped(location)
                stay[slot.names[0]] = location
                used[location.file] += 1
            else:
                tensor = torch.empty(location.shape, dtype=location.dtype)
                location.file.read_into(location, tensor)
                bar.update(location.nbytes)
            if is_parameter:
                learns = slot.tensor.requires_grad and tensor.is_floating_point()
                tensor = nn.Parameter(tensor, requires_grad=learns)
            for registry, key in slot.places:
                registry[key] = tensor
    for file in values.files:
        if not used[file]:
            file.close()
    return stay

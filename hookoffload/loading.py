"""Checkpoint -> attached model: nothing is initialised, nothing is read too early."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .attach import attach_one
from .cached_codes import CodeCache
from .checkpoint import open_checkpoint
from .codable import check_makes_codes
from .conversion_cache import ConversionCache
from .converting import Converter, Locations, convert
from .file_maps import OwnMaps
from .model_building import build_empty
from .packed import with_parts
from .policy import OffloadPolicy
from .progress import progress_shown
from .readers import Read, empty_in_ram, read_tensors
from .safetensors_file import CheckpointFile
from .saved_forms import find_saved_weights
from .saved_weight import SavedWeight
from .slots import Slot, check_fit, slots_of
from .state_hooks import session_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_model(
    model_class_or_factory: Callable[..., ModuleT],
    checkpoint: str | Path | list[str | Path],
    policy: OffloadPolicy | None = None,
    *,
    config: Any = None,
    state_dict_converter: Converter | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_codes: bool = False,
    progress: bool = True,
) -> ModuleT:
    """Build a model without initialising it, give it a checkpoint, attach the hooks.

    With weights offloaded to disk (``store="disk"``) the files stay where the weights
    are, and a layer's bytes are read when the layer needs them. Otherwise they are
    read once, by several threads, into the host RAM where they stay; with
    ``host_limit_gb`` that is so for as many layers as fit it. Tensors keep the
    dtype that the files have; where the policy's ``storage_dtype`` is another one, they
    are cast as they are read into RAM.

    What has to be computed before it can be read (a converter that does more than
    rename, a binary checkpoint) is computed once, whatever the store, and kept as
    safetensors in a cache folder, where the next load finds it. An entry is known by
    the paths, sizes and times of the files, and by what the converter does: its code,
    its closure, and the functions and values that it uses of its module. Of another
    module only the file counts, not what that file imports. Entries are never removed:
    delete the folder, or entries of it, when you need the room. The log says at level
    INFO where they are.

    Args:
        model_class_or_factory: called to make the model. A model class of transformers
            or diffusers, if `config` is None and the checkpoint is a folder with a
            config.json, is configured by that. A function may quantise what it makes;
            then the checkpoint has the parts of each weight, under the names that
            its class has for them (``"up.weight.scale"``). It need not for what
            bitsandbytes and torchao saved: plain linear layers become theirs.
        checkpoint: a file, several (a later one wins), a pattern such as
            ``"folder/*.safetensors"``, an index, or a folder with an index. GGUF files
            take the extra ``gguf``; their packed weights stay so. Files that
            `torch.save` made (.bin, .pth, .pt, .ckpt) are converted first; those that
            would run code are refused.
        policy: as for `attach_offload_hooks`.
        config: None calls the factory without arguments, a mapping with these
            keyword arguments, anything else (a transformers config) with this one.
        state_dict_converter: from the checkpoint's names and tensors to the model's.
            If it only renames, drops, and takes parts that are contiguous, the files
            are still read in place. It is called once with tensors that have no values;
            only if it needs values it is called again, with all of them, and what it
            computes has to fit RAM.
        cache_dir: the cache folder; default: ``hookoffload/converted`` in the user's
            cache directory. If it cannot be written, what is computed goes to a
            temporary folder.
        cache_codes: keep the codes of ``codec="lossless"`` in the cache folder, three
            quarters of the weights' size. They are read instead of the weights, by
            this load and by later ones of the same files, which have nothing to
            encode. Layers that wait on disk are read from there in each pass. What
            `torch.save` made, or a converter computes, has to be kept there too.
        progress: show bars for what takes longer than a second.

    Returns:
        The model, attached and in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged or not safe to load, its tensors
            are not those of the model, or the disk of the cache folder is full.
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
    resolved = policy.resolve()
    on_disk = resolved.offload.on_disk
    # What is coded rests in the file, and its code in RAM or in the cache.
    stays = on_disk or resolved.codec is not None
    if cache_codes:
        check_makes_codes(resolved)
    cache = ConversionCache(cache_dir)
    with ExitStack() as opened, progress_shown(progress):
        locations = open_checkpoint(checkpoint, cache)
        _close_later(opened, locations)
        if state_dict_converter is not None:
            locations = convert(locations, state_dict_converter, cache)
            _close_later(opened, locations)
        model = build_empty(model_class_or_factory, config, checkpoint)
        saved = find_saved_weights(model, locations, resolved.compute_dtype)
        slots = slots_of(model, {weight.name for weight in saved})
        apart = locations.keys() - {name for weight in saved for name in weight.names}
        check_fit(slots, {n: locations[n] for n in apart}, checkpoint)
        stay = _assign(slots, saved, locations, apart=stays)
        _close_later(opened, stay)
        keeps = cache_codes and not cache.used_temporary_folder
        code_cache = CodeCache(cache, locations) if keeps else None
        if code_cache is not None:
            opened.callback(code_cache.close)
        attach_one(model, policy, stay, code_cache)
        session = session_of(model)
        assert session is not None, "it has just been attached"
        session.loaded = True
        if stays:
            opened.pop_all()
            whole = on_disk and resolved.host_limit_bytes is None
            used = session.store.files
            if whole:
                used |= _files_of(stay)
            for file in (_files_of(locations) | _files_of(stay)) - used:
                file.close()
        # In RAM they have no place in a file any more, nor have those that the user
        # registers later under the same names.
        stay.clear()
        return model


def _close_later(opened: ExitStack, locations: Locations) -> None:
    for file in _files_of(locations):
        opened.callback(file.close)


def _files_of(locations: Locations) -> set[CheckpointFile]:
    return {location.file for location in locations.values()}


def _assign(
    slots: list[Slot], saved: list[SavedWeight], locations: Locations, *, apart: bool
) -> Locations:
    """Register tensors with values in place of those without.

    Buffers are read. Parameters are maps of their files, from which the store reads
    them when it takes them over, or whenever a layer needs them.

    Args:
        slots: the model's tensors.
        saved: those that have a form of their own in the checkpoint.
        locations: the checkpoint's.
        apart: whether the maps stay, so that no two of them may share bytes.

    Returns:
        Where the bytes of parameters lie.
    """
    stay: Locations = {}
    reads: list[Read] = []
    maps = OwnMaps()
    packed: dict[int, _Packed] = {}
    for slot in slots:
        location = next(locations[n] for n in slot.names if n in locations)
        is_parameter = isinstance(slot.tensor, nn.Parameter)
        if is_parameter or slot.path:
            location = maps.own(location) if apart else location
            tensor = location.file.mapped(location)
            if is_parameter:
                learns = slot.tensor.requires_grad and tensor.is_floating_point()
                tensor = nn.Parameter(tensor, requires_grad=learns)
            stay[slot.names[0]] = location
        else:
            tensor = empty_in_ram(location.shape, location.dtype)
            reads.append((location, tensor))
        for registry, key in slot.places:
            if slot.path:
                wrapper = registry[key]
                about = packed.setdefault(id(wrapper), _Packed(wrapper))
                about.parts[slot.path] = tensor
                about.places.append((registry, key))
            else:
                registry[key] = tensor
    for about in packed.values():
        about.register()
    for weight in saved:
        if apart:
            weight.parts = {p: maps.own(at) for p, at in weight.parts.items()}
        weight.register()
        stay |= {weight.name + path: at for path, at in weight.parts.items()}
    read_tensors(reads)
    return stay


class _Packed:
    """A quantised tensor whose parts are being given values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.parts: dict[str, torch.Tensor] = {}
        self.places: list[tuple[dict[str, Any], str]] = []

    def register(self) -> None:
        """Make it anew around its parts, and register it where it was."""
        made = with_parts(self.tensor, self.parts)
        if isinstance(self.tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.tensor.requires_grad)
        for registry, key in self.places:
            registry[key] = made

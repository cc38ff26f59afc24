"""A converter applied to a checkpoint: read in place what it only renames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from .conversion_cache import ConversionCache
from .conversion_entry import EntryWriter, part_of
from .conversion_trace import Exports, Place, Trace, Writes, is_plain
from .converter_identity import identity_of
from .progress import progress_bar
from .readers import empty_in_ram, read_tensors
from .safetensors_file import CheckpointFile, TensorLocation

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Locations = dict[str, TensorLocation]
Converter = Callable[[Tensors], Mapping[str, torch.Tensor]]


def convert(
    locations: Locations, converter: Converter, cache: ConversionCache
) -> Locations:
    """Return where the tensors lie that a converter makes of a checkpoint's.

    See [Note: traced conversion].

    Args:
        locations: the checkpoint's tensors.
        converter: from the checkpoint's names and tensors to the model's.
        cache: where to keep what it computes.

    Returns:
        The location of each tensor by its new name. Files of the checkpoint that none
        of them lies in are closed.

    Raises:
        ValueError: The converter returned no names and tensors.
        CheckpointError: The disk is full, or a file changed meanwhile.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _convert(locations, converter, cache)


def _convert(
    locations: Locations, converter: Converter, cache: ConversionCache
) -> Locations:
    traced = _traced(locations, converter)
    if traced is not None and not traced.computed:
        found = traced.kept
    else:
        found = cache.converted(
            f"the converter {getattr(converter, '__qualname__', converter)!r}",
            identity_of(converter),
            locations,
            sorted({location.file.path for location in locations.values()}),
            (traced or _Untraced(locations, converter)).write,
        )
    needed = {location.file for location in found.values()}
    for file in {location.file for location in locations.values()} - needed:
        file.close()
    return found


def _traced(locations: Locations, converter: Converter) -> _Traced | None:
    """Run a converter on stand-ins; None if it needs values."""
    stand_ins = {
        name: torch.empty(location.shape, dtype=location.dtype, device="meta")
        for name, location in locations.items()
    }
    trace = Trace(stand_ins)
    try:
        with trace:
            result = _checked(converter(dict(stand_ins)))
    except Exception as error:
        # Whatever is wrong, it says so again when it is given values.
        logger.debug("the converter does not run on stand-ins: %s", error)
        return None
    if not all(map(trace.is_known, result.values())):
        trace.untraceable = "it returns tensors that are not plain"
    if trace.untraceable:
        logger.debug("the converter is not traced: %s", trace.untraceable)
        return None
    return _Traced(locations, trace, result)


class _Traced:
    """What a converter does, known from stand-ins."""

    def __init__(self, locations: Locations, trace: Trace, result: Tensors) -> None:
        self._locations = locations
        self._trace = trace
        self._sources = {name: trace.source_of(t) for name, t in result.items()}
        self.kept = {
            name: _part(locations[source[0]], result[name], source[1])
            for name, source in self._sources.items()
            if source is not None
        }
        self.computed = {n: t for n, t in result.items() if n not in self.kept}

    def write(self, writer: EntryWriter) -> None:
        """Compute what is to be computed, group by group, and write it."""
        for name, location in self.kept.items():
            found = self._sources[name]
            assert found is not None, "or it would not be kept"
            source = found[0]
            writer.keep(name, source, location, self._locations[source].offset)
        made_now = {n: t for n, t in self.computed.items() if not t.is_meta}
        places = {n: Place.of(t) for n, t in self.computed.items() if t.is_meta}
        with progress_bar("converting weights", _nbytes(self.computed)) as bar:
            writer.progress = bar.update
            add_once(writer, made_now)
            for group in self._trace.groups(places):
                storages = self._real_storages(*group.sources())
                add_once(writer, group.compute(storages))
            writer.flush()

    def _real_storages(
        self, used: set[int], written: set[int]
    ) -> dict[int, torch.UntypedStorage]:
        storages = {}
        for storage in used & self._trace.sources.keys():
            location = self._locations[self._trace.sources[storage]]
            if storage in written:
                # Not the map: its pages, written to, would stay as long as the file.
                tensor = empty_in_ram(location.shape, location.dtype)
                read_tensors([(location, tensor)])
            else:
                tensor = location.file.mapped(location)
            storages[storage] = tensor.untyped_storage()
        return storages


class _Untraced:
    """What a converter does, known only from running it on all of the tensors."""

    def __init__(self, locations: Locations, converter: Converter) -> None:
        self._locations = locations
        self._converter = converter

    def write(self, writer: EntryWriter) -> None:
        """Run the converter on maps of the files, and write what it computed."""
        # Maps of their own: what the converter writes to must not be seen by others.
        files = {location.file for location in self._locations.values()}
        again: dict[CheckpointFile, CheckpointFile] = {}
        try:
            for file in files:
                again[file] = type(file)(file.path)
            tensors = {
                name: again[at.file].mapped(replace(at, file=again[at.file]))
                for name, at in self._locations.items()
            }
        finally:
            for file in again.values():
                file.close()
        given = {Place.of(tensor).storage: name for name, tensor in tensors.items()}
        writes, exports = Writes(), Exports()
        with writes, exports:
            result = _checked(self._converter(dict(tensors)))
        changed = writes.written | exports.exported
        computed = {}
        for name, tensor in result.items():
            source = None
            if is_plain(tensor) and tensor.is_contiguous():
                storage = Place.of(tensor).storage
                source = None if storage in changed else given.get(storage)
            if source is None:
                computed[name] = tensor
            else:
                location = self._locations[source]
                start = Place.of(tensor).start
                part = _part(location, tensor, start)
                writer.keep(name, source, part, location.offset)
        with progress_bar("writing converted weights", _nbytes(computed)) as bar:
            writer.progress = bar.update
            add_once(writer, computed)
            writer.flush()


def _part(location: TensorLocation, tensor: torch.Tensor, start: int) -> TensorLocation:
    return part_of(location, tensor.dtype, tuple(tensor.shape), start)


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if is_plain(tensor))


def add_once(writer: EntryWriter, tensors: Tensors) -> None:
    """Have tensors written, those that are the same one only once."""
    first_names: dict[Place, str] = {}
    for name, tensor in tensors.items():
        first = name
        if is_plain(tensor):
            first = first_names.setdefault(Place.of(tensor), name)
        if first == name:
            writer.add(name, tensor.detach())
        else:
            writer.repeat(name, first)


def _checked(converted: object) -> Tensors:
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

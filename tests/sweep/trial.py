"""One class, attached: what comes of it."""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import hookoffload
from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
)
from tests.snapshots import Snapshot, assert_same_surroundings, same_bits, tensors_of

from .recipe import Recipe, seed_everything

GIB = 2**30
SHARE = 0.3
FORWARDS = 2
Outcome = Literal["equal", "refused", "unbuilt", "failed"]
_LIBRARY = str(Path(hookoffload.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one class.

    Attributes:
        name: of the class.
        outcome: "equal", "refused", "unbuilt" or "failed".
        reason: why it is not equal; empty if it is.
        size: bytes of parameters and buffers.
        limit: bytes of the limit.
        beside: bytes of it for what an accelerator holds beside weights: activations,
            and workspaces of its libraries.
        least: whether the limit is the least that the model needs, which is more than
            30% of its size.
        peak: bytes held against the limit.
        moved: bytes copied.
        inputs: names of the inputs it was called with.
        seconds: how long all of it took.
    """

    name: str
    outcome: Outcome
    reason: str = ""
    size: int = 0
    limit: int = 0
    beside: int = 0
    least: bool = False
    peak: int = 0
    moved: int = 0
    inputs: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a trial runs.

    Attributes:
        device: "cpu" or an accelerator.
        dtype: of the weights; None leaves them as the library makes them.
        module_map: what the policy says of layers; None leaves it to the rules.
        rests: where weights rest; None: on disk for a CPU, which computes with what is
            in RAM where it lies, and in RAM for an accelerator.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    module_map: Mapping[str, Any] | None = None
    rests: Literal["cpu", "disk"] | None = None

    @property
    def store(self) -> Literal["cpu", "disk"]:
        """Where layers rest."""
        return self.rests or ("disk" if self.device == "cpu" else "cpu")


class _NothingToCompareError(Exception):
    """A model whose output says nothing, or another thing each time."""


class _RefusedError(Exception):
    """The library does not take the model."""


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """What a model does without the library.

    Attributes:
        wants: the tensors that each forward gives.
        model: after these forwards.
        activations: bytes on an accelerator beside the weights.
    """

    wants: list[list[torch.Tensor]]
    model: nn.Module
    activations: int


def run_trial(name: str, recipe: Recipe, place: Place) -> Result:
    """Run a class plain and attached, and compare everything.

    Args:
        name: of the class.
        recipe: how to build and call it.
        place: where.
    """
    about: dict[str, Any] = {"name": name, "inputs": tuple(recipe.inputs)}
    try:
        plain = _run_plain(recipe, place)
    except _NothingToCompareError as error:
        return Result(outcome="unbuilt", reason=str(error), **about)
    except Exception as error:
        reason = f"without the library: {_said(error)}"
        return Result(outcome="unbuilt", reason=reason, **about)
    about["size"] = _size(plain.model)
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        return _run_attached(recipe, place, plain, about, Path(folder))


def _run_attached(
    recipe: Recipe,
    place: Place,
    plain: _Plain,
    about: dict[str, Any],
    folder: Path,
) -> Result:
    """Attach with 30% of the size, or with the least if that is more."""
    model = _built(recipe, place)
    # On an accelerator the limit holds for all that the process has there.
    beside = about["beside"] = plain.activations + _held(place) + _unsure(place)
    limit = int(SHARE * about["size"]) + beside
    try:
        try:
            return _run_with(limit, model, recipe, place, plain, about, folder)
        except BudgetExceededError:
            # Some weights are read in a way that only a forward shows.
            model = _built(recipe, place)
            limit = max(_least(model, recipe, place, folder) + beside, limit + 1)
            model = _built(recipe, place)
            about["least"] = True
            return _run_with(limit, model, recipe, place, plain, about, folder)
    except _RefusedError as error:
        return Result(outcome="refused", reason=str(error), **about)
    except Exception as error:
        return Result(outcome="failed", reason=_said(error), **about)


def _run_with(
    limit: int,
    model: nn.Module,
    recipe: Recipe,
    place: Place,
    plain: _Plain,
    about: dict[str, Any],
    folder: Path,
) -> Result:
    before = Snapshot(model, folder)
    about["limit"] = limit
    _attach(model, limit, place, folder)
    try:
        about |= _compare_attached(model, recipe, place, plain.wants, limit)
    finally:
        detach(model)
    problems = _differences(model, before, plain.model)
    if problems:
        return Result(outcome="failed", reason="; ".join(problems[:4]), **about)
    return Result(outcome="equal", **about)


def _attach(model: nn.Module, limit: int, place: Place, folder: Path) -> None:
    policy = OffloadPolicy(
        limit_gb=limit / GIB,
        store=place.store,
        compute_device=place.device,
        disk_dir=folder if place.store == "disk" else None,
        module_map=place.module_map,
    )
    try:
        attach_offload_hooks(model, policy)
    except BudgetExceededError:
        raise
    except (ValueError, RuntimeError) as error:
        raise _RefusedError(_said(error)) from error


def _least(model: nn.Module, recipe: Recipe, place: Place, folder: Path) -> int:
    """Return the least that a model needs, known when it has run once."""
    _attach(model, 0, place, folder)
    try:
        _call(model, recipe, place)
        return offload_plan(model).least_bytes
    finally:
        detach(model)


def _built(recipe: Recipe, place: Place) -> nn.Module:
    model = recipe.build()
    return model if place.dtype is None else model.to(place.dtype)


def _inputs(recipe: Recipe, place: Place) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            dtype = place.dtype if value.is_floating_point() else None
            return value.to(place.device, dtype, copy=True)
        if isinstance(value, list | tuple):
            return type(value)(moved(one) for one in value)
        return copy.deepcopy(value)

    return {key: moved(value) for key, value in recipe.inputs.items()}


def _call(model: nn.Module, recipe: Recipe, place: Place) -> list[torch.Tensor]:
    inputs = _inputs(recipe, place)
    seed_everything()
    with torch.no_grad():
        output = model(**inputs)
    return [
        t.detach().clone(memory_format=torch.contiguous_format).cpu()
        for t in tensors_in(output)
    ]


def _run_plain(recipe: Recipe, place: Place) -> _Plain:
    """Run two forwards without the library, twice."""
    model, again = _built(recipe, place), _built(recipe, place)
    if not _size(model):
        raise _NothingToCompareError("it has no weights")
    both = zip(tensors_of(model).values(), tensors_of(again).values(), strict=True)
    if not all(same_bits(one, other) for one, other in both):
        raise _NothingToCompareError("it is not built the same twice")
    wants: list[list[torch.Tensor]] = []
    repeated: list[list[torch.Tensor]] = []
    activations = 0
    for outputs, built in ((wants, model), (repeated, again)):
        built.to(place.device)
        with _peak(place) as measured:
            outputs.extend(_call(built, recipe, place) for _ in range(FORWARDS))
        activations = max(activations, measured())
        built.to("cpu")
    if not wants[0]:
        raise _NothingToCompareError("its output has no tensor")
    if not all(map(_all_same, wants, repeated)):
        raise _NothingToCompareError("its output differs from run to run without us")
    return _Plain(wants=wants, model=model, activations=activations)


def _held(place: Place) -> int:
    """Return what the process has on an accelerator before anything is attached."""
    return 0 if place.device == "cpu" else torch.cuda.memory_allocated()


def _unsure(place: Place) -> int:
    """Return by how much the same activations differ in what they take.

    The allocator hands out up to 1 MiB more than is asked for, as blocks are free.
    """
    return 0 if place.device == "cpu" else 2 * 2**20


@contextmanager
def _peak(place: Place) -> Iterator[Callable[[], int]]:
    """Measure what a call takes on an accelerator beside what is there before."""
    if place.device == "cpu":
        yield lambda: 0
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - start


def _asked_for(place: Place) -> int:
    """Return the peak of what was asked for on an accelerator, without what it adds."""
    if place.device == "cpu":
        return sys.maxsize  # nothing is added
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"])


def _compare_attached(
    model: nn.Module,
    recipe: Recipe,
    place: Place,
    wants: list[list[torch.Tensor]],
    limit: int,
) -> dict[str, Any]:
    asked_for = 0
    for number, want in enumerate(wants):
        got = _call(model, recipe, place)
        asked_for = max(asked_for, _asked_for(place))
        if not _all_same(got, want):
            raise AssertionError(f"forward {number + 1}: {_difference(got, want)}")
    stats = offload_stats(model)
    # Each block may be up to 1 MiB larger than what was asked for: with gigabytes of
    # activations, that is more than 30% of a small model's size.
    if stats.peak_bytes > limit and asked_for > limit:
        raise AssertionError(
            f"peak {stats.peak_bytes} ({asked_for} asked for) above the limit {limit}"
        )
    return {"peak": stats.peak_bytes, "moved": stats.bytes_moved}


def _differences(model: nn.Module, before: Snapshot, plain: nn.Module) -> list[str]:
    """Tell what detach did not restore; what the forward itself changes may differ.

    Args:
        model: detached.
        before: as it was before it was attached.
        plain: the same model, run as often without the library.
    """
    problems = []
    now, without = tensors_of(model), tensors_of(plain)
    if list(now) != list(without):
        return ["there are other tensors than after plain forwards"]
    for name, tensor in now.items():
        then = before.tensors.get(name)
        if not _is_same(tensor, without[name], then and then.tensor):
            problems.append(f"{name} has another value after detach")
        if tensor.device != without[name].device:
            problems.append(f"{name} is on {tensor.device} after detach")
        if isinstance(tensor, nn.Parameter) and then and tensor is not then.tensor:
            problems.append(f"{name} is another object after detach")
        if tensor.requires_grad != without[name].requires_grad:
            problems.append(f"{name} has another requires_grad after detach")
    hooks = _hook_counts(model)
    problems += [
        f"{name or 'the model'} has other hooks after detach"
        for name, count in _hook_counts(plain).items()
        if hooks.get(name) != count
    ]
    try:
        assert_same_surroundings(before)
    except AssertionError as error:
        problems.append(str(error))
    return problems


def _is_same(now: torch.Tensor, plain: torch.Tensor, before: Any) -> bool:
    """Tell whether a tensor has the bits that the plain model's has.

    Some forwards cast a module for good. detach gives it back in its own dtype.
    """
    if same_bits(now, plain):
        return True
    kept = before is not None and now.dtype == before.dtype != plain.dtype
    return kept and same_bits(now.to(plain.dtype), plain)


def _hook_counts(model: nn.Module) -> dict[str, int]:
    return {
        name: sum(
            len(hooks)
            for key, hooks in vars(module).items()
            if key.endswith("_hooks") and isinstance(hooks, dict)
        )
        for name, module in model.named_modules()
    }


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return all tensors in an output: containers, dataclasses, caches and the like."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found.append(one)
            return
        if isinstance(one, str | bytes | int | float | type | None | nn.Module):
            return
        if id(one) in seen:
            return
        seen.add(id(one))
        if isinstance(one, Mapping):
            for inner in one.values():
                walk(inner)
        elif isinstance(one, list | tuple | set):
            for inner in one:
                walk(inner)
        elif is_dataclass(one) or type(one).__module__.partition(".")[0] in _KNOWN:
            if hasattr(one, "to_dict"):
                return  # a config
            for inner in getattr(one, "__dict__", {}).values():
                walk(inner)

    walk(value)
    return found


_KNOWN = ("transformers", "diffusers", "torch")


def _all_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(same_bits, some, others))


def _difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> str:
    if len(got) != len(want):
        return f"{len(got)} tensors come out, not {len(want)}"
    wrong = [i for i in range(len(got)) if not same_bits(got[i], want[i])]
    i = wrong[0]
    if got[i].shape != want[i].shape or got[i].dtype != want[i].dtype:
        return f"output {i} is {got[i].dtype} {tuple(got[i].shape)}"
    most = (got[i].double() - want[i].double()).abs().max().item()
    return f"{len(wrong)} of {len(got)} tensors differ, output {i} by up to {most:.3g}"


def _size(model: nn.Module) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors_of(model).values()
    }
    return sum(storages.values())


def _said(error: BaseException) -> str:
    """Return an exception in one line, with the last place of the library in it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(_LIBRARY)]
    where = f" [{Path(ours[-1].filename).name}:{ours[-1].lineno}]" if ours else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{where}"

"""Converters that compute: done once, in parts, and kept where the next load looks."""

from __future__ import annotations

import errno
import functools
import gc
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import nn

from hookoffload import CheckpointError, OffloadPolicy, detach, load_model
from hookoffload.converter_identity import identity_of
from tests.process_memory import settled_bytes
from tests.safetensors_samples import descriptors_kept
from tests.small_models import assert_same, chain, on_disk, run

Tensors = dict[str, torch.Tensor]
MIB = 2**20
LARGE = 10 * MIB  # elements; more than 32 MiB are returned to the system when freed
KILLS = 50 if settings.get_current_profile_name() == "long" else 10

_forked = multiprocessing.get_context("fork")


class Table(nn.Module):
    """Holds whatever parameters it is told to."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _load(
    path: Any,
    converter: Callable[[Tensors], Any],
    cache: Path,
    store: str = "cpu",
    **shapes: tuple[int, ...],
) -> Tensors:
    """Return what a model holds after loading through a converter."""
    policy = OffloadPolicy(store=store, compute_device="cpu")  # type: ignore[arg-type]
    model = load_model(
        Table,
        path,
        policy,
        config=shapes,
        state_dict_converter=converter,
        cache_dir=cache,
    )
    detach(model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*") if path.is_dir())


def _tensors_in(cache: Path) -> int:
    files = [file for entry in _entries(cache) for file in entry.glob("*.safetensors")]
    return sum(len(load_file(file)) for file in files)


class Counted:
    """Wraps a converter and counts its calls with values, not as a part of it."""

    calls = 0

    def __init__(self, converter: Callable[[Tensors], Any]) -> None:
        self.converter = converter

    def __call__(self, state: Tensors) -> Any:
        if not any(tensor.is_meta for tensor in state.values()):
            Counted.calls += 1
        return self.converter(state)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    state = {
        "qkv": torch.randn(12, 4),
        "a": torch.randn(4, 6),
        "b": torch.randn(4, 6),
        "scale": torch.tensor(2.0),
    }
    save_file(state, path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# --- what is read in place ---


def _split(state: Tensors) -> Tensors:
    q, k, v = state["qkv"].chunk(3)
    return {"q": q, "k": k.detach(), "v": nn.Parameter(v), "whole": state["a"].view(24)}


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_contiguous_parts_are_read_where_they_lie(
    path: Path, cache: Path, store: str
) -> None:
    shapes = {name: (4, 4) for name in "qkv"} | {"whole": (24,)}
    found = _load(path, _split, cache, store, **shapes)
    for name, tensor in _split(load_file(path)).items():
        assert_same(found[name], tensor.detach())
    assert not cache.exists()


def _copied(state: Tensors) -> Tensors:
    first, rest = state["qkv"].split([4, 8])
    copied = torch.cat([rest])
    return {"q": torch.cat([first]), "k": copied[:4], "v": copied[4:].clone()}


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_copies_of_contiguous_parts_are_read_where_they_lie(
    path: Path, cache: Path, store: str
) -> None:
    found = _load(path, _copied, cache, store, q=(4, 4), k=(4, 4), v=(4, 4))
    for name, value in _copied(load_file(path)).items():
        assert_same(found[name], value)
    assert not _entries(cache)


def _copied_and_changed(state: Tensors) -> Tensors:
    late = torch.cat([state["a"]])
    state["a"] += 1
    changed = torch.cat([state["b"]])
    changed += 1
    turned = torch.cat([state["qkv"].t()])
    twice = torch.cat([state["b"], state["b"]])
    return {"late": late, "changed": changed, "turned": turned, "twice": twice}


def test_copies_of_what_is_changed_or_turned_are_computed(
    path: Path, cache: Path
) -> None:
    shapes = {"late": (4, 6), "changed": (4, 6), "turned": (4, 12), "twice": (8, 6)}
    found = _load(path, _copied_and_changed, cache, **shapes)
    for name, value in _copied_and_changed(load_file(path)).items():
        assert_same(found[name], value)
    assert _tensors_in(cache) == 4


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_parts_that_overlap_are_independent(
    path: Path, cache: Path, store: str
) -> None:
    policy = OffloadPolicy(store=store, compute_device="cpu")  # type: ignore[arg-type]
    model = load_model(
        Table,
        path,
        policy,
        config={"low": (3, 6), "high": (3, 6), "all": (4, 6)},
        state_dict_converter=lambda s: {
            "low": s["a"][:3],
            "high": s["a"][1:],
            "all": s["a"],
        },
    )
    source = load_file(path)["a"]
    nn.init.zeros_(model.low)
    assert_same(model.high.detach(), source[1:])
    assert_same(model.all.detach(), source)
    detach(model)


# --- what is computed ---


def _everything(state: Tensors) -> Tensors:
    a, b = state["a"], state["b"]
    rotated = torch.empty_like(a)
    rotated[:2] = a[2:]
    rotated[2:].copy_(a[:2])
    b.mul_(3).add_(state["scale"])
    both = torch.cat([a, b], dim=1)
    left, right = both.half().split([5, 7], dim=1)
    return {
        "rotated": rotated,
        "b": b,
        "transposed": a.T,
        "left": left,
        "right": right.contiguous(),
        "mixed": a * torch.tensor(0.5) + torch.zeros_like(a),
        "made": torch.arange(3.0),
        "same": rotated,
        "kept": state["qkv"],
        "squared": torch.einsum("ij,kj->ik", a, a),
    }


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("values", [False, True], ids=["traced", "with_values"])
def test_what_is_computed_is_what_the_converter_computes(
    path: Path, cache: Path, store: str, values: bool
) -> None:
    def convert(state: Tensors) -> Tensors:
        if values:
            assert state["scale"].item() == 2
        return _everything(state)

    wanted = _everything(load_file(path))
    counted = Counted(convert)
    for calls in (1, 0):
        Counted.calls = 0
        found = _load(path, counted, cache, store, **_shapes(wanted))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_same(found[name], tensor.contiguous())
        assert Counted.calls == (calls if values else 0)
    assert len(_entries(cache)) == 1
    assert _tensors_in(cache) == len(wanted) - 2, "not what is kept, nor twice"


def test_numbers_written_behind_the_back_of_torch_are_noticed(
    path: Path, cache: Path
) -> None:
    def convert(state: Tensors) -> Tensors:
        state["a"].numpy()[:] = 7
        return {"a": state["a"], "b": state["b"]}

    found = _load(path, convert, cache, "disk", a=(4, 6), b=(4, 6))
    assert_same(found["a"], torch.full((4, 6), 7.0))
    assert_same(found["b"], load_file(path)["b"])


def test_data_replaced_by_a_converter_is_noticed(path: Path, cache: Path) -> None:
    def convert(state: Tensors) -> Tensors:
        state["a"].data = state["b"].data
        state["b"].data = state["b"].data.flip(0)
        return {"a": state["a"], "b": state["b"]}

    found = _load(path, convert, cache, a=(4, 6), b=(4, 6))
    source = load_file(path)["b"]
    assert_same(found["a"], source)
    assert_same(found["b"], source.flip(0))


def test_data_written_to_by_a_converter_is_noticed(path: Path, cache: Path) -> None:
    def convert(state: Tensors) -> Tensors:
        state["a"].data.mul_(2)  # moves no version that the tensor shows
        return {"a": state["a"], "b": state["b"]}

    found = _load(path, convert, cache, a=(4, 6), b=(4, 6))
    assert_same(found["a"], load_file(path)["a"] * 2)


def test_conjugate_views_are_computed(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "complex.safetensors"
    save_file({"a": torch.randn(3, dtype=torch.complex64)}, path)
    found = _load(path, lambda s: {"a": s["a"].conj()}, cache, a=(3,))
    assert_same(found["a"], load_file(path)["a"].conj().resolve_conj())


def test_conversion_takes_the_memory_of_its_largest_group(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hookoffload import conversion_entry
    from hookoffload.conversion_trace import Group

    monkeypatch.setattr(conversion_entry, "_SHARD", 2 * 64 * 4)
    path = tmp_path / "model.safetensors"
    save_file({f"t{i}": torch.full((8, 8), float(i)) for i in range(10)}, path)
    sizes: list[int] = []
    compute = Group.compute

    def note(self: Group, storages: Any) -> Tensors:
        sizes.append(len(storages))
        return compute(self, storages)

    monkeypatch.setattr(Group, "compute", note)
    wanted = {f"t{i}": (8, 8) for i in range(10)}
    found = _load(path, lambda s: {n: t.T + 1 for n, t in s.items()}, cache, **wanted)
    assert_same(found["t7"], torch.full((8, 8), 8.0))
    assert sizes == [1] * 10, "one tensor of the checkpoint at a time"
    assert len(list(_entries(cache)[0].glob("*.safetensors"))) == 5


def test_what_is_computed_in_place_does_not_stay_in_memory(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(LARGE), "b": torch.ones(4)}, path)
    policy = on_disk(tmp_path / "spill")

    def convert(state: Tensors) -> Tensors:
        state["a"].neg_()
        return state

    def load(name: str) -> nn.Module:
        return load_model(
            Table,
            path,
            policy,
            config={"a": (LARGE,), "b": (4,)},
            state_dict_converter=convert,
            cache_dir=cache / name,
        )

    detach(load("first"))  # imports what it needs
    start = settled_bytes()
    model = load("second")
    assert settled_bytes() - start < 12 * MIB
    assert model.a.detach()[-1] == -1
    detach(model)


# --- the cache ---


def _doubled(state: Tensors) -> Tensors:
    return {"a": state["a"] * 2}


def test_cache_is_not_used_for_other_files_or_converters(
    path: Path, cache: Path, tmp_path: Path
) -> None:
    def factor(number: float) -> Callable[[Tensors], Tensors]:
        return lambda state: {"a": state["a"] * number}

    source = load_file(path)
    for number in (2.0, 3.0, 2.0):
        found = _load(path, factor(number), cache, a=(4, 6))
        assert_same(found["a"], source["a"] * number)
    assert len(_entries(cache)) == 2
    save_file(source | {"a": source["a"] + 1}, path)
    os.utime(path, ns=(1, 1))
    assert_same(_load(path, factor(2.0), cache, a=(4, 6))["a"], (source["a"] + 1) * 2)
    assert len(_entries(cache)) == 3


def test_cache_lies_in_the_users_cache_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    policy = OffloadPolicy(compute_device="cpu")
    model = load_model(
        Table, path, policy, config={"a": (4, 6)}, state_dict_converter=_doubled
    )
    detach(model)
    assert len(_entries(tmp_path / "home" / "hookoffload" / "converted")) == 1


def test_converter_that_cannot_be_recognised_is_not_kept(
    path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    factor = torch.full((4, 6), 2.0, device="cpu")

    def convert(state: Tensors) -> Tensors:
        return {"a": state["a"] * factor[0, 0]}

    assert identity_of(convert) is None
    policy = on_disk(tmp_path / "spill")
    model = load_model(
        Table,
        path,
        policy,
        config={"a": (4, 6)},
        state_dict_converter=convert,
        cache_dir=cache,
    )
    assert not _entries(cache)
    assert len(_entries(tmp_path / "temporary")) == 1
    assert_same(model.a.detach(), load_file(path)["a"] * 2)
    detach(model)
    del model
    gc.collect()
    assert not _entries(tmp_path / "temporary")


def test_home_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"  # as on a read-only disk, also for root
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = _load(path, _doubled, cache, a=(4, 6))
            assert_same(found["a"], load_file(path)["a"] * 2)
    warnings = [r for r in caplog.records if "cache_dir=" in r.getMessage()]
    assert len(warnings) == 1


@pytest.mark.parametrize("function", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_that_is_full_leaves_nothing_behind(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken, descriptors_kept():
        broken.setattr(os, function, fail)
        with pytest.raises(CheckpointError, match=r"cache_dir="):
            _load(path, _doubled, cache, a=(4, 6))
    assert not _entries(cache)
    assert_same(_load(path, _doubled, cache, a=(4, 6))["a"], load_file(path)["a"] * 2)


@pytest.mark.parametrize("damage", ["cut", "table", "no file"])
def test_damaged_entry_is_made_anew(path: Path, cache: Path, damage: str) -> None:
    _load(path, _doubled, cache, a=(4, 6))
    (entry,) = _entries(cache)
    (file,) = entry.glob("*.safetensors")
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 4)
    elif damage == "table":
        (entry / "conversion.safetensors.index.json").write_text("{")
    else:
        file.unlink()
    assert_same(_load(path, _doubled, cache, a=(4, 6))["a"], load_file(path)["a"] * 2)
    assert _entries(cache) == [entry]


def test_checkpoint_that_changes_while_it_is_converted_is_refused(
    path: Path, cache: Path
) -> None:
    def convert(state: Tensors) -> Tensors:
        os.utime(path, ns=(5, 5))
        return _doubled(state)

    with pytest.raises(CheckpointError, match="was written to"):
        _load(path, convert, cache, a=(4, 6))
    assert not _entries(cache)


# --- several processes ---


def _many(path: Path) -> dict[str, tuple[int, ...]]:
    state = {f"t{i}": torch.full((64, 64), float(i)) for i in range(30)}
    save_file(state, path)
    return _shapes(state)


def _slowly(state: Tensors) -> Tensors:
    if any(tensor.is_meta for tensor in state.values()):
        raise RuntimeError("wants values")
    time.sleep(0.05)
    return {name: tensor + 1 for name, tensor in state.items()}


def _plus_one(state: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in state.items()}


def _assert_many(found: Tensors) -> None:
    for name, tensor in found.items():
        assert_same(tensor, torch.full((64, 64), float(name[1:]) + 1))


def _convert_and_tell(path: Path, cache: Path, shapes: Any, results: Any) -> None:
    Counted.calls = 0
    _assert_many(_load(path, Counted(_slowly), cache, **shapes))
    results.put(Counted.calls)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_two_processes_convert_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    shapes = _many(path)
    results = _forked.Queue()
    workers = [
        _forked.Process(target=_convert_and_tell, args=(path, cache, shapes, results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    calls = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(calls) == [0, 1]
    assert len(_entries(cache)) == 1


class Steps:
    """Counts what is done to the disk, and ends the process at one of the steps."""

    def __init__(self, last: int | None = None) -> None:
        self.count = 0
        self._last = last

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("mkdir", "pwrite", "fsync", "rename", "rmdir"):
            monkeypatch.setattr(
                os, name, functools.partial(self._do, getattr(os, name))
            )

    def _do(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)


def _load_until(step: int, path: Path, cache: Path, shapes: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        Steps(step).watch(patched)
        _load(path, _plus_one, cache, **shapes)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_process_may_be_killed_at_any_step(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    shapes = _many(path)
    steps = Steps()
    with monkeypatch.context() as counted:
        steps.watch(counted)
        _assert_many(_load(path, _plus_one, tmp_path / "other", **shapes))
    assert steps.count > len(shapes)
    moments = list(range(1, steps.count + 1))
    if len(moments) > KILLS:
        moments = random.Random(0).sample(moments[:-3], KILLS - 3) + moments[-3:]
    left = 0
    for moment in moments:
        worker = _forked.Process(target=_load_until, args=(moment, path, cache, shapes))
        worker.start()
        worker.join(60)
        done = _finished(cache)
        assert worker.exitcode == -signal.SIGKILL or done
        left = max(left, len(_entries(cache)) - done)
    assert left, "some had begun"
    _assert_many(_load(path, _plus_one, cache, **shapes))
    assert len(_entries(cache)) == _finished(cache) == 1, "what they left is swept away"


def _finished(cache: Path) -> int:
    return sum(
        (entry / "conversion.safetensors.index.json").exists() and "-" not in entry.name
        for entry in _entries(cache)
    )


# --- telling converters apart ---

FACTOR = 2.0


def _helper(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def _with_helper(state: Tensors) -> Tensors:
    return {name: _helper(tensor) * FACTOR for name, tensor in state.items()}


def test_helpers_and_constants_of_the_module_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = f"{__name__}."
    before = identity_of(_with_helper)
    assert before is not None
    assert before == identity_of(_with_helper)
    monkeypatch.setattr(here + "FACTOR", 3.0)
    assert identity_of(_with_helper) != before
    monkeypatch.setattr(here + "FACTOR", 2.0)
    assert identity_of(_with_helper) == before
    monkeypatch.setattr(here + "_helper", lambda tensor: tensor * 3)
    assert identity_of(_with_helper) != before


def test_converters_that_differ_in_anything_are_told_apart() -> None:
    def keyword(state: Tensors, *, by: float = 2.0) -> Tensors:
        return {name: tensor * by for name, tensor in state.items()}

    def other(state: Tensors, *, by: float = 3.0) -> Tensors:
        return {name: tensor * by for name, tensor in state.items()}

    other.__qualname__ = keyword.__qualname__
    objects = [Counted(keyword), Counted(other), Counted(_helper)]  # type: ignore[arg-type]
    found = [identity_of(one) for one in [keyword, other, *objects]]
    assert None not in found
    assert len(set(found)) == len(found)


class _Settings:
    scale = 2.0
    names: ClassVar[dict[str, str]] = {}


def _by_settings(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_Settings.names.get(n, n): t * _Settings.scale for n, t in state.items()}


def test_value_that_a_class_of_the_converter_s_module_holds_is_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = identity_of(_by_settings)
    assert before == identity_of(_by_settings)
    monkeypatch.setattr(_Settings, "scale", 1.0)
    changed = identity_of(_by_settings)
    monkeypatch.setitem(_Settings.names, "a", "b")
    assert len({before, changed, identity_of(_by_settings)}) == 3


def test_what_holds_a_file_or_a_tensor_is_not_recognised(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w") as file:
        for held in (file, torch.ones(2), [torch.ones(2)]):
            assert identity_of(lambda state, held=held: state) is None


def test_model_runs_from_what_was_converted(tmp_path: Path, cache: Path) -> None:
    plain = chain(4, 8, 4)
    path = tmp_path / "model.safetensors"
    turned = {k: v.flip(0).contiguous() for k, v in plain.state_dict().items()}
    save_file(turned, path)
    for _ in range(2):
        model = load_model(
            lambda: chain(4, 8, 4),
            path,
            on_disk(tmp_path / "spill"),
            state_dict_converter=lambda s: {k: v.flip(0) for k, v in s.items()},
            cache_dir=cache,
        )
        assert_same(run(model, torch.ones(1, 4)), run(plain, torch.ones(1, 4)))
        detach(model)

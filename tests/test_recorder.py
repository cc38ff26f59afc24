"""What a run was like: counts, times and memory, noted only when asked for."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import profiler

import hookoffload.host_copies as host_copies
import hookoffload.recorder as recorder_module
from hookoffload import (
    OffloadPolicy,
    Report,
    load_model,
    offload_plan,
    offload_stats,
    offloaded,
    report,
    set_limit,
)
from hookoffload.budget import MemoryBudget
from hookoffload.device_memory import DeviceMemory
from hookoffload.recorder import PASSES_KEPT, Recorder
from hookoffload.run_report import Bound
from tests.small_models import assert_same, chain, nbytes, run, tiny_model, tokens

CPU = torch.device("cpu")


@contextmanager
def recorded(model: nn.Module, folder: Path, **fields: Any) -> Iterator[nn.Module]:
    """Attach a model that streams everything from disk and records it."""
    fields = {"store": "disk", "disk_dir": folder, "limit_gb": 0, **fields}
    with offloaded(model, compute_device="cpu", record=True, **fields):
        yield model


def report_of(folder: Path, passes: int = 3, **fields: Any) -> Report:
    model = tiny_model()
    with recorded(model, folder, **fields):
        for _ in range(passes):
            run(model, tokens())
        return report(model)


def assert_adds_up(found: Report, model: nn.Module) -> None:
    stats = offload_stats(model)
    assert found.stats == stats
    assert sum(layer.bytes_moved for layer in found.layers) == stats.bytes_moved
    assert sum(layer.hits for layer in found.layers) == stats.hits
    assert sum(layer.misses for layer in found.layers) == stats.misses
    stalled = sum(layer.stall_seconds for layer in found.layers)
    assert stalled == pytest.approx(stats.stall_seconds, abs=1e-9)


class _Lookup(nn.Module):
    """Looks rows up in a table that rests in another dtype, then streams a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9000, 32)
        self.out = nn.Linear(32, 8)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(indices))


class _Breaks(nn.Module):
    """Runs two layers and raises what it is told to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


# -- off ------------------------------------------------------------------------------


def test_nothing_is_recorded_unless_the_policy_says_so(tmp_path: Path) -> None:
    model = tiny_model()
    gc.collect()
    before = sum(type(thing) is Recorder for thing in gc.get_objects())
    with offloaded(
        model, compute_device="cpu", store="disk", disk_dir=tmp_path, limit_gb=0
    ):
        run(model, tokens())
        gc.collect()
        after = sum(type(thing) is Recorder for thing in gc.get_objects())
        assert after == before
        with pytest.raises(RuntimeError, match=r"TinyModel .*record=True"):
            report(model)


def test_a_report_needs_an_attached_model() -> None:
    with pytest.raises(RuntimeError, match="attach_offload_hooks"):
        report(chain(2, 2))


@pytest.mark.parametrize("value", [1, "yes", None])
def test_record_that_is_no_bool_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="record="):
        OffloadPolicy(record=value)


# -- counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_figures_of_the_layers_add_up_to_the_totals(
    tmp_path: Path, share: float
) -> None:
    model = tiny_model()
    want = run(copy.deepcopy(model), tokens())
    limit = share * nbytes(model) / 2**30
    with recorded(model, tmp_path, limit_gb=limit):
        for _ in range(4):
            assert_same(run(model, tokens()), want)
        found = report(model)
        assert_adds_up(found, model)
        passes = found.timeline.passes
        assert [one.number for one in passes] == [1, 2, 3, 4]
        assert sum(one.bytes_moved for one in passes) == found.stats.bytes_moved
    names = {name for name, _ in model.named_modules()} | {"TinyModel"}
    assert {layer.name for layer in found.layers} <= names


def test_rows_of_tables_that_are_looked_up_are_counted(tmp_path: Path) -> None:
    model = _Lookup()
    with recorded(model, tmp_path, compute_dtype=torch.float64):
        for _ in range(2):
            run(model, torch.arange(5))
        found = report(model)
        assert_adds_up(found, model)
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["table"].bytes_moved == 2 * 5 * 32 * 4
    assert by_name["table"].copies == 0


def test_a_model_that_load_model_made_is_recorded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(chain(8, 8, 8).state_dict(), tmp_path / "weights.safetensors")
    policy = OffloadPolicy(store="disk", compute_device="cpu", limit_gb=0, record=True)
    model = load_model(
        lambda: chain(8, 8, 8), tmp_path / "weights.safetensors", policy=policy
    )
    run(model, torch.randn(1, 8))
    found = report(model)
    assert_adds_up(found, model)
    assert {span.name for span in found.timeline.reads} == {"0", "1"}


# -- times ----------------------------------------------------------------------------


def test_each_layer_of_a_pass_is_in_its_lanes(tmp_path: Path) -> None:
    model = chain(16, 16, 16, 16)
    with recorded(model, tmp_path):
        run(model, torch.randn(1, 16))
        timeline = report(model).timeline
    assert [span.name for span in timeline.computes] == ["0", "1", "2"]
    (only,) = timeline.passes
    for span in timeline.computes:
        assert only.start <= span.start <= span.end <= only.end
    for number in "012":
        first = next(span for span in timeline.copies if span.name == number)
        used = next(span for span in timeline.computes if span.name == number)
        assert first.queued is not None
        assert first.queued <= first.start <= first.end <= used.start
        reads = [one for one in timeline.reads if first.start <= one.start <= first.end]
        assert {one.name for one in reads} == {number}
        assert sum(one.nbytes for one in reads) == first.nbytes


def test_layers_inside_of_others_are_deeper(tmp_path: Path) -> None:
    timeline = report_of(tmp_path, passes=2).timeline
    depth = {span.name: span.depth for span in timeline.computes}
    assert depth["TinyModel"] == 0
    assert depth["blocks.0"] == depth["TinyModel"] + 1
    assert depth["blocks.0.up"] == depth["blocks.0"] + 1


def test_a_stall_ends_with_the_copy_that_was_waited_for(tmp_path: Path) -> None:
    found = report_of(tmp_path, passes=4)
    assert found.timeline.stalls, "everything streams, and some copies begin too late"
    seconds = sum(span.seconds for span in found.timeline.stalls)
    assert seconds == pytest.approx(found.stats.stall_seconds, abs=1e-6)
    for stall in found.timeline.stalls:
        ends = [one.end for one in found.timeline.copies if one.name == stall.name]
        assert any(end <= stall.end and end >= stall.start for end in ends)


def test_the_report_does_not_change_any_more(tmp_path: Path) -> None:
    model = tiny_model()
    with recorded(model, tmp_path):
        run(model, tokens())
        found = report(model)
        text = str(found)
        run(model, tokens())
        assert str(found) == text
        assert report(model).stats.forwards == 2
    assert str(found) == text


def test_a_report_waits_for_copies_that_run_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = host_copies.read_into

    def read_slowly(*args: Any) -> None:
        time.sleep(0.05)
        read_into(*args)

    monkeypatch.setattr(host_copies, "read_into", read_slowly)
    model = chain(8, 8, 8)
    with recorded(model, tmp_path):
        for _ in range(2):  # the first pass does not know what the next one begins with
            run(model, torch.randn(1, 8))
        first = report(model).timeline.copies
        time.sleep(0.2)
        assert len(report(model).timeline.copies) == len(first) > 4


# -- passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_pass_that_was_interrupted_says_so(
    tmp_path: Path, error: BaseException
) -> None:
    model, x = _Breaks(), torch.randn(1, 8)
    with recorded(model, tmp_path):
        run(model, x)
        model.error = error
        with pytest.raises(type(error)):
            run(model, x)
        model.error = None
        run(model, x)
        found = report(model)
        assert_adds_up(found, model)
    assert [one.complete for one in found.timeline.passes] == [True, False, True]
    assert str(found).count("interrupted") == 1


def test_parts_that_are_called_by_themselves_are_recorded(tmp_path: Path) -> None:
    model = _Breaks()
    with recorded(model, tmp_path):
        run(model.second, torch.randn(1, 8))
        found = report(model)
        assert_adds_up(found, model)
    assert found.timeline.passes == ()
    assert [span.name for span in found.timeline.computes] == ["second"]
    assert found.bound is None
    assert "no complete pass" in str(found)


def test_a_report_inside_a_forward_is_refused(tmp_path: Path) -> None:
    model = _Breaks()
    with recorded(model, tmp_path):
        model.first.register_forward_hook(lambda module, args, output: report(model))
        with pytest.raises(RuntimeError, match="report was called from inside"):
            run(model, torch.randn(1, 8))


def test_only_the_last_passes_are_kept_and_the_totals_are_of_all(
    tmp_path: Path,
) -> None:
    model = chain(8, 8, 8)
    with recorded(model, tmp_path):
        for _ in range(PASSES_KEPT + 9):
            run(model, torch.randn(1, 8))
        found = report(model)
        assert_adds_up(found, model)
    kept = [one.number for one in found.timeline.passes]
    assert kept == list(range(10, PASSES_KEPT + 10))
    assert len(found.timeline.computes) == 2 * PASSES_KEPT
    # What the window takes has not changed since a pass that is gone.
    assert found.timeline.memory[0].by_kind == found.peak_by_kind


def test_entries_are_bounded_within_a_pass_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "ENTRIES_KEPT", 40)
    model = chain(*[8] * 50)
    with recorded(model, tmp_path):
        for _ in range(5):
            run(model, torch.randn(1, 8))
        found = report(model)
        assert_adds_up(found, model)
        for _ in range(30):
            run(model[3], torch.randn(1, 8))
        parts = report(model)
        assert_adds_up(parts, model)
    assert found.timeline.left_out > 0
    assert f"{found.timeline.left_out} events had no room" in str(found)
    for timeline in (found.timeline, parts.timeline):
        entries = len(timeline.computes) + len(timeline.copies) + len(timeline.memory)
        assert 0 < entries <= 70  # one that is full, and half as many behind it
    assert {span.name for span in parts.timeline.computes} == {"3"}


# -- memory ---------------------------------------------------------------------------


def test_memory_over_time_has_the_peak_and_its_kinds(tmp_path: Path) -> None:
    model = tiny_model()
    limit = 0.6 * nbytes(model) / 2**30
    with recorded(model, tmp_path, limit_gb=limit):
        for _ in range(3):
            run(model, tokens())
        found = report(model)
        total = offload_plan(model).total_bytes
    points = [sum(point.by_kind.values()) for point in found.timeline.memory]
    assert max(points) == found.stats.peak_bytes
    assert points[-1] <= total
    assert found.peak_by_kind == found.stats.peak_by_kind
    assert {"window", "residents"} <= set(found.timeline.memory[-1].by_kind)


def test_memory_follows_a_limit_that_is_lowered(tmp_path: Path) -> None:
    model = tiny_model()
    with recorded(model, tmp_path, limit_gb=nbytes(model) * 0.9 / 2**30):
        for _ in range(3):
            run(model, tokens())
        set_limit(model, nbytes(model) * 0.4 / 2**30)
        run(model, tokens())
        points = report(model).timeline.memory
    held = [sum(point.by_kind.values()) for point in points]
    assert held[-1] <= nbytes(model) * 0.4 < max(held)


def test_every_change_of_memory_is_noted() -> None:
    budget = MemoryBudget(None)
    recorder = Recorder(DeviceMemory(CPU, budget))
    budget.reserve("window", 30)
    budget.reserve("casts", 5)
    budget.release("window", 30)
    (record,) = recorder.records
    held = [entry.by_kind for entry in record.memory]
    assert held[-3:] == [{"window": 30}, {"window": 30, "casts": 5}, {"casts": 5}]


def test_thinning_many_changes_of_memory_loses_no_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "ENTRIES_KEPT", 80)
    budget = MemoryBudget(None)
    recorder = Recorder(DeviceMemory(CPU, budget))
    for index in range(500):
        size = 7000 if index == 123 else 10
        budget.reserve("window", size)
        budget.release("window", size)
    (record,) = recorder.records
    assert len(record.memory) < 80
    assert max(entry.total for entry in record.memory) == 7000


# -- the bound ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "link", "disk", "limited_by"),
    [(4, 1, 2, "compute"), (1, 4, 2, "link"), (1, 2, 4, "disk")],
)
def test_the_bound_is_the_largest_of_compute_link_and_disk(
    compute: float, link: float, disk: float, limited_by: str
) -> None:
    bound = Bound(
        passes=1,
        seconds=5,
        compute_seconds=compute,
        link_seconds=link,
        disk_seconds=disk,
        link_bytes_per_second=1e9,
    )
    assert (bound.bound_seconds, bound.limited_by) == (4, limited_by)
    assert bound.reached == pytest.approx(0.8)


def test_the_bound_leaves_the_first_pass_out_and_is_never_beaten(
    tmp_path: Path,
) -> None:
    found = report_of(tmp_path, passes=5)
    bound = found.bound
    assert bound is not None
    assert bound.passes == 4
    steady = found.timeline.passes[1:]
    assert bound.seconds == pytest.approx(sum(one.seconds for one in steady) / 4)
    assert 0 < bound.reached <= 1
    assert 0 < bound.disk_seconds <= bound.seconds
    assert bound.link_seconds == 0  # read to where they are used
    assert found.verdict() in str(found)


# -- profilers ------------------------------------------------------------------------


def test_torch_profiler_sees_the_names_of_layers(tmp_path: Path) -> None:
    model = tiny_model()
    with offloaded(
        model, compute_device="cpu", store="disk", disk_dir=tmp_path, limit_gb=0
    ):
        run(model, tokens())
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile:
            run(model, tokens())
        run(model, tokens())
    names = [event.name for event in profile.events()]
    assert names.count("hookoffload::layer blocks.1.up") == 1
    assert names.count("hookoffload::wait blocks.1.up") == 1


def test_ranges_are_not_made_without_a_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "record_function", None)
    report_of(tmp_path)


def test_ranges_of_an_interrupted_pass_are_closed(tmp_path: Path) -> None:
    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    model, x = _Breaks(), torch.randn(1, 8)
    with recorded(model, tmp_path), torch.profiler.profile() as profile:
        # Behind the library's hook, in front of the forward.
        handle = model.second.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, x)
        handle.remove()
        run(model, x)
    names = [event.name for event in profile.events()]
    assert names.count("hookoffload::layer first") == 2
    assert names.count("hookoffload::layer second") == 2


# -- on an accelerator ----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_times_of_the_device_are_in_order_and_add_up(
    tmp_path: Path, store: str
) -> None:
    model = chain(*[1024] * 9)
    fields: dict[str, Any] = {"disk_dir": tmp_path} if store == "disk" else {}
    with offloaded(model, store=store, limit_gb=0, record=True, **fields):
        for _ in range(4):
            run(model, torch.randn(4, 1024))
        found = report(model)
        assert_adds_up(found, model)
    timeline, bound = found.timeline, found.bound
    assert len(timeline.computes) == 4 * 8
    for before, after in zip(timeline.computes, timeline.computes[1:], strict=False):
        assert before.end <= after.start + 1e-5
    for span in [*timeline.computes, *timeline.copies, *timeline.stalls]:
        assert 0 <= span.start <= span.end <= timeline.end
    for one in timeline.computes:
        ready = [c.end for c in timeline.copies if c.name == one.name]
        assert any(end <= one.start + 1e-5 for end in ready)
    assert bound is not None
    assert bound.link_bytes_per_second > 1e9
    assert (bound.disk_seconds > 0) == (store == "disk")
    assert sum(found.peak_by_kind.values()) == found.stats.peak_bytes
    assert "activations" in timeline.memory[-1].by_kind

"""Three tiers: layers on the compute device, in host RAM, and in their files."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import hookoffload.copy_engine as copy_engine
import hookoffload.layer_copies as layer_copies
import hookoffload.safetensors_file as safetensors_file
import hookoffload.store as store
from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    Placement,
    Rates,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_plan,
    offload_stats,
    onload,
    save_model,
    set_limit,
)
from hookoffload.cli import main
from hookoffload.copy_engine import StreamCopyEngine
from hookoffload.direct_reads import DirectReader, direct_pays
from hookoffload.disk_reads import Part
from hookoffload.plan import LayerSpec
from hookoffload.planner import make_plan
from hookoffload.reader_threads import ReaderThreads
from hookoffload.staging import BUFFER_BYTES, StagedRead, Staging
from hookoffload.tiers import host_tier, staging_bytes
from tests.samples import same_bits
from tests.simulated_device import CPU, Simulation

MIB, GIB = 2**20, 2**30
WIDTH, DEPTH = 64, 12
# One layer: a weight, and a bias.
LAYER = 4 * WIDTH * (WIDTH + 1)
MODEL = DEPTH * LAYER


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])


X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    output: torch.Tensor = model(X)
    return output


WANTED = run(net())


def tiered(folder: Path, layers: float, **fields: Any) -> OffloadPolicy:
    """Return a policy with RAM for so many layers."""
    fields = {"limit_gb": 3 * (LAYER + 512) / GIB, "compute_device": "cpu", **fields}
    return OffloadPolicy(host_limit_gb=layers * LAYER / GIB, disk_dir=folder, **fields)


def saved(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(net().state_dict(), path)
    return path


def spilled_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


# -- which layers -------------------------------------------------------------------


def specs(sizes: list[int]) -> list[LayerSpec]:
    return [
        LayerSpec(
            name=f"blocks.{index}",
            stream_bytes=size * MIB,
            copy_bytes=size * MIB,
            resident_bytes=size * MIB,
            host_bytes=size * MIB,
        )
        for index, size in enumerate(sizes)
    ]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    less=st.integers(0, 400),
    more=st.integers(0, 400),
)
def test_a_larger_host_limit_keeps_all_that_a_smaller_one_keeps(
    sizes: list[int], less: int, more: int
) -> None:
    layers, order = specs(sizes), range(len(sizes))
    small = host_tier(layers, order, less * MIB)
    large = host_tier(layers, order, (less + more) * MIB)
    assert small <= large
    assert sum(layers[index].host_bytes for index in large) <= (less + more) * MIB


@pytest.mark.parametrize("count", [40, 60, 61, 100])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_ram_and_device_never_hold_one_layer_twice_while_others_are_on_disk(
    count: int, share: float
) -> None:
    layers, order = specs([64] * count), range(count)
    waiting = host_tier(layers, order, int(count * share) * 64 * MIB)
    assert len(waiting) == int(count * share)
    for limit in range(3, count):
        plan = make_plan(layers, order=order, chains=[], limit_bytes=limit * 64 * MIB)
        on_disk = set(order) - waiting - plan.resident
        assert not (waiting & plan.resident and on_disk)


@pytest.mark.parametrize("count", [40, 60, 61, 100])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_layers_on_disk_are_spread_over_the_pass(count: int, share: float) -> None:
    layers, order = specs([64] * count), range(count)
    waiting = host_tier(layers, order, int(count * share) * 64 * MIB)
    longest = run_length = 0
    for index in [*order, *order]:  # a pass goes over into the next
        run_length = 0 if index in waiting else run_length + 1
        longest = max(longest, run_length)
    assert longest <= 2 / share


def test_a_table_whose_rows_are_looked_up_waits_in_ram_last() -> None:
    layers = specs([8, 1, 1, 1])
    order = [1, 2, 3]
    assert host_tier(layers, order, 3 * MIB) == {1, 2, 3}
    assert host_tier(layers, order, 10 * MIB) == {1, 2, 3}
    assert host_tier(layers, order, 11 * MIB) == {0, 1, 2, 3}


def test_the_ring_that_files_are_read_into_counts_in_the_host_limit() -> None:
    policy = OffloadPolicy(host_limit_gb=4, limit_gb=2, compute_device="cuda")
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(128)])
    plan = offload_plan(model.to_empty(device="cpu"), policy)
    ring = staging_bytes(64 * MIB, 8 * GIB, 4 * GIB)
    assert ring >= 2 * 64 * MIB
    assert 4 * GIB - ring - 64 * MIB < plan.host_bytes <= 4 * GIB - ring


# -- attached models ----------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1, 5.5, DEPTH])
def test_what_ram_has_no_room_for_is_spilled_and_computes_the_same(
    tmp_path: Path, layers: float
) -> None:
    model = net()
    attach_offload_hooks(model, tiered(tmp_path, layers))
    waiting = int(layers)
    on_disk = (DEPTH - waiting) * LAYER
    assert on_disk <= spilled_bytes(tmp_path) <= on_disk + 4096
    for _ in range(3):
        assert same_bits(run(model), WANTED)
    stats = offload_stats(model)
    assert stats.host_bytes == waiting * LAYER <= stats.host_limit_bytes
    assert stats.disk_bytes == on_disk
    plan = offload_plan(model)
    assert plan.host_bytes == stats.host_bytes
    assert plan.disk_bytes <= on_disk
    assert (stats.bytes_read > 0) == (on_disk > 0)
    detach(model)
    assert all(
        same_bits(tensor, net().state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    assert not spilled_bytes(tmp_path)


def test_a_host_limit_of_zero_is_a_plain_disk(tmp_path: Path) -> None:
    plans = []
    for fields in ({"store": "disk"}, {"host_limit_gb": 0}):
        policy = OffloadPolicy(limit_gb=1e-4, compute_device="cpu", **fields)
        plans.append(offload_plan(net(), policy))
    assert plans[0] == plans[1]
    assert plans[0].disk_bytes > 0


def test_loading_reads_only_what_waits_in_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = saved(tmp_path), [0]
    whole_read = os.preadv

    def count(fd: int, buffers: Any, offset: int) -> int:
        done = whole_read(fd, buffers, offset)
        read[0] += done
        return done

    monkeypatch.setattr(os, "preadv", count)
    model = load_model(net, path, tiered(tmp_path / "spill", 5))
    assert 5 * LAYER <= read[0] < 5 * LAYER + 64 * 1024, "the header is read too"
    assert not (tmp_path / "spill").exists(), "the file is there: nothing is spilled"
    for _ in range(2):
        assert same_bits(run(model), WANTED)
    detach(model)
    assert same_bits(run(model), WANTED)


def test_ram_is_given_back_where_weights_rest_on_disk(tmp_path: Path) -> None:
    policy = tiered(tmp_path, 5, offload=Placement(device="disk"))
    model = attach_offload_hooks(net(), policy)
    assert offload_stats(model).host_bytes == 0
    assert spilled_bytes(tmp_path) >= MODEL
    onload(model)
    assert offload_stats(model).host_bytes == 5 * LAYER
    assert same_bits(run(model), WANTED)
    offload(model)
    assert offload_stats(model).host_bytes == 0
    assert same_bits(run(model), WANTED)
    detach(model)
    assert same_bits(run(model), WANTED)


def test_ram_stays_where_nothing_else_is_said(tmp_path: Path) -> None:
    model = attach_offload_hooks(net(), tiered(tmp_path, 5))
    for _ in range(2):
        assert offload_stats(model).host_bytes == 5 * LAYER
        assert same_bits(run(model), WANTED)
        offload(model)
    onload(model)
    assert offload_stats(model).host_bytes == 5 * LAYER
    detach(model)


@pytest.mark.parametrize("from_file", [False, True])
def test_edits_in_every_tier_are_computed_with_saved_and_kept(
    tmp_path: Path, from_file: bool
) -> None:
    policy = tiered(tmp_path / "spill", 5)
    if from_file:
        model = load_model(net, saved(tmp_path), policy)
    else:
        model = attach_offload_hooks(net(), policy)
    plain = net()
    for edit in range(3):
        with torch.no_grad():
            for one, other in zip(model.parameters(), plain.parameters(), strict=True):
                one.mul_(1.5 + edit)
                other.mul_(1.5 + edit)
        assert same_bits(run(model), run(plain))
        set_limit(model, [None, 0, 1e-4][edit])
        assert same_bits(run(model), run(plain))
    loaded = {name: torch.randn_like(t) for name, t in plain.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(loaded, assign=assign)
        plain.load_state_dict(loaded)
        assert same_bits(run(model), run(plain))
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, plain.state_dict()[name])
    save_model(model, tmp_path / "saved")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    kept = {k: v for file in files for k, v in load_file(file).items()}
    for name, tensor in plain.state_dict().items():
        assert same_bits(kept[name], tensor)
    detach(model)
    assert same_bits(run(model), run(plain))


def test_storage_dtype_is_that_of_ram_and_of_what_is_spilled(tmp_path: Path) -> None:
    fields = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    rounded = net()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = attach_offload_hooks(net(), tiered(tmp_path, 2.5, **fields))
    assert offload_stats(model).host_bytes == 5 * LAYER // 2
    assert same_bits(run(model), run(rounded))
    detach(model)


# -- what contradicts it ------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"store": "cpu"}, "store='cpu'"),
        ({"offload": Placement(device="cpu")}, "offload.device='cpu'"),
        ({"offload": Placement(device="cuda")}, "offload.device='cuda'"),
        (
            {
                "offload": Placement(device="disk"),
                "onload": Placement(device="cuda"),
                "compute_device": "cuda",
            },
            "onload.device='cuda'",
        ),
        (
            {
                "offload": Placement(device="disk", dtype=torch.float16),
                "onload": Placement(device="cpu", dtype=torch.bfloat16),
            },
            "onload.dtype=torch.bfloat16",
        ),
    ],
)
def test_a_placement_that_leaves_no_tier_is_refused_by_both_names(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        OffloadPolicy(host_limit_gb=2, **fields)
    assert "host_limit_gb=2" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize("limit", [-1, float("nan"), float("inf"), "2", True])
def test_a_host_limit_that_is_no_size_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="host_limit_gb"):
        OffloadPolicy(host_limit_gb=limit)


# -- what is shown ------------------------------------------------------------------


def test_the_plan_names_the_tiers_and_predicts_from_three_terms(
    tmp_path: Path,
) -> None:
    policy = OffloadPolicy(limit_gb=1.1e-4, host_limit_gb=5 * LAYER / GIB)
    plan = offload_plan(saved(tmp_path), policy)
    assert plan.divided and plan.host_bytes == 5 * LAYER
    text = str(plan)
    assert "in host RAM" in text and "5 layers" in text and "on disk" in text
    assert f"({len(plan.from_disk)} from disk)" in plan.summary
    disk_rate = plan.disk_bytes / 2.0
    rates = Rates(
        link_bytes_per_second=1e12, disk_bytes_per_second=disk_rate, compute_seconds=1
    )
    predicted = plan.predict(rates)
    assert predicted is not None and predicted.seconds == predicted.disk_seconds == 2


def test_the_command_line_plans_with_a_host_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(saved(tmp_path)), "--device=cpu", "--limit-gb=0.0001"]
    host = f"--host-limit-gb={5 * LAYER / GIB}"
    assert main([*arguments, host]) == 0
    assert "in RAM and on disk" in capsys.readouterr().out
    assert main([*arguments, host, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["host_bytes"] == 5 * LAYER
    from_disk = sum(group["from_disk"] for group in record["groups"])
    assert 0 < from_disk <= DEPTH - 5
    assert record["disk_bytes"] == from_disk * LAYER


def test_stats_say_what_waits_where(tmp_path: Path) -> None:
    model = attach_offload_hooks(net(), tiered(tmp_path, 5))
    assert "in host RAM (limit" in str(offload_stats(model))
    assert "on disk" in str(offload_stats(model))
    detach(model)


# -- how files are read -------------------------------------------------------------


def test_neighbours_in_a_file_are_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(net, saved(tmp_path), OffloadPolicy(store="disk", limit_gb=0))
    whole_read, sizes = os.preadv, []

    def note(fd: int, buffers: Any, offset: int) -> int:
        sizes.append(whole_read(fd, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", note)
    assert same_bits(run(model), WANTED)
    assert set(sizes) == {LAYER}, "a bias and its weight"
    detach(model)


def test_a_short_read_of_neighbours_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_read = os.preadv

    def stutter(fd: int, buffers: Any, offset: int) -> int:
        return whole_read(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", stutter)
    model = load_model(net, saved(tmp_path), OffloadPolicy(store="disk", limit_gb=0))
    assert same_bits(run(model), WANTED)
    detach(model)


def test_a_program_may_end_while_files_are_read(tmp_path: Path) -> None:
    program = """
import sys, torch
from torch import nn
from hookoffload import OffloadPolicy, load_model
width = 512
def net(): return nn.Sequential(*[nn.Linear(width, width) for _ in range(40)])
policy = OffloadPolicy(store="disk", limit_gb=0.03, compute_device="cpu")
model = load_model(net, sys.argv[1], policy)
with torch.no_grad():
    model(torch.randn(1, width))
"""
    path = tmp_path / "large.safetensors"
    save_file(
        nn.Sequential(*[nn.Linear(512, 512) for _ in range(40)]).state_dict(), path
    )
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", program, path],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == 0, ended.stderr


# -- reading ahead, for an accelerator ------------------------------------------------


class Reads:
    """Notes the layers whose bytes are read, by their places in the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[int] = []
        self.failing = False
        self._read, self._lock = os.preadv, threading.Lock()
        monkeypatch.setattr(os, "preadv", self._note)

    def wait_until_quiet(self) -> None:
        """Return when nothing more is read ahead."""
        seen = -1
        while seen != len(self.offsets):
            seen = len(self.offsets)
            time.sleep(0.1)

    def _note(self, fd: int, buffers: Any, offset: int) -> int:
        if self.failing:
            raise OSError(5, "Input/output error")
        with self._lock:
            self.offsets.append(offset)
        return self._read(fd, buffers, offset)


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Have layers come through staging buffers, to an accelerator that is simulated."""
    device = Simulation()
    monkeypatch.setattr(copy_engine, "torch", device)
    monkeypatch.setattr(
        layer_copies, "make_copy_engine", lambda _: StreamCopyEngine(CPU)
    )
    return device


def from_disk(folder: Path, **fields: Any) -> nn.Module:
    fields = {"store": "disk", "limit_gb": 0, "compute_device": "cpu", **fields}
    return load_model(net, saved(folder), OffloadPolicy(**fields))


def copy_engine_of(model: nn.Module) -> StreamCopyEngine:
    from hookoffload.state_hooks import session_of

    session = session_of(model)
    assert session is not None
    engine = session.mover.engine
    assert isinstance(engine, StreamCopyEngine)
    return engine


def test_layers_come_through_the_ring_of_buffers_unchanged(
    tmp_path: Path, staged: Simulation
) -> None:
    model = from_disk(tmp_path)
    for _ in range(3):
        assert same_bits(run(model), WANTED)
    assert copy_engine_of(model).staging_bytes() > 0
    offload(model)
    assert copy_engine_of(model).staging_bytes() == 0
    assert same_bits(run(model), WANTED)
    detach(model)


def test_each_layer_is_read_once_a_pass_and_ahead_of_the_window(
    tmp_path: Path, staged: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_disk(tmp_path)
    for _ in range(2):
        run(model)
    reads = Reads(monkeypatch)
    reads.wait_until_quiet()
    begun = len(reads.offsets)
    for _ in range(4):
        assert same_bits(run(model), WANTED)
    reads.wait_until_quiet()
    assert len(reads.offsets) - begun == 4 * DEPTH
    # What the window of one layer has no room for waits in the ring all the same.
    reads.failing = True
    with torch.no_grad():
        for index in range(3):
            assert same_bits(model[index](X), net()[index](X))
    detach(model)


def test_the_end_of_a_pass_reads_the_beginning_of_the_next() -> None:
    sources = [_Source(number) for number in range(6)]
    layers: Any = [(source,) for source in sources]
    coming = [(masters, number == 5) for number, masters in enumerate(layers)]
    readers = ReaderThreads()
    ring = Staging(readers, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    ring.expect(coming, 4 * BUFFER_BYTES)
    # Layer 5 stays from its first copy on; the last pass leaves out two others.
    for number in (0, 1, 2, 3, 4, 5, 0, 3, 4):
        readers.drain()  # so that nothing is given up before it has been read
        for read in ring.take(layers[number]):
            assert read.place(*_only_part(read)).tolist() == [number] * 8
            ring.give_back(read, _Happened())
    readers.drain()
    # Behind layer 4 come 0 to 3 of the next pass: as many as there are buffers.
    assert [source.reads for source in sources] == [3, 3, 3, 3, 2, 1]
    assert ring.nbytes == 4 * BUFFER_BYTES
    ring.expect((), 0)
    ring.reset()
    assert ring.nbytes == 0
    ring.close()


class _Source:
    """Stands in for a master in RAM that is not page-locked."""

    def __init__(self, number: int) -> None:
        self.number, self.reads = number, 0
        self.source, self.nbytes, self.copied_revision = None, 8, 0
        self.in_ram = True

    def read_into(self, destination: torch.Tensor, start: int) -> None:
        self.reads += 1
        destination.fill_(self.number)


class _Happened:
    """A token for what has happened."""

    def synchronize(self) -> None:
        """Return at once."""


def _only_part(read: StagedRead) -> tuple[Part, dict[Part, int]]:
    return read.chunk.parts[0], read.offsets()


def test_an_edit_behind_what_was_read_ahead_is_computed_with(
    tmp_path: Path, staged: Simulation
) -> None:
    model = attach_offload_hooks(net(), tiered(tmp_path, 0, limit_gb=0))
    plain = net()
    for index in (0, 2, 5, 11):
        assert same_bits(run(model), run(plain))
        with torch.no_grad():
            model[index].weight.mul_(-2)
            plain[index].weight.mul_(-2)
    assert same_bits(run(model), run(plain))
    detach(model)


def test_layers_that_a_pass_leaves_out_do_not_disturb_it(
    tmp_path: Path, staged: Simulation
) -> None:
    class Skips(nn.Sequential):
        left_out: tuple[int, ...] = ()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self):
                if index not in self.left_out:
                    x = layer(x)
            return x

    torch.manual_seed(0)
    plain = Skips(*net())
    model = Skips(*net())
    attach_offload_hooks(model, tiered(tmp_path, 0, limit_gb=0))
    for left_out in ((), (3,), (0, 1, 2), (7, 11), ()):
        model.left_out = plain.left_out = left_out
        for _ in range(2):
            assert same_bits(run(model), run(plain))
    detach(model)


def test_a_read_that_fails_ahead_is_raised_where_it_is_needed_and_tried_again(
    tmp_path: Path, staged: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_disk(tmp_path)
    assert same_bits(run(model), WANTED)
    reads = Reads(monkeypatch)
    reads.failing = True
    offload(model)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor"):
        run(model)
    reads.failing = False
    for _ in range(2):
        assert same_bits(run(model), WANTED)
    detach(model)


# -- past the page cache --------------------------------------------------------------


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a page cache that holds nothing; collects how much is read past it."""
    monkeypatch.setattr(store, "reclaimable_memory", lambda: 0)
    monkeypatch.setattr(safetensors_file, "direct_pays", lambda *_: True)
    past: list[int] = []
    read = DirectReader.read

    def note(self: DirectReader, views: Any, position: int) -> int:
        past.append(read(self, views, position))
        return past[-1]

    monkeypatch.setattr(DirectReader, "read", note)
    return past


def test_files_that_the_page_cache_cannot_hold_are_read_past_it(
    tmp_path: Path, small_cache: list[int]
) -> None:
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    model = from_disk(tmp_path)
    for _ in range(2):
        assert same_bits(run(model), WANTED)
    if not small_cache:
        pytest.skip("the file system of the temporary folder has no direct reads")
    assert sum(small_cache) >= 2 * MODEL
    detach(model)
    del model
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_files_that_fit_the_page_cache_are_read_through_it(
    tmp_path: Path, small_cache: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "reclaimable_memory", lambda: GIB)
    model = from_disk(tmp_path)
    assert same_bits(run(model), WANTED)
    assert not small_cache
    detach(model)


def test_reads_go_through_the_cache_where_the_system_refuses_others(
    tmp_path: Path, small_cache: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: DirectReader, views: Any, position: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(DirectReader, "read", refuse)
    model = from_disk(tmp_path)
    for _ in range(2):
        assert same_bits(run(model), WANTED)
    detach(model)


@given(data=st.data())
def test_direct_reads_fill_what_plain_ones_fill(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("direct") / "file"
    whole = os.urandom(data.draw(st.integers(1, 20_000)))
    path.write_bytes(whole)
    try:
        reader = DirectReader(path, path.stat())
    except OSError:
        pytest.skip("the file system of the temporary folder has no direct reads")
    start = data.draw(st.integers(0, len(whole) - 1))
    sizes = data.draw(st.lists(st.integers(1, 9000), min_size=1, max_size=4))
    views = [memoryview(bytearray(size)) for size in sizes]
    count = reader.read(views, start)
    reader.close()
    assert count == min(sum(sizes), len(whole) - start)
    assert b"".join(views)[:count] == whole[start : start + count]


def test_the_probe_compares_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    try:
        reader = DirectReader(path, path.stat())
    except OSError:
        pytest.skip("the file system of the temporary folder has no direct reads")
    fd = os.open(path, os.O_RDONLY)

    class Slow(DirectReader):
        def __init__(self) -> None:
            self.fd = reader.fd

        def read(self, views: Any, position: int) -> int:
            time.sleep(0.1)
            return super().read(views, position)

    assert not direct_pays(fd, Slow(), MIB)
    assert not direct_pays(fd, reader, 100), "too short to tell"
    reader.close()
    os.close(fd)

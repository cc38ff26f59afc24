"""Reading into host RAM: all of it once, by several threads, cast on the way."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hookoffload import CheckpointError, OffloadPolicy, Placement, detach, load_model
from hookoffload.checkpoint import open_checkpoint
from hookoffload.readers import empty_in_ram, read_tensors
from tests.safetensors_samples import descriptors_kept
from tests.small_models import assert_same, chain, run

MIB = 2**20


class Reads:
    """Notes what is read, where, and by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self._note)

    def _note(self, fd: int, buffers: Any, offset: int) -> int:
        count = self._read(fd, buffers, offset)
        self.ranges.append((offset, offset + count))
        self.threads.add(threading.get_ident())
        return count


def _load(make: Any, path: Any, **fields: Any) -> nn.Module:
    return load_model(make, path, OffloadPolicy(compute_device="cpu", **fields))


def _large() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3000, 3000), nn.LayerNorm(3000))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "large.safetensors"
    save_file({name: torch.randn(t.shape) for name, t in _large_shapes().items()}, path)
    return path


def _large_shapes() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(_large().state_dict())


def test_every_byte_is_read_once_and_by_several_threads(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    model = _load(_large, large)
    state = load_file(large)
    for name, tensor in model.state_dict().items():
        assert_same(tensor, state[name])
    ranges = sorted(reads.ranges)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges))
    assert sum(b - a for a, b in ranges) == sum(t.nbytes for t in state.values())
    assert len(reads.threads) > 1
    assert threading.get_ident() not in reads.threads
    detach(model)


def test_model_in_ram_needs_its_files_no_more(large: Path) -> None:
    with descriptors_kept():
        model = _load(_large, large)
        large.unlink()
    run(model, torch.ones(1, 3000))
    detach(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"storage_dtype": torch.bfloat16},
        {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32},
        {
            "offload": Placement(device="disk"),
            "onload": Placement(device="cpu", dtype=torch.bfloat16),
        },
    ],
)
def test_weights_are_cast_while_they_are_read(
    large: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    plain = _large()
    plain.load_state_dict(load_file(large))
    rest = fields.get("storage_dtype", torch.bfloat16)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(rest).to(torch.float32)
    reads = Reads(monkeypatch)
    model = _load(_large, large, **fields)
    x = torch.randn(2, 3000)
    for _ in range(2):
        assert_same(run(model, x), run(plain, x))
    assert model[0].weight.dtype == rest
    assert len(reads.threads) > 1
    assert sum(b - a for a, b in reads.ranges) == sum(
        tensor.nbytes for tensor in load_file(large).values()
    )
    detach(model)
    assert model[0].weight.dtype == torch.float32


def _peak_bytes(reset: bool = False) -> int:
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("the system does not tell the most memory that a process had")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_peak_of_memory_is_that_of_the_model(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(4)])

    path = tmp_path / "model.safetensors"
    save_file({f"{i}.weight": torch.full((4096, 4096), i / 7) for i in range(4)}, path)
    detach(_load(make, path, storage_dtype=dtype))  # threads, buffers, code
    start = _peak_bytes(reset=True)
    model = _load(make, path, storage_dtype=dtype)
    peak = _peak_bytes() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size == 4 * 4096**2 * (4 if dtype is None else 2)
    threads = max(4, min(os.cpu_count() or 1, 16))  # each casts in a buffer of its own
    assert peak < 1.03 * size + (0 if dtype is None else threads * MIB)
    detach(model)


def test_read_that_fails_ends_loading(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, calls = os.preadv, []

    def fail(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset)

    before = threading.active_count()
    with descriptors_kept(), monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"0\.weight.*cannot be read"):
            _load(_large, large)
        gc.collect()  # the model that was not filled, in the error's frames
    assert threading.active_count() == before
    detach(_load(_large, large))


def test_short_reads_are_completed(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def short(fd: int, buffers: Any, offset: int) -> int:
        (buffer,) = buffers
        return read(fd, [buffer[: max(1, min(len(buffer), 777_777))]], offset)

    monkeypatch.setattr(os, "preadv", short)
    model = _load(_large, large)
    for name, tensor in load_file(large).items():
        assert_same(model.state_dict()[name], tensor)
    detach(model)


def test_ten_thousand_small_tensors_load_soon(tmp_path: Path) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number in range(10_000):
                self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(8)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.p9999

    path = tmp_path / "model.safetensors"
    state = {f"p{number}": torch.full((8,), float(number)) for number in range(10_000)}
    save_file(state, path)
    started = time.process_time()
    model = _load(Many, path)
    assert time.process_time() - started < 30, "and not with the square of the number"
    assert_same(model.p1234.detach(), state["p1234"])
    assert_same(run(model, torch.zeros(8)), state["p9999"])
    detach(model)


def test_progress_is_told_in_bytes_of_the_file(large: Path) -> None:
    reads = [
        (location, empty_in_ram(location.shape, torch.float16))
        for location in open_checkpoint(large).values()
    ]
    told: list[int] = []
    read_tensors(reads, told.append)
    assert sum(told) == sum(location.nbytes for location, _ in reads)
    assert len(told) > 3
    reads[0][0].file.close()


class Bars:
    """Stands in for tqdm's output, which is made where a terminal is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hookoffload import progress

        self.disabled: list[bool | None] = []
        made = progress._Bar

        def note(**options: Any) -> Any:
            self.disabled.append(options["disable"])
            return made(**options)

        monkeypatch.setattr(progress, "_Bar", note)


@pytest.mark.parametrize("shown", [True, False])
def test_bars_can_be_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    path = tmp_path / "model.pt"
    torch.save(chain(4, 8, 4).state_dict(), path)
    bars = Bars(monkeypatch)
    model = load_model(
        lambda: chain(4, 8, 4),
        path,
        OffloadPolicy(compute_device="cpu"),
        state_dict_converter=lambda s: {name: t * 1 for name, t in s.items()},
        cache_dir=tmp_path / "cache",
        progress=shown,
    )
    detach(model)
    assert len(bars.disabled) == 3
    assert set(bars.disabled) == {None if shown else True}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux counts maps")
def test_a_large_tensor_takes_one_of_the_maps_that_a_process_may_have() -> None:
    def maps() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = maps()
    tensors = [empty_in_ram((5_000_000,), torch.uint8) for _ in range(400)]
    # Most systems lay neighbours into one; some leave a gap to the next huge page.
    assert maps() - before < 1.5 * len(tensors)

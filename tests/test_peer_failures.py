"""What users of other offloading libraries meet, one test a failure."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
)
from tests.process_memory import anonymous_bytes, settled_bytes
from tests.real_models import REAL_MODELS
from tests.samples import (
    GIB,
    STREAMING,
    Picture,
    Stack,
    first_output,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    seen_inside,
    weight_bytes,
)

ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs the figures of Linux"
)


class _Fragile(nn.Module):
    """Raises while its own tensors and those of a child are in use."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.child = child
        self.broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.child(x @ self.weight)
        if self.broken:
            raise KeyError("the user's own error")
        return x @ self.weight


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_no_parameter_stays_on_the_device_after_an_exception_in_the_forward(
    fields: dict[str, Any], warm: bool
) -> None:
    innermost = _Fragile(nn.Linear(32, 32))
    model = nn.Sequential(
        nn.Linear(32, 32), _Fragile(_Fragile(innermost)), nn.Linear(32, 32)
    )
    dtype = fields.get("compute_dtype", torch.float32)
    x = torch.randn(2, 32, dtype=dtype)
    want = run(copy.deepcopy(model).to(dtype), x)
    before = Picture(model)
    with offloaded(model, **{**fields, "limit_gb": 0}):
        at_rest = [p.data_ptr() for p in model.parameters()]
        if warm:
            run(model, x)
        for _ in range(2):
            innermost.broken = True
            with pytest.raises(KeyError, match="the user's own error"):
                run(model, x)
            assert [p.data_ptr() for p in model.parameters()] == at_rest
            innermost.broken = False
            assert all(same_bits(run(model, x), want) for _ in range(2))
    assert before.differences(model) == []


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_the_state_dict_has_the_true_values_at_every_moment(
    fields: dict[str, Any],
) -> None:
    model = Stack()
    want = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))

    def agrees() -> bool:
        state = model.state_dict()
        return list(state) == list(want) and all(
            same_bits(state[name], t) for name, t in want.items()
        )

    inside = seen_inside(model.blocks[2], lambda _: agrees())
    with offloaded(model, **fields):
        assert agrees()
        for _ in range(2):
            run(model, x)
            assert agrees()
        offload(model)
        assert agrees()
        onload(model)
        assert agrees()
    assert inside == [True, True]


def test_models_of_one_architecture_in_one_folder_keep_their_own_weights(
    tmp_path: Path,
) -> None:
    models, x = [Stack(), Stack(), Stack()], torch.randn(2, 32)
    wants = [run(copy.deepcopy(model), x) for model in models]
    policy = OffloadPolicy(store="disk", disk_dir=tmp_path, limit_gb=0)
    for model in models:
        attach_offload_hooks(model, policy)
    for _ in range(2):
        for model, want in zip(models, wants, strict=True):
            assert same_bits(run(model, x), want)
    detach(models[0])
    assert all(
        same_bits(run(model, x), want)
        for model, want in zip(models, wants, strict=True)
    )
    detach(models[1])
    detach(models[2])
    assert list(tmp_path.iterdir()) == []


class _Twice(nn.Module):
    """Runs one block at the beginning and the end of a pass."""

    def __init__(self, width: int, between: int) -> None:
        super().__init__()
        self.block = nn.Linear(width, width, bias=False)
        self.between = linears(width, between)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.between(self.block(x)))


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the system does not count reads"
)
@pytest.mark.parametrize(("between", "layers_in_window"), [(1, 1), (0, 1), (8, 3)])
def test_a_block_used_twice_in_a_pass_is_fetched_no_more_often_than_it_runs(
    between: int, layers_in_window: int
) -> None:
    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(n.split()[1]) for n in lines if n.startswith("rchar"))

    model, x = _Twice(512, between), torch.randn(2, 512)
    one = model.block.weight.nbytes
    want = run(copy.deepcopy(model), x)
    passes, runs = 4, between + 2
    with offloaded(model, store="disk", limit_gb=layers_in_window * one / GIB):
        for _ in range(3):
            assert same_bits(run(model, x), want)
        before, moved = bytes_read(), offload_stats(model).bytes_moved
        for _ in range(passes):
            assert same_bits(run(model, x), want)
        # At the end, layers of the next pass may be under way.
        fetched = (bytes_read() - before) / one
        assert fetched < runs * passes + layers_in_window + 0.5
        assert offload_stats(model).bytes_moved - moved <= runs * passes * one


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_runs(fields: dict[str, Any], need_weights: bool) -> None:
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    dtype = fields.get("compute_dtype", torch.float32)
    x = torch.randn(2, 5, 16, dtype=dtype)
    want = run(copy.deepcopy(model).to(dtype), x, x, x, need_weights=need_weights)
    with offloaded(model, **fields):
        for _ in range(3):
            got = run(model, x, x, x, need_weights=need_weights)
            assert same_bits(got[0], want[0])
            assert (got[1] is None) == (want[1] is None)
            assert got[1] is None or same_bits(got[1], want[1])


@pytest.mark.parametrize("part", ["model", "block", "layer"])
def test_a_deep_copy_while_attached_is_refused_and_says_what_to_do(part: str) -> None:
    model = Stack()
    parts = {
        "model": model,
        "block": model.blocks[0],
        "layer": model.blocks[0].up,
    }
    with offloaded(model, store="disk", limit_gb=0):
        with pytest.raises(RuntimeError, match="detach"):
            copy.deepcopy(parts[part])
        run(model, torch.randn(2, 32))
        with pytest.raises(RuntimeError, match="detach"):
            pickle.dumps(parts[part])
    copied = copy.deepcopy(model)
    assert Picture(model).differences(model) == []
    assert all(
        same_bits(mine, theirs)
        for mine, theirs in zip(model.parameters(), copied.parameters(), strict=True)
    )


def test_a_deep_copy_of_a_resident_model_is_refused_as_well() -> None:
    model = linears(depth=3)
    with offloaded(model, store="disk"):
        for _ in range(2):
            run(model, torch.randn(2, 32))
        with pytest.raises(RuntimeError, match="detach"):
            copy.deepcopy(model)


def test_attaching_copies_nothing_that_lies_in_host_memory() -> None:
    model = Stack()
    at_rest = [p.data_ptr() for p in model.parameters()]
    with offloaded(model, store="cpu", limit_gb=0):
        assert [p.data_ptr() for p in model.parameters()] == at_rest
        run(model, torch.randn(2, 32))
        assert [p.data_ptr() for p in model.parameters()] == at_rest
    assert [p.data_ptr() for p in model.parameters()] == at_rest


class _Sampler:
    """Notes the most memory that the process has while something runs."""

    def __enter__(self) -> _Sampler:
        self.before = self.most = settled_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = anonymous_bytes()

    def _sample(self) -> None:
        while not self._stop.wait(timeout=0.001):
            self.most = max(self.most, anonymous_bytes())


@ON_LINUX
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_host_memory_does_not_double_while_weights_go_to_disk(
    dtype: torch.dtype | None,
) -> None:
    policy = OffloadPolicy(store="disk", storage_dtype=dtype, limit_gb=0)
    # What is made once in a process: threads, buffers, imports.
    detach(attach_offload_hooks(linears(width=3072, depth=1), policy))
    model = linears(width=3072, depth=8)
    total = weight_bytes(model)
    with _Sampler() as memory:
        attach_offload_hooks(model, policy)
    # Chunks of 16 MiB, and what the heap keeps of them, whatever the model's size.
    assert memory.most - memory.before < total / 4
    assert memory.after - memory.before < -total * 3 / 4, "their memory is free again"


@pytest.mark.gpu
@ON_LINUX
def test_page_locking_neither_rounds_up_nor_copies() -> None:
    # Each weight takes 9 MiB; a page-locked allocation of its own would take 16.
    model, x = linears(width=1536, depth=32), torch.randn(2, 1536)
    run(copy.deepcopy(model[0]).cuda(), x.cuda())  # what CUDA itself takes
    with _Sampler() as memory:
        attach_offload_hooks(model, OffloadPolicy(compute_device="cuda", limit_gb=0))
        run(model, x)
    assert memory.most - memory.before < weight_bytes(model) / 2


@ON_LINUX
def test_weights_that_lie_in_the_heap_are_moved_without_doubling_it() -> None:
    script = """
import ctypes, mmap, torch
heap = ctypes.CDLL(None)
assert heap.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: everything lies in the heap
from hookoffload import OffloadPolicy, attach_offload_hooks
from hookoffload.pinning import _has_own_pages, _move_out_of_heap, _starts_of_maps
from hookoffload.state_hooks import session_of
from tests.process_memory import anonymous_bytes
from tests.samples import linears, weight_bytes
model = linears(width=1536, depth=96)
attach_offload_hooks(model, OffloadPolicy(compute_device="cpu"))
masters = session_of(model).store.masters
maps = _starts_of_maps()
assert not any(_has_own_pages(master.flat, maps) for master in masters)
before = anonymous_bytes()
_move_out_of_heap(masters)
assert all(master.flat.data_ptr() % mmap.PAGESIZE == 0 for master in masters)
print((anonymous_bytes() - before) / weight_bytes(model))
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert float(output) < 0.1


@pytest.mark.parametrize("limit", [1, 0.5, 0.001])
def test_a_limit_that_is_one_number_is_a_limit(limit: float) -> None:
    model = linears(width=512, depth=4)
    with offloaded(model, store="disk", limit_gb=limit):
        run(model, torch.randn(2, 512))
        plan = offload_plan(model)
        assert plan.limit_bytes == int(limit * 2**30)
        assert offload_stats(model).peak_bytes <= limit * 2**30
        assert (len(plan.resident) < 4) == (limit == 0.001)


@pytest.mark.parametrize("limit", ["2", "2GB", True, [2], {"transformer": 2}])
def test_a_limit_that_is_no_number_is_refused_instead_of_being_none(limit: Any) -> None:
    with pytest.raises(ValueError, match="limit_gb"):
        OffloadPolicy(limit_gb=limit)


def test_a_bare_number_in_place_of_the_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OffloadPolicy\(limit_gb=2\)"):
        attach_offload_hooks(linears(), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_survive_an_exception_in_the_middle(name: str) -> None:
    model, inputs = REAL_MODELS[name]()
    want = first_output(run(copy.deepcopy(model), **inputs))
    before = Picture(model)
    modules = [m for m in model.modules() if not list(m.children())]
    middle = modules[len(modules) // 2]
    with offloaded(model, store="disk", limit_gb=0):
        at_rest = [lies_in_a_file(p) for p in model.parameters()]
        handle = middle.register_forward_hook(_raise)
        for _ in range(2):
            with pytest.raises(KeyError, match="the user's own error"):
                run(model, **inputs)
            assert [lies_in_a_file(p) for p in model.parameters()] == at_rest
        handle.remove()
        assert same_bits(first_output(run(model, **inputs)), want)
    assert before.differences(model) == []


def _raise(*_: object) -> None:
    raise KeyError("the user's own error")

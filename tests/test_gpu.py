"""What only a GPU can show: streams, page-locking, the allocator's peak."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hookoffload as ho

pytestmark = pytest.mark.gpu

MIB = 2**20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x) * self.scale
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


class Everything(nn.Module):
    """Tied head, a sideways weight, statistics, a recurrent layer, a skipped block."""

    def __init__(self, width: int = 256, blocks: int = 4, words: int = 3000) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.sideways = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, skip: int = -1) -> torch.Tensor:
        x = self.embed(ids)
        for index, block in enumerate(self.blocks):
            if index != skip:
                x = block(x)
        x = F.linear(x, self.sideways.weight)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.recurrent(x)[0])


class Wide(nn.Sequential):
    """Big plain layers, for peaks and speeds: ``layers`` times 32 MiB."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__(*[nn.Linear(2048, 4096) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = F.gelu(layer(x))[..., :2048]
        return x


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 3000, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def on_gpu(model: nn.Module, *inputs: object, dtype: object = None) -> torch.Tensor:
    """The output of a copy that lies on the GPU as a whole."""
    twin = copy.deepcopy(model).cuda()
    if dtype is not None:
        twin = twin.to(dtype)
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    with torch.no_grad():
        return twin(*moved)


DISK_THEN_RAM = {
    "offload": ho.Placement(device="disk"),
    "onload": ho.Placement(device="cpu"),
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"limit_gb": 0},
        {"limit_gb": 0, "debug": True},
        {"limit_gb": 1},
        {"limit_gb": 0, "store": "disk"},
        {"store": "disk"},
        {"limit_gb": 0, "pin_limit_gb": 0},
        {"limit_gb": 0, "pin_limit_gb": 0.005, "debug": True},
        {**DISK_THEN_RAM, "limit_gb": 0},
        {**DISK_THEN_RAM, "limit_gb": 0, "host_limit_gb": 0.04},
        {"limit_gb": 0, "host_limit_gb": 0},
        {"limit_gb": 0, "host_limit_gb": 0.04, "debug": True},
        {"preparing": ho.Placement(device="disk")},
        {"onload": ho.Placement(device="cuda")},
    ],
    ids=str,
)
def test_output_is_that_of_the_model_on_the_gpu_bit_for_bit(
    fields: dict[str, object], ids: torch.Tensor
) -> None:
    model = Everything().eval()
    expected = on_gpu(model, ids)
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    with ho.offloaded(model, **fields), torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(ids), expected)
        for name, value in model.state_dict().items():
            assert value.device.type == "cpu"
            assert torch.equal(value, state[name])
        ho.offload(model)
        assert torch.equal(model(ids), expected)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.device.type == "cpu"
        assert not parameter.is_pinned()
        assert torch.equal(parameter, state[name])


@pytest.mark.parametrize("limit", [0, 1, None])
def test_compute_dtype_is_that_of_the_model_cast_as_a_whole(
    limit: float | None, ids: torch.Tensor
) -> None:
    model = Everything().eval()
    expected = on_gpu(model, ids, dtype=torch.bfloat16)
    with ho.offloaded(model, limit_gb=limit, compute_dtype=torch.bfloat16):
        for _ in range(3):
            with torch.no_grad():
                assert torch.equal(model(ids), expected)
        assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("limit", [0, 1, None])
def test_fp8_at_rest_computes_in_bf16(limit: float | None) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64))
    model = model.to(torch.bfloat16)
    rounded = copy.deepcopy(model)
    for p in rounded.parameters():
        p.data = p.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    expected = on_gpu(rounded, x)
    fields = {"limit_gb": limit, "storage_dtype": torch.float8_e4m3fn}
    with ho.offloaded(model, **fields), torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert model[0].weight.dtype == torch.float8_e4m3fn


def test_train_mode_statistics_are_kept(ids: torch.Tensor) -> None:
    model = Everything().train()
    twin = copy.deepcopy(model).cuda()
    with ho.offloaded(model, limit_gb=0), torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(ids), twin(ids.cuda()))
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer.cpu(), model.get_buffer(name))


def test_a_model_that_lay_on_the_gpu_comes_back_to_it(ids: torch.Tensor) -> None:
    model = Everything().eval().cuda()
    with torch.no_grad():
        expected = model(ids.cuda())
    with ho.offloaded(model, limit_gb=0), torch.no_grad():
        assert all(p.device.type == "cpu" for p in model.parameters())
        assert torch.equal(model(ids), expected)
    assert all(p.device.type == "cuda" for p in model.parameters())
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        assert torch.equal(model(ids.cuda()), expected)


def test_weights_are_page_locked_where_they_lie() -> None:
    model = Wide(2)
    before = [layer.weight.data_ptr() for layer in model]
    with ho.offloaded(model, limit_gb=0):
        assert [layer.weight.data_ptr() for layer in model] == before
        assert all(p.is_pinned() for p in model.parameters())
    assert not any(p.is_pinned() for p in model.parameters())


@pytest.mark.parametrize("limit_mib", [130, 200, 300, 450])
def test_peak_of_the_allocator_is_within_the_limit_from_the_first_forward_on(
    limit_mib: int,
) -> None:
    model = Wide(12)
    on_gpu(model, torch.randn(4, 2048))  # the matrix library takes its workspace
    limit = limit_mib * MIB + torch.cuda.memory_allocated()
    with ho.offloaded(model, limit_gb=limit / 2**30), torch.no_grad():
        for rows in (64, 256, 64, 1024, 16, 1024):
            torch.cuda.reset_peak_memory_stats()
            model(torch.randn(rows, 2048))
            assert torch.cuda.max_memory_allocated() <= limit
        plan = ho.offload_plan(model)
        assert plan.resident or limit_mib < 300, str(plan)
        assert ho.offload_stats(model).peak_bytes <= limit


def test_steady_pass_does_not_synchronise_and_allocates_what_the_model_does() -> None:
    model = Wide(12)
    x = torch.randn(64, 2048, device="cuda")

    def allocations(run: nn.Module) -> tuple[int, int]:
        before = torch.cuda.memory_stats()
        run(x)
        after = torch.cuda.memory_stats()
        return (
            after["allocation.all.allocated"] - before["allocation.all.allocated"],
            after["num_device_alloc"] - before["num_device_alloc"],
        )

    with torch.no_grad():
        twin = copy.deepcopy(model).cuda()
        twin(x)
        plain, _ = allocations(twin)
        del twin
        with ho.offloaded(model, limit_gb=0.25):
            for _ in range(3):
                model(x)
            torch.cuda.set_sync_debug_mode("error")
            try:
                assert allocations(model) == (plain, 0)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_bytes_of_a_steady_pass_are_those_of_the_plan() -> None:
    model = Wide(12)
    x = torch.randn(64, 2048)
    with ho.offloaded(model, limit_gb=0.25), torch.no_grad():
        for _ in range(3):
            model(x)
        before = ho.offload_stats(model)
        for _ in range(4):
            model(x)
        after = ho.offload_stats(model)
        moved = after.bytes_moved - before.bytes_moved
        assert moved == 4 * ho.offload_plan(model).pass_bytes
        assert after.misses == before.misses


def test_a_layer_that_is_skipped_now_and_then_costs_no_wrong_result(
    ids: torch.Tensor,
) -> None:
    model = Everything(blocks=5).eval()
    expected = {skip: on_gpu(model, ids, skip) for skip in range(-1, 5)}
    with ho.offloaded(model, limit_gb=0, debug=True), torch.no_grad():
        for skip in (-1, 2, 2, -1, 0, 4, 4, 1, -1, 3):
            assert torch.equal(model(ids, skip), expected[skip])


def test_when_everything_fits_no_hook_is_on_the_path() -> None:
    model = Wide(8)
    x = torch.randn(8, 2048)
    with ho.offloaded(model, limit_gb=4), torch.no_grad():
        for _ in range(3):
            model(x)
        assert not any(m._forward_pre_hooks for m in model)
        ho.set_limit(model, 0.2)
        expected = model(x)
        assert any(m._forward_pre_hooks for m in model)
        ho.set_limit(model, 4)
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_gradient_through_a_streamed_weight_is_refused() -> None:
    model = Wide(3)
    with (
        ho.offloaded(model, limit_gb=0),
        pytest.raises(RuntimeError, match="no_grad"),
    ):
        model(torch.randn(2, 2048))


def test_exception_and_interrupt_in_a_forward_leave_a_model_that_works() -> None:
    class Stops(nn.Module):
        error: BaseException | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.error is not None:
                raise self.error
            return x

    stops = Stops()
    model = nn.Sequential(*Wide(2), stops)
    model[1] = nn.Linear(4096, 64)
    x = torch.randn(4, 2048)
    expected = on_gpu(model, x)
    state = copy.deepcopy(model.state_dict())
    ho.attach_offload_hooks(model, ho.OffloadPolicy(limit_gb=0, debug=True))
    with torch.no_grad():
        for error in (ValueError("mine"), KeyboardInterrupt(), ValueError("again")):
            stops.error = error
            with pytest.raises(type(error)):
                model(x)
            stops.error = None
            assert torch.equal(model(x), expected)
        stops.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            model(x)
    ho.detach(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_edits_between_forwards_are_seen_although_the_layer_was_prefetched() -> None:
    model = Wide(4)
    x = torch.randn(4, 2048)
    with ho.offloaded(model, limit_gb=0.14), torch.no_grad():
        model(x)
        for layer in model:
            layer.weight.mul_(0.5)
            twin = copy.deepcopy({k: v for k, v in model.state_dict().items()})
            plain = Wide(4)
            plain.load_state_dict(twin)
            assert torch.equal(model(x), on_gpu(plain, x))


@pytest.mark.parametrize("codec", [None, "lossless"])
def test_edits_do_not_reach_a_forward_that_is_still_under_way(
    codec: Literal["lossless"] | None,
) -> None:
    """What the library writes to masters waits for copies that read them."""
    model = Wide(6).bfloat16()
    x = torch.randn(4, 2048).bfloat16().cuda()
    old = on_gpu(model, x)
    with ho.offloaded(model, limit_gb=0, codec=codec), torch.no_grad():
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(2**28)  # copies wait until what is in the window was used
        before = model(x)
        for layer in model:
            layer.weight.data = torch.zeros_like(layer.weight)
        after = model(x)
        assert torch.equal(before, old)
    assert torch.equal(after, on_gpu(model, x))


def test_two_threads_get_right_results() -> None:
    model = Wide(4)
    inputs = [torch.randn(4, 2048) for _ in range(2)]
    expected = [on_gpu(model, x) for x in inputs]
    wrong: list[int] = []

    def run(which: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(inputs[which]), expected[which]):
                    wrong.append(which)

    with ho.offloaded(model, limit_gb=0):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_many_forwards_under_changing_limits_leave_nothing_behind() -> None:
    model = Wide(8)
    inputs = {rows: torch.randn(rows, 2048) for rows in (8, 64, 256)}
    expected = {rows: on_gpu(model, x) for rows, x in inputs.items()}
    choice = torch.Generator().manual_seed(3)
    allocated = []
    ho.attach_offload_hooks(model, ho.OffloadPolicy(limit_gb=0.2))
    with torch.no_grad():
        for step in range(60):
            pick = int(torch.randint(0, 3, (), generator=choice))
            rows = list(inputs)[pick]
            limit = [0, 0.13, 0.2, 0.3, None][step % 5]
            ho.set_limit(model, limit)
            if step % 7 == 3:
                with pytest.raises(RuntimeError):
                    model(torch.randn(2, 3))
            assert torch.equal(model(inputs[rows]), expected[rows])
            if limit == 0.2:
                ho.offload(model)
                allocated.append(torch.cuda.memory_allocated())
    assert max(allocated) <= allocated[0]
    ho.detach(model)


@pytest.mark.parametrize("layers", [0, 3, 8, 12])
def test_layers_from_ram_and_from_disk_pass_the_window_in_turns(
    layers: int, tmp_path: Path
) -> None:
    model, x = Wide(), torch.randn(4, 2048)
    wanted = on_gpu(model, x)
    layer = sum(p.nbytes for p in model[0].parameters())
    ring = 128 * MIB  # that files are read into: it counts in the host limit
    policy = ho.OffloadPolicy(
        limit_gb=0.15,
        host_limit_gb=(layers * layer + ring * (0 < layers < 12)) / 2**30,
        disk_dir=tmp_path,
    )
    ho.attach_offload_hooks(model, policy)
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(model(x), wanted)
    stats = ho.offload_stats(model)
    assert stats.disk_bytes == (12 - layers) * layer
    assert not layers or stats.host_bytes <= stats.host_limit_bytes
    with torch.no_grad():
        model[5].weight.mul_(2)
    assert torch.equal(run_once(model, x), on_gpu_again(model, x))
    ho.detach(model)
    assert not list(tmp_path.rglob("*.safetensors"))


def run_once(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def on_gpu_again(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a plain model with the values of an attached one."""
    twin = Wide()
    twin.load_state_dict(model.state_dict())
    return on_gpu(twin, x)


class Wave(nn.Module):
    """A block that compiles to one graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("streams", [False, True], ids=["all stays", "streams"])
def test_blocks_that_replay_cuda_graphs_compute_the_same(
    streams: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph whose weights have moved is captured anew, and that is told."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = nn.Sequential(*(Wave(1024) for _ in range(16)))
    xs = [torch.randn(16, 1024, device="cuda") for _ in range(5)]
    blocks = copy.deepcopy(model).cuda()
    plain = nn.Sequential(*(torch.compile(block) for block in blocks))
    with torch.no_grad():
        wants = [plain(x) for x in xs]
    size = sum(parameter.nbytes for parameter in model.parameters())
    limit = (torch.cuda.memory_allocated() + size // 2) / 2**30 if streams else None
    ho.attach_offload_hooks(model, ho.OffloadPolicy(limit_gb=limit))
    for block in model:
        block.compile(mode="reduce-overhead")
    for x, want in zip(xs, wants, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            torch.testing.assert_close(model(x).clone(), want)
    assert (ho.offload_plan(model).pass_bytes > 0) == streams
    assert ("replay CUDA graphs" in caplog.text) == streams
    ho.detach(model)

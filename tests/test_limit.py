"""The limit is exact: the least that is named works, and one byte less does not."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
    offloaded,
)
from hookoffload.layer import Layer
from hookoffload.state_hooks import session_of
from hookoffload.window import Window
from tests.samples import linears, same_bits
from tests.small_models import (
    assert_same,
    chain,
    expected,
    on_disk,
    run,
    tiny_model,
    tokens,
)
from tests.snapshots import Snapshot, assert_untouched

GIB = 2**30


class Held(nn.Module):
    """Its own parameter is needed while all of its children run."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(300))
        self.inner = nn.ModuleList(chain(300, 100, 300, seed=i) for i in range(3))
        self.register_buffer("bias", torch.randn(300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner in self.inner:
            x = inner(x) * self.scale + self.bias
        return x


class Sideways(nn.Module):
    """Reads a child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(40, 40)
        self.other = nn.Linear(40, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.other(x), self.child.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.conv = nn.Conv1d(32, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0]
        x = self.rnn(x)[0]
        return self.conv(x.transpose(1, 2))


def _held() -> nn.Module:
    torch.manual_seed(0)
    return Held().eval()


def _sideways() -> nn.Module:
    torch.manual_seed(0)
    return Sideways().eval()


def _attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


def _table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64)).eval()


Case = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]
CASES: dict[str, Case] = {
    "tiny": (tiny_model, tokens),
    "held": (_held, lambda: torch.ones(2, 300)),
    "sideways": (_sideways, lambda: torch.ones(2, 40)),
    "attention": (_attention, lambda: torch.ones(2, 5, 32)),
    "chain": (lambda: chain(64, 300, 7, 300, 64), lambda: torch.ones(2, 64)),
    "one": (lambda: chain(13, 17)[0], lambda: torch.ones(2, 13)),
    "table": (_table, lambda: torch.arange(4)),
}
POLICIES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk"},
    "cast": {"store": "cpu", "compute_dtype": torch.float64},
    "disk and cast": {"store": "disk", "compute_dtype": torch.float64},
    "narrow on disk": {
        "store": "disk",
        "storage_dtype": torch.bfloat16,
        "compute_dtype": torch.float32,
    },
}

every_case = pytest.mark.parametrize("case", CASES)
every_policy = pytest.mark.parametrize("kind", POLICIES)


def _policy(folder: Path, kind: str, limit_bytes: int | None) -> OffloadPolicy:
    fields = dict(POLICIES[kind])
    if fields["store"] == "disk":
        fields["disk_dir"] = folder
    limit = None if limit_bytes is None else limit_bytes / GIB
    return OffloadPolicy(limit_gb=limit, compute_device="cpu", **fields)


def _input(kind: str, x: torch.Tensor) -> torch.Tensor:
    dtype = POLICIES[kind].get("compute_dtype")
    return x.to(dtype) if dtype and x.is_floating_point() else x


@every_policy
@every_case
def test_least_works_and_one_byte_less_does_not(
    tmp_path: Path, case: str, kind: str
) -> None:
    make, make_input = CASES[case]
    model, x = make(), _input(kind, make_input())
    with offloaded(model, _policy(tmp_path, kind, 0)):
        least = offload_plan(model).least_bytes
        wanted = [run(model, x) for _ in range(2)]
    assert least > 0
    model = make()
    attach_offload_hooks(model, _policy(tmp_path, kind, least))
    for output in wanted:
        assert_same(run(model, x), output)
    assert 0 < offload_stats(model).peak_bytes <= least
    detach(model)
    before = Snapshot(model, tmp_path)
    with pytest.raises(BudgetExceededError):
        attach_offload_hooks(model, _policy(tmp_path, kind, least - 1))
    assert_untouched(model, before)


@every_policy
@every_case
def test_every_feasible_limit_is_kept(tmp_path: Path, case: str, kind: str) -> None:
    make, make_input = CASES[case]
    model, x = make(), _input(kind, make_input())
    with offloaded(model, _policy(tmp_path, kind, None)):
        wanted = run(model, x)
        run(model, x)
        whole = offload_stats(model).peak_bytes
    with offloaded(model, _policy(tmp_path, kind, 0)):
        least = offload_plan(model).least_bytes
    steps = sorted({least + (whole - least) * step // 7 for step in range(9)})
    for limit in [*steps, least + 1, least + 511, whole + 12_345]:
        model = make()
        with offloaded(model, _policy(tmp_path, kind, limit)):
            for _ in range(3):
                assert_same(run(model, x), wanted)
            assert 0 < offload_stats(model).peak_bytes <= limit, limit


@every_policy
@every_case
def test_limit_of_zero_takes_the_least(tmp_path: Path, case: str, kind: str) -> None:
    make, make_input = CASES[case]
    model, x = make(), _input(kind, make_input())
    with offloaded(model, _policy(tmp_path, kind, 0)):
        plan = offload_plan(model)
        assert not plan.resident
        assert plan.limit_bytes == plan.least_bytes == plan.total_bytes
        for _ in range(3):
            run(model, x)
        if case != "sideways":  # whose least is known only after the first pass
            assert offload_stats(model).peak_bytes <= plan.least_bytes


def test_more_memory_never_means_more_copies(tmp_path: Path) -> None:
    moved = []
    with offloaded(tiny_model(), on_disk(tmp_path)) as model:
        least = offload_plan(model).least_bytes
    for limit in range(least, 3 * least, least // 5):
        with offloaded(tiny_model(), on_disk(tmp_path, limit_gb=limit / GIB)) as model:
            moved.append(offload_plan(model).pass_bytes)
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[-1]


# --- the message ---

MESSAGE = re.compile(
    r"limit_gb=(?P<limit>[\d.]+) is below the least this model needs, "
    r"(?P<least>[\d.]+) GiB: (?P<why>.+)\. Set limit_gb=(?P<set>[\d.]+) or more, "
    r"or 0 for as little as possible\.$"
)


class Large(nn.Module):
    """Eight blocks; in half precision the largest layer takes 0.056 GiB.

    The memory is never written to, so the system gives none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(8):
            mlp = nn.Module()
            mlp.down = nn.Linear(100, 10, device="meta")
            mlp.up = nn.Linear(10, 100, device="meta")
            block = nn.Module()
            block.mlp = mlp
            self.blocks.append(block)
        size = int(0.0555 * GIB / 2 / 1000)
        mlp.up = nn.Linear(1000, size, bias=False, device="meta")
        table = torch.empty(int(0.0148 * GIB / 2), device="meta")
        self.register_buffer("table", table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_message_has_the_form_of_the_documentation(tmp_path: Path) -> None:
    model = Large().to_empty(device="cpu")
    policy = on_disk(
        tmp_path,
        limit_gb=0.05,
        storage_dtype=torch.float16,
        compute_dtype=torch.float16,
    )
    with pytest.raises(BudgetExceededError) as caught:
        attach_offload_hooks(model, policy)
    assert str(caught.value) == (
        "limit_gb=0.05 is below the least this model needs, 0.071 GiB: "
        "blocks.7.mlp.up takes 0.056, always-resident tensors 0.015. "
        "Set limit_gb=0.071 or more, or 0 for as little as possible."
    )
    assert list(tmp_path.iterdir()) == []


@every_policy
@every_case
def test_number_in_the_message_works_when_typed_back(
    tmp_path: Path, case: str, kind: str
) -> None:
    make, make_input = CASES[case]
    model, x = make(), _input(kind, make_input())
    with pytest.raises(BudgetExceededError) as caught:
        attach_offload_hooks(model, _policy(tmp_path, kind, 1))
    found = MESSAGE.match(str(caught.value))
    assert found, caught.value
    least = Decimal(found["set"])
    assert least == Decimal(found["least"])
    fields = {**POLICIES[kind], "compute_device": "cpu"}
    if fields["store"] == "disk":
        fields["disk_dir"] = tmp_path
    with offloaded(model, limit_gb=float(least), **fields):
        run(model, x)
        run(model, x)
    one_less = least - Decimal(1).scaleb(int(least.as_tuple().exponent))
    if one_less > 0:
        with pytest.raises(BudgetExceededError):
            attach_offload_hooks(
                model, OffloadPolicy(limit_gb=float(one_less), **fields)
            )


def test_message_names_the_root_by_its_class(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(BudgetExceededError, match=r"TinyModel and blocks\.0 "):
        attach_offload_hooks(model, on_disk(tmp_path, limit_gb=2**-20))
    with offloaded(model, on_disk(tmp_path)):
        assert "  TinyModel " in str(offload_plan(model))


@pytest.mark.parametrize("limit_gb", [2**-30, 1e-10, 5e-324])
def test_tiniest_limit_is_refused_and_not_taken_for_zero(
    tmp_path: Path, limit_gb: float
) -> None:
    model = tiny_model()
    before = Snapshot(model, tmp_path)
    with pytest.raises(BudgetExceededError, match="is below the least"):
        attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    assert_untouched(model, before)


def test_limit_is_of_no_concern_where_nothing_has_to_move() -> None:
    """On a CPU, weights in host RAM are computed with where they lie."""
    model = tiny_model()
    wanted = expected(model, tokens())
    with offloaded(model, limit_gb=2**-30, compute_device="cpu"):
        assert_same(run(model, tokens()), wanted)
        assert offload_stats(model).peak_bytes == 0


@pytest.mark.gpu
@every_case
def test_least_works_on_an_accelerator_without_activations(case: str) -> None:
    make, make_input = CASES[case]
    x = make_input().cuda()
    wanted = run(make().cuda(), x)
    with offloaded(make(), limit_gb=0, compute_device="cuda") as model:
        least = offload_plan(model).least_bytes
        assert_same(run(model, x), wanted)
    model = make()
    before = Snapshot(model)
    with pytest.raises(BudgetExceededError):
        attach_offload_hooks(
            model, OffloadPolicy(limit_gb=(least - 1) / GIB, compute_device="cuda")
        )
    assert_untouched(model, before)
    with offloaded(model, limit_gb=least / GIB, compute_device="cuda"):
        assert_same(run(model, x), wanted)


def test_room_for_a_cast_is_not_made_of_the_layer_that_is_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = linears(width=64, depth=8).to(torch.bfloat16), torch.randn(2, 64)
    want = run(copy.deepcopy(model).float(), x)
    layer = 64 * 64 * 2
    policy = OffloadPolicy(
        store="disk",
        disk_dir=tmp_path,
        compute_dtype=torch.float32,
        compute_device="cpu",
        limit_gb=11 * layer / GIB,
    )
    with offloaded(model, policy):
        for _ in range(2):
            run(model, x)
        first, *others = session_of(model).layers
        assert first.resident is not None
        take = Window.take_scratch

        def refuse(window: Window, asking: Layer, size: int) -> bool:
            return asking is not first and take(window, asking, size)

        monkeypatch.setattr(Window, "take_scratch", refuse)
        assert same_bits(run(model, x), want)
        assert any(other.resident is None for other in others)


class Calling(nn.Linear):
    """Linear; it can call another one in its forward, which no plan foresees."""

    def __init__(self, nested: list[bool]) -> None:
        super().__init__(128, 128, bias=False)
        self.inner: list[nn.Module] = []
        self.nested = nested

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x) / 16
        return self.inner[0](y) if self.nested[0] and self.inner else y


def test_residents_that_gave_way_once_come_back() -> None:
    nested = [False]
    layers = [Calling(nested) for _ in range(16)]
    for outer, inner in itertools.pairwise(layers[:9]):
        outer.inner = [inner]
    model, x = nn.Sequential(*layers), torch.randn(2, 128)
    limit = 10.2 * layers[0].weight.nbytes / 2**30
    policy = OffloadPolicy(limit_gb=limit, compute_device="cpu", store="disk")
    attach_offload_hooks(model, policy)

    def copied(times: int, *, inside: bool = False) -> int:
        nested[0] = inside
        with torch.no_grad():
            for _ in range(times):
                before = offload_stats(model).bytes_moved
                model(x)
        return offload_stats(model).bytes_moved - before

    copied(3)
    planned = offload_plan(model).pass_bytes
    assert copied(1) == planned
    copied(1, inside=True)  # more at once than the plan has room for
    copied(5)
    assert copied(1) == planned
    # Where each pass does so, they are not brought in to be given up again.
    steady = [copied(6, inside=True), copied(1, inside=True), copied(1, inside=True)]
    assert steady[0] == steady[1] == steady[2]
    detach(model)

"""Linear layers compute in 8-bit floats where the policy says so, and nothing else."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from hookoffload import (
    OffloadPolicy,
    Placement,
    add_lora,
    attach_offload_hooks,
    clear_lora,
    detach,
    load_model,
    offload_plan,
    offload_stats,
    offloaded,
    set_limit,
)
from hookoffload.fp8 import why_not_on

from .interrupts import NthCall
from .samples import GIB, least_limit_gb, run, same_bits, seen_inside
from .small_models import assert_same
from .snapshots import Snapshot, assert_untouched

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8
CPU = torch.device("cpu")
EIGHT = {"compute_device": "cpu", "compute_dtype": FP8}

multiplies = pytest.mark.skipif(
    why_not_on(CPU, FP8, torch.bfloat16) is not None,
    reason="this release of PyTorch does not multiply 8-bit floats on CPUs",
)

# Streamed, kept on the device in 8 bits, read where they rest, and from files.
PLACES: dict[str, dict[str, Any]] = {
    "in place": {"limit_gb": 0},
    "resident": {},
    "disk, least": {"store": "disk", "limit_gb": 0},
    "disk, poisoned": {"store": "disk", "limit_gb": 0, "debug": True},
    "disk, resident": {"store": "disk"},
    "disk, resident as it is": {
        "store": "disk",
        "preparing": Placement(dtype=torch.float32),
    },
}


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 8-bit values of rows and their scales, as the note has them."""
    scale = rows.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).to(FP8), scale


def product(
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return what a Linear with these 8-bit weights and scales computes."""
    rows, scale = quantised(x.reshape(-1, x.shape[-1]))
    flat = torch._scaled_mm(
        rows,
        weight[0].t(),
        scale_a=scale,
        scale_b=weight[1].t(),
        bias=bias,
        out_dtype=x.dtype,
    )
    return flat.view(*x.shape[:-1], -1)


def by_hand(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return product(x, quantised(layer.weight.detach()), layer.bias.detach())


def error_bound(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Bound how far an 8-bit product may be from the exact one, for each output.

    A value of FP8 has 4 significant bits, so rounding to it moves a number by at most
    2**-4 of itself, or by half the smallest step, 2**-10 of the scale. The error of a
    product of two such numbers follows: ``|x'w' - xw| <= |x'-x| |w'| + |x| |w'-w|``.
    """

    def moved(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(1, keepdim=True) / LARGEST
        return torch.maximum(rows.abs() * 2**-4, scale * 2**-10)

    rows = x.reshape(-1, x.shape[-1]).double()
    weight = layer.weight.detach().double()
    error = moved(rows) @ (weight.abs() + moved(weight)).t()
    error += rows.abs() @ moved(weight).t()
    exact = rows @ weight.t() + layer.bias.detach().double()
    rounding = 2 * torch.finfo(x.dtype).eps * (exact.abs() + error)
    return (error + rounding).view(*x.shape[:-1], -1)


def linear(dtype: torch.dtype = torch.float32, *, gain: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    model[0].weight.data *= gain
    return model


class Mixed(nn.Module):
    """Linear layers between others, one of them of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.conv = nn.Conv1d(32, 32, 1)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.odd = nn.Linear(32, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.odd(self.down(torch.relu(self.up(self.norm(x)))))

    def by_hand(self, tokens: torch.Tensor) -> torch.Tensor:
        """What it computes with its Linear layers in 8 bits."""
        x = self.embed(tokens)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        hidden = torch.relu(by_hand(self.up, self.norm(x)))
        return self.odd(by_hand(self.down, hidden))


TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _support_is_asked_anew() -> Iterator[None]:
    yield
    why_not_on.cache_clear()


# -- what is computed ---------------------------------------------------------------


@multiplies
@pytest.mark.parametrize("fields", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_computes_the_formula_of_the_note_wherever_its_weight_rests(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = linear(dtype)
    x = torch.randn(5, 64).to(dtype)
    want = run(lambda: by_hand(model[0], x))
    with offloaded(model, **EIGHT, **fields):
        for _ in range(3):
            assert_same(run(model, x), want)


@multiplies
@pytest.mark.parametrize("gain", [1e-9, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_as_near_to_the_wide_one_as_rounding_allows(
    dtype: torch.dtype, gain: float
) -> None:
    model = linear(dtype, gain=gain)
    # Rows of very different sizes: each has its own scale.
    x = (torch.randn(7, 64) * torch.logspace(-4, 4, 7).unsqueeze(1)).to(dtype)
    exact = run(copy.deepcopy(model).double(), x.double())
    bound = error_bound(model[0], x)
    with offloaded(model, **EIGHT):
        error = (run(model, x).double() - exact).abs()
    assert (error <= bound).all()
    # The bound is for the worst case; what happens is an order of magnitude nearer.
    assert error.norm() < bound.norm() / 8


@multiplies
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64)])
def test_input_may_have_any_leading_shape(shape: tuple[int, ...]) -> None:
    model = linear()
    x = torch.randn(shape)
    want = run(lambda: by_hand(model[0], x)) if x.numel() else torch.empty(0, 48)
    with offloaded(model, **EIGHT):
        assert_same(run(model, x), want)


@multiplies
def test_weights_beyond_the_largest_8_bit_value_do_not_overflow() -> None:
    model = linear(gain=1e6)
    assert model[0].weight.abs().max() > 100 * LARGEST
    with offloaded(model, **EIGHT, limit_gb=0):
        assert run(model, torch.randn(2, 64) * 1e6).isfinite().all()


@multiplies
def test_rows_of_zeros_stay_zeros_and_nans_stay_in_their_row() -> None:
    model = linear()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 0
    x = torch.randn(3, 64)
    x[1] = 0
    x[2, 5] = torch.nan
    with offloaded(model, **EIGHT):
        out = run(model, x)
    assert (out[:2, 3] == 0).all()
    assert torch.equal(out[1], model[0].bias)
    assert out[:2].isfinite().all() and out[2].isnan().all()


@multiplies
def test_large_weights_and_inputs_are_brought_to_8_bits_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linear()
    x = torch.randn(50, 64)
    want = run(lambda: by_hand(model[0], x))
    monkeypatch.setattr("hookoffload.fp8._WEIGHT_PART", 7 * 64 + 3)
    monkeypatch.setattr("hookoffload.fp8._INPUT_PART", 11 * 64 + 3)
    with offloaded(model, **EIGHT, store="disk", limit_gb=0):
        assert_same(run(model, x), want)


@multiplies
def test_only_linear_layers_compute_in_8_bits() -> None:
    model = Mixed()
    want = run(model.by_hand, TOKENS)
    seen = {
        name: seen_inside(child, lambda m: m.weight.data.dtype)
        for name, child in model.named_children()
    }
    for fields in ({}, {"store": "disk", "limit_gb": 0}):
        with offloaded(model, **EIGHT, **fields):
            assert_same(run(model, TOKENS), want)
    assert {dtype for dtypes in seen.values() for dtype in dtypes} == {torch.float32}


@multiplies
def test_autocast_decides_the_dtype_of_the_output() -> None:
    model = linear()
    x = torch.randn(5, 64)
    half = copy.deepcopy(model).bfloat16()
    half[0].weight.data = model[0].weight.data  # its 8 bits are made of what rests
    want = run(lambda: by_hand(half[0], x.bfloat16()))
    with offloaded(model, **EIGHT), torch.autocast("cpu", torch.bfloat16):
        # Autocast rounds nothing before the rows get their scales.
        got = run(model, x.bfloat16())
        assert_same(got, want)
        assert run(model, x).dtype == torch.bfloat16


@multiplies
def test_weight_may_be_read_without_calling_its_module() -> None:
    class Sideways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.inner.weight
            assert weight.dtype == x.dtype and weight.shape == (32, 32)
            product = functional.linear(x.to(weight.dtype), weight, self.inner.bias)
            return product + x @ weight.T + torch.einsum("bi,oi->bo", x, weight)

    model = Sideways()
    x = torch.randn(3, 32)
    values, scale = quantised(model.inner.weight.detach())
    value = values.float() * scale
    want = run(lambda: by_hand(model.inner, x)) + 2 * (x @ value.T)
    for fields in ({}, {"storage_dtype": torch.bfloat16}):
        with offloaded(model, **EIGHT, store="disk", limit_gb=0, **fields):
            for _ in range(3):
                got = run(model, x)
                if not fields:
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@multiplies
def test_subclass_of_linear_with_a_forward_of_its_own_computes_in_8_bits() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * functional.linear(
                bias=self.bias, input=input, weight=self.weight
            )

    model = nn.Sequential(Doubled(32, 32))
    x = torch.randn(2, 32)
    want = 2 * run(lambda: by_hand(model[0], x))
    with offloaded(model, **EIGHT):
        assert_same(run(model, x), want)


class Reader(nn.Module):
    """Reads the weight of a Linear that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.inner.weight.dtype) @ self.inner.weight.T


@multiplies
@pytest.mark.parametrize("how", ["whole", "in place", "child"])
def test_compiled_models_compute_the_same(how: str) -> None:
    model = nn.Sequential(Reader(), nn.GELU(), nn.Linear(32, 32))
    x = torch.randn(2, 32)
    with offloaded(model, **EIGHT, store="disk", limit_gb=0):
        want = run(model, x)
        called: Any = model
        if how == "whole":
            called = torch.compile(model, backend="aot_eager")
        else:
            (model if how == "in place" else model[0]).compile(backend="aot_eager")
        for _ in range(3):
            assert_same(run(called, x), want)
    torch._dynamo.reset()


# -- where weights rest -------------------------------------------------------------


@multiplies
@pytest.mark.parametrize(
    "fields",
    [{"limit_gb": 0}, {"store": "disk", "limit_gb": 0}, {"store": "disk"}],
    ids=["in place", "disk", "resident"],
)
def test_weights_that_rest_in_8_bits_are_multiplied_as_they_are(
    fields: dict[str, Any],
) -> None:
    model = linear(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    rounded = (model[0].weight.detach().to(FP8), torch.ones(48, 1))
    bias = model[0].bias.detach().to(FP8).bfloat16()
    want = product(x, rounded, bias)
    with offloaded(model, **EIGHT, storage_dtype=FP8, **fields):
        for _ in range(3):
            assert_same(run(model, x), want)
        assert model[0].weight.dtype == FP8
        # The scales, and the bias in its own dtype: no second copy of the weight.
        assert offload_plan(model).scratch_bytes < model[0].weight.nbytes
        if fields == {"store": "disk", "limit_gb": 0}:
            moved = 3 * (model[0].weight.nbytes + model[0].bias.nbytes)
            assert offload_stats(model).bytes_moved == moved


@multiplies
@pytest.mark.parametrize("fields", [{}, {"store": "disk"}], ids=["in place", "disk"])
def test_weights_that_rest_in_8_bits_are_found_wherever_they_lie(
    fields: dict[str, Any],
) -> None:
    layers = [nn.Linear(32, 32, bias=False) for _ in range(6)]
    model = nn.Sequential(*layers)
    together = torch.randn(6, 32, 32).to(FP8)
    for layer, weight in zip(layers, together, strict=True):
        layer.weight.data = weight  # not where their storage begins
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    want = x
    for weight in together.clone():
        want = product(want, (weight, torch.ones(32, 1)), None)
    least = least_limit_gb(model, **EIGHT, **fields)
    for limit in (least, 2 * least):  # the window has room for one, and for more
        with offloaded(model, **EIGHT, **fields, limit_gb=limit):
            for _ in range(3):
                assert_same(run(model, x), want)


@multiplies
def test_other_8_bit_dtype_at_rest_is_brought_to_the_one_that_multiplies() -> None:
    model = linear()
    x = torch.randn(3, 64)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.float8_e5m2).float()
    want = run(lambda: by_hand(rounded[0], x))
    for store in ("cpu", "disk"):
        with offloaded(model, **EIGHT, storage_dtype=torch.float8_e5m2, store=store):
            for _ in range(2):
                assert_same(run(model, x), want)
        model.load_state_dict(rounded.state_dict())


@multiplies
def test_checkpoint_in_8_bits_is_read_as_it_is_and_norms_compute_in_bf16(
    tmp_path: Path,
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))

    plain = make().bfloat16()
    state = {name: value.to(FP8) for name, value in plain.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    policy = OffloadPolicy(store="disk", limit_gb=0, **EIGHT)
    model = load_model(make, path, policy=policy)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    plain.load_state_dict({name: value.bfloat16() for name, value in state.items()})
    weight = (state["1.weight"], torch.ones(32, 1))
    want = product(run(plain[0], x), weight, plain[1].bias.detach())
    for _ in range(2):
        assert_same(run(model, x), want)
    moved = sum(value.nbytes for value in state.values())
    assert offload_stats(model).bytes_moved == 2 * moved
    detach(model)


@multiplies
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_vram_config_of_the_seed_system_computes_in_8_bits(place: str) -> None:
    config = {
        "offload_dtype": torch.bfloat16,
        "offload_device": place,
        "onload_dtype": torch.bfloat16,
        "onload_device": place,
        "preparing_dtype": FP8,
        "preparing_device": "cpu",
        "computation_dtype": FP8,
        "computation_device": "cpu",
    }
    model = linear(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    want = run(lambda: by_hand(model[0], x))
    for limit in (0, 1):
        policy = OffloadPolicy.from_vram_config(config, vram_limit=limit)
        attach_offload_hooks(model, policy)
        for _ in range(2):
            assert_same(run(model, x), want)
        detach(model)


# -- what is left as it was ---------------------------------------------------------


@multiplies
@pytest.mark.parametrize("fields", PLACES.values(), ids=PLACES)
def test_between_forwards_and_behind_detach_nothing_is_left(
    fields: dict[str, Any],
) -> None:
    model = Mixed()
    before = Snapshot(model)
    own = {name: vars(p).copy() for name, p in model.named_parameters()}
    with offloaded(model, **EIGHT, **fields):
        for _ in range(2):
            run(model, TOKENS)
            for name, parameter in model.named_parameters():
                assert type(parameter) is nn.Parameter, name
                assert parameter.dtype == torch.float32, name
                assert vars(parameter) == own[name], name
                assert same_bits(parameter, before.tensors[name].value), name
    assert_untouched(model, before, same_memory="store" not in fields)


@multiplies
def test_resident_that_rests_in_8_bits_is_a_plain_parameter_between_forwards() -> None:
    # A bias would be cast, and its layer not stay bound anyway.
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    with offloaded(model, **EIGHT, store="disk", storage_dtype=FP8):
        for _ in range(3):
            run(model, torch.randn(1, 64))
            assert type(model[0].weight) is nn.Parameter
            assert model[0].weight.dtype == FP8
    assert type(model[0].weight) is nn.Parameter


@multiplies
def test_state_dict_inside_a_forward_has_the_weights_at_rest() -> None:
    model = linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = seen_inside(model[0], lambda _: model.state_dict())
    with offloaded(model, **EIGHT, store="disk", limit_gb=0):
        run(model, torch.randn(1, 64))
        for name, value in states[0].items():
            assert_same(value, before[name])


class Stopped(BaseException):
    """Like Ctrl-C: PyTorch calls no hooks behind it."""


@multiplies
@pytest.mark.parametrize("kind", [ValueError, Stopped])
def test_forward_that_ends_early_leaves_no_weight_in_8_bits(
    kind: type[BaseException],
) -> None:
    model = linear()
    x = torch.randn(2, 64)
    want = run(lambda: by_hand(model[0], x))
    before = Snapshot(model)
    stop = True

    def interrupt(*_: Any) -> None:
        if stop:
            raise kind

    handle = model[0].register_forward_pre_hook(interrupt)
    attach_offload_hooks(model, OffloadPolicy(limit_gb=0, **EIGHT))
    with pytest.raises(kind):
        run(model, x)
    stop = False
    assert_same(run(model, x), want)
    stop = True
    with pytest.raises(kind):
        run(model, x)
    detach(model)
    handle.remove()
    assert_untouched(model, before)


@multiplies
@pytest.mark.parametrize("rest", [None, FP8], ids=str)
def test_weight_that_is_edited_behind_an_interrupted_bind_has_the_new_values(
    rest: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = linear(torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    new = torch.randn(48, 64).to(FP8).bfloat16()
    fields = {"store": "disk", "limit_gb": 0, "storage_dtype": rest}
    with offloaded(model, **EIGHT, **fields):
        run(model, x)
        with monkeypatch.context() as patched:
            patched.setattr("hookoffload.layer.put_scales_on", NthCall(_none, 0))
            with pytest.raises(KeyboardInterrupt):
                run(model, x)
        with torch.no_grad():
            model[0].weight.copy_(new)
        run(model, x)
        assert_same(model[0].weight.detach().bfloat16(), new)


def _none(*_: object) -> None:
    """Does nothing."""


@multiplies
def test_weights_that_are_edited_between_forwards_get_new_scales() -> None:
    model = linear()
    x = torch.randn(2, 64)
    for fields in ({}, {"store": "disk"}, {"limit_gb": 0}):
        with offloaded(model, **EIGHT, **fields), torch.no_grad():
            model(x)
            model[0].weight.mul_(3)
            assert_same(model(x), by_hand(model[0], x))


@multiplies
def test_limit_is_kept_to_the_byte() -> None:
    layers = [nn.Linear(256, 256) for _ in range(6)]
    model = nn.Sequential(*layers)
    x = torch.randn(2, 256)
    want = x
    for layer in layers:
        want = run(lambda y, layer=layer: by_hand(layer, y), want)
    for fields in ({}, {"store": "disk"}, {"store": "disk", "storage_dtype": FP8}):
        least = least_limit_gb(model, **EIGHT, **fields)
        for limit in (least, 1.3 * least, 2 * least, 1.0):
            with offloaded(model, **EIGHT, **fields, limit_gb=limit):
                for _ in range(3):
                    got = run(model, x)
                if "storage_dtype" not in fields:
                    assert_same(got, want)
                plan, stats = offload_plan(model), offload_stats(model)
                assert stats.peak_bytes <= limit * GIB >= plan.total_bytes
                if limit == least:
                    assert stats.peak_bytes == plan.total_bytes


@multiplies
def test_residents_are_kept_in_8_bits_and_brought_once() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    model = model.bfloat16()
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    with offloaded(model, **EIGHT, store="disk", limit_gb=0) as attached:
        want = run(attached, x)
        set_limit(attached, 1)
        run(attached, x)
        moved = offload_stats(attached).bytes_moved
        assert_same(run(attached, x), want)
        assert offload_stats(attached).bytes_moved == moved
        scales = 256 * 4
        assert offload_plan(attached).resident_bytes == 4 * (256 * 256 + scales)


@multiplies
def test_plan_of_a_model_is_that_of_the_attached_one() -> None:
    model = Mixed()
    policy = OffloadPolicy(**EIGHT, store="disk", limit_gb=0)
    planned = offload_plan(model, policy)
    with offloaded(model, policy):
        attached = offload_plan(model)
    assert planned.total_bytes == attached.total_bytes
    assert planned.scratch_bytes == attached.scratch_bytes
    assert "F8_E4M3" in str(planned)


@multiplies
def test_loras_are_added_to_8_bit_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    x = torch.randn(3, 64)
    # Computed in the dtype of the layer, not in that of the file.
    down, up = torch.randn(4, 64).bfloat16(), torch.randn(48, 4).bfloat16()
    lora = {"0.lora_A.weight": down, "0.lora_B.weight": up}
    base = product(x, quantised(model[0].weight.detach()), None)
    delta = 0.3 * (x @ down.float().t() @ up.float().t())
    with offloaded(model, **EIGHT, store="disk", limit_gb=0):
        add_lora(model, lora, scale=0.3)
        for _ in range(2):
            torch.testing.assert_close(
                run(model, x),
                base + delta,
                rtol=1e-5,
                atol=1e-4,
            )
        clear_lora(model)
        assert_same(run(model, x), base)


# -- what stays in its own dtype ----------------------------------------------------


def test_sizes_that_are_no_multiples_of_16_compute_in_their_own_dtype(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 20))
    x = torch.randn(3, 20)
    want = run(copy.deepcopy(model), x)
    with (
        caplog.at_level(logging.INFO, "hookoffload"),
        offloaded(model, **EIGHT, store="disk", limit_gb=0),
    ):
        for _ in range(3):
            assert_same(run(model, x), want)
    said = [r for r in caplog.records if "own dtype" in r.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING
    assert "2 of 2 Linear layers" in said[0].getMessage()
    assert "0: 32 x 20 is no multiple of 16" in said[0].getMessage()


def test_device_without_8_bit_products_computes_in_the_models_own_dtype(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on newer devices")

    why_not_on.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    model = linear(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    want = run(copy.deepcopy(model), x)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(FP8).bfloat16()
    with offloaded(model, **EIGHT):
        assert_same(run(model, x), want)
    with offloaded(model, **EIGHT, storage_dtype=FP8, store="disk", limit_gb=0):
        assert_same(run(model, x), run(rounded, x))
    assert "only supported on newer devices" in caplog.text


def test_weights_that_others_read_as_well_compute_in_their_own_dtype() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # In front: the first name of a shared weight is the Linear's.
            self.head = nn.Linear(32, 32, bias=False)
            self.embed = nn.Embedding(32, 32)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(self.attention(x, x, x)[0])

    model = Tied().eval()
    want = run(copy.deepcopy(model), TOKENS)
    for fields in ({}, {"store": "disk", "limit_gb": 0}):
        with offloaded(model, **EIGHT, **fields):
            assert_same(run(model, TOKENS), want)


# -- what is refused ----------------------------------------------------------------


@multiplies
@pytest.mark.parametrize("limit", [0, None])
def test_gradients_through_8_bit_layers_are_refused_by_name(
    limit: float | None,
) -> None:
    model = linear()
    with (
        offloaded(model, **EIGHT, limit_gb=limit),
        pytest.raises(RuntimeError, match=r"0\.weight computes in fp8, which has no"),
    ):
        model(torch.randn(2, 64))


@multiplies
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.__setitem__(0, 0),
        lambda weight: weight.__iadd__(1),
        lambda weight: setattr(weight, "data", torch.zeros(48, 64)),
        lambda weight: torch.mul(weight, 2, out=weight),
    ],
    ids=["method", "index", "operator", "data", "out"],
)
def test_writes_to_an_8_bit_weight_inside_a_forward_are_refused_by_name(
    write: Any,
) -> None:
    model = linear()
    before = Snapshot(model)
    handle = model[0].register_forward_hook(lambda m, *_: write(m.weight) and None)
    with (
        offloaded(model, **EIGHT, limit_gb=0),
        pytest.raises(RuntimeError, match=r"0\.weight computes in fp8 and cannot be"),
    ):
        run(model, torch.randn(2, 64))
    handle.remove()
    assert_untouched(model, before)


# -- on a GPU -----------------------------------------------------------------------

# Of these, rows have the scales that the formula says, whatever the kernels sum up.
GPU_PLACES: dict[str, dict[str, Any]] = {
    "streamed": {"limit_gb": 0},
    "resident": {},
    "disk": {"store": "disk", "limit_gb": 0},
    "disk, resident": {"store": "disk"},
}


@pytest.fixture
def gpu_multiplies() -> None:
    reason = why_not_on(torch.device("cuda", 0), FP8, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"this GPU does not multiply 8-bit floats: {reason}")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_multiplies")
@pytest.mark.parametrize("fields", GPU_PLACES.values(), ids=GPU_PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_computes_the_formula_of_the_note(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(512, 768)).to(dtype)
    model[0].weight.data *= 1e4
    x = torch.randn(3, 5, 512).to(dtype)
    # There: GPUs divide by a number otherwise, and a value in the middle of two goes up
    # or down with the last bit of its scale.
    rows, row_scale = (t.cpu() for t in quantised(x.view(-1, 512).cuda()))
    weight, weight_scale = (t.cpu() for t in quantised(model[0].weight.data.cuda()))
    want = (rows.double() * row_scale) @ (weight.double() * weight_scale).t()
    want = want.view(3, 5, 768) + model[0].bias.detach().double()
    with offloaded(model, compute_device="cuda", compute_dtype=FP8, **fields):
        for _ in range(3):
            got = run(model, x)
            assert (got.dtype, got.device.type) == (dtype, "cuda")
            # The kernels may sum with fewer digits than fp32 has, and write bf16.
            error = (got.cpu().double() - want).abs()
            assert (error <= 2**-7 * want.abs() + 2**-9 * want.abs().max()).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_multiplies")
@pytest.mark.parametrize("rest", [None, FP8], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_gpu_keeps_the_limit_in_8_bits(rest: torch.dtype | None, share: float) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12))).bfloat16()
    x = torch.randn(16, 1024, dtype=torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters()) / GIB
    fields = {"compute_device": "cuda", "compute_dtype": FP8, "storage_dtype": rest}
    limit = least_limit_gb(model, **fields) + 0.02 + share * weights
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    with offloaded(model, **fields, limit_gb=limit + held / GIB):
        first = run(model, x)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            assert torch.equal(run(model, x), first)
        assert torch.cuda.max_memory_allocated() - held <= limit * GIB

"""Quantised weights: moved in their packed form, whatever their class is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hookoffload import (
    OffloadPolicy,
    add_lora,
    attach_offload_hooks,
    clear_lora,
    detach,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
)
from hookoffload.packed import Wrapper
from hookoffload.registered import check_packed, unreadable_at_rest
from tests.quantised_models import (
    CPU_KINDS,
    KINDS,
    WIDTH,
    Coded,
    attributes,
    bitsandbytes_4bit,
    coded,
    flat,
    linears,
    parts,
    rows,
    torchao_cpu_int4,
)
from tests.samples import run, same_bits

GIB = 2**30

SETTINGS: dict[str, dict[str, Any]] = {
    "least": {"limit_gb": 0},
    "unlimited": {},
    "half of it": {"limit_gb": 0.0003},
    "poisoned": {"limit_gb": 0, "debug": True},
}

every_kind = pytest.mark.parametrize("make", CPU_KINDS.values(), ids=CPU_KINDS)


def _policy(**fields: Any) -> OffloadPolicy:
    return OffloadPolicy(compute_device="cpu", **{"store": "disk", **fields})


@every_kind
def test_outputs_are_those_of_the_plain_quantised_model(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), rows()
    want = run(model, x)
    for setting in SETTINGS.values():
        with offloaded(model, _policy(**setting)):
            for _ in range(3):
                assert same_bits(run(model, x), want)


@every_kind
def test_what_moves_are_the_packed_bytes_within_the_limit(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), rows()
    run(model, x)  # the forwards of bitsandbytes change the dtype of a bias
    distinct = {part.data_ptr(): part.nbytes for part in parts(model).values()}
    with offloaded(model, _policy(limit_gb=0)):
        plan = offload_plan(model)
        assert plan.pass_bytes <= sum(distinct.values()) < plan.pass_bytes * 1.02
        for _ in range(3):
            run(model, x)
        peak = offload_stats(model).peak_bytes
        moved = offload_stats(model).bytes_moved
    assert 2 * plan.pass_bytes < moved < 4.5 * plan.pass_bytes
    assert peak <= plan.least_bytes < sum(distinct.values()) * 0.8


@every_kind
def test_detach_gives_the_same_objects_back_with_the_same_bytes(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), rows()
    run(model, x)
    before, held = attributes(model), parts(model)
    values = {name: part.clone() for name, part in held.items()}
    for setting in SETTINGS.values():
        with offloaded(model, _policy(**setting)):
            run(model, x)
            assert attributes(model) == before
        assert attributes(model) == before
        now = parts(model)
        assert now.keys() == values.keys()
        for name, part in now.items():
            assert part is held[name]
            assert same_bits(part, values[name])


@every_kind
def test_nothing_packed_is_cast_by_the_dtypes_of_the_policy(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), rows()
    run(model, x)
    dtypes = {name: part.dtype for name, part in parts(model).items()}
    plain = {
        f"{name}, part 0"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if type(tensor) in (torch.Tensor, nn.Parameter)
    }
    fields = {"storage_dtype": torch.float16, "compute_dtype": torch.float64}
    seen: list[dict[str, torch.dtype]] = []
    for module in model:
        module.register_forward_pre_hook(
            lambda *_: seen.append({n: p.dtype for n, p in parts(model).items()})
        )
    with offloaded(model, _policy(limit_gb=0, **fields)):
        at_rest = {name: part.dtype for name, part in parts(model).items()}
        with pytest.raises(RuntimeError, match="dtype"):
            run(model[1], x.float())  # the norm computes in float64
    for now in (at_rest, *seen):
        cast = {name for name in dtypes if now[name] != dtypes[name]}
        assert cast <= plain
    assert at_rest["1.weight, part 0"] is torch.float16
    assert seen[0]["1.weight, part 0"] is torch.float64


@every_kind
def test_a_state_dict_has_the_masters_whatever_is_resident(
    make: Callable[[], nn.Module],
) -> None:
    model, x = make(), rows()
    run(model, x)
    want = flat(model.state_dict())
    own = _those_of_the_model(want, model)
    with offloaded(model, _policy()):
        for _ in range(2):
            run(model, x)
            got = flat(model.state_dict())
            assert got.keys() == want.keys()
            for name, value in want.items():
                if isinstance(value, torch.Tensor):
                    assert same_bits(got[name], value), name
                else:
                    assert got[name] is value, name
            offload(model)
            assert _those_of_the_model(got, model) == own


def _those_of_the_model(state: dict[str, Any], model: nn.Module) -> set[str]:
    places = {part.data_ptr() for part in parts(model).values()}
    tensors = {n: t for n, t in state.items() if isinstance(t, torch.Tensor)}
    return {name for name, tensor in tensors.items() if tensor.data_ptr() in places}


@pytest.mark.parametrize("kind", ["wrapper subclass", "torchao int8", "gguf q8_0"])
def test_what_is_loaded_into_a_quantised_model_is_computed_with(kind: str) -> None:
    model, other, x = KINDS[kind](), KINDS[kind](), rows()
    want = run(other, x)
    with offloaded(model, _policy()):
        assert not torch.equal(run(model, x), want)
        model.load_state_dict(other.state_dict())
        assert same_bits(run(model, x), want)
    assert same_bits(run(model, x), want)


@pytest.mark.parametrize("kind", ["wrapper subclass", "quanto int8", "torchao fp8"])
def test_weights_that_replace_others_are_taken_over(kind: str) -> None:
    model, other, x = KINDS[kind](), KINDS[kind](), rows()
    want = run(other, x)
    with offloaded(model, _policy(limit_gb=0)):
        run(model, x)
        model.load_state_dict(other.state_dict(), assign=True)
        for _ in range(2):
            assert same_bits(run(model, x), want)
    assert same_bits(run(model, x), want)


class Tied(nn.Module):
    """One quantised weight in two modules, with another between them."""

    def __init__(self) -> None:
        super().__init__()
        made = coded()
        self.first, self.second = made[0], nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.between = nn.Sequential(made[2], made[4])
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def test_a_tied_quantised_weight_has_one_master_and_stays_tied() -> None:
    model, x = Tied(), rows()
    want = run(model, x)
    weight = model.first.weight
    with offloaded(model, _policy(limit_gb=0)):
        assert same_bits(run(model, x), want)
        codes = sum(layer.copy_bytes for layer in offload_plan(model).layers)
        assert codes < 6 * WIDTH * WIDTH  # once 1 and twice 2 squares of one byte each
    assert model.first.weight is weight is model.second.weight


class Sideways(nn.Module):
    """Reads a quantised weight without calling the module that owns it."""

    def __init__(self, *, one_scale: bool) -> None:
        super().__init__()
        self.inner = coded()
        if one_scale:
            self.inner[4].weight.scale = self.inner[0].weight.scale
        self.places: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.inner[0].weight
        self.places.append(weight.codes.data_ptr())
        return self.inner(F.linear(x, weight))


@pytest.mark.parametrize("one_scale", [False, True])
def test_a_quantised_weight_that_is_read_sideways_is_brought_in(
    one_scale: bool,
) -> None:
    model, x = Sideways(one_scale=one_scale), rows()
    want = run(model, x)
    with offloaded(model, _policy(limit_gb=0, debug=True)):
        for _ in range(3):
            assert same_bits(run(model, x), want)
        # The first forward shows it, the others have it from the beginning.
        assert model.places[1] == model.inner[0].weight.codes.data_ptr()
        assert model.places[1] not in model.places[2:]


class Leaking(nn.Module):
    """Hands a view of its quantised weight out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = coded()
        self.loose = nn.Linear(4, 4)
        self.loose.weight = nn.Parameter(
            Coded.of(torch.randn(4, 4)), requires_grad=False
        )
        self.loose.forward = lambda: self.loose.weight.detach()  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.loose(), self.inner(x)


def test_a_view_of_a_quantised_weight_that_is_handed_out_keeps_its_values() -> None:
    model = Leaking()
    want = model.loose.weight.value().clone()
    with offloaded(model, _policy(limit_gb=0, debug=True)):
        view = run(model, rows())[0]
        run(model, rows())
        assert isinstance(view, Coded)
        assert same_bits(view.value(), want)


def test_a_gradient_through_a_streamed_quantised_weight_is_refused() -> None:
    model, x = coded(), rows().requires_grad_()
    with (
        offloaded(model, _policy(limit_gb=0)),
        pytest.raises(RuntimeError, match="need a gradient"),
    ):
        model(x)


def test_two_quantised_models_share_a_limit() -> None:
    models = {"one": coded(), "two": coded()}
    x = rows()
    want = {name: run(model, x) for name, model in models.items()}
    with offloaded(models, _policy(limit_gb=0.0003)):
        for name in ("one", "two", "one"):
            assert same_bits(run(models[name], x), want[name])
    shared = {"one": models["one"], "two": nn.Sequential(nn.Linear(2, 2))}
    shared["two"][0].weight = models["one"][0].weight
    with pytest.raises(ValueError, match=r"two\.0\.weight and one\.0\.weight are the"):
        attach_offload_hooks(shared, _policy())


def test_a_lora_is_hot_loaded_beside_a_quantised_weight() -> None:
    model, x = coded(), rows()
    want = run(model, x)
    down, up = torch.randn(4, WIDTH), torch.randn(WIDTH, 4) / 64
    plain = copy.deepcopy(linears())
    with torch.no_grad():
        for index in (0, 2, 4):
            plain[index].weight.copy_(model[index].weight.value())
            plain[index].bias.copy_(model[index].bias)
        plain[0].weight += (up @ down).to(torch.bfloat16)
    with offloaded(model, _policy(limit_gb=0)):
        add_lora(model, {"0.lora_A.weight": down, "0.lora_B.weight": up})
        assert torch.allclose(run(model, x), run(plain, x), atol=0.1)
        assert not torch.equal(run(model, x), want)
        clear_lora(model)
        assert same_bits(run(model, x), want)


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes int8"])
def test_a_bias_that_the_forward_casts_by_itself_is_as_it_was_behind_it(
    kind: str,
) -> None:
    model, x = KINDS[kind](), rows()
    before = copy.deepcopy(model)
    bias = model[0].bias
    assert bias.dtype is torch.float32 and x.dtype is torch.bfloat16
    with offloaded(model, _policy()):
        for _ in range(3):
            got = run(model, x)
            assert bias.dtype is torch.float32
    assert same_bits(got, run(before, x))


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes int8"])
def test_a_bias_that_is_cast_where_nothing_moves_is_put_back(kind: str) -> None:
    model, x = KINDS[kind](), rows()
    want = run(copy.deepcopy(model), x)
    bias = model[0].bias
    values = bias.detach().clone()
    attach_offload_hooks(model, _policy(store="cpu"))
    for _ in range(3):
        assert same_bits(run(model, x), want)
    assert same_bits(model.state_dict()["0.bias"], values)
    run(model, x)
    bias.data = bias.data.double() + 1
    with pytest.raises(RuntimeError, match=r"0\.bias was moved or cast"):
        run(model, x)
    bias.data = values.to(torch.bfloat16)
    run(model, x)
    detach(model)
    assert same_bits(bias.detach(), values)


def test_8_bit_weights_that_have_run_keep_nothing_behind_in_ram() -> None:
    """Their first forward hands what was quantised on to the module."""
    model, x = KINDS["bitsandbytes int8"](), rows()
    want = run(model, x)
    state = model[0].state
    inside: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: inside.append(state.SCB.data_ptr()))
    with offloaded(model, _policy(limit_gb=0)):
        assert state.CB.data_ptr() == model[0].weight.data_ptr()
        assert same_bits(run(model, x), want)
        assert state.CB.data_ptr() == model[0].weight.data_ptr()
        assert inside[0] != state.SCB.data_ptr()


def test_a_table_that_all_4_bit_weights_read_brings_no_layer_along() -> None:
    model = bitsandbytes_4bit("nf4")
    table = model[0].weight.quant_state.code
    for module in (model[2], model[4]):
        module.weight.quant_state.code = table
    x = rows()
    want = run(model, x)
    with offloaded(model, _policy(limit_gb=0)):
        plan = offload_plan(model)
        assert same_bits(run(model, x), want)
        assert plan.least_bytes < 0.6 * sum(layer.copy_bytes for layer in plan.layers)
    assert model[4].weight.quant_state.code is table


def test_a_quantised_weight_of_an_attached_model_cannot_be_attached_again() -> None:
    model, other = coded(), linears()
    other[0].weight = model[0].weight
    with (
        offloaded(model, _policy()),
        pytest.raises(RuntimeError, match=r"0\.weight belongs to Sequential"),
    ):
        attach_offload_hooks(other, _policy())


def test_an_offloaded_quantised_model_gives_its_memory_back() -> None:
    model, x = coded(), rows()
    want = run(model, x)
    with offloaded(model, _policy()):
        run(model, x)
        offload(model)
        assert same_bits(run(model, x), want)


def test_a_wrapper_says_the_device_of_its_parts_once_all_are_there() -> None:
    """The parts are stand-ins: this machine need not have the device."""
    codes, scale = torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1)
    weight = Coded(codes, scale)
    wrapper = Wrapper(weight, ["codes", "scale"])
    there = torch.device("cuda:0")
    weight.codes = Coded(codes, scale, there)
    wrapper.follow(there)
    assert weight.device == torch.device("cpu")
    weight.scale = Coded(codes, scale, there)
    with torch.inference_mode():
        wrapper.follow(there)
    assert weight.device == there
    assert not weight.is_inference()
    weight.codes, weight.scale = codes, scale
    wrapper.follow(torch.device("cpu"))
    assert weight.device == torch.device("cpu")
    assert weight.codes is codes


# -- refused -----------------------------------------------------------------------


class Repacked(Coded):
    """Packed for a GPU; on the CPU its bytes lie otherwise."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            return Coded(args[0].codes.t().contiguous(), args[0].scale)
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_weight_that_is_packed_for_another_device_is_refused() -> None:
    model = linears()
    weight = Repacked(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1), "cuda:0")
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    match = r"2\.weight is a Repacked on cuda .*compute on cpu.*Quantise .* on cpu"
    with pytest.raises(ValueError, match=match):
        attach_offload_hooks(model, _policy())
    assert not model[0]._forward_pre_hooks


def test_a_weight_that_its_class_cannot_read_in_ram_is_known_by_name() -> None:
    model = linears()
    assert unreadable_at_rest(model) is None
    weight = Repacked(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1), "cuda:0")
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    assert unreadable_at_rest(model) == "2.weight, a Repacked packed for cuda"


def test_a_replacement_that_is_packed_for_another_device_is_refused() -> None:
    model, x = coded(), rows()
    weight = Repacked(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1), "cuda:0")
    with offloaded(model, _policy(limit_gb=0)):
        run(model, x)
        kept = model[2].weight
        model[2].weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(RuntimeError, match=r"2\.weight is a Repacked on cuda"):
            run(model, x)
        model[2].weight = kept
        run(model, x)


def test_a_format_that_the_compute_device_has_no_kernels_for_is_refused() -> None:
    """Its class would copy the bytes there, and fail in the forward."""
    model = torchao_cpu_int4()
    check_packed(model, torch.device("cpu"))
    match = r"0\.weight is a Int4OpaqueTensor, .* for cpu, .*compute on cuda.* Quantise"
    with pytest.raises(ValueError, match=match):
        check_packed(model, torch.device("cuda"))
    quantization = pytest.importorskip("torchao.quantization")
    weight = quantization.Int4TilePackedTo4dTensor(
        torch.zeros(32, 2, 32, 4, dtype=torch.int32),
        torch.zeros(2, WIDTH, 2, dtype=torch.bfloat16),
        block_size=[1, 128],
        shape=torch.Size([WIDTH, WIDTH]),
    )
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight is a Int4TilePacked.* on cpu"):
        attach_offload_hooks(model, _policy())


class AnyPacking(Coded):
    """Packed for any device; moving it anywhere makes a faster class of it."""

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Any], context: None, size: Any, stride: Any
    ) -> Coded:
        return AnyPacking(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            return CpuPacking(args[0].codes.t().contiguous(), args[0].scale)
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)


class CpuPacking(AnyPacking):
    """What `AnyPacking` is made into."""


class Elsewhere(AnyPacking):
    """Takes its parts on no other device, although it is a base class."""

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Any], context: None, size: Any, stride: Any
    ) -> Coded:
        raise AssertionError("only where I was made")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            return FromElsewhere(args[0].codes, args[0].scale)
        return super().__torch_dispatch__(func, types, args, kwargs)


class FromElsewhere(Elsewhere):
    """What `Elsewhere` is made into."""


def test_a_weight_packed_for_any_device_is_streamed_as_it_is_and_that_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = coded()
    other, x = model[2].weight, rows()
    want = run(model, x)
    weight = AnyPacking(other.codes, other.scale, "cuda:0")
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    assert unreadable_at_rest(model) is None
    with offloaded(model, _policy(limit_gb=0)):
        (told,) = [text for text in caplog.messages if "AnyPacking" in text]
        for _ in range(2):
            assert same_bits(run(model, x), want)
        assert type(model[2].weight) is AnyPacking
    assert "2.weight is a AnyPacking on cuda" in told
    assert ".to() would make a CpuPacking" in told
    assert "results may differ" in told


def test_a_base_class_that_does_not_take_its_parts_elsewhere_is_refused() -> None:
    model = linears()
    weight = Elsewhere(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1), "cuda:0")
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"would make a FromElsewhere\. Quantise"):
        attach_offload_hooks(model, _policy())
    assert unreadable_at_rest(model) == "2.weight, a Elsewhere packed for cuda"


class Remade(Coded):
    """Makes its parts anew whenever somebody looks."""

    @property
    def codes(self) -> torch.Tensor:  # type: ignore[override]
        return self.__dict__["kept"].clone()

    @codes.setter
    def codes(self, value: torch.Tensor) -> None:
        self.__dict__["kept"] = value


def test_a_weight_whose_parts_are_made_anew_at_each_look_is_refused() -> None:
    model = linears()
    model[2].weight = nn.Parameter(Remade.of(torch.randn(4, 4)), requires_grad=False)
    with pytest.raises(ValueError, match=r"2\.weight is a Remade .*[Dd]equantise"):
        attach_offload_hooks(model, _policy())


def test_4_bit_weights_that_the_cpu_would_pack_anew_are_refused() -> None:
    model, x = bitsandbytes_4bit("nf4"), rows()
    want = run(model, x)
    for module in model:
        module.support_avx512bf16_for_cpu = True
    with pytest.raises(ValueError, match=r"0\.weight: .*_for_cpu = False"):
        attach_offload_hooks(model, _policy())
    for module in model:
        module.support_avx512bf16_for_cpu = False
    assert same_bits(run(detach(attach_offload_hooks(model, _policy())), x), want)

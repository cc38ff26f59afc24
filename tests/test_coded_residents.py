"""Residents that are kept coded: which, how many more fit, and what they compute."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hookoffload as ho
from hookoffload import codable, code_choice, measured_pass
from hookoffload.coded_residents import fastest
from hookoffload.copies import Copy
from hookoffload.copy_engine import StreamCopyEngine
from hookoffload.cost import Rates
from hookoffload.fp8 import why_not_on
from hookoffload.host_copies import HostCopyEngine
from hookoffload.measured_pass import MeasuredPass, PassMeter
from hookoffload.plan import LayerSpec, Plan
from hookoffload.plan_table import plan_record
from hookoffload.planner import make_plan

from .test_lossless_offload import assert_same_bits, policy
from .test_planner import GIB, MIB, blocks, models
from .test_planner import Model as Specs
from .unreadable_ram import have_ram_unreadable

WIDTH = 1024
LAYER_BYTES = 2 * WIDTH * WIDTH
LAYERS = 8


# -- plans ----------------------------------------------------------------------------


@st.composite
def coded_models(draw: st.DrawFn) -> Specs:
    """Models some of whose layers are coded, and pass through the window raw."""
    model = draw(models())
    layers = []
    for spec in model.layers:
        if draw(st.booleans()):
            plain = 4 * spec.stream_bytes // 3
            spec = dataclasses.replace(
                spec,
                cast_bytes=plain,
                resident_bytes=plain,
                resident_cast_bytes=0,
                transit_bytes=spec.stream_bytes,
                decoded_bytes=plain,
                coded_bytes=spec.stream_bytes,
            )
        layers.append(spec)
    return model._replace(layers=layers)


SHARES = st.sampled_from([0.0, 0.3, 0.5, 1.0])


@given(coded_models(), SHARES, st.floats(0, 1.2), st.floats(0, 1.2))
def test_more_memory_keeps_all_residents_and_copies_no_more(
    model: Specs, code_share: float, one: float, other: float
) -> None:
    least = model.plan(0).least_bytes
    small, large = (
        model.plan(least + int(s * model.all_bytes), code_share=code_share)
        for s in sorted((one, other))
    )
    whole = model.plan(None, code_share=code_share)
    assert small.resident <= large.resident <= whole.resident
    assert large.pass_bytes <= small.pass_bytes
    assert not whole.kept_coded


@given(coded_models(), SHARES, st.floats(0, 1.2))
def test_a_plan_with_coded_residents_keeps_its_limit_and_covers_what_is_bound(
    model: Specs, code_share: float, share: float
) -> None:
    least = model.plan(0).least_bytes
    limit = least + int(share * model.all_bytes)
    plan = model.plan(limit, code_share=code_share)
    assert plan.total_bytes <= limit
    if limit - model.activations >= least:
        assert plan.total_bytes + model.activations <= limit
    assert plan.kept_coded <= plan.resident
    decoded = plan.resident - plan.kept_coded
    for index in decoded:
        spec = plan.layers[index]
        room = plan.stack_bytes if spec.held else plan.ring_bytes
        assert spec.transit_bytes <= room
    for index in plan.streamed:
        spec = plan.layers[index]
        assert spec.stream_bytes <= (plan.stack_bytes if spec.held else plan.ring_bytes)
    for chain in model.chains:
        casts = 0
        for index in chain:
            spec = plan.layers[index]
            stays = index in decoded
            casts += spec.resident_cast_bytes if stays else spec.cast_bytes
        assert casts <= plan.scratch_bytes


def coded(name: str, nbytes: int, **more: Any) -> LayerSpec:
    """A layer of so many bytes when it is decoded."""
    fields = {
        "stream_bytes": nbytes * 3 // 4,
        "copy_bytes": nbytes * 3 // 4,
        "transit_bytes": nbytes * 3 // 4,
        "coded_bytes": nbytes * 3 // 4,
        "cast_bytes": nbytes,
        "decoded_bytes": nbytes,
        "resident_bytes": nbytes,
    }
    return LayerSpec(name=name, **{**fields, **more})


def plan_of(
    layers: list[LayerSpec], limit: int | None, code_share: float = 1.0
) -> Plan:
    return make_plan(
        layers,
        order=range(len(layers)),
        chains=[],
        limit_bytes=limit,
        code_share=code_share,
    )


STACK = [coded(f"blocks.{i}", 64 * MIB) for i in range(100)]


def test_a_third_more_layers_stay_where_memory_is_short() -> None:
    for limit in (2 * GIB, 3 * GIB, 4 * GIB):
        kept = plan_of(STACK, limit)
        decoded = plan_of(STACK, limit, code_share=0)
        assert kept.kept_coded == kept.resident and not decoded.kept_coded
        assert len(kept.resident) > 1.25 * len(decoded.resident)
        assert kept.pass_bytes < decoded.pass_bytes
        assert kept.decoded_bytes == 100 * 64 * MIB


def test_a_model_that_fits_decoded_is_kept_decoded() -> None:
    whole = plan_of(STACK, None)
    assert len(whole.resident) == 100 and not whole.kept_coded
    assert plan_of(STACK, whole.total_bytes).kept_coded == frozenset()
    assert plan_of(STACK, whole.total_bytes).decoded_bytes == 0
    tight = plan_of(STACK, whole.total_bytes - MIB)
    assert len(tight.resident) == 100 and 0 < len(tight.kept_coded) < 10


def test_memory_that_is_left_over_decodes_the_small_ones() -> None:
    layers = [coded(f"part{i}", (64 + i) * MIB) for i in range(20)]
    counts = []
    for limit in range(1200 * MIB, 1900 * MIB, 25 * MIB):
        plan = plan_of(layers, limit)
        if plan.pass_bytes:
            assert plan.kept_coded == plan.resident
            continue
        counts.append(len(plan.kept_coded))
        assert plan.kept_coded == frozenset(range(20 - counts[-1], 20))
    assert counts[0] > 15 and counts[-1] == 0
    assert counts == sorted(counts, reverse=True)


def test_small_and_held_layers_and_giants_are_kept_decoded() -> None:
    layers = [
        *(coded(f"norms.{i}", MIB) for i in range(4)),
        coded("outer", 64 * MIB, held=True),
        coded("head", 2 * GIB),
        *STACK,
    ]
    plan = plan_of(layers, 5 * GIB)
    assert {0, 1, 2, 3, 4, 5} <= plan.resident - plan.kept_coded
    assert plan.kept_coded and plan.scratch_bytes == 64 * MIB


def test_a_share_is_spread_over_the_order() -> None:
    plan = plan_of(STACK, 4 * GIB, code_share=0.5)
    assert 0.4 < len(plan.kept_coded) / len(plan.resident) < 0.6
    assert {index % 2 for index in plan.kept_coded} == {0}


def test_the_model_of_cost_says_how_many_are_kept_coded() -> None:
    def best(compute: float, decode: float = 2e12) -> Plan:
        rates = Rates(
            link_bytes_per_second=50e9,
            compute_seconds=compute,
            decode_bytes_per_second=decode,
        )
        return fastest(lambda share: plan_of(STACK, 3 * GIB, share), rates)

    assert best(compute=0.0).code_share == 1
    assert best(compute=0.03).code_share == 1
    # Computing hides the copies, and decoding takes a part of it that counts.
    assert best(compute=0.2, decode=2e11).code_share == 0
    assert 0 < best(compute=0.042, decode=5e11).code_share < 1
    # It does not, where the decoder is fast beside that.
    assert best(compute=1.0).code_share == 1
    # Slower than the link: nothing is gained by decoding.
    assert best(compute=0.0, decode=2e10).code_share == 0
    unknown = Rates(link_bytes_per_second=50e9)
    assert fastest(lambda s: plan_of(STACK, 3 * GIB, s), unknown).code_share == 1


def test_the_curve_of_a_plan_keeps_its_share() -> None:
    for share in (0.0, 0.5, 1.0):
        plan = plan_of(STACK, 3 * GIB, share)
        assert plan.curve([3])[0].resident_bytes == plan.resident_bytes


def test_plans_foresee_coded_residents_from_rates(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Model()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    limit = 8 * LAYER_BYTES
    rates = Rates(
        link_bytes_per_second=1e9,
        compute_seconds=0.0,
        decode_bytes_per_second=1e12,
    )
    slow = dataclasses.replace(rates, compute_seconds=0.1, decode_bytes_per_second=1e9)
    for source in (model, tmp_path / "model.safetensors"):
        unknown, link_bound, compute_bound = (
            ho.offload_plan(source, policy("cuda", limit), rates=given)
            for given in (None, rates, slow)
        )
        assert unknown.kept_coded == link_bound.kept_coded != frozenset()
        assert not compute_bound.kept_coded


def test_plans_say_which_residents_are_coded() -> None:
    plan = plan_of(STACK, 4 * GIB)
    count, nbytes = len(plan.kept_coded), plan.kept_coded_bytes / GIB
    assert f"{count} layers, {count} of them coded, {nbytes:.3f} GiB" in str(plan)
    assert "and decoding, 6.250 GiB a pass" in str(plan)
    record = plan_record(plan)
    assert record["coded_resident_layers"] == count
    assert record["coded_resident_bytes"] == plan.kept_coded_bytes
    assert record["decoded_bytes"] == plan.decoded_bytes
    raw = make_plan(blocks(9), order=range(9), chains=[], limit_bytes=40 * MIB)
    assert "coded" not in str(raw)


# -- sessions -------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(self.norm(x)))
        return x


@pytest.fixture(params=["window", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU as if it could not read host RAM; a GPU."""
    if request.param == "cuda":
        return "cuda"
    have_ram_unreadable(monkeypatch)
    return "cpu"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, WIDTH).to(torch.bfloat16)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return Model().eval()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).cpu()


def plain(model: nn.Module, x: torch.Tensor, device: str) -> torch.Tensor:
    return run(copy.deepcopy(model).to(device), x.to(device))


def detached(model: nn.Module) -> nn.Module:
    untouched = Model().eval()
    untouched.load_state_dict(model.state_dict())
    return untouched


def room_for(device: str, layers: int) -> int:
    """Return a limit with room for what is on the device anyway, and so many layers."""
    if device == "cpu":
        return layers * LAYER_BYTES
    gc.collect()
    plain(Model(), torch.ones(3, WIDTH, dtype=torch.bfloat16), device)  # workspaces
    gc.collect()
    return torch.cuda.memory_allocated() + layers * LAYER_BYTES


@pytest.fixture
def limit(device: str) -> int:
    """Room for about half of the layers, coded; and for activations."""
    return room_for(device, 8)


def kept(model: nn.Module) -> list[str]:
    plan = ho.offload_plan(model)
    return [plan.layers[index].name for index in sorted(plan.kept_coded)]


@pytest.mark.parametrize("layers", [4, 5, 6, 7, 8, 9])
def test_outputs_are_the_same_bits_at_any_limit(
    device: str, model: Model, x: torch.Tensor, layers: int
) -> None:
    expected = plain(model, x, device)
    ho.attach_offload_hooks(model, policy(device, room_for(device, layers), debug=True))
    for _ in range(3):
        assert_same_bits(run(model, x), expected)
    stats = ho.offload_stats(model)
    assert stats.peak_bytes <= stats.limit_bytes
    assert stats.coded_resident_bytes == ho.offload_plan(model).kept_coded_bytes
    if device == "cpu":
        assert bool(kept(model)) == (5 <= layers <= 8)


def test_residents_that_are_coded_spare_copies(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    ho.attach_offload_hooks(model, policy(device, limit))
    for _ in range(2):
        run(model, x)
    plan, before = ho.offload_plan(model), ho.offload_stats(model).bytes_moved
    run(model, x)
    stats = ho.offload_stats(model)
    assert stats.bytes_moved - before == plan.pass_bytes
    assert plan.kept_coded and stats.coded_resident_bytes == plan.kept_coded_bytes
    assert stats.coded_resident_bytes < 0.76 * len(plan.kept_coded) * LAYER_BYTES
    assert "resident so" in str(stats)


class Gated(nn.Linear):
    """Multiplies in 8 bits, and has weights that do not."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        weight = self.weight
        del self.weight  # behind the gate, so that decoding that moves its scales
        self.gate = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x) * (x @ self.gate))


@pytest.mark.parametrize("kept_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layers", [12, 16, 40])
def test_layers_that_multiply_in_8_bits_beside_coded_weights_compute_as_without_codes(
    device: str, x: torch.Tensor, layers: int, kept_dtype: torch.dtype | None
) -> None:
    reason = why_not_on(torch.device(device), torch.float8_e4m3fn, torch.bfloat16)
    if reason is not None:
        pytest.skip(f"8-bit floats are not multiplied here: {reason}")
    torch.manual_seed(1)
    model = nn.Sequential(*(Gated() for _ in range(LAYERS))).to(torch.bfloat16)
    fields: dict[str, Any] = {"debug": True, "compute_dtype": torch.float8_e4m3fn}
    if kept_dtype is not None:
        fields["preparing"] = ho.Placement(dtype=kept_dtype)
    found = {}
    for codec in (None, "lossless"):
        chosen = policy(device, room_for(device, layers), codec=codec, **fields)
        with ho.offloaded(model, chosen):
            outputs = [run(model, x) for _ in range(3)]
            found[codec] = outputs[0]
            for output in outputs[1:]:
                assert_same_bits(output, outputs[0])
            if codec:
                plan = ho.offload_plan(model)
                assert bool(plan.kept_coded) == (kept_dtype is not None and layers < 40)
    assert_same_bits(found["lossless"], found[None])


def test_members_of_coded_residents_rest_at_their_masters(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    ho.attach_offload_hooks(model, policy(device, limit))
    run(model, x)
    names = kept(model)
    assert names
    for name in names:
        weight = model.get_submodule(name).weight
        assert weight.data_ptr() == places[f"{name}.weight"]
        assert weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def test_detach_gives_every_bit_back(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    before = copy.deepcopy(model.state_dict())
    ho.attach_offload_hooks(model, policy(device, limit))
    run(model, x)
    assert kept(model)
    ho.detach(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])


def test_edits_of_coded_residents_are_seen(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    ho.attach_offload_hooks(model, policy(device, limit))
    run(model, x)
    weights = [model.get_submodule(name).weight for name in kept(model)]
    assert len(weights) > 1
    for scale in (1.5, 2.0**40, -1.0):
        with torch.no_grad():
            weights[0].mul_(scale)
            weights[1][17].fill_(float(scale))
        assert_same_bits(run(model, x), plain(detached(model), x, device))
    # Values that need more patches than there is room for, and others behind them.
    for value in (torch.randn(WIDTH, WIDTH) * torch.logspace(-30, 0, WIDTH), 0.5):
        with torch.no_grad():
            weights[0].copy_(torch.as_tensor(value))
        for _ in range(2):
            assert_same_bits(run(model, x), plain(detached(model), x, device))


def test_other_codes_wait_for_forwards_that_read_those_before(
    device: str,
    model: Model,
    x: torch.Tensor,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = StreamCopyEngine if device == "cuda" else HostCopyEngine
    seen: list[str] = []
    fence, start = engine.fence, engine.start

    def fenced(self: Any) -> None:
        seen.append("fence")
        fence(self)

    def started(self: Any, wanted: Copy) -> None:
        seen.append(wanted.name)
        start(self, wanted)

    ho.attach_offload_hooks(model, policy(device, limit))
    for _ in range(2):
        run(model, x)
    name = kept(model)[1]
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(2)
    monkeypatch.setattr(engine, "fence", fenced)
    monkeypatch.setattr(engine, "start", started)
    run(model, x)
    assert seen[seen.index(name) - 1] == "fence"
    assert seen.count("fence") == 1


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_can_be_loaded(
    device: str, model: Model, x: torch.Tensor, limit: int, assign: bool
) -> None:
    other = Model().eval()
    ho.attach_offload_hooks(model, policy(device, limit))
    run(model, x)
    model.load_state_dict(other.state_dict(), assign=assign)
    for _ in range(2):
        assert_same_bits(run(model, x), plain(other, x, device))
    ho.detach(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, other.state_dict()[name])


def test_what_a_forward_writes_to_a_coded_resident_stays(
    device: str, x: torch.Tensor
) -> None:
    class Counts(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x

    class Counting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            with torch.no_grad():
                self.weight.mul_(-0.5)
            return output

    torch.manual_seed(2)
    model = Counts().eval()
    for block in model.blocks:
        block.__class__ = Counting
    expected = copy.deepcopy(model).to(device)
    ho.attach_offload_hooks(model, policy(device, room_for(device, 8)))
    for _ in range(3):
        assert_same_bits(run(model, x), run(expected, x.to(device)))
    assert kept(model) and ho.offload_stats(model).bytes_written_back
    ho.detach(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, expected.state_dict()[name].cpu())


def test_a_limit_that_changes_codes_and_decodes_residents(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    expected = plain(model, x, device)
    ho.attach_offload_hooks(model, policy(device, limit))
    small, large = room_for(device, 6), room_for(device, 16)
    for nbytes in (None, limit, large, small, None, 0, limit):
        ho.set_limit(model, nbytes and nbytes / 2**30)
        for _ in range(2):
            assert_same_bits(run(model, x), expected)
        plan, stats = ho.offload_plan(model), ho.offload_stats(model)
        assert stats.coded_resident_bytes == plan.kept_coded_bytes
        assert bool(plan.kept_coded) == (nbytes in (limit, small))
    ho.offload(model)
    assert ho.offload_stats(model).coded_resident_bytes == 0
    assert_same_bits(run(model, x), expected)


def test_several_models_keep_coded_residents_under_one_limit(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    models = {"one": model, "other": Model().eval()}
    expected = {name: plain(model, x, device) for name, model in models.items()}
    ho.attach_offload_hooks(models, policy(device, limit))
    for _ in range(3):
        for name, member in models.items():
            assert_same_bits(run(member, x), expected[name])
    stats = ho.offload_stats(models)
    assert 0 < stats.coded_resident_bytes <= limit
    assert stats.peak_bytes <= limit
    ho.detach(models)


def test_a_loaded_model_keeps_coded_residents(
    device: str, model: Model, x: torch.Tensor, limit: int, tmp_path: Path
) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = plain(model, x, device)
    loaded = ho.load_model(Model, tmp_path / "model.safetensors", policy(device, limit))
    for _ in range(2):
        assert_same_bits(run(loaded, x), expected)
    assert kept(loaded)
    foreseen = policy("cuda", room_for("cpu", 8))
    assert ho.offload_plan(tmp_path / "model.safetensors", foreseen).kept_coded


def test_an_interrupted_forward_leaves_coded_residents_right(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    expected = plain(model, x, device)
    ho.attach_offload_hooks(model, policy(device, limit))
    run(model, x)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule(kept(model)[1]).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, x)
    handle.remove()
    for _ in range(2):
        assert_same_bits(run(model, x), expected)
    assert ho.offload_stats(model).coded_resident_bytes


def test_the_report_shows_coded_residents(
    device: str, model: Model, x: torch.Tensor, limit: int
) -> None:
    ho.attach_offload_hooks(model, policy(device, limit, record=True))
    for _ in range(2):
        run(model, x)
    figures = {label: number for label, _, number in ho.report(model).figures()}
    plan = ho.offload_plan(model)
    assert figures["residents coded"] == plan.kept_coded_bytes > 0


# -- what a measured pass says --------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Have passes that are measured, the link and the decoder take what this says."""
    said = {"seconds": 1.0, "stalled": 0.0, "copying": 1e-9, "decoding": 1e-9}
    take = PassMeter.take

    def taken(self: PassMeter) -> MeasuredPass | None:
        if take(self) is None:
            return None
        return MeasuredPass(seconds=said["seconds"], stalled_seconds=said["stalled"])

    for module in (codable, measured_pass):
        monkeypatch.setattr(module, "has_link", codable.can_code)
    monkeypatch.setattr(measured_pass, "_STILL_FASTER", 0.0)  # two are enough
    monkeypatch.setattr(PassMeter, "take", taken)
    monkeypatch.setattr(
        code_choice, "_measure", lambda *_: (said["copying"], said["decoding"])
    )
    monkeypatch.setattr(code_choice, "known_decode_seconds", lambda _: None)
    return said


def test_residents_are_decoded_where_decoding_them_takes_longer_than_copies(
    device: str, model: Model, x: torch.Tensor, limit: int, measured: dict[str, float]
) -> None:
    expected, less = plain(model, x, device), room_for(device, 7)
    measured["decoding"] = 0.03 / LAYER_BYTES
    ho.attach_offload_hooks(model, policy(device, limit))
    before = ho.offload_plan(model)
    for _ in range(5):
        assert_same_bits(run(model, x), expected)
    after = ho.offload_plan(model)
    assert not after.kept_coded
    if device == "cpu":  # a GPU's first plan knows nothing of activations
        assert before.kept_coded and after.resident < before.resident
    assert ho.offload_stats(model).coded_resident_bytes == 0
    ho.set_limit(model, less / 2**30)
    assert ho.offload_plan(model).kept_coded


def test_residents_stay_coded_where_the_link_is_the_limit(
    device: str, model: Model, x: torch.Tensor, limit: int, measured: dict[str, float]
) -> None:
    measured.update(copying=0.2 / LAYER_BYTES, stalled=0.7)
    ho.attach_offload_hooks(model, policy(device, limit))
    before = ho.offload_plan(model)
    for _ in range(4):
        run(model, x)
    after = ho.offload_plan(model)
    assert after.kept_coded
    if device == "cpu":
        assert before.kept_coded == after.kept_coded


def test_auto_codes_residents_where_the_link_is_the_limit_beside_codes(
    device: str, model: Model, x: torch.Tensor, limit: int, measured: dict[str, float]
) -> None:
    expected = plain(model, x, device)
    measured.update(copying=0.2 / LAYER_BYTES, stalled=0.9, decoding=1e-12)
    ho.attach_offload_hooks(model, policy(device, limit, codec="auto"))
    for _ in range(8):
        assert_same_bits(run(model, x), expected)
    plan = ho.offload_plan(model)
    assert kept(model) and plan.kept_coded == plan.resident - {LAYERS}
    ho.detach(model)
    ho.attach_offload_hooks(model, policy(device, limit))
    for _ in range(2):
        run(model, x)
    assert ho.offload_plan(model).resident == plan.resident


def test_auto_codes_no_more_than_host_ram_has_room_for(
    device: str,
    model: Model,
    x: torch.Tensor,
    limit: int,
    measured: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = plain(model, x, device)
    measured.update(copying=0.2 / LAYER_BYTES, stalled=0.9, decoding=1e-12)
    spare = iter([2 * LAYER_BYTES])
    monkeypatch.setattr(code_choice, "spare_memory", lambda: next(spare, 0))
    ho.attach_offload_hooks(model, policy(device, limit, codec="auto"))
    for _ in range(8):
        assert_same_bits(run(model, x), expected)
    coded = [spec for spec in ho.offload_plan(model).layers if spec.decoded_bytes]
    assert 0 < sum(spec.copy_bytes for spec in coded) <= 2 * LAYER_BYTES
    assert "host RAM, of which there are 4.000 MiB to spare" in caplog.text


def test_auto_leaves_residents_as_they_are_where_codes_of_the_others_are_enough(
    device: str, model: Model, x: torch.Tensor, limit: int, measured: dict[str, float]
) -> None:
    measured.update(copying=0.25 / LAYER_BYTES, stalled=0.1, decoding=1e-12)
    ho.attach_offload_hooks(model, policy(device, limit, codec="auto"))
    run(model, x)
    raw = ho.offload_plan(model).resident
    for _ in range(6):
        run(model, x)
    plan = ho.offload_plan(model)
    assert raw & plan.resident and any(s.decoded_bytes for s in plan.layers)
    assert not any(plan.layers[i].decoded_bytes for i in raw & plan.resident)

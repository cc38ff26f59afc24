"""codec="auto" codes what the link has too little time for, once that is known."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hookoffload as ho
from hookoffload import codable, measured_pass
from hookoffload.coded_residents import spread
from hookoffload.master import Master
from hookoffload.measured_pass import MeasuredPass, PassMeter

from .test_lossless_offload import (
    LAYER_BYTES,
    Model,
    assert_same_bits,
    plain,
    policy,
    run,
)
from .unreadable_ram import have_ram_unreadable


@pytest.fixture(params=["window", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU as if it could not read host RAM; a GPU."""
    if request.param == "cuda":
        return "cuda"
    have_ram_unreadable(monkeypatch)
    for module in (codable, measured_pass):
        monkeypatch.setattr(module, "has_link", codable.can_code)
    return "cpu"


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return Model().eval()


def measures(
    monkeypatch: pytest.MonkeyPatch, *, stalled: float, share: float = 1.0
) -> list[MeasuredPass]:
    """Have passes that are measured take a second and wait so long of it."""
    taken: list[MeasuredPass] = []
    take = PassMeter.take

    def measured(self: PassMeter) -> MeasuredPass | None:
        if take(self) is None:
            return None
        taken.append(MeasuredPass(seconds=1.0, stalled_seconds=stalled))
        return taken[-1]

    monkeypatch.setattr(measured_pass, "_STILL_FASTER", 0.0)  # two are enough
    monkeypatch.setattr(PassMeter, "take", measured)
    monkeypatch.setattr(MeasuredPass, "share_to_code", lambda *_, **__: share)
    return taken


def coded_layers(model: Model) -> list[str]:
    plan = ho.offload_plan(model)
    return [spec.name for spec in plan.layers if spec.decoded_bytes]


def test_nothing_is_encoded_before_passes_have_waited_for_copies(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = measures(monkeypatch, stalled=0.5)
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 5 * LAYER_BYTES, codec="auto"))
    assert not coded_layers(model)
    for _ in range(6):
        if not taken:
            assert not coded_layers(model)
        assert_same_bits(run(model, ids), expected)
    assert taken
    plan = ho.offload_plan(model)
    streamed = [plan.layers[index] for index in plan.streamed]
    large = [spec.name for spec in streamed if spec.copy_bytes >= LAYER_BYTES // 2]
    assert large and coded_layers(model) == large
    assert ho.offload_stats(model).coded_bytes < 0.78 * len(large) * LAYER_BYTES


def test_a_model_that_computes_longer_than_its_copies_take_stays_as_it_is(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = measures(monkeypatch, stalled=0.01)
    monkeypatch.setattr(Master, "make_code", None)
    ho.attach_offload_hooks(model, policy(device, 4 * LAYER_BYTES, codec="auto"))
    for _ in range(6):
        run(model, ids)
    assert len(taken) == 1 and not coded_layers(model)


def test_half_of_the_layers_are_coded_where_half_are_enough(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures(monkeypatch, stalled=0.5, share=0.5)
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 0, codec="auto"))
    for _ in range(6):
        assert_same_bits(run(model, ids), expected)
    assert coded_layers(model) == ["blocks.0", "blocks.2", "blocks.4"]
    before = {n: p.clone() for n, p in model.state_dict().items()}
    ho.detach(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value.cpu(), before[name].cpu())


def test_a_smaller_limit_is_measured_anew(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("activations take limits as small as that whole")
    taken = measures(monkeypatch, stalled=0.5)
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 5 * LAYER_BYTES, codec="auto"))
    for _ in range(6):
        run(model, ids)
    few, measured = len(coded_layers(model)), len(taken)
    ho.set_limit(model, 2.5 * LAYER_BYTES / 2**30)
    for _ in range(6):
        assert_same_bits(run(model, ids), expected)
    assert len(taken) > measured and few < len(coded_layers(model)) <= 6


def test_ctrl_c_while_layers_are_encoded_leaves_them_as_they_were(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures(monkeypatch, stalled=0.5)
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 0, codec="auto"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Master, "make_code", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(6):
                run(model, ids)
    assert not coded_layers(model)
    for _ in range(4):
        assert_same_bits(run(model, ids), expected)


def test_ctrl_c_while_layers_get_their_codes_leaves_them_as_they_were(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures(monkeypatch, stalled=0.5)
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 0, codec="auto"))
    code_as = Master.code_as
    calls = []

    def interrupted(self: Master, code: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        code_as(self, code)

    with monkeypatch.context() as patch:
        patch.setattr(Master, "code_as", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(6):
                run(model, ids)
    assert not coded_layers(model)
    for _ in range(4):
        assert_same_bits(run(model, ids), expected)


def test_a_limit_without_room_to_decode_into_keeps_the_weights_as_they_are(
    device: str,
    model: Model,
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hookoffload")
    taken = measures(monkeypatch, stalled=0.5)
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 0, codec=None))
    least = ho.offload_plan(model).least_bytes
    ho.detach(model)
    ho.attach_offload_hooks(model, policy(device, least + 4096, codec="auto"))
    for _ in range(6):
        assert_same_bits(run(model, ids), expected)
    assert taken and not coded_layers(model)
    assert "no room to decode into" in caplog.text


def test_what_streams_from_a_file_is_encoded_when_it_is_read(
    device: str, model: Model, ids: torch.Tensor, tmp_path: Path
) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = plain(model, ids, device)
    loaded = ho.load_model(
        Model,
        tmp_path / "model.safetensors",
        policy=policy(device, 5 * LAYER_BYTES, codec="auto"),
    )
    assert 0 < len(coded_layers(loaded)) < 6
    for _ in range(4):
        assert_same_bits(run(loaded, ids), expected)


def test_a_file_is_read_as_it_is_where_there_is_no_room_to_decode_into(
    device: str, model: Model, ids: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    expected = plain(model, ids, device)
    loaded = ho.load_model(Model, path, policy(device, 0, codec=None))
    least = ho.offload_plan(loaded).least_bytes
    ho.detach(loaded)
    tight = policy(device, least + 4096, codec="auto")
    loaded = ho.load_model(Model, path, tight)
    assert not coded_layers(loaded)
    for _ in range(4):
        assert_same_bits(run(loaded, ids), expected)


@pytest.mark.parametrize(
    ("seconds", "stalled", "link", "share"),
    [
        (0.735, 0.56, 0.735, 1.0),  # link-bound: everything
        (1.082, 0.127, 0.735, 0.0),  # waits, though the link has time to spare
        (1.0, 0.01, 1.0, 0.0),  # as good as never waits
        (1.0, 0.05, 1.0, 0.05 / 0.27),
    ],
)
def test_the_share_makes_copies_as_long_as_computing(
    seconds: float, stalled: float, link: float, share: float
) -> None:
    measured = MeasuredPass(seconds=seconds, stalled_seconds=stalled)
    found = measured.share_to_code(link_seconds=link, saved=0.25, decode_seconds=0.02)
    assert found == pytest.approx(share)


def test_layers_are_chosen_evenly() -> None:
    assert spread([1] * 6, 1.0) == [0, 1, 2, 3, 4, 5]
    assert spread([1] * 6, 0.0) == []
    assert spread([], 0.5) == []
    for share in (0.1, 0.25, 0.4, 0.77):
        chosen = spread([1] * 100, share)
        assert len(chosen) == pytest.approx(100 * share, abs=1)
        gaps = [b - a for a, b in pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


def test_weights_in_ram_are_counted_beside_their_codes(model: Model) -> None:
    ho.attach_offload_hooks(model, policy("cpu"))
    stats = ho.offload_stats(model)
    held = sum(p.nbytes for p in model.parameters()) + stats.coded_bytes
    assert stats.host_bytes == pytest.approx(held, rel=0.02)


def test_what_waits_on_disk_by_another_host_limit_is_not_coded(
    device: str, model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, 0, codec="auto"))
    run(model, ids)
    ho.set_limit(model, host_limit_gb=0)
    measures(monkeypatch, stalled=0.9)
    for _ in range(5):
        assert_same_bits(run(model, ids), expected)
    stats = ho.offload_stats(model)
    assert stats.decoded_bytes == 0 and stats.disk_bytes > 5 * LAYER_BYTES


@pytest.mark.parametrize(
    ("seconds", "decides", "by"),
    [
        ([9.0, 1.0, 1.0], 2, 1.0),
        ([9.0, 1.0, 9.0], 2, 1.0),
        ([9.0, 0.5, 0.4, 0.3, 0.31, 9.0], 4, 0.3),
        ([9.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01], 5, 0.1),
    ],
)
def test_passes_with_a_plan_are_measured_until_one_is_no_faster(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], decides: int, by: float
) -> None:
    decided = _decisions(monkeypatch, seconds)
    assert decided == {decides: pytest.approx(by)}


def test_a_busy_machine_does_not_decide_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes are measured again, ever more rarely, and faster ones decide anew."""
    busy, quiet = [1.0] * 10, [0.8] * 30
    decided = _decisions(monkeypatch, [9.0, *busy, *quiet])
    assert decided == {2: pytest.approx(1.0), 16: pytest.approx(0.8)}


def test_passes_that_are_as_fast_as_before_decide_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decided = _decisions(monkeypatch, [9.0, *[1.0, 0.97] * 20])
    assert list(decided) == [2]


def test_only_auto_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = _decisions(monkeypatch, [9.0, 1.0, 1.0, *[0.5] * 20], codec="lossless")
    assert list(decided) == [2]


def _decisions(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], codec: str = "auto"
) -> dict[int, float]:
    """Return which passes with one plan are decided by, and how long those took."""
    monkeypatch.setattr(measured_pass, "has_link", lambda _policy: True)
    memory = SimpleNamespace(device=torch.device("cpu"))
    engine = SimpleNamespace(stall_seconds=lambda: 0.0)
    plans = [SimpleNamespace(resident={n}, kept_coded={n}) for n in range(2)]
    mover: Any = SimpleNamespace(plan=None, memory=memory, engine=engine)
    policy: Any = SimpleNamespace(codec=codec)
    meter = PassMeter(policy, mover)
    clock = [0.0]
    monkeypatch.setattr(measured_pass.time, "perf_counter", lambda: clock[0])
    decided = {}
    for number, taken in enumerate([1.0, *seconds], start=-1):
        mover.plan = plans[number >= 0]
        meter.begin()
        clock[0] += taken
        meter.end(complete=True)
        measured = meter.take()
        if measured is not None:
            decided[number] = measured.seconds
    return decided

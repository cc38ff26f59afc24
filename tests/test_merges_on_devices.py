"""What peft has wrapped rests in host RAM between forwards, and is merged there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import OffloadPolicy, attach_offload_hooks, detach
from hookoffload.edits import Edits
from hookoffload.member import Member

from .interrupts import NthCall
from .samples import GIB, Stack, run, same_bits, seen_inside, weight_bytes

peft = pytest.importorskip("peft")

GPU_TOO = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LIMITS = [0, 0.6, 1.3, None]  # of the weights' size
WIDTH = 32


def _wrapped(model: nn.Module) -> Any:
    torch.manual_seed(1)
    fields = {"target_modules": ["up"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **fields))


def _attached(device: str, limit: float | None) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model = Stack(width=WIDTH, depth=4)
    gib = None if limit is None else limit * weight_bytes(model) / GIB
    policy = OffloadPolicy(store="disk", limit_gb=gib, compute_device=device)
    attach_offload_hooks(model, policy)
    return model, torch.randn(3, WIDTH, device=device)


@pytest.mark.parametrize("device", GPU_TOO)
@pytest.mark.parametrize("limit", LIMITS)
def test_merged_and_unmerged_adapters_compute_as_in_the_plain_model(
    limit: float | None, device: str
) -> None:
    model, x = _attached(device, limit)
    run(model, x)
    wrapped = _wrapped(model)
    for change in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        for _ in range(2):
            run(model, x)
        getattr(wrapped, change)()
        plain = Stack(width=WIDTH, depth=4)
        twin = _wrapped(plain)
        if wrapped.base_model.model.blocks[0].up.merged:
            twin.merge_adapter()  # or its forward would add them; values come now
        twin.load_state_dict(wrapped.state_dict())
        wanted = run(plain.to(device), x)
        for _ in range(2):
            assert same_bits(run(model, x), wanted)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    detach(model)
    assert all(same_bits(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("limit", LIMITS)
def test_wrapped_layers_rest_between_forwards_and_others_need_not(
    limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is on a GPU: a CPU that reads no weight where it rests."""
    monkeypatch.setattr("hookoffload.layer.is_readable", lambda *_: False)
    model, x = _attached("cpu", limit)
    run(model, x)
    wrapped = _wrapped(model)
    for _ in range(3):
        run(model, x)
    up, down = model.blocks[1].up.base_layer, model.blocks[1].down
    lies = seen_inside(up, lambda one: one.weight.data_ptr())
    lay = seen_inside(down, lambda one: one.weight.data_ptr())
    run(model, x)
    assert up.weight.data_ptr() not in lies
    if limit is None:
        assert down.weight.data_ptr() in lay
    base = wrapped.unload()
    for _ in range(3):
        run(base, x)
    lies = seen_inside(base.blocks[1].up, lambda one: one.weight.data_ptr())
    run(base, x)
    if limit in (0, None):
        assert (base.blocks[1].up.weight.data_ptr() in lies) == (limit is None)
    detach(base)


def test_a_copy_of_what_was_wrapped_is_plain() -> None:
    model, x = _attached("cpu", None)
    run(model, x)
    _wrapped(model).merge_and_unload()
    wanted = run(model, x)
    detach(model)
    assert same_bits(run(copy.deepcopy(model), x), wanted)


@pytest.mark.gpu
def test_adapters_made_beside_a_resident_go_home_with_it() -> None:
    model, x = _attached("cuda", None)
    wanted = [run(model, x), run(model, x)][1]
    wrapped = _wrapped(model)
    assert model.blocks[0].up.lora_A["default"].weight.is_cuda
    computed = run(model, x)
    assert not same_bits(computed, wanted)
    detach(model)
    assert {p.device.type for p in wrapped.parameters()} == {"cpu"}
    run(wrapped, x.cpu())


def test_home_is_that_of_the_base_and_not_where_the_adapters_were_made() -> None:
    model, x = _attached("cpu", None)
    _wrapped(model)
    adapter = model.blocks[0].up.lora_A["default"].weight
    init = Member.__init__

    def made_elsewhere(self: Member, managed: Any, low: int) -> None:
        init(self, managed, low)
        if managed.tensor is adapter:
            self.device = torch.device("meta")  # stands for a GPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "__init__", made_elsewhere)
        run(model, x)
    detach(model)
    assert adapter.device.type == "cpu"


def test_an_interrupt_while_merges_are_noticed_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = _attached("cpu", 0)
    wrapped = _wrapped(model)
    for _ in range(2):
        run(model, x)
    wrapped.merge_adapter()
    with monkeypatch.context() as patch:
        patch.setattr(Edits, "note_data_writes", NthCall(Edits.note_data_writes, 0))
        with pytest.raises(KeyboardInterrupt):
            run(model, x)
    noticed: list[int] = []
    note = Edits.note_data_writes
    monkeypatch.setattr(
        Edits,
        "note_data_writes",
        lambda self, found: [noticed.append(len(found)), note(self, found)],
    )
    run(model, x)
    assert noticed == [4]
    detach(model)

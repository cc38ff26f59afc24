"""Weights that are given each other's data (``a.data, b.data = b.data, a.data``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offloaded,
    set_limit,
)
from hookoffload.state_hooks import session_of

from .samples import GIB, run, same_bits, weight_bytes

WIDTH, DEPTH = 16, 5
X = torch.linspace(-2, 2, 3 * WIDTH).view(3, WIDTH)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])


SOME_GB = 0.6 * weight_bytes(layers()) / GIB
POLICIES: dict[str, dict[str, Any]] = {
    "in place": {},
    "least": {"store": "disk", "limit_gb": 0},
    "some stay": {"limit_gb": SOME_GB, "compute_dtype": torch.float64},
    "disk, some stay": {"store": "disk", "limit_gb": SOME_GB},
    "disk, all stay": {"store": "disk"},
    "disk, coded": {"store": "disk", "limit_gb": SOME_GB, "codec": "lossless"},
}


def exchange(model: Any) -> None:
    """Have the first take the last one's place."""
    first, last = model[0].weight, model[-1].weight
    first.data, last.data = last.data, first.data


def rotate(model: Any) -> None:
    """Have each take the place of the one before it."""
    values = [layer.weight.data for layer in model]
    for layer, value in zip(model, [values[-1], *values], strict=False):
        layer.weight.data = value


def halve(model: Any) -> None:
    """Have one be a part of another, which then is given new values."""
    model[-1].weight.data = model[1].weight.data[: WIDTH // 2]
    model[-1].bias.data = model[1].bias.data[: WIDTH // 2]
    model[1].weight.data = torch.full_like(model[1].weight.data, 0.25)
    model[1].bias.data = torch.zeros_like(model[1].bias.data)


EDITS = {"exchange": exchange, "rotate": rotate, "halve": halve}
NEXT: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: None,
    "state dict": lambda model: model.state_dict(),
    "offload": offload,
    "another limit": lambda model: set_limit(model, None),
    "a part": lambda model: run(model[1], X),
}


@pytest.mark.parametrize("then", NEXT.values(), ids=NEXT)
@pytest.mark.parametrize("calls_before", [0, 1, 3])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_weights_that_are_given_each_others_data_have_each_others_values(
    fields: dict[str, Any],
    edit: Callable[[Any], None],
    calls_before: int,
    then: Callable[[Any], Any],
) -> None:
    model, twin = layers(), layers()
    objects = list(model.parameters())
    fields = dict(fields)
    dtype = fields.get("compute_dtype", torch.float32)
    if dtype is torch.float64:
        fields["limit_gb"] *= 2
    x = X.to(dtype)
    attach_offload_hooks(model, OffloadPolicy(compute_device="cpu", **fields))
    for _ in range(calls_before):
        run(model, x)
    edit(model)
    edit(twin)
    if dtype is torch.float32:
        then(model)
    wanted = run(copy.deepcopy(twin).to(dtype), x)
    for _ in range(3):
        assert same_bits(run(model, x), wanted)
    for key, value in twin.state_dict().items():
        assert same_bits(model.state_dict()[key], value), key
    detach(model)
    assert same_bits(run(model, X), run(twin, X))
    assert all(p is q for p, q in zip(model.parameters(), objects, strict=True))


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_a_part_of_a_weight_that_keeps_its_own_data_shares_its_memory(
    fields: dict[str, Any],
) -> None:
    model = layers()
    with offloaded(model, OffloadPolicy(compute_device="cpu", **fields)):
        model[1].weight.data = model[0].weight.data[: WIDTH // 2]
        model[1].bias.data = model[0].bias.data[: WIDTH // 2]
        state = model.state_dict()
        assert state["1.weight"].data_ptr() == state["0.weight"].data_ptr()
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("then", NEXT.values(), ids=NEXT)
@pytest.mark.parametrize("calls_before", [0, 3])
@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_data_that_is_kept_while_a_weight_has_other_data_can_be_given_back(
    fields: dict[str, Any], calls_before: int, then: Callable[[Any], Any]
) -> None:
    # As averages of weights are tried: theirs in, a run, the trained ones back.
    model = layers()
    x = X.to(fields.get("compute_dtype", torch.float32))
    wanted = run(copy.deepcopy(model).to(x.dtype), x)
    values = [p.detach().clone() for p in model.parameters()]
    if x.dtype is torch.float64:
        fields = {**fields, "limit_gb": 2 * fields["limit_gb"]}
        then = NEXT["forward"] if then is NEXT["a part"] else then
    with offloaded(model, OffloadPolicy(compute_device="cpu", **fields)):
        for _ in range(calls_before):
            run(model, x)
        state = model.state_dict()
        kept = [p.data for p in model.parameters()]
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter.data)
        then(model)
        assert not run(model, x).any()
        assert all(map(same_bits, state.values(), values))
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.data = value
        assert same_bits(run(model, x), wanted)
    assert all(map(same_bits, model.parameters(), values))


@pytest.mark.parametrize("of_the_model", [False, True], ids=["outside", "new"])
@pytest.mark.parametrize("then", NEXT.values(), ids=NEXT)
@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_data_can_be_exchanged_with_what_is_not_managed(
    fields: dict[str, Any], then: Callable[[Any], Any], of_the_model: bool
) -> None:
    model, twin = layers(), layers()
    others = [nn.Linear(WIDTH, WIDTH, dtype=torch.float32) for _ in range(2)]
    others[1].load_state_dict(others[0].state_dict())
    attach_offload_hooks(model, OffloadPolicy(compute_device="cpu", **fields))
    for one, other in zip((model, twin), others, strict=True):
        if of_the_model:
            one[1] = other
        weight = one[2].weight
        weight.data, other.weight.data = other.weight.data, weight.data
    if "compute_dtype" not in fields:
        then(model)
        assert same_bits(run(model, X), run(twin, X))
    detach(model)
    assert same_bits(run(model, X), run(twin, X))
    assert same_bits(others[0].weight, others[1].weight)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_a_weight_that_is_given_the_data_of_another_is_tied_to_it(
    fields: dict[str, Any],
) -> None:
    model = layers()
    fields = fields | ({"limit_gb": 0} if fields.get("limit_gb") else {})
    attach_offload_hooks(model, OffloadPolicy(compute_device="cpu", **fields))
    model[1].weight.data = model[3].weight.data
    run(model, X.to(fields.get("compute_dtype", torch.float32)))
    with torch.no_grad():
        model[3].weight.mul_(2)
    detach(model)
    assert model[1].weight.data_ptr() == model[3].weight.data_ptr()
    assert same_bits(model[1].weight, 2 * layers()[3].weight)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_layers_stay_as_they_are_where_nobody_kept_what_a_weight_had(
    fields: dict[str, Any],
) -> None:
    model = layers()
    x = X.to(fields.get("compute_dtype", torch.float32))
    with offloaded(model, OffloadPolicy(compute_device="cpu", **fields)):
        run(model, x)
        session = session_of(model)
        assert session is not None
        before = session.layers
        model[1].weight.data = torch.zeros_like(model[1].weight)
        assert same_bits(run(model[1], x)[0], run(model[1], x)[1])
        assert session.layers is before

"""An attached model goes on living: saved, loaded, edited, switched, never copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_stats,
    offloaded,
    onload,
)
from hookoffload.always import AlwaysResident
from hookoffload.budget import MemoryBudget
from hookoffload.codec import Codec
from hookoffload.device_memory import DeviceMemory
from hookoffload.layer import Layer
from hookoffload.master import Master
from hookoffload.registered import group_tensors
from tests.small_models import (
    TinyModel,
    assert_same,
    chain,
    expected,
    on_disk,
    run,
    tiny_model,
    tokens,
)
from tests.snapshots import Snapshot, assert_untouched, same_bits, tensors_of

# Streamed in full, partly resident, and resident in full.
LIMITS = [0, 0.00008, None]
every_limit = pytest.mark.parametrize("limit_gb", LIMITS)


# Only "ram" moves nothing on a CPU. Bits of float32 survive a cast to float64.
STORES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk"},
    "cast": {"compute_dtype": torch.float64},
    "ram": {},
}
KINDS = [("disk", 0), ("disk", 0.00008), ("disk", None), ("cast", 0), ("ram", None)]
FEW_KINDS = [("disk", 0.00008), ("cast", None), ("ram", 0)]


def _policy(store: str, limit_gb: Any, folder: Path) -> OffloadPolicy:
    where = {"disk_dir": folder} if store == "disk" else {}
    return OffloadPolicy(
        limit_gb=limit_gb, compute_device="cpu", **where, **STORES[store]
    )


class Pair:
    """An attached model and a plain one that must go on behaving alike."""

    def __init__(self, store: str, limit_gb: Any, folder: Path) -> None:
        self.model = tiny_model()
        self.plain = tiny_model()
        self.casts = store == "cast"
        attach_offload_hooks(self.model, _policy(store, limit_gb, folder))

    def assert_alike(self, seed: int = 0) -> None:
        output = run(self.model, tokens(seed))
        plain = self.plain
        if self.casts:
            plain = copy.deepcopy(plain).double()
        assert_same(output, run(plain, tokens(seed)))

    def both(self, change: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
        return change(self.model), change(self.plain)

    def assert_same_tensors(self) -> None:
        theirs = tensors_of(self.plain)
        for name, tensor in tensors_of(self.model).items():
            assert same_bits(tensor, theirs[name]), name


def _pairs(kind: tuple[str, Any], folder: Path) -> Iterator[Pair]:
    """Yield the two models after a pass, and compare them again after detach."""
    both = Pair(*kind, folder)
    both.assert_alike()
    yield both
    if "_apply" in both.model.__dict__:
        detach(both.model)
    both.assert_same_tensors()
    assert_same(run(both.model, tokens()), run(both.plain, tokens()))


def _kind_name(kind: tuple[str, Any]) -> str:
    return f"{kind[0]} {kind[1]}"


@pytest.fixture(params=KINDS, ids=_kind_name)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    yield from _pairs(request.param, tmp_path / "spill")


@pytest.fixture(params=FEW_KINDS, ids=_kind_name)
def any_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Yield a pair of fewer kinds, for what depends less on them."""
    yield from _pairs(request.param, tmp_path / "spill")


# --- state_dict ---


def test_state_dict_has_the_weights_at_any_time(pair: Pair) -> None:
    for _ in range(2):
        state, wanted = pair.model.state_dict(), pair.plain.state_dict()
        assert list(state) == list(wanted)
        assert state._metadata == wanted._metadata
        for name, tensor in wanted.items():
            assert_same(state[name], tensor)
            assert state[name].device.type == "cpu"
        pair.assert_alike(1)


def test_state_dict_does_not_change_with_later_forwards(pair: Pair) -> None:
    state = pair.model.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for seed in range(3):
        pair.assert_alike(seed)
    offload(pair.model)
    for name, tensor in state.items():
        assert_same(tensor, kept[name])


def test_state_dict_of_a_part_has_the_weights(any_pair: Pair) -> None:
    state = any_pair.model.blocks[1].state_dict(prefix="x.")
    wanted = any_pair.plain.blocks[1].state_dict(prefix="x.")
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert_same(state[name], tensor)


def test_state_dict_can_return_the_parameters_themselves(any_pair: Pair) -> None:
    state = any_pair.model.state_dict(keep_vars=True)
    assert state["blocks.0.up.weight"] is any_pair.model.blocks[0].up.weight


@every_limit
def test_state_dict_inside_a_forward_has_the_weights(
    tmp_path: Path, limit_gb: Any
) -> None:
    model, wanted = tiny_model(), tiny_model().state_dict()
    states = []
    model.blocks[1].up.register_forward_pre_hook(
        lambda *_: states.append({k: v.clone() for k, v in model.state_dict().items()})
    )
    output = expected(tiny_model(), tokens())
    with offloaded(model, on_disk(tmp_path, limit_gb=limit_gb)):
        for _ in range(2):
            assert_same(run(model, tokens()), output)
    for state in states:
        for name, tensor in wanted.items():
            assert_same(state[name], tensor)


def test_saved_state_dict_loads_into_a_plain_model(any_pair: Pair) -> None:
    file = io.BytesIO()
    torch.save(any_pair.model.state_dict(), file)
    file.seek(0)
    other = tiny_model(seed=9)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(run(other, tokens()), run(any_pair.plain, tokens()))


# --- load_state_dict ---


def test_loaded_state_dict_is_used_by_the_next_forward(pair: Pair) -> None:
    for seed in (1, 2):
        state = tiny_model(seed).state_dict()
        for model in (pair.model, pair.plain):
            matched = model.load_state_dict(state)
            assert str(matched) == "<All keys matched successfully>"
        pair.assert_alike()
        pair.assert_alike(1)


def test_loading_keeps_the_parameter_objects(any_pair: Pair) -> None:
    before = dict(any_pair.model.named_parameters())
    any_pair.both(lambda model: model.load_state_dict(tiny_model(1).state_dict()))
    for name, parameter in any_pair.model.named_parameters():
        assert parameter is before[name]


def test_parameters_can_be_swapped_with_others_by_loading_and_by_hand(
    any_pair: Pair,
) -> None:
    # What `load_state_dict` does to subclasses of tensors, and to all if told so.
    swapping = torch.__future__.set_swap_module_params_on_conversion
    swapping(True)
    try:
        any_pair.both(lambda model: model.load_state_dict(tiny_model(1).state_dict()))
    finally:
        swapping(False)
    any_pair.assert_alike()

    def swap(model: nn.Module) -> nn.Parameter:
        weight = model.blocks[0].up.weight
        other = nn.Parameter(torch.full_like(weight, 0.25))
        torch.utils.swap_tensors(weight, other)
        return other

    one, other = any_pair.both(swap)
    assert same_bits(one, other)
    any_pair.assert_alike()


def test_loading_a_part_is_used_by_the_next_forward(pair: Pair) -> None:
    state = tiny_model(1).blocks[1].state_dict()
    pair.both(lambda model: model.blocks[1].load_state_dict(state))
    pair.assert_alike()


def test_loading_leniently_tells_what_was_missing_and_what_was_too_much(
    pair: Pair,
) -> None:
    state = dict(tiny_model(1).state_dict())
    del state["blocks.0.up.weight"], state["statistics.running_var"]
    state["blocks.9.gain"] = torch.ones(3)
    one, other = pair.both(lambda model: model.load_state_dict(state, strict=False))
    assert one == other
    assert one.missing_keys == ["blocks.0.up.weight", "statistics.running_var"]
    assert one.unexpected_keys == ["blocks.9.gain"]
    pair.assert_alike()


def _error(action: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        action()
    return str(caught.value)


def test_loading_strictly_refuses_missing_and_unknown_keys_as_torch_does(
    any_pair: Pair,
) -> None:
    state = dict(tiny_model(1).state_dict())
    del state["blocks.0.up.weight"]
    state["nobody"] = torch.ones(1)
    one, other = any_pair.both(
        lambda model: _error(lambda: model.load_state_dict(state))
    )
    assert one == other
    assert "blocks.0.up.weight" in one and "nobody" in one
    any_pair.assert_alike()


def test_loading_wrong_shapes_is_refused_as_torch_does(any_pair: Pair) -> None:
    state = dict(tiny_model(1).state_dict())
    state["blocks.1.down.weight"] = torch.ones(2, 2)
    one, other = any_pair.both(
        lambda model: _error(lambda: model.load_state_dict(state))
    )
    assert one == other
    assert "size mismatch for blocks.1.down.weight" in one
    any_pair.assert_alike()


def test_loading_another_dtype_casts_as_torch_does(any_pair: Pair) -> None:
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in tiny_model(1).state_dict().items()
    }
    any_pair.both(lambda model: model.load_state_dict(state))
    any_pair.assert_alike()


def test_assigned_tensors_are_managed_like_the_first(
    pair: Pair, tmp_path: Path
) -> None:
    def assign(model: nn.Module) -> None:
        state = {k: v.clone() for k, v in tiny_model(1).state_dict().items()}
        state["head.weight"] = state["embed.weight"]
        model.load_state_dict(state, assign=True)

    pair.both(assign)
    assigned = dict(pair.model.named_parameters())
    for seed in range(3):
        pair.assert_alike(seed)
    detach(pair.model)
    for name, parameter in pair.model.named_parameters():
        assert parameter is assigned[name]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_parameter_that_is_replaced_by_hand_is_managed(pair: Pair) -> None:
    def replace(model: nn.Module) -> None:
        torch.manual_seed(5)
        model.blocks[0].gain = nn.Parameter(torch.randn(48))
        model.blocks[1].up.weight = nn.Parameter(torch.randn(96, 48))

    pair.both(replace)
    pair.assert_alike()
    pair.assert_alike(1)


def test_module_that_is_replaced_by_hand_computes(pair: Pair) -> None:
    def replace(model: nn.Module) -> None:
        torch.manual_seed(5)
        model.blocks[1].up = nn.Linear(48, 96)

    pair.both(replace)
    pair.assert_alike()
    pair.assert_alike(1)


# --- modes and parameters ---


@every_limit
def test_modes_are_the_models_own(tmp_path: Path, limit_gb: Any) -> None:
    model, plain = tiny_model(), tiny_model()
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    for seed, mode in enumerate((True, False, True)):
        model.train(mode)
        plain.train(mode)
        assert all(module.training is mode for module in model.modules())
        assert_same(run(model, tokens(seed)), run(plain, tokens(seed)))
    model.blocks[1].eval()
    detach(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert not modes["blocks.1.up"] and modes["blocks.2.up"] and modes[""]
    for name, buffer in plain.named_buffers():
        assert_same(model.get_buffer(name), buffer)


def test_parameters_are_the_same_objects_with_the_same_look(tmp_path: Path) -> None:
    model = tiny_model()
    before = list(model.named_parameters(remove_duplicate=False))
    looks = [(p.shape, p.dtype, p.device, p.requires_grad) for _, p in before]
    for store, limit_gb in KINDS:
        attach_offload_hooks(model, _policy(store, limit_gb, tmp_path))
        for _ in range(3):
            now = list(model.named_parameters(remove_duplicate=False))
            assert [name for name, _ in now] == [name for name, _ in before]
            assert all(p is q for (_, p), (_, q) in zip(now, before, strict=True))
            assert [
                (p.shape, p.dtype, p.device, p.requires_grad) for _, p in now
            ] == looks
            run(model, tokens())
        detach(model)


def test_freezing_while_attached_stays_after_detach(any_pair: Pair) -> None:
    any_pair.both(lambda model: model.blocks.requires_grad_(False))
    any_pair.assert_alike()
    detach(any_pair.model)
    frozen = {n for n, p in any_pair.model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, p in any_pair.plain.named_parameters() if not p.requires_grad
    }
    assert frozen


def test_user_hooks_added_and_removed_meanwhile_stay_the_users(any_pair: Pair) -> None:
    seen: list[torch.Tensor] = []
    layer = any_pair.model.blocks[0].up
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    wanted: list[torch.Tensor] = []
    other = any_pair.plain.blocks[0].up.register_forward_hook(
        lambda m, a, out: wanted.append(out.clone())
    )
    any_pair.assert_alike()
    assert_same(seen[0].float(), wanted[0].float())
    handle.remove()
    other.remove()
    any_pair.assert_alike()
    assert len(seen) == 1


# --- edits at rest ---


def _multiply(parameter: torch.Tensor) -> None:
    parameter.mul_(1.5)


def _copy(parameter: torch.Tensor) -> None:
    parameter.copy_(parameter.flip(0) * 2)


def _set_one(parameter: torch.Tensor) -> None:
    parameter.view(-1)[3] = 7.5


def _data_replaced(parameter: torch.Tensor) -> None:
    parameter.data = parameter.data * 3


def _detached_view(parameter: torch.Tensor) -> None:
    parameter.detach()[0].zero_()


EDITS = [_multiply, _copy, _set_one, _data_replaced, _detached_view]
every_edit = pytest.mark.parametrize(
    "edit", EDITS, ids=[edit.__name__.strip("_") for edit in EDITS]
)


def test_edit_through_data_is_seen_behind_offload(pair: Pair) -> None:
    """``.data`` has a version of its own: PyTorch tells nobody of such an edit."""

    def halve(model: nn.Module) -> None:
        if model is pair.model:
            offload(model)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)

    pair.assert_alike()
    pair.both(halve)
    pair.assert_alike()


@every_edit
def test_edit_of_weights_at_rest_is_used_by_the_next_forward(
    pair: Pair, edit: Callable[[torch.Tensor], None]
) -> None:
    """The pass before has copied the first layers ahead: those copies are stale."""

    @torch.no_grad()
    def edit_all(model: nn.Module) -> None:
        for parameter in model.parameters():
            edit(parameter)

    for seed in range(2):
        pair.both(edit_all)
        pair.assert_alike(seed)


@every_edit
@pytest.mark.parametrize("name", ["position", "blocks.0.norm.weight"])
def test_edit_of_one_weight_is_used_by_the_next_forward(
    any_pair: Pair, edit: Callable[[torch.Tensor], None], name: str
) -> None:
    @torch.no_grad()
    def edit_one(model: nn.Module) -> None:
        edit(model.get_parameter(name))

    any_pair.both(edit_one)
    any_pair.assert_alike()


@every_edit
def test_edit_is_in_the_state_dict_and_survives_detach(
    pair: Pair, edit: Callable[[torch.Tensor], None]
) -> None:
    @torch.no_grad()
    def edit_all(model: nn.Module) -> None:
        for parameter in model.parameters():
            edit(parameter)

    pair.both(edit_all)
    state, wanted = pair.model.state_dict(), pair.plain.state_dict()
    for name, tensor in wanted.items():
        assert_same(state[name], tensor)


def test_edits_of_buffers_are_used_and_kept(pair: Pair) -> None:
    @torch.no_grad()
    def edit(model: Any) -> None:
        model.blocks[0].shift.add_(1)
        model.statistics.running_mean.copy_(torch.linspace(-1, 1, 48))
        model.order.copy_(model.order.flip(0))

    pair.both(edit)
    pair.assert_alike()


def test_edit_through_data_between_a_load_and_the_next_forward_is_kept(
    tmp_path: Path,
) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    policy = OffloadPolicy(
        disk_dir=tmp_path,
        offload=Placement(device="disk"),
        onload=Placement(device="cpu"),
    )
    attach_offload_hooks(model, policy)
    run(model, x)
    model.load_state_dict({"0.bias": torch.ones(4)}, strict=False)
    offload(model)  # behind it, everything is at rest and may be written to
    model[0].weight.data.copy_(torch.eye(4))
    assert_same(run(model, x), x + 1)
    offload(model)
    assert_same(model[0].weight.detach(), torch.eye(4))
    detach(model)
    assert_same(run(model, x), x + 1)


def test_initialisation_by_apply_is_used_by_the_next_forward(pair: Pair) -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.01)

    pair.both(lambda model: model.apply(initialise))
    pair.assert_alike()


def test_edit_between_a_forwards_layers_is_used_by_the_later_layer(
    tmp_path: Path,
) -> None:
    """A hook in an early layer changes a layer that was copied ahead already."""

    def scale_later(model: nn.Module) -> None:
        @torch.no_grad()
        def scale(*_: Any) -> None:
            model.blocks[0].down.weight.mul_(1.5)

        model.blocks[0].up.register_forward_hook(scale)

    model, plain = tiny_model(), tiny_model()
    scale_later(model)
    scale_later(plain)
    with offloaded(model, on_disk(tmp_path, limit_gb=0.00008)):
        for seed in range(3):
            assert_same(run(model, tokens(seed)), run(plain, tokens(seed)))
    assert_same(model.blocks[0].down.weight, plain.blocks[0].down.weight)


# --- copies are refused ---


def _save_whole(model: nn.Module) -> None:
    torch.save(model, io.BytesIO())


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": _save_whole,
    "copy.deepcopy of a part": lambda model: copy.deepcopy(model.blocks[0]),
    "pickle of a part": lambda model: pickle.dumps(model.blocks[0].up),
}


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_an_attached_model_is_refused_naming_detach(
    any_pair: Pair, how: str
) -> None:
    now = Snapshot(any_pair.model)
    with pytest.raises(RuntimeError, match=r"TinyModel.*detach"):
        COPIES[how](any_pair.model)
    assert_untouched(any_pair.model, now)
    any_pair.assert_alike()
    detach(any_pair.model)
    COPIES[how](any_pair.model)


# --- moves are refused ---

MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "to(dtype)": lambda model: model.to(torch.float16),
    "to(device, dtype)": lambda model: model.to("cpu", torch.bfloat16),
    "to(tensor)": lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
    "to(meta)": lambda model: model.to("meta"),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "to_empty(meta)": lambda model: model.to_empty(device="meta"),
    "share_memory": lambda model: model.share_memory(),
}
if torch.cuda.is_available():
    MOVES["cuda"] = lambda model: model.cuda()
    MOVES["to(cuda)"] = lambda model: model.to("cuda")


@pytest.mark.parametrize("how", MOVES)
def test_move_of_an_attached_model_is_refused_naming_detach(
    any_pair: Pair, how: str
) -> None:
    now = Snapshot(any_pair.model)
    with pytest.raises(RuntimeError, match=r"TinyModel .*detach\(model\)"):
        MOVES[how](any_pair.model)
    assert_untouched(any_pair.model, now)
    any_pair.assert_alike()
    detach(any_pair.model)
    any_pair.assert_same_tensors()


def test_move_to_a_device_that_is_not_there_is_refused_naming_detach(
    any_pair: Pair,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    now = Snapshot(any_pair.model)
    with pytest.raises(RuntimeError, match="detach"):
        any_pair.model.cuda()
    assert_untouched(any_pair.model, now)


@pytest.mark.parametrize(
    "change_nothing",
    [
        lambda model: model.to("cpu"),
        lambda model: model.cpu(),
        lambda model: model.float(),
        lambda model: model.to(torch.float32),
        lambda model: model.to(device="cpu", dtype=torch.float32, non_blocking=True),
    ],
    ids=["to(cpu)", "cpu", "float", "to(float32)", "to(both)"],
)
def test_move_that_changes_nothing_is_allowed(
    any_pair: Pair, change_nothing: Callable[[nn.Module], Any]
) -> None:
    now = Snapshot(any_pair.model)
    assert change_nothing(any_pair.model) is any_pair.model
    assert_untouched(any_pair.model, now)
    any_pair.assert_alike()


def test_moving_works_again_after_detach(any_pair: Pair) -> None:
    detach(any_pair.model)
    any_pair.both(lambda model: model.double())
    assert_same(run(any_pair.model, tokens()), run(any_pair.plain, tokens()))
    any_pair.both(lambda model: model.float())


BEHIND_THE_BACK: dict[str, Callable[[Any], Any]] = {
    "linear": lambda model: model.blocks[1].up.to(torch.float16),
    "several": lambda model: [block.up.half() for block in model.blocks],
    "norm": lambda model: model.blocks[0].norm.double(),
    "meta": lambda model: model.blocks[1].down.to("meta"),
}


@pytest.mark.parametrize("limit_gb", LIMITS)
@pytest.mark.parametrize("how", BEHIND_THE_BACK)
def test_part_that_is_moved_behind_the_back_is_noticed_by_the_next_forward(
    tmp_path: Path, how: str, limit_gb: Any
) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    assert_same(run(model, tokens()), wanted)
    BEHIND_THE_BACK[how](model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"blocks\.[01]\..*detach\(model\)"):
            run(model, tokens())
    detach(model)
    assert not list(tmp_path.iterdir())
    if how != "meta":  # a meta parameter is a new object, which the user put there
        assert_untouched(model, before, same_memory=False)
        assert_same(run(model, tokens()), wanted)


@every_limit
def test_part_that_is_moved_and_moved_back_computes_as_before(
    tmp_path: Path, limit_gb: Any
) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    with offloaded(model, on_disk(tmp_path, limit_gb=limit_gb)):
        run(model, tokens())
        model.blocks[1].double().float()
        for _ in range(2):
            assert_same(run(model, tokens()), wanted)
    assert_same(run(model, tokens()), wanted)


# --- parts, and the two states ---


def test_part_that_is_called_alone_computes(pair: Pair) -> None:
    x = torch.randn(2, 3, 48, dtype=torch.float64 if pair.casts else torch.float32)
    plain = copy.deepcopy(pair.plain).double() if pair.casts else pair.plain
    for block, other in zip(pair.model.blocks, plain.blocks, strict=True):
        assert_same(run(block, x), run(other, x))
    pair.assert_alike()


def test_part_that_is_called_before_the_whole_computes(tmp_path: Path) -> None:
    for kind in KINDS:
        both = Pair(*kind, tmp_path)
        x = torch.randn(2, 48, dtype=torch.float64 if both.casts else torch.float32)
        plain = copy.deepcopy(both.plain).double() if both.casts else both.plain
        assert_same(run(both.model.blocks[2].up, x), run(plain.blocks[2].up, x))
        both.assert_alike()
        detach(both.model)


def test_switching_states_by_hand_changes_no_output(pair: Pair) -> None:
    for switch in (offload, onload, onload, offload, offload):
        switch(pair.model)
        pair.assert_alike()
    assert offload_stats(pair.model).forwards == 6


def test_offload_takes_what_was_edited_with_it(pair: Pair) -> None:
    def edit(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)

    for switch in (offload, onload, offload):
        pair.both(edit)
        switch(pair.model)
        pair.assert_alike()


def test_model_from_a_checkpoint_has_the_same_life(tmp_path: Path) -> None:
    plain = tiny_model()
    state = dict(plain.state_dict())
    del state["head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    model = load_model(
        TinyModel, tmp_path / "model.safetensors", on_disk(tmp_path / "spill")
    )
    run(model, tokens())
    for name, tensor in plain.state_dict().items():
        assert_same(model.state_dict()[name], tensor)
    with pytest.raises(RuntimeError, match="detach"):
        model.half()
    with pytest.raises(RuntimeError, match="detach"):
        copy.deepcopy(model)
    for module in (model, plain):
        module.load_state_dict(tiny_model(1).state_dict())
        with torch.no_grad():
            module.blocks[0].gain.mul_(2)
    for _ in range(2):
        assert_same(run(model, tokens()), run(plain, tokens()))
    detach(model)
    assert_same(run(model, tokens()), run(plain, tokens()))
    copy.deepcopy(model)


@pytest.mark.parametrize("limit_gb", [0, None])
def test_state_dict_that_is_written_to_later_changes_the_weights(
    tmp_path: Path, limit_gb: float | None
) -> None:
    """A running average keeps a state dict and writes to it between forwards."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    x = torch.randn(2, 8)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    for _ in range(2):
        assert_same(run(model, x), run(plain, x))
    held, held_plain = model.state_dict(), plain.state_dict()
    for _ in range(3):
        for state in (held, held_plain):
            for tensor in state.values():
                tensor.mul_(0.5)
        assert_same(run(model, x), run(plain, x))
    detach(model)
    assert_same(run(model, x), run(plain, x))


def _chain_and_copy(
    folder: Path, limit_gb: float | None
) -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """Attach eight layers, run them until they have their plan; and a plain copy."""
    model, x = chain(*[32] * 9), torch.randn(2, 32)
    plain = copy.deepcopy(model)
    attach_offload_hooks(model, on_disk(folder, limit_gb=limit_gb))
    for _ in range(3):
        assert_same(run(model, x), run(plain, x))
    return model, plain, x


# All resident without hooks; some resident, with one hook that looks; all streamed.
@pytest.mark.parametrize("limit_gb", [None, 0.000025, 0])
@pytest.mark.parametrize("once", [True, False], ids=["held", "taken anew"])
def test_write_to_a_state_dict_is_seen_by_a_part_that_is_called_alone(
    tmp_path: Path, once: bool, limit_gb: float | None
) -> None:
    model, plain, x = _chain_and_copy(tmp_path, limit_gb)
    held = [each.state_dict() for each in (model, plain)]
    for index in range(8):
        for each, state in zip((model, plain), held, strict=True):
            taken = state if once else each.state_dict()
            taken[f"{index}.weight"].mul_(0.5)
        assert_same(run(model[index], x), run(plain[index], x))
        assert_same(run(model, x), run(plain, x))
    detach(model)
    assert_same(run(model, x), run(plain, x))


@pytest.mark.parametrize("limit_gb", [None, 0.000025, 0])
@pytest.mark.parametrize("passes", [0, 1])
def test_state_dict_that_was_taken_right_after_attach_can_be_written_to_for_ever(
    tmp_path: Path, passes: int, limit_gb: float | None
) -> None:
    """What it holds was at rest then, and is resident by now."""
    model, x = chain(*[32] * 9), torch.randn(2, 32)
    plain = copy.deepcopy(model)
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    for _ in range(passes):
        run(model, x)
    held = [each.state_dict() for each in (model, plain)]
    for _ in range(3):
        assert_same(run(model, x), run(plain, x))
    for index in range(8):
        for state in held:
            state[f"{index}.weight"].mul_(0.5)
        assert_same(run(model[index], x), run(plain[index], x))
        assert_same(run(model, x), run(plain, x))
    for name, tensor in model.state_dict().items():
        assert_same(tensor, plain.state_dict()[name])
    detach(model)
    assert_same(run(model, x), run(plain, x))


@pytest.mark.parametrize("limit_gb", [None, 0.000025])
def test_part_that_is_called_alone_behind_a_load_does_not_compute_at_rest(
    tmp_path: Path, limit_gb: float | None
) -> None:
    """On an accelerator the weights at rest are on another device."""
    model, plain, x = _chain_and_copy(tmp_path, limit_gb)
    # Not the model's own: who has its state dict has it watched.
    state = {name: tensor * 1.5 for name, tensor in plain.state_dict().items()}
    for each in (model, plain):
        each.load_state_dict(state)
    at_rest = [layer.weight.data_ptr() for layer in model]
    read: list[int] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda m, _: read.append(m.weight.data_ptr()))
    for layer, other in zip(model, plain, strict=True):
        assert_same(run(layer, x), run(other, x))
    assert len(read) == 8 and not set(read) & set(at_rest)
    detach(model)


@pytest.mark.parametrize("limit_gb", [None, 0])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.int8, torch.uint8), (torch.bfloat16, torch.float16)],
    ids=["integers", "floats"],
)
def test_data_of_another_dtype_in_the_same_memory_is_noticed(
    tmp_path: Path, dtype: torch.dtype, other: torch.dtype, limit_gb: float | None
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_buffer("table", torch.ones(4, dtype=dtype))
    attach_offload_hooks(model, on_disk(tmp_path, limit_gb=limit_gb))
    run(model, torch.zeros(1, 8))
    model[0].table.data = model[0].table.data.view(other)
    with pytest.raises(RuntimeError, match=f"0.table was moved or cast.* is {other}"):
        run(model, torch.zeros(1, 8))
    detach(model)
    assert model[0].table.dtype == dtype


def test_disk_dir_is_found_again_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.zeros(1, 8)
    wanted = run(model, x)
    attach_offload_hooks(model, on_disk(Path("spill")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same(run(model, x), wanted)
    detach(model)
    assert not list((tmp_path / "spill").iterdir())


def test_buffer_that_is_given_other_data_is_saved_with_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    policy = on_disk(tmp_path, compute_dtype=torch.bfloat16)
    attach_offload_hooks(model, policy)
    model[1].running_mean.data = torch.full((8,), 3.0)
    assert torch.equal(model.state_dict()["1.running_mean"], torch.full((8,), 3.0))
    detach(model)
    assert torch.equal(model[1].running_mean, torch.full((8,), 3.0))


def test_data_given_behind_an_interrupted_forward_keeps_its_strides(
    tmp_path: Path,
) -> None:
    class Interrupted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(8, 8), Interrupted(8, 8))
    model[1].weight.data = torch.randn(8, 8).T
    attach_offload_hooks(model, on_disk(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(model, torch.zeros(1, 8))
    new = torch.randn(8, 8)
    model[1].weight.data = new.clone()
    detach(model)
    assert torch.equal(model[1].weight, new)
    assert model[1].weight.stride() == new.stride()


@pytest.mark.parametrize("limit_gb", [None, 0])
def test_weight_written_to_in_two_ways_at_once_is_told_where_one_is_lost(
    tmp_path: Path, limit_gb: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain, x = _chain_and_copy(tmp_path, limit_gb)
    for each in (model, plain):
        each.state_dict()["3.weight"].mul_(0.5)
        with torch.no_grad():
            each[3].weight.add_(1)
    same = same_bits(run(model, x), run(plain, x))
    told = [text for text in caplog.messages if text.startswith("3.weight was changed")]
    assert same == (limit_gb == 0)  # at rest both have the same memory
    assert len(told) == (not same)
    detach(model)


@pytest.mark.parametrize("when", ["right after attach", "after forwards"])
@pytest.mark.parametrize("action", [offload, detach, nn.Module.state_dict])
@pytest.mark.parametrize("limit_gb", [None, 0])
def test_write_to_a_state_dict_is_kept_whatever_comes_next(
    tmp_path: Path,
    limit_gb: float | None,
    action: Callable[[nn.Module], Any],
    when: str,
) -> None:
    """Masters that went from disk to RAM are not dropped with what was written."""
    plain, x = chain(*[32] * 5), torch.randn(2, 32)
    path = tmp_path / "model.safetensors"
    save_file(plain.state_dict(), path)
    policy = OffloadPolicy(
        offload=Placement(device="disk"),
        onload=Placement(device="cpu"),
        disk_dir=tmp_path,
        compute_device="cpu",
        compute_dtype=torch.float64,
        limit_gb=limit_gb,
    )
    model = load_model(lambda: chain(*[32] * 5), path, policy)
    if when == "after forwards":
        for _ in range(3):
            run(model, x.double())
    for state in (model.state_dict(), plain.state_dict()):
        for name in ("0.weight", "3.bias"):
            state[name].mul_(0.5)
    action(model)
    if action is not detach:
        run(model, x.double())
        detach(model)
    for name, tensor in plain.state_dict().items():
        assert_same(model.state_dict()[name], tensor)


def test_write_to_a_buffer_at_rest_reaches_the_copy_that_forwards_use() -> None:
    model = nn.BatchNorm1d(4)
    _, groups = group_tensors(model)
    mean = next(group for group in groups if group.name == "running_mean")
    master = Master(mean, Codec(torch.float32, torch.float32, torch.float32))
    layer = Layer(-1, "buffers", [master])
    # As on an accelerator, which cannot read it where it rests.
    master.on_disk = True
    layer.measure(torch.device("cpu"), may_stay=True)
    memory = DeviceMemory(torch.device("cpu"), MemoryBudget(None))
    always = AlwaysResident(layer, Layer(-2, "cast buffers", ()), memory)
    always.onload()
    assert model.running_mean.data_ptr() != master.flat.data_ptr()
    master.flat.fill_(3)
    master.note_change()
    always.renew(master)
    assert_same(model.running_mean, torch.full((4,), 3.0))
    always.release()
    assert_same(model.running_mean, torch.full((4,), 3.0))


class _Replaces(nn.Module):
    """Replaces a child in its first forward, as BigBird does; it has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(8))
        self.child: nn.Module = nn.Linear(8, 8)
        self.calls = 0
        self.lay: list[tuple[str, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            self.child = nn.Sequential(self.child)
        self.lay.append((self.places.device.type, self.places.data_ptr()))
        return self.child(x) + self.places


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="as if RAM were another device"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("edit", ["a child is replaced", "assign=True"])
def test_buffers_are_on_the_compute_device_behind_an_edit(
    device: str, edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hookoffload.layer.is_readable", lambda *_: False)
    model = _Replaces()
    x = torch.randn(2, 8, device=device)
    wanted = run(copy.deepcopy(model).to(device), x)
    model.calls = 0 if edit == "a child is replaced" else 1
    rests = model.places.data_ptr()
    with offloaded(model, limit_gb=0, compute_device=device):
        for _ in range(4):
            if edit == "assign=True":
                state = {k: v.clone() for k, v in model.state_dict().items()}
                model.load_state_dict(state, assign=True)
                rests = state["places"].data_ptr()
            assert_same(run(model, x), wanted)
            assert model.lay[-1][0] == device and model.lay[-1][1] != rests

"""peft merges into weights of a model that runs, without `offload` before.

It writes ``weight.data += delta`` between two forwards, which PyTorch counts nowhere,
while some weights are resident, some are copied ahead and some wait in files. Each test
does the same to a plain model and to an attached one.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules import module as torch_module

from hookoffload import (
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_stats,
    save_model,
    set_limit,
)

from .samples import GIB, Stack, run, weight_bytes

peft = pytest.importorskip("peft")

WIDTH, DEPTH = 32, 4
X = torch.linspace(-2, 2, 3 * WIDTH).view(3, WIDTH)
SIZE_GB = weight_bytes(Stack(width=WIDTH, depth=DEPTH)) / GIB
WIDE = torch.float64

POLICIES: dict[str, dict[str, Any]] = {
    "cast, least": {"compute_dtype": WIDE, "limit_gb": 0},
    "cast, some stay": {"compute_dtype": WIDE, "limit_gb": 1.2 * SIZE_GB},
    "cast, all stay": {"compute_dtype": WIDE},
    "disk, least": {"store": "disk", "limit_gb": 0},
    "disk, some stay": {"store": "disk", "limit_gb": 0.6 * SIZE_GB},
    "disk, all stay": {"store": "disk"},
    "disk, some stay, coded": {
        "store": "disk",
        "codec": "lossless",
        "limit_gb": 0.6 * SIZE_GB,
    },
    "disk, some in RAM, some stay": {
        "store": "disk",
        "host_limit_gb": 0.4 * SIZE_GB,
        "limit_gb": 0.4 * SIZE_GB,
    },
    "disk to RAM, some stay": {
        "offload": Placement(device="disk"),
        "onload": Placement(device="cpu"),
        "limit_gb": 0.6 * SIZE_GB,
    },
}


def stack() -> Stack:
    return Stack(width=WIDTH, depth=DEPTH)


class Side:
    """One model, plain or attached, and what was seen of it.

    Args:
        fields: of the policy; None leaves the model plain.
        dtype: what the model computes in.
        folder: where the attached model is loaded from; None: it is made in RAM.
    """

    def __init__(
        self, fields: dict[str, Any] | None, dtype: torch.dtype, folder: Path | None
    ) -> None:
        torch.manual_seed(1)
        self.model: Any = stack()
        self.plain = fields is None
        self.dtype = dtype
        self.seen: list[torch.Tensor] = []
        if fields is None:
            self.model.to(dtype)
        elif folder is None:
            attach_offload_hooks(self.model, policy(fields))
        else:
            path = folder / "model.safetensors"
            save_file(self.model.state_dict(), path)
            self.model = load_model(stack, path, policy=policy(fields))
        torch.manual_seed(2)

    def call(self, times: int = 1) -> None:
        """Run the model, and keep what it returns."""
        for _ in range(times):
            self.seen.append(run(self.model, X.to(self.dtype)))

    def look(self) -> None:
        """Keep what the weights are."""
        self.keep(self.model.state_dict())

    def keep(self, state: dict[str, torch.Tensor]) -> None:
        self.seen += [state[key].clone() for key in sorted(state)]

    def wrap(self, **fields: Any) -> Any:
        """Give the model adapters."""
        fields = {"target_modules": ["up", "down"], **fields}
        fields = {"init_lora_weights": False, **fields}
        config = peft.LoraConfig(r=4, lora_alpha=8, **fields)
        return peft.get_peft_model(self.model, config)

    def detach(self) -> None:
        """Detach it; what the weights are then is kept."""
        if not self.plain:
            detach(self.model)
        self.look()


def policy(fields: dict[str, Any]) -> OffloadPolicy:
    return OffloadPolicy(compute_device="cpu", **fields)


def same(
    story: Callable[[Side], None], fields: dict[str, Any], folder: Path | None = None
) -> None:
    """Let a story happen to a plain model and to an attached one."""
    dtype = fields.get("compute_dtype", torch.float32)
    plain = Side(None, dtype, None)
    story(plain)
    attached = Side(fields, dtype, folder)
    story(attached)
    for want, got in zip(plain.seen, attached.seen, strict=True):
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-5, atol=1e-5 * want.abs().max().item()
        )


@pytest.fixture(params=POLICIES.values(), ids=POLICIES)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(params=[False, True], ids=["attached", "loaded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param else None


@pytest.mark.parametrize("calls_before", [0, 1, 3])
@pytest.mark.parametrize("calls_between", [0, 2])
def test_a_merge_is_used_and_saved_and_survives_detach(
    fields: dict[str, Any], folder: Path | None, calls_before: int, calls_between: int
) -> None:
    def story(side: Side) -> None:
        side.call(calls_before)
        wrapped = side.wrap()
        side.call(calls_between)
        wrapped.merge_adapter()
        side.call(2)
        side.look()
        wrapped.unmerge_adapter()
        side.call(2)
        wrapped.merge_adapter()
        side.detach()

    same(story, fields, folder)


def test_another_scale_of_the_same_adapter_is_used(fields: dict[str, Any]) -> None:
    def story(side: Side) -> None:
        wrapped = side.wrap()
        wrapped.merge_adapter()
        side.call(3)
        wrapped.unmerge_adapter()
        for module in side.model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)
        wrapped.merge_adapter()
        side.call(2)
        side.look()
        side.detach()

    same(story, fields)


@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_adapters_may_come_merge_and_go_between_two_forwards(
    fields: dict[str, Any], folder: Path | None, calls_before: int
) -> None:
    def story(side: Side) -> None:
        side.call(calls_before)
        for _ in range(2):
            side.wrap().merge_and_unload()
        side.call(2)
        side.look()
        side.wrap().merge_and_unload()
        side.detach()

    same(story, fields, folder)


def test_merged_adapters_that_are_disabled_are_unmerged_before_the_forward(
    fields: dict[str, Any], folder: Path | None
) -> None:
    def story(side: Side) -> None:
        wrapped = side.wrap()
        wrapped.merge_adapter()
        side.call(3)
        with wrapped.disable_adapter():
            side.call(2)
        side.call(2)
        side.look()
        wrapped.merge_adapter()
        with wrapped.disable_adapter(), torch.inference_mode():
            side.call()
        side.detach()

    same(story, fields, folder)


def test_adapters_that_change_the_weights_when_made_are_seen(
    fields: dict[str, Any],
) -> None:
    if "compute_dtype" in fields:
        pytest.skip("peft initialises no float64 so")

    def story(side: Side) -> None:
        side.call(3)
        side.wrap(init_lora_weights="olora")
        side.call(2)
        side.look()
        side.detach()

    same(story, fields)


@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_hot_swapped_adapters_are_used(
    fields: dict[str, Any], folder: Path | None, calls_before: int
) -> None:
    """peft copies them into the old ones' data."""
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    def swap(adapted: Any) -> None:
        model = adapted.base_model.model
        state = {
            name: torch.randn(parameter.shape).to(parameter.dtype)
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        config = adapted.peft_config["default"]
        hotswap_adapter_from_state_dict(model, state, "default", config)

    def story(side: Side) -> None:
        adapted = side.wrap()
        side.call(calls_before)
        for _ in range(2):
            swap(adapted)
            side.call(2)
        swap(adapted)
        side.look()
        side.call()
        swap(adapted)
        adapted.merge_adapter()
        side.call()
        adapted.unload()
        side.detach()

    same(story, fields, folder)


MOVES: dict[str, Callable[[Any], Any]] = {
    "offload": offload,
    "no limit": lambda model: set_limit(model, None),
    "limit of 0": lambda model: set_limit(model, 0),
    "a part": lambda model: run(model.blocks[0], X),
    "interrupt": lambda model: interrupt(model),
}


def interrupt(model: nn.Module) -> None:
    """Have a forward fail in the middle, as by Ctrl-C."""

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[2].register_forward_pre_hook(fail)  # type: ignore[index,operator]
    with suppress(KeyboardInterrupt):
        run(model, X)
    handle.remove()


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_merge_is_kept_whatever_comes_next(
    folder: Path | None, move: Callable[[Any], Any]
) -> None:
    def story(side: Side) -> None:
        wrapped = side.wrap()
        side.call(3)
        wrapped.merge_adapter()
        if not side.plain:
            move(side.model)
        side.call(2)
        side.look()
        if not side.plain and move is MOVES["interrupt"]:
            move(side.model)
        wrapped.unmerge_adapter()
        side.call(2)
        side.detach()

    same(story, POLICIES["disk, some stay"], folder)


def test_a_merge_into_residents_is_saved(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def story(side: Side) -> None:
        wrapped = side.wrap()
        side.call(3)
        wrapped.merge_adapter()
        if side.plain:
            return side.look()
        save_model(side.model, tmp_path / "saved")
        return side.keep(load_file(tmp_path / "saved" / "model.safetensors"))

    same(story, fields)


def test_only_what_was_merged_leaves_the_file(tmp_path: Path) -> None:
    """The others are read from the checkpoint as before, and take no RAM."""
    side = Side(POLICIES["disk, least"], torch.float32, tmp_path)
    side.call(2)
    before = offload_stats(side.model)
    wrapped = side.wrap(target_modules=["0.up"])
    side.call(1)
    wrapped.merge_adapter()
    side.call(2)
    wrapped.unload()
    side.call(1)
    merged = side.model.blocks[0].up.weight.nbytes
    after = offload_stats(side.model)
    left = before.disk_bytes - after.disk_bytes
    assert merged <= left < 2 * merged  # with what lies on the same pages
    side.detach()


class Tokens(nn.Module):
    """An embedding, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(self.embed(ids))
        return out


@pytest.mark.parametrize("limit_gb", [0, None])
def test_what_a_wrapper_reads_of_a_weight_joins_it_by_its_new_name(
    limit_gb: float | None,
) -> None:
    """peft's layer for single tokens reads the table of the embedding inside it."""
    model = Tokens()
    attach_offload_hooks(model, policy({"compute_dtype": WIDE, "limit_gb": limit_gb}))
    ids = torch.arange(8)
    run(model, ids)
    config = peft.LoraConfig(
        target_modules=["up"],
        trainable_token_indices={"embed": [1, 3]},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    outputs = [run(model, ids) for _ in range(4)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    wrapped.merge_adapter()
    torch.testing.assert_close(run(model, ids).float(), outputs[0].float())
    detach(model)


def test_diffusers_fuses_and_unfuses() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    model = diffusers.UNet2DConditionModel(**sizes).eval()
    twin = diffusers.UNet2DConditionModel(**sizes).eval()
    twin.load_state_dict(model.state_dict())
    limit_gb = 0.6 * weight_bytes(model) / GIB
    attach_offload_hooks(model, policy({"store": "disk", "limit_gb": limit_gb}))
    x = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 2, 8)
    for _ in range(3):
        run(model, *x)
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False
    )
    outputs: list[list[torch.Tensor]] = [[], []]
    for one, seen in zip((twin, model), outputs, strict=True):
        torch.manual_seed(1)
        one.add_adapter(config)
        one.fuse_lora(lora_scale=0.5)
        seen += [run(one, *x).sample for _ in range(2)]
        one.unfuse_lora()
        seen += [run(one, *x).sample for _ in range(2)]
        one.fuse_lora()
        one.unload_lora()
        seen += [run(one, *x).sample for _ in range(2)]
    detach(model)
    outputs[0].append(run(twin, *x).sample)
    outputs[1].append(run(model, *x).sample)
    for want, got in zip(*outputs, strict=True):
        torch.testing.assert_close(got, want)
    assert not torch.allclose(outputs[0][0], outputs[0][2])


def test_who_listens_for_adapters_keeps_no_model_and_goes_with_the_last() -> None:
    gc.collect()
    hooks = torch_module._global_module_registration_hooks
    others = len(hooks)
    dropped = weakref.ref(attach_offload_hooks(stack(), policy({})))
    model = attach_offload_hooks(stack(), policy({}))
    gc.collect()
    assert dropped() is None
    assert len(hooks) <= others + 1
    detach(model)
    assert len(hooks) == 0

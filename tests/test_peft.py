"""peft works on attached models: its layers come and go, its merges reach the masters.

Each test does the same to a plain model and to one that is attached, and compares all
outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    OffloadPolicy,
    add_lora,
    attach_offload_hooks,
    clear_lora,
    detach,
    offload,
)

from .samples import Picture, Stack, run

peft = pytest.importorskip("peft")

WIDTH = 16
X = torch.linspace(-2, 2, 3 * WIDTH).view(3, WIDTH)

POLICIES: dict[str, dict[str, Any]] = {
    "in place": {},
    "disk, least": {"store": "disk", "limit_gb": 0},
    "disk, poisoned": {"store": "disk", "limit_gb": 0, "debug": True},
    "disk, all stay": {"store": "disk"},
    "cast to float64": {"compute_dtype": torch.float64, "limit_gb": 0},
}


class Run:
    """One model, plain or attached, and what it has returned.

    Args:
        fields: of the policy; None leaves the model plain.
        dtype: in which the model is run.
    """

    def __init__(self, fields: dict[str, Any] | None, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        self.model: Any = Stack(width=WIDTH, depth=2)
        self._fields = fields
        self._compute_dtype = dtype
        self._dtype = torch.float32 if fields is not None else dtype
        self.model.to(self._dtype)
        torch.manual_seed(2)
        self.outputs: list[torch.Tensor] = []

    def attach(self) -> None:
        """Attach the model, or the peft model that it has become."""
        if self._fields is not None:
            policy = OffloadPolicy(compute_device="cpu", **self._fields)
            attach_offload_hooks(self.model, policy)
            self._dtype = self._compute_dtype

    def detach(self) -> None:
        """Detach it."""
        if self._fields is not None:
            detach(self.model)
            self._dtype = torch.float32

    def rest(self) -> None:
        """Have it rest, as edits by ``.data`` ask for."""
        if self._fields is not None:
            offload(self.model)

    def call(self) -> None:
        """Call it twice: under the probe, and again."""
        for _ in range(2):
            self.outputs.append(run(self.model, X.to(self._dtype)))

    @property
    def layers(self) -> list[Any]:
        """peft's layers."""
        return [m for m in self.model.modules() if isinstance(m, _tuner_layer())]


def _tuner_layer() -> type[Any]:
    from peft.tuners.lora import LoraLayer

    return LoraLayer  # type: ignore[no-any-return]


def config() -> Any:
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False
    )


def same(story: Callable[[Run], None], fields: dict[str, Any]) -> None:
    """Let a story happen to a plain and to an attached model."""
    dtype = fields.get("compute_dtype", torch.float32)
    plain = Run(None, dtype)
    story(plain)
    attached = Run(fields, dtype)  # only now: the adapters are random
    story(attached)
    for want, got in zip(plain.outputs, attached.outputs, strict=True):
        # Not by the bit: a cast policy keeps and merges weights in another dtype.
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-5, atol=1e-5 * want.abs().max().item()
        )
    different = [
        not torch.allclose(one, other)
        for one, other in zip(plain.outputs[:-1], plain.outputs[1:], strict=True)
    ]
    assert any(different), "the story changes nothing, so it shows nothing"


@pytest.fixture(params=POLICIES.values(), ids=POLICIES)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


class TestBeforeAttach:
    def test_wrapped_models_are_attached_as_they_are(
        self, fields: dict[str, Any]
    ) -> None:
        def story(one: Run) -> None:
            one.call()
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_adapters_are_switched_and_switched_off(
        self, fields: dict[str, Any]
    ) -> None:
        def story(one: Run) -> None:
            one.model = peft.get_peft_model(one.model, config())
            one.model.add_adapter("other", config())
            one.attach()
            one.call()
            one.model.set_adapter("other")
            one.call()
            one.model.base_model.set_adapter(["default", "other"])
            one.call()
            with one.model.disable_adapter():
                one.call()
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_adapters_are_scaled(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            one.call()
            for layer in one.layers:
                layer.scale_layer(0.5)
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_adapters_are_loaded(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.model = peft.get_peft_model(one.model, config())
            state = {
                key: tensor.clone() * 2
                for key, tensor in peft.get_peft_model_state_dict(one.model).items()
            }
            one.attach()
            one.call()
            peft.set_peft_model_state_dict(one.model, state)
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_adapters_are_added_and_deleted(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            one.call()
            one.model.add_adapter("other", config())
            one.model.set_adapter("other")
            one.call()
            one.model.delete_adapter("default")
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_adapters_are_combined(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.model = peft.get_peft_model(one.model, config())
            one.model.add_adapter("other", config())
            one.attach()
            one.call()
            one.model.add_weighted_adapter(
                ["default", "other"], [0.5, 0.25], "both", combination_type="linear"
            )
            one.model.set_adapter("both")
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_merged_models_are_unmerged_while_attached(
        self, fields: dict[str, Any]
    ) -> None:
        def story(one: Run) -> None:
            one.call()
            one.model = peft.get_peft_model(one.model, config())
            one.model.merge_adapter()
            one.attach()
            one.call()
            one.rest()
            one.model.unmerge_adapter()
            one.call()
            one.detach()
            one.call()

        same(story, fields)


class TestMergingAtRest:
    """peft merges by ``weight.data += delta``, which no version counter notices."""

    @pytest.mark.parametrize("calls_before", [False, True])
    def test_writes_the_masters(
        self, fields: dict[str, Any], calls_before: bool
    ) -> None:
        def story(one: Run) -> None:
            one.call()
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            if calls_before:
                one.call()
                one.rest()
            one.model.merge_adapter()
            one.call()
            one.detach()
            one.call()
            for layer in one.layers:
                assert layer.merged
                layer.merged_adapters.clear()
                layer.enable_adapters(False)
            one.call()  # what is in the weights alone

        same(story, fields)

    def test_is_undone_by_unmerging(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.call()
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            one.call()
            one.rest()
            one.model.merge_adapter()
            one.call()
            one.rest()
            one.model.unmerge_adapter()
            with one.model.disable_adapter():
                one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_and_unloading_leaves_plain_layers(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.call()
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            one.call()
            one.rest()
            one.model.merge_and_unload()
            assert not one.layers
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_of_weights_that_are_read_in_place_needs_no_rest(self) -> None:
        def story(one: Run) -> None:
            one.model = peft.get_peft_model(one.model, config())
            one.attach()
            one.call()
            one.model.merge_adapter()
            one.call()
            one.model.unmerge_adapter()
            with one.model.disable_adapter():
                one.call()
            one.detach()
            one.call()

        same(story, {})


class TestAfterAttach:
    @pytest.mark.parametrize("calls_before", [False, True])
    def test_injected_layers_are_taken_in(
        self, fields: dict[str, Any], calls_before: bool
    ) -> None:
        def story(one: Run) -> None:
            one.call()
            one.attach()
            if calls_before:
                one.call()
            peft.inject_adapter_in_model(config(), one.model, "first")
            one.call()
            peft.inject_adapter_in_model(config(), one.model, "second")
            one.call()
            for layer in one.layers:
                layer.set_adapter("second")
            one.call()
            for layer in one.layers:
                layer.delete_adapter("first")
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_a_model_wrapped_around_an_attached_one_runs(
        self, fields: dict[str, Any]
    ) -> None:
        def story(one: Run) -> None:
            one.call()
            one.attach()
            one.call()
            inner, one.model = one.model, peft.get_peft_model(one.model, config())
            one.call()
            one.model = inner
            one.detach()
            one.call()

        same(story, fields)

    def test_layers_are_taken_out_again(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.attach()
            one.call()
            peft.inject_adapter_in_model(config(), one.model)
            one.call()
            for block in one.model.blocks:
                block.up, block.down = block.up.base_layer, block.down.base_layer
            one.call()
            one.detach()
            one.call()

        same(story, fields)

    def test_injected_layers_merge_at_rest(self, fields: dict[str, Any]) -> None:
        def story(one: Run) -> None:
            one.attach()
            one.call()
            peft.inject_adapter_in_model(config(), one.model)
            one.call()
            one.rest()
            for layer in one.layers:
                layer.merge()
            one.call()
            one.rest()
            for layer in one.layers:
                layer.unmerge()
            one.call()
            one.detach()
            one.call()

        same(story, fields)


def test_added_loras_equal_those_of_peft_and_both_run_together(
    fields: dict[str, Any],
) -> None:
    model = Stack(width=WIDTH, depth=2)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config())
    state = {
        key: tensor.clone()
        for key, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    dtype = fields.get("compute_dtype", torch.float32)
    want = run(copy.deepcopy(wrapped).to(dtype), X.to(dtype))
    plain = run(copy.deepcopy(model).to(dtype), X.to(dtype))
    before = Picture(model)
    policy = OffloadPolicy(compute_device="cpu", **fields)
    attach_offload_hooks(model, policy)
    add_lora(model, state, scale=8 / 4)
    torch.testing.assert_close(run(model, X.to(dtype)), want, rtol=1e-5, atol=1e-5)
    clear_lora(model)
    torch.testing.assert_close(run(model, X.to(dtype)), plain, rtol=0, atol=0)
    detach(model)
    assert before.differences(model) == []


def test_an_added_lora_stays_on_a_layer_that_peft_wraps() -> None:
    model = Stack(width=WIDTH, depth=2)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config())
    state = {
        key: tensor.clone()
        for key, tensor in peft.get_peft_model_state_dict(wrapped).items()
    }
    policy = OffloadPolicy(compute_device="cpu", store="disk", limit_gb=0)
    attach_offload_hooks(model, policy)
    add_lora(model, state, scale=8 / 4)
    once = run(model, X)
    peft.inject_adapter_in_model(config(), model)
    for layer in model.modules():
        if isinstance(layer, _tuner_layer()):
            layer.enable_adapters(False)
    torch.testing.assert_close(run(model, X), once)
    for layer in model.modules():
        if isinstance(layer, _tuner_layer()):
            layer.enable_adapters(True)
    assert not torch.allclose(run(model, X), once)
    detach(model)
    assert all(isinstance(b.up.base_layer, nn.Linear) for b in model.blocks)
    assert not any(b.up.base_layer._forward_hooks for b in model.blocks)


class Attends(nn.Module):
    """An attention, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.up(self.attention(x, x, x)[0])
        return out


def test_adapters_that_replace_weights_in_each_forward_are_refused_by_name() -> None:
    """Those of peft for the fused attention: what a forward computes with is new."""
    adapted = peft.LoraConfig(target_modules=["attention"])
    model = Attends()
    wanted = run(model, X)
    wrapped = peft.get_peft_model(model, adapted)
    with pytest.raises(RuntimeError, match=r"model\.attention is peft's.*Merge and un"):
        attach_offload_hooks(wrapped)
    model = wrapped.unload()
    policy = OffloadPolicy(compute_device="cpu", store="disk", limit_gb=0)
    attach_offload_hooks(model, policy)
    torch.testing.assert_close(run(model, X), wanted)
    wrapped = peft.get_peft_model(model, adapted)
    with pytest.raises(RuntimeError, match="attention is peft's"):
        run(model, X)
    wrapped.unload()
    torch.testing.assert_close(run(model, X), wanted)
    detach(model)
    torch.testing.assert_close(run(model, X), wanted)

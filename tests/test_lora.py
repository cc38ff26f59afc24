"""LoRAs are added to attached models by hooks, and taken off without a trace."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    BudgetExceededError,
    add_lora,
    clear_lora,
    offload,
    offload_plan,
    offload_stats,
    set_limit,
)
from hookoffload import offloaded as offloaded_anywhere

from .samples import (
    GIB,
    STREAMING,
    Picture,
    Stack,
    hooks_of,
    least_limit_gb,
    linears,
    run,
    same_bits,
)

# Besides those that stream: everything in place, and everything resident.
POLICIES = {
    **STREAMING,
    "in place": {},
    "from disk, as it was": {"store": "disk", "limit_gb": 1},
}

# What is compared here are sums in float64, which a GPU's kernels round differently.
offloaded = partial(offloaded_anywhere, compute_device="cpu")

WIDTH = 32
X = torch.linspace(-2, 2, 3 * WIDTH).view(3, WIDTH)


def lora_of(
    model: nn.Module, rank: int = 4, *, seed: int = 1, form: str = "{}.lora_{}.weight"
) -> dict[str, torch.Tensor]:
    """Make a LoRA for every Linear and Conv of a model.

    Args:
        model: the model.
        rank: of each layer's factors.
        seed: of their values.
        form: of the keys, with places for the layer and for "A" or "B".
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            inner, outer, kernel = _sizes(layer)
            down = torch.randn(rank, inner, *kernel, generator=generator)
            up = torch.randn(outer, rank, *(1,) * len(kernel), generator=generator)
            state[form.format(name, "A")] = down / rank
            state[form.format(name, "B")] = up / rank
    return state


def _sizes(layer: Any) -> tuple[int, int, tuple[int, ...]]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, ()
    return layer.in_channels, layer.out_channels, layer.kernel_size


def merged(
    model: nn.Module, *loras: tuple[Mapping[str, torch.Tensor], float]
) -> nn.Module:
    """Return a float64 copy of a model, LoRAs merged into its weights.

    Args:
        model: the model.
        loras: state dicts with plain keys, each with its factor.
    """
    model = copy.deepcopy(model).double()
    layers = dict(model.named_modules())
    for state, factor in loras:
        for key, down in state.items():
            name, _, rest = key.partition(".lora_A")
            if rest:
                up = state[f"{name}.lora_B.weight"].double().flatten(1)
                delta = up @ down.double().flatten(1)
                weight = layers[name].weight
                weight.data += factor * delta.view(weight.shape)
    return model


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def output(model: nn.Module, **fields: Any) -> torch.Tensor:
    """Run a model in the dtype that a policy's fields ask for."""
    value = run(model, X.to(fields.get("compute_dtype", X.dtype)))
    assert isinstance(value, torch.Tensor)
    return value


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
class TestWhereverTheWeightsRest:
    def test_output_is_that_of_merged_weights(self, fields: dict[str, Any]) -> None:
        model = Stack()
        lora = lora_of(model)
        want = run(merged(model, (lora, 0.5)), X.double())
        with offloaded(model, **fields):
            add_lora(model, lora, scale=0.5)
            for _ in range(3):
                assert_close(output(model, **fields), want)

    def test_added_between_forwards_it_counts_from_the_next(
        self, fields: dict[str, Any]
    ) -> None:
        model = Stack()
        lora = lora_of(model)
        plain = run(merged(model), X.double())
        want = run(merged(model, (lora, 1.0)), X.double())
        with offloaded(model, **fields):
            for _ in range(2):
                assert_close(output(model, **fields), plain)
            add_lora(model, lora)
            for _ in range(2):
                assert_close(output(model, **fields), want)

    def test_several_add_up(self, fields: dict[str, Any]) -> None:
        model = Stack()
        one, other = lora_of(model, seed=1), lora_of(model, rank=3, seed=2)
        want = run(merged(model, (one, 1.0), (other, -0.25)), X.double())
        with offloaded(model, **fields):
            add_lora(model, one)
            output(model, **fields)
            add_lora(model, other, scale=-0.25)
            for _ in range(2):
                assert_close(output(model, **fields), want)

    def test_cleared_the_model_computes_its_own_bits(
        self, fields: dict[str, Any]
    ) -> None:
        model = Stack()
        with offloaded(model, **fields):
            plain = output(model, **fields)
            add_lora(model, lora_of(model))
            assert not torch.equal(output(model, **fields), plain)
            clear_lora(model)
            for _ in range(2):
                assert same_bits(output(model, **fields), plain)

    def test_detach_takes_it_off_too(self, fields: dict[str, Any]) -> None:
        model = Stack()
        plain = run(model, X)
        before = Picture(model)
        with offloaded(model, **fields):
            add_lora(model, lora_of(model))
            output(model, **fields)
        assert before.differences(model) == []
        assert same_bits(run(model, X), plain)

    def test_it_stays_through_offload_and_state_dicts(
        self, fields: dict[str, Any]
    ) -> None:
        model = Stack()
        lora = lora_of(model)
        want = run(merged(model, (lora, 1.0)), X.double())
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        with offloaded(model, **fields):
            add_lora(model, lora)
            assert_close(output(model, **fields), want)
            offload(model)
            state = model.state_dict()
            assert list(state) == list(weights)
            assert all(same_bits(state[name], t) for name, t in weights.items())
            assert_close(output(model, **fields), want)
            model.load_state_dict(weights)
            assert_close(output(model, **fields), want)


class TestTheProduct:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1.0, 0.3])
    def test_of_half_precision_is_right_up_to_rounding(
        self, dtype: torch.dtype, scale: float
    ) -> None:
        layer = nn.Linear(WIDTH, WIDTH).to(dtype)
        model = nn.Sequential(layer)
        x = torch.randn(64, WIDTH).to(dtype)
        lora = lora_of(model)
        exact = run(merged(model, (_rounded(lora, dtype), scale)), x.double())
        down, up = lora["0.lora_A.weight"], lora["0.lora_B.weight"]
        peft = run(layer, x) + (x @ down.to(dtype).t() @ up.to(dtype).t()) * scale
        with offloaded(model, store="disk", limit_gb=0):
            add_lora(model, lora, scale=scale)
            got = run(model, x)
        assert got.dtype == dtype
        error = (got.double() - exact).abs().mean()
        assert error <= 1.1 * (peft.double() - exact).abs().mean()

    def test_is_scaled_before_it_is_rounded(self) -> None:
        model = linears().to(torch.bfloat16)
        lora = lora_of(model)
        scaled = {k: t * 0.3 if "lora_B" in k else t for k, t in lora.items()}
        x = X.to(torch.bfloat16)
        with offloaded(model):
            add_lora(model, scaled)
            want = run(model, x)
            clear_lora(model)
            add_lora(model, lora, scale=0.3)
            assert same_bits(run(model, x), want)

    def test_has_the_dtype_in_which_the_layer_computes(self) -> None:
        model = linears()
        lora = {k: v.to(torch.float64) for k, v in lora_of(model).items()}
        fields: dict[str, Any] = {
            "storage_dtype": torch.float8_e4m3fn,
            "compute_dtype": torch.bfloat16,
        }
        with offloaded(model, **fields):
            before = output(model, **fields)
            add_lora(model, lora)
            after = output(model, **fields)
        assert after.dtype == torch.bfloat16
        assert not torch.equal(after, before)

    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
            (nn.Conv1d(4, 6, 3, padding="same", dilation=2), torch.randn(2, 4, 9)),
            (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9, 8)),
            (
                nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(2, 0), dilation=(3, 1)),
                torch.randn(2, 4, 12, 8),
            ),
            (nn.Conv2d(4, 6, 1), torch.randn(4, 9, 8)),
            (
                nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
                torch.randn(2, 4, 9, 8),
            ),
            (
                nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
                torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last),
            ),
            (nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), torch.randn(2, 4, 3, 5, 5)),
        ],
        ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
    )
    def test_of_a_convolution_follows_its_geometry(
        self, layer: nn.Module, x: torch.Tensor
    ) -> None:
        model = nn.Sequential(layer)
        one, other = lora_of(model, seed=1), lora_of(model, rank=2, seed=2)
        want = run(merged(model, (one, 1.0), (other, 2.0)), x.double())
        with offloaded(model, store="disk", limit_gb=0):
            add_lora(model, one)
            add_lora(model, other, scale=2.0)
            for _ in range(2):
                assert_close(run(model, x), want)

    def test_of_a_convolution_with_groups_takes_peft_factors(self) -> None:
        layer = nn.Conv2d(4, 6, 3, groups=2)
        model = nn.Sequential(layer)
        x = torch.randn(2, 4, 8, 8)
        down, up = torch.randn(4, 4, 3, 3), torch.randn(6, 2, 1, 1)
        hidden = nn.functional.conv2d(x, down)
        want = run(model, x) + nn.functional.conv2d(hidden, up, groups=2)
        with offloaded(model):
            add_lora(model, {"0.lora_A.weight": down, "0.lora_B.weight": up})
            assert_close(run(model, x), want.double())

    @pytest.mark.parametrize("shape", [(), (1, 1)], ids=["matrix", "1x1"])
    @pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
    def test_of_matrices_may_be_written_as_one_by_one_convolutions(
        self, kind: type[nn.Module], shape: tuple[int, ...]
    ) -> None:
        layer = nn.Linear(5, 7) if kind is nn.Linear else nn.Conv2d(5, 7, 1)
        model = nn.Sequential(layer)
        x = torch.randn(2, 5) if kind is nn.Linear else torch.randn(2, 5, 3, 3)
        lora = lora_of(model)
        want = run(merged(model, (lora, 1.0)), x.double())
        written = {key: t.reshape(*t.shape[:2], *shape) for key, t in lora.items()}
        with offloaded(model):
            add_lora(model, written)
            assert_close(run(model, x), want)

    @pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3)])
    def test_takes_inputs_of_any_shape(self, shape: tuple[int, ...]) -> None:
        model = linears()
        lora = lora_of(model)
        x = torch.randn(*shape, WIDTH)
        want = run(merged(model, (lora, 1.0)), x.double())
        with offloaded(model, store="disk", limit_gb=0):
            add_lora(model, lora)
            assert_close(run(model, x), want)
            assert_close(run(model, input=x), want)

    def test_takes_inputs_that_are_not_contiguous(self) -> None:
        model = linears()
        lora = lora_of(model)
        x = torch.randn(WIDTH, 3, 5).permute(2, 1, 0)
        want = run(merged(model, (lora, 1.0)), x.double())
        with offloaded(model, store="disk", limit_gb=0):
            add_lora(model, lora)
            assert_close(run(model, x), want)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
    def test_is_added_to_what_a_packed_layer_returns(self, dtype: torch.dtype) -> None:
        class Packed(nn.Linear):
            def __init__(self) -> None:
                super().__init__(WIDTH, WIDTH)
                codes = torch.randint(-9, 9, (WIDTH, WIDTH)).to(dtype)
                self.weight = nn.Parameter(codes, requires_grad=False)

            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(input, self.weight.to(input.dtype) / 9)

        model = nn.Sequential(Packed(), Packed())
        model[0].bias = model[1].bias = None
        lora = lora_of(model, rank=2)
        plain = copy.deepcopy(model)
        parts = [(lora[f"{i}.lora_A.weight"], lora[f"{i}.lora_B.weight"]) for i in "01"]
        x = X
        for layer, (down, up) in zip(plain, parts, strict=True):
            x = run(layer, x) + x @ down.t() @ up.t()
        with offloaded(model, store="disk", limit_gb=0):
            add_lora(model, lora)
            assert_close(run(model, X), x.double())

    def test_belongs_to_the_library(self) -> None:
        model = linears()
        lora = lora_of(model)
        want = run(merged(model, (lora, 1.0)), X.double())
        with offloaded(model):
            add_lora(model, lora)
            for tensor in lora.values():
                tensor.zero_()
            assert_close(run(model, X), want)

    def test_is_taken_from_parameters_inside_inference_mode(self) -> None:
        model = linears()
        lora = lora_of(model)
        want = run(merged(model, (lora, 1.0)), X.double())
        with torch.inference_mode():
            written = {k: nn.Parameter(v.clone()) for k, v in lora.items()}
        with offloaded(model):
            with torch.inference_mode():
                add_lora(model, written)
                assert_close(model(X), want)
            x = X.clone().requires_grad_()
            model.requires_grad_(False)
            model(x).sum().backward()
            assert x.grad is not None

    def test_lets_gradients_through_where_everything_stays(self) -> None:
        model = linears().requires_grad_(False)
        lora = lora_of(model)
        x = X.clone().requires_grad_()
        wanted = X.double().requires_grad_()
        merged(model, (lora, 1.0))(wanted).square().sum().backward()
        with offloaded(model):
            add_lora(model, lora)
            model(x).square().sum().backward()
        assert x.grad is not None and wanted.grad is not None
        torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)

    def test_follows_autocast(self) -> None:
        model = linears()
        lora = lora_of(model)
        want = run(merged(model, (lora, 1.0)), X.double())
        with offloaded(model, store="disk", limit_gb=0):
            add_lora(model, lora)
            with torch.autocast("cpu", torch.bfloat16):
                got = run(model, X)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0.1, atol=0.1)

    def test_is_for_all_layers_of_a_module_with_hooks_outside(self) -> None:
        model = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True).eval()
        down, up = torch.randn(4, WIDTH) / 4, torch.randn(64, 4) / 4
        lora = {"linear1.lora_A.weight": down, "linear1.lora_B.weight": up}
        want = run(merged(model, (lora, 1.0)), X.double()[None])
        with offloaded(model, store="disk", limit_gb=0):
            for _ in range(2):
                run(model, X[None])
            add_lora(model, lora)
            for _ in range(2):
                assert_close(run(model, X[None]), want)


def _rounded(
    lora: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {key: tensor.to(dtype) for key, tensor in lora.items()}


class Attention(nn.Module):
    """Names as diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](torch.relu(self.to_q(x)))  # type: ignore[no-any-return]


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.mid_block:
            x = block(x)
        return x


def _factors_renamed(
    lora: dict[str, torch.Tensor], down: str, up: str, layer: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    written = {}
    for key, tensor in lora.items():
        name, _, factor = key.partition(".lora_")
        written[f"{layer(name)}.{down if factor[0] == 'A' else up}.weight"] = tensor
    return written


def _after(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


STYLES: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "peft": ("lora_A", "lora_B", str),
    "peft, with the adapter": ("lora_A.default", "lora_B.default", str),
    "peft, whole": ("lora_A", "lora_B", _after("base_model.model.")),
    "diffusers, unet": ("lora_A", "lora_B", _after("unet.")),
    "diffusers, transformer": ("lora_A", "lora_B", _after("transformer.")),
    "diffusers, old": ("lora.down", "lora.up", _after("unet.")),
    "up and down": ("lora_down", "lora_up", str),
    "original names": ("lora_down", "lora_up", _after("diffusion_model.")),
    "with the model": ("lora_A", "lora_B", _after("model.diffusion_model.")),
    "prefix on prefix": ("lora_A", "lora_B", _after("transformer.base_model.model.")),
    "kohya": ("lora_down", "lora_up", _kohya),
}


@pytest.mark.parametrize(("down", "up", "layer"), STYLES.values(), ids=STYLES)
class TestKeys:
    def test_of_every_common_style_are_understood(
        self, down: str, up: str, layer: Callable[[str], str]
    ) -> None:
        model = Unet()
        lora = lora_of(model)
        want = run(merged(model, (lora, 1.0)), X.double())
        with offloaded(model):
            add_lora(model, _factors_renamed(lora, down, up, layer))
            assert_close(run(model, X), want)

    def test_may_come_with_an_alpha_for_each_layer(
        self, down: str, up: str, layer: Callable[[str], str]
    ) -> None:
        model = Unet()
        lora = lora_of(model, rank=4)
        want = run(merged(model, (lora, 0.5 * 3 / 4)), X.double())
        written = _factors_renamed(lora, down, up, layer)
        alphas = {
            f"{layer(name)}.alpha": torch.tensor(3.0)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        with offloaded(model):
            add_lora(model, {**written, **alphas}, scale=0.5)
            assert_close(run(model, X), want)
            clear_lora(model)
            numbers = {key: float(alpha) for key, alpha in alphas.items()}
            add_lora(model, written, 0.5, network_alphas=numbers)
            assert_close(run(model, X), want)


def test_a_prefix_that_is_a_name_of_the_model_stays() -> None:
    model = nn.ModuleDict({"transformer": linears(), "0": nn.Linear(3, 3)})
    lora = {"transformer.0.lora_A.weight": torch.ones(1, WIDTH)}
    lora["transformer.0.lora_B.weight"] = torch.ones(WIDTH, 1)
    inner = model["transformer"]
    with offloaded(model):
        plain = run(inner[0], X)
        add_lora(model, lora)
        assert not torch.equal(run(inner[0], X), plain)


def test_a_shared_layer_takes_one_adapter_under_two_names() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    lora = lora_of(model)
    want = run(merged(model, (lora, 1.0)), X.double())
    twice = {**lora, **{"2" + key[1:]: tensor for key, tensor in lora.items()}}
    with offloaded(model):
        add_lora(model, twice)
        assert_close(run(model, X), want)
        other = {**twice, "2.lora_A.weight": twice["2.lora_A.weight"] + 1}
        with pytest.raises(ValueError, match="0 and 2 are adapters for one layer"):
            add_lora(model, other)


class Twins(nn.Module):
    """Two layers whose names are one with underscores instead of dots."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.Linear(WIDTH, WIDTH)
        self.a = nn.ModuleDict({"b": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a_b(x) + self.a["b"](x)  # type: ignore[no-any-return]


DOWN, UP = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
GOOD = {"0.lora_A.weight": DOWN, "0.lora_B.weight": UP}

BAD: dict[str, tuple[Any, str]] = {
    "no mapping": ("lora.safetensors", "must map keys to tensors, and is a str"),
    "empty": ({}, "empty"),
    "no string": ({1: DOWN}, "keys must be strings; 1 is not"),
    "no tensor": ({**GOOD, "1.lora_A.weight": 3}, "1.lora_A.weight must be a tensor"),
    "integers": (
        {**GOOD, "0.lora_B.weight": UP.to(torch.int8)},
        r"0.lora_B.weight must be a floating-point matrix .* torch.int8",
    ),
    "on the meta device": (
        {**GOOD, "0.lora_B.weight": UP.to("meta")},
        "0.lora_B.weight must be a floating-point matrix with values",
    ),
    "half a pair": ({**GOOD, "3.lora_B.weight": UP}, r"lack one of .*: 3$"),
    "alpha alone": ({**GOOD, "3.alpha": torch.tensor(1.0)}, r"lack one of .*: 3$"),
    "alpha of two": ({**GOOD, "0.alpha": torch.ones(2)}, "0.alpha must be one finite"),
    "alpha not a number": (
        {**GOOD, "0.alpha": torch.tensor(float("nan"))},
        "0.alpha must be one finite number",
    ),
    "no LoRA key": (
        {**GOOD, "0.weight": DOWN},
        "does not know what to do with 0.weight",
    ),
    "DoRA": (
        {**GOOD, "0.dora_scale": UP},
        r"does not know what to do with 0.dora_scale \(DoRA\)",
    ),
    "DoRA of peft": (
        {**GOOD, "0.lora_magnitude_vector.default.weight": UP},
        r"0.lora_magnitude_vector.default.weight \(DoRA\)",
    ),
    "LoHa": ({"diffusion_model.0.hada_w1_a": UP}, r"0.hada_w1_a \(LoHa\)"),
    "LoKr": ({"diffusion_model.0.lokr_w1": UP}, r"0.lokr_w1 \(LoKr\)"),
    "core tensor": ({**GOOD, "0.lora_mid.weight": UP}, r"\(LoCon with a core tensor\)"),
    "bias": ({**GOOD, "0.lora_B.bias": UP}, r"0.lora_B.bias \(LoRA with biases\)"),
    "embedding": ({"0.lora_embedding_A": UP}, r"\(LoRA of an embedding\)"),
    "whole weights": ({"0.diff": UP}, r"0.diff \(whole weights\)"),
    "absent layers": (
        {**GOOD, "7.lora_A.weight": DOWN, "7.lora_B.weight": UP},
        "1 of the state dict's 2 layers are not in the model: 7. Nothing was applied",
    ),
    "absent for kohya": (
        {"lora_unet_7.lora_down.weight": DOWN, "lora_unet_7.lora_up.weight": UP},
        "not in the model: lora_unet_7",
    ),
    "not a layer": (
        {"1.lora_A.weight": DOWN, "1.lora_B.weight": UP},
        r"no LoRA can be added to 1 \(a ReLU, neither Linear nor Conv1d",
    ),
    "embedding layer": (
        {"2.lora_A.weight": DOWN, "2.lora_B.weight": UP},
        r"2 \(a Embedding, neither Linear",
    ),
    "attention's own": (
        {"3.out_proj.lora_A.weight": DOWN, "3.out_proj.lora_B.weight": UP},
        r"3.out_proj \(nn.MultiheadAttention reads its weight without calling it\)",
    ),
    "other size": (
        {**GOOD, "0.lora_A.weight": torch.ones(2, 5)},
        r"other sizes: 0: down \(2, 5\) and up \(32, 2\), and the layer needs "
        r"\(2, 32\) and \(32, 2\)",
    ),
    "other ranks": (
        {**GOOD, "0.lora_B.weight": torch.ones(WIDTH, 3)},
        r"0: down \(2, 32\) and up \(32, 3\)",
    ),
    "no rank": (
        {"0.lora_A.weight": DOWN[:0], "0.lora_B.weight": UP[:, :0]},
        "0: its rank is 0",
    ),
    "two of one layer": (
        {**GOOD, "0.lora_A.a.weight": DOWN},
        "has two adapters for 0",
    ),
    "for two models": (
        {
            **{f"unet.{key}": tensor for key, tensor in GOOD.items()},
            **{f"text_encoder.{key}": tensor for key, tensor in GOOD.items()},
        },
        "for several models (denoiser, text_encoder)".replace("(", r"\(").replace(
            ")", r"\)"
        ),
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("run_before", [False, True])
    @pytest.mark.parametrize(("state", "message"), BAD.values(), ids=BAD)
    def test_is_refused_and_nothing_is_applied(
        self, state: Any, message: str, run_before: bool
    ) -> None:
        model = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Embedding(4, 4),
            nn.MultiheadAttention(WIDTH, 4),
        )
        with offloaded(model, store="disk", limit_gb=0):
            plain = run(model[0], X) if run_before else None
            hooks, plan = hooks_of(model), offload_plan(model)
            with pytest.raises(ValueError, match=message):
                add_lora(model, state)
            assert (hooks_of(model), offload_plan(model)) == (hooks, plan)
            if plain is not None:
                assert same_bits(run(model[0], X), plain)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
    def test_scale_that_is_no_finite_number_is_refused(self, scale: Any) -> None:
        with (
            offloaded(linears()) as model,
            pytest.raises(ValueError, match="scale must be"),
        ):
            add_lora(model, GOOD, scale)

    def test_underscores_that_could_mean_two_layers_are_refused(self) -> None:
        lora = {
            "lora_unet_a_b.lora_down.weight": DOWN,
            "lora_unet_a_b.lora_up.weight": UP,
        }
        with (
            offloaded(Twins()) as model,
            pytest.raises(ValueError, match=r"lora_unet_a_b could be a_b or a\.b"),
        ):
            add_lora(model, lora)

    def test_only_the_first_of_many_absent_names_are_listed(self) -> None:
        lora = lora_of(linears(depth=40))
        with offloaded(linears(depth=20)) as model:
            message = "20 of the state dict's 40 layers .*: 20, 21, .*29 and 10 more"
            with pytest.raises(ValueError, match=message):
                add_lora(model, lora)

    @pytest.mark.parametrize("function", [clear_lora, lambda m: add_lora(m, GOOD)])
    def test_model_without_hooks_is_refused(
        self, function: Callable[[nn.Module], None]
    ) -> None:
        with pytest.raises(RuntimeError, match="attach_offload_hooks"):
            function(linears())

    @pytest.mark.parametrize("function", [clear_lora, lambda m: add_lora(m, GOOD)])
    def test_model_that_runs_is_refused(
        self, function: Callable[[nn.Module], None]
    ) -> None:
        model = linears()
        model[2].register_forward_pre_hook(lambda *_: function(model))
        with (
            offloaded(model, store="disk"),
            pytest.raises(RuntimeError, match="inside"),
        ):
            run(model, X)

    def test_copying_a_model_with_a_lora_is_refused(self) -> None:
        with offloaded(linears()) as model:
            run(model, X)
            add_lora(model, GOOD)
            with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
                copy.deepcopy(model[0])


class Sideways(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.body(x), self.head.weight)


HEAD = {f"head.{key[2:]}": tensor for key, tensor in GOOD.items()}


def test_layer_whose_weight_was_read_without_a_call_is_refused() -> None:
    with offloaded(Sideways(), store="disk", limit_gb=0) as model:
        run(model, X)
        with pytest.raises(ValueError, match=r"head \(its weight is read by another"):
            add_lora(model, HEAD)


def test_lora_that_turns_out_to_do_nothing_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with offloaded(Sideways(), store="disk", limit_gb=0) as model:
        add_lora(model, HEAD)
        with caplog.at_level(logging.WARNING, "hookoffload"):
            run(model, X)
    assert "the LoRA of head has no effect" in caplog.text


class TestTheLimit:
    @pytest.mark.parametrize("run_before", [False, True])
    def test_that_has_room_for_it_is_the_least_that_the_refusal_names(
        self, run_before: bool
    ) -> None:
        lora = lora_of(linears(), rank=8)
        least = least_limit_gb(linears(), store="disk")
        with offloaded(linears(), store="disk", limit_gb=least) as model:
            plain = run(model, X)
            with pytest.raises(
                BudgetExceededError, match="none was applied"
            ) as refusal:
                add_lora(model, lora)
            assert same_bits(run(model, X), plain)
            assert offload_plan(model).always_bytes == 0
            set_limit(model, least)
        named = str(refusal.value).rpartition("Set limit_gb=")[2].split()[0]
        with offloaded(linears(), store="disk", limit_gb=float(named)) as model:
            if run_before:
                run(model, X)
            add_lora(model, lora)
            assert not torch.equal(run(model, X), plain)
            stats = offload_stats(model)
        assert stats.limit_bytes is not None
        assert stats.peak_bytes <= stats.limit_bytes
        assert stats.peak_by_kind["adapters"] >= sum(t.nbytes for t in lora.values())
        below = float(named) * 0.9
        with (
            offloaded(linears(), store="disk", limit_gb=below) as model,
            pytest.raises(BudgetExceededError),
        ):
            add_lora(model, lora)

    def test_is_kept_by_residents_that_give_way(self) -> None:
        model = linears(width=64, depth=8)
        x = torch.randn(2, 64)
        lora = lora_of(model, rank=16)
        want = run(merged(model, (lora, 1.0)), x.double())
        plain = run(model, x)
        limit = 7 * 64 * 64 * 4 / GIB
        with offloaded(model, store="disk", limit_gb=limit):
            for _ in range(2):
                run(model, x)
            before = offload_plan(model)
            add_lora(model, lora)
            after = offload_plan(model)
            assert after.resident < before.resident
            for _ in range(2):
                assert_close(run(model, x), want)
            assert offload_stats(model).peak_bytes <= limit * GIB
            clear_lora(model)
            assert offload_plan(model) == before
            assert same_bits(run(model, x), plain)

    def test_where_everything_stayed_may_make_layers_stream(self) -> None:
        model = linears(width=64, depth=8)
        x = torch.randn(2, 64)
        lora = lora_of(model, rank=16)
        want = run(merged(model, (lora, 1.0)), x.double())
        limit = 10 * 64 * 64 * 4 / GIB
        with offloaded(model, store="disk", limit_gb=limit):
            for _ in range(3):
                run(model, x)
            assert len(offload_plan(model).resident) == 8
            add_lora(model, lora)
            assert len(offload_plan(model).resident) < 8
            moved = offload_stats(model).bytes_moved
            for layer in model:  # without the root, which would hang the hooks
                x = run(layer, x)
            assert_close(x, want)
            assert offload_stats(model).bytes_moved > moved

    def test_below_what_it_takes_is_refused_later_too(self) -> None:
        lora = lora_of(linears(), rank=8)
        with offloaded(linears(), store="disk", limit_gb=1) as model:
            least = offload_plan(model).least_bytes
            add_lora(model, lora)
            more = offload_plan(model).least_bytes - least
            assert more >= sum(tensor.nbytes for tensor in lora.values())
            with pytest.raises(BudgetExceededError, match="always-resident"):
                set_limit(model, least / GIB)
            clear_lora(model)
            set_limit(model, least / GIB)

    def test_counts_nothing_while_the_model_is_offloaded(self) -> None:
        with offloaded(linears(), store="disk", limit_gb=1) as model:
            add_lora(model, GOOD)
            got = run(model, X)
            offload(model)
            budget = _budget_of(model)
            assert budget.used == 0
            assert same_bits(run(model, X), got)
            assert budget.by_kind()["adapters"] > 0
        assert budget.used == 0


def _budget_of(model: nn.Module) -> Any:
    from hookoffload.state_hooks import session_of

    session = session_of(model)
    assert session is not None
    return session.budget


class TestHooksOfTheUser:
    def test_see_the_output_with_the_lora_in_it(self) -> None:
        model = linears(depth=1)
        seen: list[torch.Tensor] = []
        model[0].register_forward_hook(lambda *call: seen.append(call[-1]))
        with offloaded(model, store="disk"):
            add_lora(model, GOOD)
            got = run(model, X)
        assert same_bits(seen[0], got)

    @pytest.mark.parametrize("everywhere", [False, True])
    def test_that_run_before_keep_what_they_were_given(self, everywhere: bool) -> None:
        model = linears(depth=1)
        plain = run(model, X)
        seen: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if module is model[0]:
                seen.append(output)

        with offloaded(model, store="disk"):
            add_lora(model, GOOD)
            handle = (
                nn.modules.module.register_module_forward_hook(keep)
                if everywhere
                else model[0].register_forward_hook(keep, prepend=True)
            )
            got = run(model, X)
            handle.remove()
        assert same_bits(seen[0], plain)
        assert not torch.equal(got, plain)

    def test_that_return_a_tensor_of_their_own_keep_it(self) -> None:
        model = linears(depth=1)
        constant = torch.zeros(3, WIDTH)
        with offloaded(model, store="disk"):
            add_lora(model, GOOD)
            model[0].register_forward_hook(lambda *_: constant, prepend=True)
            assert run(model, X).any()
        assert not constant.any()


def test_a_layer_whose_forward_returns_the_same_tensor_each_time_keeps_it() -> None:
    class Constant(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.kept = torch.zeros(3, WIDTH)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.kept

    model = nn.Sequential(Constant())
    with offloaded(model):
        add_lora(model, GOOD)
        assert run(model, X).any()
    assert not model[0].kept.any()


def test_several_loras_hang_one_hook_on_a_layer() -> None:
    model = linears()
    with offloaded(model):
        run(model, X)
        before = hooks_of(model)
        for seed in range(3):
            add_lora(model, lora_of(model, seed=seed))
            run(model, X)
        registered = [len(layer._forward_hooks) for layer in model]
        clear_lora(model)
        run(model, X)
        assert hooks_of(model) == before
    assert registered == [1] * len(model)


def test_two_threads_take_turns_with_one_lora() -> None:
    model = linears()
    lora = lora_of(model)
    want = run(merged(model, (lora, 1.0)), X.double())
    plain = run(merged(model), X.double())
    wrong: list[str] = []

    def call() -> None:
        for _ in range(20):
            got = run(model, X).double()
            if not any(torch.allclose(got, w, 1e-3, 1e-3) for w in (want, plain)):
                wrong.append("neither with nor without")

    with offloaded(model, store="disk", limit_gb=0):
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            add_lora(model, lora)
            clear_lora(model)
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_add_that_fails_half_way_leaves_what_there_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linears()
    first, second = lora_of(model, seed=1), lora_of(model, seed=2)
    with offloaded(model, store="disk", limit_gb=1):
        add_lora(model, first)
        before = run(model, X)
        plan, hooks = offload_plan(model), hooks_of(model)
        original = nn.Module.register_forward_hook
        calls = iter(range(100))

        def fail(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 3:
                raise torch.OutOfMemoryError("for the test")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "register_forward_hook", fail)
            with pytest.raises(torch.OutOfMemoryError):
                add_lora(model, second)
        assert offload_plan(model) == plan
        assert hooks_of(model) == hooks
        assert same_bits(run(model, X), before)


@pytest.mark.gpu
def test_on_a_gpu_it_is_within_the_limit_and_moves_away_with_the_model() -> None:
    model = linears(width=4096, depth=8).to(torch.bfloat16)
    x = torch.randn(4, 4096).to(torch.bfloat16)
    lora = lora_of(model, rank=32)
    want = run(merged(model, (_rounded(lora, torch.bfloat16), 1.0)), x.double())
    # Room for half of the weights beside cuBLAS's workspace.
    run(copy.deepcopy(model[0]).cuda(), x.cuda())
    limit = 0.17 + torch.cuda.memory_allocated() / GIB
    with offloaded_anywhere(model, compute_device="cuda", limit_gb=limit):
        for _ in range(2):
            run(model, x)
        add_lora(model, lora)
        for _ in range(3):
            got = run(model, x)
            error = (got.double().cpu() - want).abs().max() / want.abs().max()
            assert error < 0.05
        stats = offload_stats(model)
        factors = sum(2 * tensor.numel() for tensor in lora.values())
        assert _budget_of(model).by_kind()["adapters"] >= factors
        assert stats.peak_bytes <= limit * GIB
        offload(model)
        assert _budget_of(model).used == 0
        assert same_bits(run(model, x), got)

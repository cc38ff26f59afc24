"""Quantised weights on a GPU: they go there packed, and say where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
)
from hookoffload.packed import parts_of, with_parts
from hookoffload.registered import unreadable_at_rest
from tests.quantised_models import (
    KINDS,
    WIDTH,
    attributes,
    flat,
    linears,
    parts,
    rows,
    torchao,
)
from tests.samples import run, same_bits

pytestmark = pytest.mark.gpu

MIB = 2**20
SETTINGS: dict[str, dict[str, Any]] = {
    "least": {"limit_gb": 0},
    "unlimited": {"limit_gb": None},
    "disk, least": {"store": "disk", "limit_gb": 0},
    "disk, unlimited": {"store": "disk"},
    "poisoned": {"limit_gb": 0, "debug": True},
}


def _tile_packed(**fields: Any) -> nn.Module:
    return torchao(
        "Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d", **fields
    )


# Packed for the tensor cores: the CPU has no kernel for it.
GPU_KINDS: dict[str, Callable[..., nn.Module]] = {
    **KINDS,
    "torchao int4, tile packed": _tile_packed,
}


@pytest.mark.parametrize("make", GPU_KINDS.values(), ids=GPU_KINDS)
def test_outputs_devices_and_objects_are_those_of_the_plain_model(
    make: Callable[..., nn.Module],
) -> None:
    model, x = make(device="cuda"), rows().cuda()
    want = run(model, x)
    # Else nothing below tells anything about what is attached.
    assert_same_output(run(model, x), want, model, "plain")
    before, held = attributes(model), parts(model)
    saved = flat(model.state_dict())
    values = {name: part.cpu() for name, part in held.items()}
    # Some of optimum-quanto's formats are made for the tensor cores.
    unreadable = unreadable_at_rest(model) is not None
    seen: list[set[str]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, _: seen.append({p.device.type for p in module.parameters()})
        )
        for module in model
    ]
    for name_of_setting, setting in SETTINGS.items():
        with offloaded(model, **setting):
            for _ in range(3):
                assert_same_output(run(model, x), want, model, name_of_setting)
            if unreadable:
                with pytest.raises(RuntimeError, match="where its class cannot"):
                    model.state_dict()
                state = saved
            else:
                state = flat(model.state_dict())
                tensors = [t for t in state.values() if isinstance(t, torch.Tensor)]
                assert {tensor.device.type for tensor in tensors} == {"cpu"}
            for name, value in saved.items():
                if isinstance(value, torch.Tensor):
                    assert same_bits(state[name].cpu(), value.cpu()), name
            offload(model)  # a state dict that was refused left residents bound
            at_rest = {p.device.type for p in model.parameters()}
            assert at_rest == {"cpu"}
        assert attributes(model) == before
        for name, part in parts(model).items():
            assert part is held[name]
            assert part.device.type == "cuda"
            assert same_bits(part, values[name])
    assert set().union(*seen) == {"cuda"}
    for hook in hooks:
        hook.remove()
    assert same_bits(run(model, x), want)


def assert_same_output(
    got: torch.Tensor, want: torch.Tensor, model: nn.Module, when: str
) -> None:
    """Compare bits; what differs is told in one line, with the weights' classes."""
    if same_bits(got, want):
        return
    difference = (got.float() - want.float()).abs().max().item()
    kinds = sorted({type(module.weight).__name__ for module in linears_of(model)})
    raise AssertionError(
        f"{when}: {', '.join(kinds)}: outputs differ by up to {difference:.3g}, "
        f"the largest is {want.abs().max().item():.3g}"
    )


def linears_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model if not isinstance(m, nn.LayerNorm | nn.GELU)]


@pytest.mark.parametrize(
    "kind", ["wrapper subclass", "torchao int8", "torchao fp8", "quanto int8"]
)
def test_weights_that_were_quantised_on_the_cpu_compute_on_the_gpu(kind: str) -> None:
    model = KINDS[kind]()
    with torch.no_grad():
        moved = KINDS[kind]().cuda()
        moved.load_state_dict(model.state_dict())
    x = rows().cuda()
    want = run(moved, x)
    with offloaded(model, limit_gb=0):
        for _ in range(2):
            assert same_bits(run(model, x), want)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("store", ["disk", "cpu"])
@pytest.mark.parametrize(
    "kind",
    ["bitsandbytes nf4", "bitsandbytes fp4", "bitsandbytes int8", "torchao int8"],
)
def test_what_was_saved_packed_is_read_and_computes_on_the_gpu(
    kind: str, store: str, tmp_path: Path
) -> None:
    source, x = KINDS[kind](), rows()
    path = tmp_path / "model.safetensors"
    state, metadata = source.state_dict(), None
    if "torchao" in kind:
        support = pytest.importorskip(
            "torchao.prototype.safetensors.safetensors_support"
        )
        state, metadata = support.flatten_tensor_state_dict(state)
    save_file(state, path, metadata)
    source.cuda()
    want = run(source, x.cuda())

    def make() -> nn.Module:
        model = linears()
        if "int8" in kind and "bitsandbytes" in kind:
            library = pytest.importorskip("bitsandbytes").nn
            for index in (0, 2, 4):
                shape = model[index].in_features, model[index].out_features
                model[index] = library.Linear8bitLt(*shape, has_fp16_weights=False)
        return model

    policy = OffloadPolicy(store=store, limit_gb=0)  # type: ignore[arg-type]
    model = load_model(make, path, policy)
    for _ in range(3):
        assert_same_output(run(model, x.cuda()), want, model, store)


def test_what_the_cpu_packs_otherwise_is_refused() -> None:
    """On the CPU optimum-quanto packs 4 bits as another kernel wants them."""
    model = KINDS["quanto int4"]()
    if "TinyGemm" not in type(model[0].weight).__name__:
        pytest.skip("this optimum-quanto packs both alike")
    with pytest.raises(ValueError, match=r"weight is a TinyGemm.* on cpu"):
        attach_offload_hooks(model)


@pytest.mark.parametrize("kind", ["quanto fp8", "quanto int2"])
def test_what_is_packed_for_any_device_computes_as_it_is(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On the CPU optimum-quanto has no packing of its own for fp8 and 2 bits."""
    model, moved = KINDS[kind](), KINDS[kind]()
    for there, here in zip(linears_of(moved), linears_of(model), strict=True):
        weight = here.weight.detach()
        held = parts_of(weight)
        assert held is not None
        found = {p: t.cuda() for p, t in zip(held.paths, held.tensors, strict=True)}
        there.weight = nn.Parameter(with_parts(weight, found), requires_grad=False)
        there.bias = nn.Parameter(here.bias.detach().cuda(), requires_grad=False)
    moved[1].load_state_dict(model[1].state_dict())
    moved[1].cuda()
    x = rows().cuda()
    want = run(moved, x)
    for name, setting in SETTINGS.items():
        with offloaded(model, **setting):
            for _ in range(2):
                assert_same_output(run(model, x), want, model, name)
    faster = type(model[0].weight.detach().cuda())
    told = "\n".join(caplog.messages)
    assert (faster is not type(model[0].weight)) == ("as it is" in told), told


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4", "gguf q8_0"])
def test_the_allocators_peak_keeps_the_limit(kind: str) -> None:
    model = nn.Sequential(*[KINDS[kind](device="cuda") for _ in range(40)])
    packed = sum({p.data_ptr(): p.nbytes for p in parts(model).values()}.values())
    attach_offload_hooks(model)
    detach(model)
    x = rows().cuda()
    want = run(model, x)
    held = torch.cuda.memory_allocated() - packed  # cuBLAS's workspaces
    limit = held + packed // 3 + 8 * MIB
    with offloaded(model, limit_gb=limit / 2**30):
        for _ in range(3):
            assert same_bits(run(model, x), want)
        stats = offload_stats(model)
        assert offload_plan(model).pass_bytes < packed
        assert stats.peak_bytes <= limit
        assert stats.bytes_moved < 3.5 * packed


def test_a_whole_stack_streams_its_integers_and_no_floats() -> None:
    model = nn.Sequential(*[linears() for _ in range(2)]).cuda()
    floats = sum(p.nbytes for p in model.parameters())
    quantised = nn.Sequential(*[KINDS["torchao int8"](device="cuda") for _ in range(2)])
    x = torch.randn(2, WIDTH, dtype=torch.bfloat16, device="cuda")
    with offloaded(quantised, limit_gb=0):
        for _ in range(3):
            run(quantised, x)
        assert offload_plan(quantised).pass_bytes < 0.6 * floats

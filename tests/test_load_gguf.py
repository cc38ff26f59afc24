"""GGUF files: packed weights are read where they lie."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hookoffload import OffloadPolicy, detach, load_model, offload_plan, offload_stats
from hookoffload.cli import main
from hookoffload.gguf_file import GgufFile
from hookoffload.safetensors_header import CheckpointError
from tests.quantised_models import KINDS, WIDTH, linears, rows
from tests.quantised_models import gguf as packed_by
from tests.samples import run, same_bits
from tests.test_cli import error_of

gguf = pytest.importorskip("gguf")
pytest.importorskip("diffusers")

STORES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk", "limit_gb": 0},
    "disk, unlimited": {"store": "disk"},
    "ram": {},
    "part in ram": {"limit_gb": 0, "host_limit_gb": 0.0005},
}


def _policy(tmp_path: Path, **fields: Any) -> OffloadPolicy:
    if fields.get("store") == "disk" or "host_limit_gb" in fields:
        fields["disk_dir"] = tmp_path / "spill"
        fields["disk_dir"].mkdir(exist_ok=True)
    fields = {"compute_dtype": torch.bfloat16, **fields}
    return OffloadPolicy(compute_device="cpu", **fields)


def _write(path: Path, state: Mapping[str, torch.Tensor], arch: str = "none") -> Path:
    """Write what diffusers' parameters hold as llama.cpp would."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32("of.nothing", 7)
    for name, tensor in state.items():
        packing = getattr(tensor, "quant_type", None)
        plain = tensor.detach().as_subclass(torch.Tensor)
        if plain.dtype is torch.bfloat16:
            packing = gguf.GGMLQuantizationType.BF16
            plain = plain.view(torch.uint8)
        writer.add_tensor(name, plain.numpy().copy(), raw_dtype=packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _saved(source: nn.Module, folder: Path, prefix: str = "") -> Path:
    state = {prefix + name: tensor for name, tensor in source.named_parameters()}
    return _write(folder / "model.gguf", state)


@pytest.mark.parametrize("kind", ["gguf q8_0", "gguf q4_0"])
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_packed_weights_are_read_where_they_lie(
    tmp_path: Path, kind: str, store: dict[str, Any]
) -> None:
    source, x = KINDS[kind](), rows()
    want = run(source, x)
    path = _saved(source, tmp_path)
    model = load_model(linears, path, _policy(tmp_path, **store))
    for _ in range(3):
        assert same_bits(run(model, x), want)
    assert type(model[0]) is type(source[0])
    assert type(model[0].weight) is type(source[0].weight)
    assert model[0].compute_dtype is torch.bfloat16 and model[0].device is None
    assert not model[0].training
    if "disk" in store.values():
        held = sum(parameter.nbytes for parameter in source.parameters())
        assert offload_stats(model).disk_bytes == held
        assert not list((tmp_path / "spill").iterdir())
    detach(model)
    assert same_bits(run(model, x), want)


def test_the_only_file_of_a_folder_is_found(tmp_path: Path) -> None:
    source, x = packed_by("Q8_0"), rows()
    path = _saved(source, tmp_path)
    model = load_model(linears, tmp_path, _policy(tmp_path))
    assert same_bits(run(model, x), run(source, x))
    path.with_name("other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.gguf.*Pass the one to load"):
        load_model(linears, tmp_path, _policy(tmp_path))


def test_layers_compute_in_the_dtype_of_the_model_unless_the_policy_says_another(
    tmp_path: Path,
) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)
    model = load_model(linears, path, _policy(tmp_path, compute_dtype=None))
    assert model[0].compute_dtype is torch.bfloat16
    detach(model)
    policy = _policy(tmp_path, compute_dtype=torch.float16)
    model = load_model(linears, path, policy)
    assert detach(model)[0].compute_dtype is torch.float16
    policy = _policy(tmp_path, compute_dtype=torch.float8_e4m3fn)  # of plain weights
    assert load_model(linears, path, policy)[0].compute_dtype is torch.bfloat16


def test_what_is_not_packed_has_its_dtype_and_values(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in state.items():
                empty = torch.empty_like(tensor)
                floats = tensor.is_floating_point()
                setattr(self, name, nn.Parameter(empty, requires_grad=floats))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8]
    state = {
        f"of_{str(dtype)[6:]}": (torch.randn(3, 8) * 50).to(dtype)  # each has its name
        for dtype in dtypes
    }
    path = _write(tmp_path / "model.GGUF", state)
    model = load_model(Table, path, _policy(tmp_path, compute_dtype=None))
    for name, tensor in state.items():
        assert same_bits(getattr(model, name), tensor), name


def test_converters_may_rename_and_divide_packed_weights(tmp_path: Path) -> None:
    """As those of diffusers for single files do."""
    source, x = packed_by("Q4_0"), rows()
    want = run(source, x)
    path = _saved(source, tmp_path, "model.")

    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = {name.removeprefix("model."): value for name, value in state.items()}
        upper, lower = state.pop("2.weight").chunk(2, dim=0)
        return {**state, "2.upper.weight": torch.cat([upper]), "2.lower.weight": lower}

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upper = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
            self.lower = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
            bias = torch.empty(2 * WIDTH, dtype=torch.bfloat16)
            self.bias = nn.Parameter(bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.upper(x), self.lower(x)], -1) + self.bias

    def divided() -> nn.Module:
        model = linears()
        model[2] = Halves()
        return model

    policy = _policy(tmp_path, store="disk", limit_gb=0)
    model = load_model(divided, path, policy, state_dict_converter=convert)
    assert torch.allclose(run(model, x), want, rtol=0.02, atol=0.02)
    assert type(model[2].upper) is type(model[2].lower) is type(source[2])
    assert not list((tmp_path / "spill").iterdir())


# -- refused -----------------------------------------------------------------------


def test_packed_weights_that_a_converter_puts_together_anew_are_named(
    tmp_path: Path,
) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)

    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        upper, lower = state["2.weight"].chunk(2, dim=0)
        return {**state, "2.weight": torch.cat([lower, upper])}

    with pytest.raises(CheckpointError, match=r"^2\.weight: .* does not say how"):
        load_model(
            linears,
            path,
            _policy(tmp_path),
            state_dict_converter=convert,
            cache_dir=tmp_path / "cache",
        )


def test_packed_weights_that_no_layer_computes_with_are_named(tmp_path: Path) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)

    def make() -> nn.Module:
        model = linears()
        model[0] = nn.Embedding(WIDTH, WIDTH)
        model[0].register_parameter("bias", nn.Parameter(torch.empty(WIDTH)))
        return model

    with pytest.raises(CheckpointError, match=r"0\.weight \(Q8_0\): .*linear layers"):
        load_model(make, path, _policy(tmp_path))


def test_packed_weights_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)

    def narrow() -> nn.Module:
        model = linears()
        model[4] = nn.Linear(99, WIDTH)
        return model

    match = r"4\.weight has Q8_0 values of shape \(256, 512\).*\(256, 99\)"
    with pytest.raises(CheckpointError, match=match):
        load_model(narrow, path, _policy(tmp_path))
    with pytest.raises(CheckpointError, match=r"does not have: 2\.bias, 2\.weight"):
        load_model(lambda: linears()[:2], path, _policy(tmp_path))


def test_a_packing_that_diffusers_does_not_know_is_named(tmp_path: Path) -> None:
    source = packed_by("Q8_0")
    for module in source:
        if isinstance(module, nn.Linear):  # in size as it is
            module.weight.quant_type = gguf.GGMLQuantizationType.Q8_0
    state = dict(source.named_parameters())
    values = np.zeros((WIDTH, WIDTH), np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.TQ1_0)
    odd = torch.from_numpy(packed.copy())
    odd.quant_type = gguf.GGMLQuantizationType.TQ1_0  # type: ignore[attr-defined]
    path = _write(tmp_path / "model.gguf", {**state, "0.weight": odd})
    with pytest.raises(CheckpointError, match=r"0\.weight is packed as TQ1_0"):
        load_model(linears, path, _policy(tmp_path))


def _with_values(path: Path, alignment: int | None = None) -> Path:
    """Write a file with values of all kinds beside its tensors."""
    writer = gguf.GGUFWriter(path, "none")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_array("texts", ["", "a", "grüße" * 20_000])
    writer.add_array("numbers", list(range(50)))
    writer.add_array("arrays", [[1, 2], [3]])
    writer.add_string("text", "x" * 100_000)
    for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"):
        getattr(writer, f"add_{kind}")(kind, 7)
    writer.add_uint64("uint64", 2**63)
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.5)
    writer.add_bool("bool", True)
    values = np.random.default_rng(0).standard_normal((6, 256), np.float32)
    for kind in ("Q4_0", "Q8_0", "Q5_1", "F16", "BF16"):
        packing = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(values, packing), None, packing)
    blocks = np.zeros((6, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K][1]))
    packing = gguf.GGMLQuantizationType.Q6_K
    writer.add_tensor("Q6_K", blocks.astype(np.uint8), None, packing)
    writer.add_tensor("F32", values[:, :5].copy())
    writer.add_tensor("one", np.ones(1, np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_tensors_lie_where_the_package_finds_them(
    tmp_path: Path, alignment: int | None
) -> None:
    path = _with_values(tmp_path / "model.gguf", alignment)
    file = GgufFile(path)
    known = gguf.GGUFReader(path).tensors
    assert set(file.tensors) == {tensor.name for tensor in known}
    for tensor in known:
        found = file.tensors[tensor.name]
        assert (found.offset, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
        data = file.mapped(found)
        assert data.view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
        packed = file.packings.get(tensor.name)
        assert packed == (tensor.name if tensor.name.startswith("Q") else None)
        if tensor.name != "BF16":  # bytes for the package, numbers for PyTorch
            assert found.shape == tensor.data.shape
    assert file.tensors["BF16"].shape == (6, 256)
    file.close()


@pytest.mark.parametrize("kept", [0, 3, 40, 400, 150_000, -100, -5000])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, kept: int) -> None:
    path = _with_values(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.gguf: .*fetch it again"):
        load_model(linears, path, _policy(tmp_path))


def test_a_damaged_header_is_refused_or_read_within_the_file(tmp_path: Path) -> None:
    whole = _saved(packed_by("Q8_0"), tmp_path).read_bytes()
    path, random = tmp_path / "damaged.gguf", Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(random.choice([1, 1, 2, 8])):
            data[random.randrange(700)] = random.choice(
                [0, 1, 255, random.randrange(256)]
            )
        path.write_bytes(data)
        try:
            file = GgufFile(path)
        except CheckpointError:
            refused += 1
            continue
        for location in file.tensors.values():
            assert 0 <= location.offset <= len(whole) - location.nbytes
            file.mapped(location)
        file.close()
    assert 100 < refused < 400


@pytest.mark.parametrize(
    ("place", "number", "match"),
    [
        (-8, 70_000, "a name has 70000 bytes"),
        (8, 9 + (256 << 32), "'0.weight' is there twice, or has no shape"),
        (12, 255, "'0.weight' has rows of 255 values"),
        (12, 2**60, "'0.weight' ends at byte|does not begin where"),
        (28, 777, r"'0.weight' is packed in a way \(777\)"),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    tmp_path: Path, place: int, number: int, match: str
) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)
    data = bytearray(path.read_bytes())
    name = data.index(b"0.weight")  # length, name, dimensions, shape, packing, offset
    data[name + place : name + place + 8] = number.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        GgufFile(path)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf", {"a": torch.ones(8), "b": torch.ones(8)})
    data = path.read_bytes()
    offset = data.index((32).to_bytes(8, "little"), data.index(b"b" + bytes([1])))
    moved = data[:offset] + (0).to_bytes(8, "little") + data[offset + 8 :]
    path.write_bytes(moved)
    with pytest.raises(CheckpointError, match="tensor 'b' does not begin where"):
        GgufFile(path)


def test_the_byte_order_of_another_machine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "none", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("0.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="byte order"):
        load_model(linears, path, _policy(tmp_path))


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hookoffload\[gguf\]'"):
        load_model(linears, path, _policy(tmp_path))


def test_plan_is_made_of_a_files_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed_by("Q8_0")
    path = _saved(source, tmp_path)
    policy = OffloadPolicy(limit_gb=0, compute_device="cuda")
    plan, attached = offload_plan(path, policy), offload_plan(source, policy)
    assert plan.pass_bytes == attached.pass_bytes > 0
    assert {layer.name for layer in plan.layers} == {
        layer.name for layer in attached.layers
    }
    assert main(["plan", str(path), "--limit-gb=0"]) == 0
    assert str(plan) in capsys.readouterr().out


def test_convert_leaves_packed_weights_to_those_that_know_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)
    error = error_of(capsys, "convert", str(path), str(tmp_path / "out"))
    assert "'0.weight' is packed as Q8_0" in error
    assert not (tmp_path / "out").exists()


def test_command_without_the_package_gguf_names_the_extra(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = _saved(packed_by("Q8_0"), tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "hookoffload[gguf]" in error_of(capsys, "plan", str(path))

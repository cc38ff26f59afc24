"""What a policy accepts, what it refuses, and what it resolves to."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hookoffload.budget import GIB
from hookoffload.module_map import ModuleMap
from hookoffload.placement import Placement
from hookoffload.policy import OffloadPolicy

CPU = torch.device("cpu")
BF16, FP16, FP32, FP8 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
)
DISK = Placement(device="disk")
IN_RAM = Placement(device="cpu")

# The two configurations of the seed system's documentation.
SEED_RAM = {
    "offload_dtype": torch.bfloat16,
    "offload_device": "cpu",
    "onload_dtype": torch.bfloat16,
    "onload_device": "cpu",
    "preparing_dtype": torch.bfloat16,
    "preparing_device": "cuda",
    "computation_dtype": torch.bfloat16,
    "computation_device": "cuda",
}
SEED_DISK = {
    "offload_dtype": "disk",
    "offload_device": "disk",
    "onload_dtype": "disk",
    "onload_device": "disk",
    "preparing_dtype": torch.bfloat16,
    "preparing_device": "cuda",
    "computation_dtype": torch.bfloat16,
    "computation_device": "cuda",
}


def without_gpu(config: dict[str, Any]) -> dict[str, Any]:
    return {key: "cpu" if value == "cuda" else value for key, value in config.items()}


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with cuda:0 and cuda:1, the latter being the current one."""
    answers: dict[str, Callable[[], object]] = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cuda"),
        "device_count": lambda: 2,
        "current_device_index": lambda: 1,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, name, answer, raising=False)


def refused(*words: str, **fields: Any) -> None:
    """Asserts that a policy of these fields is a ValueError that has these words."""
    with pytest.raises(ValueError) as caught:
        OffloadPolicy(**fields)
    for word in words:
        assert word in str(caught.value)


# --- placements ---


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "disk"},
        {"dtype": "disk"},
        {"device": "disk", "dtype": "disk"},
        {"device": "cpu", "dtype": "disk"},
    ],
)
def test_disk_as_device_or_dtype_puts_a_placement_on_disk(
    fields: dict[str, str],
) -> None:
    placement = Placement(**fields)
    assert placement.on_disk
    assert placement == DISK
    assert placement.device == "disk"
    assert placement.dtype is None


def test_placement_on_disk_keeps_the_dtype_of_its_bytes() -> None:
    assert Placement(device="disk", dtype=FP8).dtype == FP8


def test_placement_on_a_device_is_not_on_disk() -> None:
    assert not Placement(device="cuda:1", dtype=BF16).on_disk
    assert not Placement().on_disk


@pytest.mark.parametrize("device", ["cuda:1", torch.device("cuda", 1)])
def test_placement_takes_devices_and_their_names(device: torch.device | str) -> None:
    assert Placement(device=device).device == torch.device("cuda", 1)


def test_placement_on_the_cpu_has_no_index() -> None:
    assert Placement(device="cpu:0").device == CPU


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", 0, 1, True, 1.5])
def test_unknown_device_is_refused_with_the_known_kinds(device: object) -> None:
    with pytest.raises(ValueError) as caught:
        Placement(device=device)  # type: ignore[arg-type]
    for word in (f"device={device!r}", "cpu", "cuda", "xpu", "mps", "disk"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        "bfloat16",
        float,
        16,
    ],
)
def test_dtype_that_is_not_floating_is_refused(dtype: Any) -> None:
    for name, make in (
        ("dtype", lambda: Placement(dtype=dtype)),
        ("compute_dtype", lambda: OffloadPolicy(compute_dtype=dtype)),
        ("storage_dtype", lambda: OffloadPolicy(storage_dtype=dtype)),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert f"{name}={dtype!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["float4_e2m1fn_x2", "float8_e8m0fnu"])
def test_dtype_that_no_cast_keeps_the_value_in_is_refused(name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip("this torch does not have the dtype")
    with pytest.raises(ValueError, match=name):
        Placement(dtype=dtype)


def test_float8_is_a_dtype_for_storage_and_compute() -> None:
    policy = OffloadPolicy(storage_dtype=torch.float8_e5m2, compute_dtype=FP8)
    assert policy.compute_dtype == FP8


# --- the limit ---


@pytest.mark.parametrize(
    "limit",
    [True, False, "2", "2GB", math.nan, -1, -0.001, math.inf, -math.inf, 1 + 0j, [2]],
)
def test_limit_that_is_no_number_of_gib_is_refused_with_its_value(limit: Any) -> None:
    refused(f"limit_gb={limit!r}", "GiB", limit_gb=limit)
    with pytest.raises(ValueError, match="vram_limit="):
        OffloadPolicy.from_vram_config({}, vram_limit=limit)


@pytest.mark.parametrize("limit", [10**400, 1e308])
def test_limit_too_large_to_count_in_bytes_is_refused(limit: float) -> None:
    refused("limit_gb=", limit_gb=limit)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, None), (0, 0), (2, 2 * 2**30), (0.5, 2**29), (Fraction(3, 2), 3 * 2**29)],
)
def test_limit_counts_in_gib(limit: Any, expected: int | None) -> None:
    policy = OffloadPolicy(limit_gb=limit, compute_device="cpu")
    assert policy.resolve().limit_bytes == expected


@given(st.floats(min_value=0, max_value=1e9))
def test_limit_in_bytes_is_the_limit_said_and_zero_only_for_zero(limit: float) -> None:
    resolved = OffloadPolicy(limit_gb=limit, compute_device="cpu").resolve()
    assert resolved.limit_bytes is not None
    exact = Fraction(limit) * GIB
    assert exact - 1 < resolved.limit_bytes <= max(exact, 1)
    assert (resolved.limit_bytes == 0) == (limit == 0)


# --- short fields and placements ---


def test_default_policy_rests_in_ram_and_computes_in_each_tensors_dtype(
    no_accelerator: None,
) -> None:
    resolved = OffloadPolicy().resolve()
    assert resolved.limit_bytes is None
    assert resolved.compute_device == CPU
    assert resolved.compute_dtype is None
    assert resolved.offload == resolved.onload == resolved.preparing == IN_RAM
    assert resolved.disk_dir is None
    assert resolved.module_map == ModuleMap()


ON_CPU = {"compute_device": "cpu"}
SPELLINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (ON_CPU, {"computation": IN_RAM}),
    (
        ON_CPU | {"compute_dtype": BF16},
        {"computation": Placement(device="cpu", dtype=BF16)},
    ),
    (ON_CPU | {"compute_dtype": BF16}, ON_CPU | {"computation": Placement(dtype=BF16)}),
    (ON_CPU | {"store": "cpu"}, ON_CPU | {"offload": IN_RAM, "onload": IN_RAM}),
    (ON_CPU | {"store": "disk"}, ON_CPU | {"offload": DISK, "onload": DISK}),
    (ON_CPU | {"store": "disk"}, ON_CPU | {"onload": DISK}),
    (
        ON_CPU | {"storage_dtype": FP8},
        ON_CPU | {"offload": Placement(dtype=FP8), "onload": Placement(dtype=FP8)},
    ),
    (ON_CPU | {"storage_dtype": FP8}, ON_CPU | {"offload": Placement(dtype=FP8)}),
    (
        ON_CPU | {"store": "disk", "storage_dtype": FP8},
        ON_CPU | {"onload": Placement(device="disk", dtype=FP8)},
    ),
    (
        ON_CPU | {"store": "disk", "storage_dtype": FP8},
        ON_CPU | {"store": "disk", "offload": Placement(dtype=FP8)},
    ),
]


@pytest.mark.parametrize(("short", "long"), SPELLINGS)
def test_short_fields_are_a_spelling_of_the_placements(
    short: dict[str, Any], long: dict[str, Any]
) -> None:
    expected = OffloadPolicy(**short).resolve()
    assert OffloadPolicy(**long).resolve() == expected
    assert OffloadPolicy(**(short | long)).resolve() == expected


def test_storage_dtype_on_disk_is_the_dtype_of_the_file() -> None:
    policy = OffloadPolicy(store="disk", storage_dtype=FP8, compute_device="cpu")
    resolved = policy.resolve()
    assert resolved.offload == resolved.onload == Placement(device="disk", dtype=FP8)


def test_offload_on_disk_alone_waits_in_ram() -> None:
    resolved = OffloadPolicy(offload=DISK, compute_device="cpu").resolve()
    assert resolved.offload == DISK
    assert resolved.onload == IN_RAM


def test_storage_dtype_in_ram_leaves_the_file_as_it_is() -> None:
    waiting = Placement(device="cpu", dtype=FP8)
    policy = OffloadPolicy(offload=DISK, onload=waiting, compute_device="cpu")
    resolved = policy.resolve()
    assert resolved.offload == DISK
    assert resolved.onload == waiting


def test_preparing_dtype_is_left_to_each_tensor_unless_given() -> None:
    fields: dict[str, Any] = {"compute_device": "cpu", "compute_dtype": BF16}
    preparing = OffloadPolicy(**fields).resolve().preparing
    assert preparing == IN_RAM
    given_dtype = OffloadPolicy(**fields, preparing=Placement(dtype=FP8)).resolve()
    assert given_dtype.preparing == Placement(device="cpu", dtype=FP8)


def test_preparing_on_disk_keeps_no_layer_resident() -> None:
    policy = OffloadPolicy(preparing=Placement(dtype="disk"), compute_device="cpu")
    assert policy.resolve().preparing is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"compute_dtype": BF16, "computation": Placement(dtype=FP16)},
            ["compute_dtype=torch.bfloat16", "computation.dtype=torch.float16"],
        ),
        (
            {"compute_device": "cpu", "computation": Placement(device="cuda")},
            ["compute_device='cpu'", "computation.device='cuda'"],
        ),
        (
            {"compute_device": "cuda:0", "computation": Placement(device="cuda:1")},
            ["compute_device='cuda:0'", "computation.device='cuda:1'"],
        ),
        (
            {"storage_dtype": FP8, "offload": Placement(dtype=BF16)},
            ["storage_dtype=torch.float8_e4m3fn", "offload.dtype=torch.bfloat16"],
        ),
        (
            {"storage_dtype": FP8, "onload": Placement(dtype=BF16)},
            ["storage_dtype=torch.float8_e4m3fn", "onload.dtype=torch.bfloat16"],
        ),
        (
            {"store": "disk", "onload": IN_RAM},
            ["store='disk'", "onload.device='cpu'"],
        ),
        (
            {"store": "disk", "offload": IN_RAM},
            ["store='disk'", "offload.device='cpu'"],
        ),
        ({"store": "cpu", "offload": DISK}, ["store='cpu'", "offload.device='disk'"]),
        (
            {"offload": IN_RAM, "onload": DISK},
            ["offload.device='cpu'", "onload.device='disk'"],
        ),
        (
            {"offload": Placement(device="cuda"), "onload": IN_RAM},
            ["offload.device='cuda'", "onload.device='cpu'"],
        ),
        (
            {
                "offload": Placement(device="disk", dtype=FP8),
                "onload": Placement(device="disk", dtype=BF16),
            },
            ["offload.dtype=torch.float8_e4m3fn", "onload.dtype=torch.bfloat16"],
        ),
        ({"disk_dir": "/spill"}, ["disk_dir='/spill'", "store=None"]),
        (
            {"disk_dir": "/spill", "offload": IN_RAM},
            ["disk_dir='/spill'", "offload.device='cpu'"],
        ),
        (
            {"disk_dir": "/spill", "preparing": DISK},
            ["disk_dir='/spill'", "nothing is on disk"],
        ),
        (
            {"compute_device": "cuda", "preparing": IN_RAM},
            ["compute_device='cuda'", "preparing.device='cpu'"],
        ),
        (
            {"computation": Placement(device="cuda:0"), "preparing": IN_RAM},
            ["computation.device='cuda:0'", "preparing.device='cpu'"],
        ),
        (
            {"compute_device": "cuda:0", "onload": Placement(device="cuda:1")},
            ["compute_device='cuda:0'", "onload.device='cuda:1'"],
        ),
        (
            {"compute_device": "cpu", "preparing": Placement(device="cuda")},
            ["compute_device='cpu'", "preparing.device='cuda'"],
        ),
    ],
)
def test_contradiction_is_refused_naming_both_fields_and_values(
    fields: dict[str, Any], words: list[str]
) -> None:
    refused(*words, **fields)


@pytest.mark.parametrize("device", ["disk", "meta", "gpu", 0])
def test_compute_device_that_cannot_compute_is_refused(device: Any) -> None:
    refused(f"compute_device={device!r}", "cuda", compute_device=device)


def test_computation_on_disk_is_refused() -> None:
    refused("computation=", "device='disk'", computation=DISK)


@pytest.mark.parametrize("store", ["ram", "", 0, True])
def test_unknown_store_is_refused(store: Any) -> None:
    refused(f"store={store!r}", "'cpu'", "'disk'", store=store)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/spill"

    def __repr__(self) -> str:
        return "BytesPath()"


@pytest.mark.parametrize("folder", [1, "", b"/spill", BytesPath()])
def test_disk_dir_that_is_no_path_is_refused(folder: Any) -> None:
    refused(f"disk_dir={folder!r}", store="disk", disk_dir=folder)


@pytest.mark.parametrize("state", ["offload", "onload", "preparing", "computation"])
def test_placement_field_of_another_type_is_refused(state: str) -> None:
    refused(f"{state}='cpu'", "Placement(", **{state: "cpu"})


def test_disk_dir_is_resolved_with_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    policy = OffloadPolicy(store="disk", disk_dir="~/spill", compute_device="cpu")
    assert policy.resolve().disk_dir == tmp_path / "spill"


def test_disk_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    policy = OffloadPolicy(store="disk", disk_dir=file, compute_device="cpu")
    with pytest.raises(ValueError, match=r"disk_dir=.*file.*not a folder"):
        policy.resolve()


# --- devices of this machine ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compute_device": "cuda"}, "compute_device='cuda' but this machine"),
        (
            {"computation": Placement(device="cuda")},
            "computation.device='cuda' but this machine",
        ),
    ],
)
def test_absent_device_is_refused_when_resolving(
    no_accelerator: None, fields: dict[str, Any], words: str
) -> None:
    policy = OffloadPolicy(**fields)
    with pytest.raises(ValueError) as caught:
        policy.resolve()
    assert words in str(caught.value)
    assert "available: cpu" in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:2", "xpu"])
def test_absent_index_or_kind_is_refused_with_what_there_is(
    two_gpus: None, device: str
) -> None:
    with pytest.raises(ValueError, match="available: cuda:0, cuda:1, cpu"):
        OffloadPolicy(compute_device=device).resolve()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "cuda:1"),
        ({"compute_device": "cuda"}, "cuda:1"),
        ({"compute_device": "cuda:0"}, "cuda:0"),
        ({"computation": Placement(device="cuda:0")}, "cuda:0"),
        (
            {"compute_device": "cuda", "computation": Placement(device="cuda:0")},
            "cuda:0",
        ),
        (
            {"compute_device": "cuda:0", "computation": Placement(device="cuda")},
            "cuda:0",
        ),
        ({"compute_device": "cpu"}, "cpu"),
    ],
)
def test_resolved_compute_device_has_its_index(
    two_gpus: None, fields: dict[str, Any], expected: str
) -> None:
    resolved = OffloadPolicy(**fields).resolve()
    assert resolved.compute_device == torch.device(expected)
    assert resolved.preparing == Placement(device=expected)


def test_device_without_an_index_is_the_compute_device(two_gpus: None) -> None:
    policy = OffloadPolicy(
        compute_device="cuda:0",
        onload=Placement(device="cuda"),
        preparing=Placement(device="cuda", dtype=FP8),
    )
    resolved = policy.resolve()
    assert resolved.offload == IN_RAM
    assert resolved.onload == Placement(device="cuda:0")
    assert resolved.preparing == Placement(device="cuda:0", dtype=FP8)


def test_offload_on_the_compute_device_waits_there_too(two_gpus: None) -> None:
    resolved = OffloadPolicy(offload=Placement(device="cuda")).resolve()
    assert resolved.offload == resolved.onload == Placement(device="cuda:1")


def test_placement_on_another_device_than_the_default_is_refused_when_resolving(
    two_gpus: None,
) -> None:
    for state, device in (("preparing", "cpu"), ("onload", "cuda:0")):
        policy = OffloadPolicy(**{state: Placement(device=device)})
        with pytest.raises(ValueError) as caught:
            policy.resolve()
        assert f"{state}.device={device!r}" in str(caught.value)
        assert "compute_device='cuda:1'" in str(caught.value)


# --- the policy as a value ---


def test_module_map_is_checked_and_copied() -> None:
    source = {nn.Linear: "layer"}
    policy = OffloadPolicy(module_map=source, compute_device="cpu")
    source[nn.Linear] = "atomic"
    assert policy.resolve().module_map.kind_of(nn.Linear(2, 2)) == "layer"
    refused("'leaf'", module_map={nn.Linear: "leaf"})


def test_policies_that_name_a_device_differently_are_equal() -> None:
    named = OffloadPolicy(compute_device="cuda:1")
    assert named == OffloadPolicy(compute_device=torch.device("cuda", 1))
    assert named.compute_device == torch.device("cuda", 1)


def test_policy_can_be_replaced_copied_pickled_and_compared() -> None:
    policy = OffloadPolicy(
        limit_gb=2,
        compute_device="cpu",
        offload=Placement(device="disk", dtype=FP8),
        module_map={"torch.nn.Linear": "layer"},
    )
    assert dataclasses.replace(policy, limit_gb=2.0) == policy
    assert dataclasses.replace(policy, limit_gb=3) != policy
    assert copy.deepcopy(policy) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert len({policy, copy.deepcopy(policy)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.limit_gb = 4  # type: ignore[misc]


def test_placement_can_be_replaced() -> None:
    placement = Placement(device="cpu", dtype=BF16)
    assert dataclasses.replace(placement, dtype=FP32) == Placement(
        device="cpu", dtype=FP32
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.dtype = FP16  # type: ignore[misc]


# --- the seed system's configurations ---


@pytest.mark.parametrize("config", [SEED_RAM, SEED_DISK])
def test_seed_documents_configuration_needs_no_gpu_to_be_read(
    no_accelerator: None, config: dict[str, Any]
) -> None:
    policy = OffloadPolicy.from_vram_config(config, vram_limit=0)
    with pytest.raises(ValueError, match="'cuda' but this machine"):
        policy.resolve()


def test_seed_documents_configuration_in_ram_means_what_it_says() -> None:
    policy = OffloadPolicy.from_vram_config(without_gpu(SEED_RAM), vram_limit=0)
    resolved = policy.resolve()
    assert resolved.limit_bytes == 0
    assert resolved.compute_device == CPU
    assert resolved.compute_dtype == BF16
    in_bf16 = Placement(device="cpu", dtype=BF16)
    assert resolved.offload == resolved.onload == resolved.preparing == in_bf16


def test_seed_documents_configuration_on_disk_means_what_it_says() -> None:
    policy = OffloadPolicy.from_vram_config(
        without_gpu(SEED_DISK), vram_limit=2, module_map={nn.Linear: "linear"}
    )
    resolved = policy.resolve()
    assert resolved.limit_bytes == 2 * GIB
    assert resolved.offload == resolved.onload == DISK
    assert resolved.preparing == Placement(device="cpu", dtype=BF16)
    assert resolved.module_map.kind_of(nn.Linear(2, 2)) == "atomic"


def test_missing_vram_keys_are_those_of_the_computation() -> None:
    policy = OffloadPolicy.from_vram_config(
        {
            "offload_device": "cpu",
            "onload_dtype": FP8,
            "preparing_dtype": None,
            "computation_dtype": BF16,
            "computation_device": "cuda",
        }
    )
    assert policy.offload == Placement(device="cpu", dtype=BF16)
    assert policy.onload == Placement(device="cuda", dtype=FP8)
    assert policy.preparing == Placement(device="cuda", dtype=BF16)
    assert policy.computation == Placement(device="cuda", dtype=BF16)


@pytest.mark.parametrize("key", ["offload_dtype", "offload_device"])
def test_disk_in_one_vram_key_puts_the_state_on_disk(key: str) -> None:
    policy = OffloadPolicy.from_vram_config(
        {key: "disk", "computation_dtype": BF16, "computation_device": "cuda"}
    )
    assert policy.offload == DISK


def test_empty_vram_config_is_all_on_the_default_device(two_gpus: None) -> None:
    resolved = OffloadPolicy.from_vram_config({}).resolve()
    on_gpu = Placement(device="cuda:1")
    assert resolved.offload == resolved.onload == resolved.preparing == on_gpu
    assert resolved.compute_device == torch.device("cuda:1")
    assert resolved.compute_dtype is None


def test_unknown_vram_key_is_refused_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'ofload_dtype'.*offload_dtype"):
        OffloadPolicy.from_vram_config({"ofload_dtype": BF16})
    with pytest.raises(ValueError, match=r"'zzz'.*onload_device"):
        OffloadPolicy.from_vram_config({"zzz": BF16})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("offload_device", "gpu"),
        ("onload_dtype", torch.int8),
        ("preparing_device", 0),
        ("computation_device", "disk"),
        ("computation_dtype", "disk"),
    ],
)
def test_illegal_vram_value_is_refused_naming_its_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        OffloadPolicy.from_vram_config({key: value})
    assert f"vram_config['{key}']={value!r}" in str(caught.value)


def test_vram_config_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="not a mapping"):
        OffloadPolicy.from_vram_config([("offload_device", "cpu")])  # type: ignore[arg-type]

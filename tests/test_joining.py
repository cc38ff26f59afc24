"""Models that `load_model` attached join others under one limit."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hookoffload import (
    BudgetExceededError,
    CheckpointError,
    OffloadPolicy,
    Placement,
    activate,
    add_lora,
    attach_offload_hooks,
    clear_lora,
    detach,
    load_model,
    offload_plan,
    offload_stats,
    save_model,
    set_limit,
)
from hookoffload.state_hooks import session_of
from tests.quantised_models import coded, rows
from tests.samples import (
    GIB,
    Picture,
    Stack,
    lies_in_a_file,
    linears,
    run,
    same_bits,
    weight_bytes,
)

WIDTH = 64
LAYER = WIDTH * WIDTH * 4
X = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="the system does not list open files"
)

STORES: dict[str, dict[str, Any]] = {
    "disk": {"store": "disk"},
    "RAM": {"store": "cpu"},
    "RAM while in use": {
        "store": None,
        "offload": Placement(device="disk"),
        "onload": Placement(device="cpu"),
    },
    "three tiers": {"store": "disk", "host_limit_gb": 3 * LAYER / GIB},
}


def _policy(layers: float, **fields: Any) -> OffloadPolicy:
    fields = {"store": "disk", **fields}
    limit = layers * LAYER / GIB
    return OffloadPolicy(limit_gb=limit, compute_device="cpu", **fields)


def _source(depth: int = 8) -> nn.Sequential:
    torch.manual_seed(depth)
    return linears(WIDTH, depth)


def _loaded(folder: Path, depth: int = 8, **fields: Any) -> nn.Sequential:
    path = folder / f"of-{depth}.safetensors"
    if not path.exists():
        save_file(_source(depth).state_dict(), path)
    policy = _policy(4, **{"store": "disk", **fields})
    return load_model(lambda: linears(WIDTH, depth), path, policy)


def _open_files(folder: Path) -> int:
    gc.collect()
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(
        os.readlink(link).startswith(str(folder))
        for link in links
        if os.path.lexists(link)
    )


def _maps(model: nn.Module) -> int:
    """Count the memory maps that weights lie in; each keeps its file open."""
    return int(any(map(lies_in_a_file, model.parameters())))


@ON_LINUX
@pytest.mark.parametrize("after", STORES)
@pytest.mark.parametrize("before", STORES)
def test_a_loaded_model_and_a_module_share_one_limit(
    before: str, after: str, tmp_path: Path
) -> None:
    loaded = _loaded(tmp_path, **STORES[before])
    models = {"loaded": loaded, "module": _source(5)}
    picture = Picture(models["module"])
    want = {"loaded": run(_source(8), X), "module": run(_source(5), X)}
    parameters = [id(parameter) for parameter in loaded.parameters()]
    run(loaded, X)
    policy = _policy(6, **STORES[after])
    assert attach_offload_hooks(models, policy) is models
    for _ in range(3):
        for name, model in models.items():
            assert same_bits(run(model, X), want[name])
    stats = offload_stats(models)
    assert stats.peak_bytes <= 6 * LAYER
    if "RAM" not in after:  # which a CPU computes with where it lies
        assert stats.peak_bytes > 4 * LAYER
    detach(models)
    assert [id(parameter) for parameter in loaded.parameters()] == parameters
    assert picture.differences(models["module"]) == []
    for name, model in models.items():
        assert same_bits(run(model, X), want[name])
    assert _open_files(tmp_path) == _maps(loaded)


def test_weights_that_lie_in_the_checkpoint_are_not_written_again(
    tmp_path: Path,
) -> None:
    loaded = _loaded(tmp_path)
    models = {"loaded": loaded, "module": _source(5)}
    attach_offload_hooks(models, _policy(6, disk_dir=tmp_path / "spilled"))
    assert all(lies_in_a_file(weight) for weight in loaded.parameters())
    spilled = (tmp_path / "spilled").rglob("*.safetensors")
    assert sum(p.stat().st_size for p in spilled) < 1.2 * weight_bytes(models["module"])
    detach(models)


@pytest.mark.parametrize("cached", [False, True])
def test_a_loaded_model_that_is_coded_joins_and_is_coded_again(
    cached: bool, tmp_path: Path
) -> None:
    source = _source(8).to(torch.bfloat16)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    x = X.to(torch.bfloat16)
    want = run(source, x)
    policy = _policy(20, store="cpu", codec="lossless")
    for _ in range(2):
        loaded = load_model(
            lambda: linears(WIDTH, 8).to(torch.bfloat16),
            tmp_path / "model.safetensors",
            policy,
            cache_dir=tmp_path / "cache",
            cache_codes=cached,
        )
        models = {"loaded": loaded, "module": _source(5)}
        attach_offload_hooks(models, policy)
        for _ in range(2):
            assert same_bits(run(loaded, x), want)
        detach(models)
        assert same_bits(run(loaded, x), want)


def test_a_pipeline_of_loaded_models_is_one(tmp_path: Path) -> None:
    pipe = SimpleNamespace(
        components={
            "text": _loaded(tmp_path, 3),
            "denoiser": _loaded(tmp_path, 8),
            "scheduler": object(),
        }
    )
    attach_offload_hooks(pipe, _policy(5))
    for _ in range(2):
        for name, depth in {"text": 3, "denoiser": 8}.items():
            assert same_bits(run(pipe.components[name], X), run(_source(depth), X))
    activate(pipe, ["text"])
    set_limit(pipe, 4 * LAYER / GIB)
    assert same_bits(run(pipe.components["denoiser"], X), run(_source(8), X))
    assert set(offload_plan(pipe)) == {"text", "denoiser"}
    assert offload_stats(pipe).peak_bytes <= 5 * LAYER
    detach(pipe)


@ON_LINUX
@pytest.mark.parametrize("store", STORES)
def test_where_the_others_do_not_fit_the_loaded_model_stays_as_it_was(
    store: str, tmp_path: Path
) -> None:
    loaded = _loaded(tmp_path, **STORES[store])
    limit = offload_stats(loaded).limit_bytes
    wide = nn.Linear(8 * WIDTH, 8 * WIDTH)
    before = Picture(wide)
    open_files = _open_files(tmp_path)
    for models in ({"loaded": loaded, "wide": wide}, {"wide": wide, "loaded": loaded}):
        with pytest.raises(BudgetExceededError, match=r"^wide: "):
            attach_offload_hooks(models, _policy(6))
    assert session_of(wide) is None
    assert before.differences(wide) == []
    for _ in range(2):
        assert same_bits(run(loaded, X), run(_source(8), X))
    assert offload_stats(loaded).limit_bytes == limit
    assert _open_files(tmp_path) == open_files
    detach(loaded)
    assert _open_files(tmp_path) == _maps(loaded)


def test_where_a_disk_refuses_the_loaded_model_stays_as_it_was(tmp_path: Path) -> None:
    loaded, module = _loaded(tmp_path), _source(5)
    (tmp_path / "file").write_text("no folder")
    policy = _policy(6, disk_dir=tmp_path / "file" / "below")
    models = {"loaded": loaded, "module": module}
    with pytest.raises(CheckpointError, match=r"^module: .*disk_dir"):
        attach_offload_hooks(models, policy)
    assert same_bits(run(loaded, X), run(_source(8), X))
    attach_offload_hooks(models, _policy(6))
    assert same_bits(run(loaded, X), run(_source(8), X))
    detach(models)


@pytest.mark.parametrize("store", ["disk", "RAM"])
def test_what_was_written_to_a_loaded_model_joins_with_it(
    store: str, tmp_path: Path
) -> None:
    loaded, changed = _loaded(tmp_path, **STORES[store]), _source(8)
    run(loaded, X)
    with torch.no_grad():
        loaded[1].weight.mul_(2)
        changed[1].weight.mul_(2)
    models = {"loaded": loaded, "module": _source(5)}
    attach_offload_hooks(models, _policy(6))
    with torch.no_grad():
        loaded[2].weight.mul_(3)
        changed[2].weight.mul_(3)
    assert same_bits(run(loaded, X), run(changed, X))
    detach(models)
    assert same_bits(run(loaded, X), run(changed, X))


def test_a_parameter_that_replaced_a_loaded_one_joins_in_its_place(
    tmp_path: Path,
) -> None:
    loaded, changed = _loaded(tmp_path), _source(8)
    new = torch.randn(WIDTH, WIDTH)
    for model in (loaded, changed):
        model[3].weight = nn.Parameter(new.clone())
    models = {"loaded": loaded, "module": _source(5)}
    attach_offload_hooks(models, _policy(6))
    assert same_bits(run(loaded, X), run(changed, X))
    detach(models)
    assert same_bits(run(loaded, X), run(changed, X))


def test_a_converted_checkpoint_in_a_temporary_folder_stays_while_it_is_read(
    tmp_path: Path,
) -> None:
    source = _source(4)
    save_file({k: v / 2 for k, v in source.state_dict().items()}, tmp_path / "h")
    (tmp_path / "no folder").write_text("")
    (tmp_path / "h").rename(tmp_path / "half.safetensors")
    loaded = load_model(
        lambda: linears(WIDTH, 4),
        tmp_path / "half.safetensors",
        _policy(3),
        state_dict_converter=lambda state: {k: v * 2 for k, v in state.items()},
        cache_dir=tmp_path / "no folder" / "cache",
    )
    models = {"loaded": loaded, "stack": Stack(WIDTH)}
    attach_offload_hooks(models, _policy(6))
    gc.collect()
    for _ in range(2):
        assert same_bits(run(loaded, X), run(source, X))
    detach(models)


def test_parts_of_quantised_weights_are_read_from_the_file_as_before(
    tmp_path: Path,
) -> None:
    source, x = coded(), rows()
    want = run(source, x)
    save_model(source, tmp_path / "model.safetensors")
    loaded = load_model(coded, tmp_path / "model.safetensors", _policy(400))
    read = offload_stats(loaded).disk_bytes
    models = {"loaded": loaded, "module": _source(5)}
    attach_offload_hooks(models, _policy(400))
    for _ in range(2):
        assert same_bits(run(loaded, x), want)
    assert offload_stats(loaded).disk_bytes == read
    session = session_of(loaded)
    assert session is not None
    assert len(session.store.masters_in_files()) == len(session.store.masters)
    detach(models)
    assert same_bits(run(loaded, x), want)


def test_a_checkpoint_that_has_changed_does_not_join(tmp_path: Path) -> None:
    loaded = _loaded(tmp_path)
    os.utime(tmp_path / "of-8.safetensors", ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"^loaded: .*was written to"):
        attach_offload_hooks({"loaded": loaded, "module": _source(5)}, _policy(6))
    assert session_of(loaded) is not None
    detach(loaded)


def test_a_loaded_model_with_loras_is_asked_to_give_them_up(tmp_path: Path) -> None:
    loaded = _loaded(tmp_path)
    factors = {"0.lora_A.weight": torch.ones(2, WIDTH)}
    add_lora(loaded, {**factors, "0.lora_B.weight": torch.ones(WIDTH, 2)})
    models = {"loaded": loaded, "module": _source(5)}
    with pytest.raises(RuntimeError, match=r"^loaded: .*has LoRAs.*clear_lora"):
        attach_offload_hooks(models, _policy(6))
    assert session_of(models["module"]) is None
    clear_lora(loaded)
    attach_offload_hooks(models, _policy(6))
    assert same_bits(run(loaded, X), run(_source(8), X))
    detach(models)


def test_a_model_that_runs_does_not_join(tmp_path: Path) -> None:
    loaded = _loaded(tmp_path)

    def join(*_: object) -> None:
        attach_offload_hooks({"loaded": loaded, "module": _source(5)}, _policy(6))

    handle = loaded[2].register_forward_hook(join)
    with pytest.raises(RuntimeError, match=r"^loaded: .*its own forward|between two"):
        run(loaded, X)
    handle.remove()
    assert same_bits(run(loaded, X), run(_source(8), X))
    detach(loaded)


def test_before_they_are_attached_as_one_loaded_models_say_how_to(
    tmp_path: Path,
) -> None:
    models = {"loaded": _loaded(tmp_path), "module": _source(5)}
    message = "not attached as one: loaded.*attach_offload_hooks.*takes it in"
    with pytest.raises(RuntimeError, match=message):
        offload_plan(models, _policy(6))
    detach(models["loaded"])

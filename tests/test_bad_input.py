"""What cannot work is refused: a clear error, the model untouched, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from safetensors.torch import save_file
from torch import nn
from torch.ao.nn.quantized import dynamic

from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    load_model,
    offload,
    offload_plan,
    offload_stats,
    offloaded,
    onload,
)
from tests.garbage import freeze_old_objects
from tests.small_models import (
    TinyModel,
    assert_same,
    chain,
    expected,
    nbytes,
    on_disk,
    run,
    tiny_model,
    tokens,
)
from tests.snapshots import Snapshot, assert_same_surroundings, assert_untouched

STREAMED: dict[str, Any] = {"store": "disk", "limit_gb": 0, "compute_device": "cpu"}


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection() -> None:
    freeze_old_objects()


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@contextlib.contextmanager
def _refused(
    model: nn.Module,
    folder: Path,
    match: str,
    error: type[BaseException] = ValueError,
    *,
    same_memory: bool = True,
) -> Iterator[None]:
    """Fail unless the block is refused and leaves everything as it was."""
    before = Snapshot(model, folder)
    with pytest.raises(error, match=match):
        yield
    assert_untouched(model, before, same_memory=same_memory)


# --- the policy ---


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"limit_gb": -1}, r"limit_gb=-1 is not a number of GiB"),
        ({"limit_gb": -1e-9}, r"limit_gb=-1e-09 is not a number of GiB"),
        ({"limit_gb": math.nan}, r"limit_gb=nan is not a number of GiB"),
        ({"limit_gb": math.inf}, r"limit_gb=inf is not a number of GiB"),
        ({"limit_gb": "2"}, r"limit_gb='2' is not a number of GiB"),
        ({"limit_gb": "2GB"}, r"limit_gb='2GB' is not a number of GiB"),
        ({"limit_gb": True}, r"limit_gb=True is not a number of GiB"),
        ({"compute_device": "gpu"}, r"compute_device='gpu' is no device"),
        ({"compute_device": "cuda:99"}, r"compute_device='cuda:99' but this machine"),
        ({"compute_device": "meta"}, r"compute_device='meta' is no device"),
        ({"compute_dtype": torch.int8}, r"compute_dtype=torch\.int8 is no dtype"),
        ({"store": "ssd"}, r"store='ssd' is unknown"),
        ({"offload": "disk"}, r"offload='disk' is not a Placement"),
        (
            {"module_map": {nn.Linear: "leaf"}},
            r"\['torch.*Linear'\] = 'leaf' is no kind",
        ),
        ({"module_map": {"Linear": 3}}, r"module_map\['Linear'\] = 3 is no kind"),
        ({"module_map": {torch.Tensor: "layer"}}, r"neither a subclass of"),
        ({"module_map": "Linear"}, r"module_map='Linear' is not a mapping"),
        (
            {"store": "cpu", "offload": Placement(device="disk")},
            r"store='cpu' contradicts offload\.device='disk'",
        ),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_bad_policy_is_refused_naming_field_and_value(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    model = tiny_model()
    with _refused(model, tmp_path, match), offloaded(model, **fields):
        pass


@pytest.mark.parametrize("policy", [{"limit_gb": 2}, 2, "2"])
def test_policy_of_another_type_is_refused(tmp_path: Path, policy: Any) -> None:
    model = tiny_model()
    with _refused(model, tmp_path, "policy must be an OffloadPolicy, not"):
        attach_offload_hooks(model, policy)


def test_policy_and_fields_together_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with (
        _refused(model, tmp_path, "either a policy or fields"),
        offloaded(model, OffloadPolicy(), limit_gb=2),
    ):
        pass


def test_class_that_matches_nothing_is_warned_about_with_near_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    module_map = {"torch.nn.Linaer": "layer", nn.Linear: "layer"}
    with caplog.at_level(logging.WARNING, "hookoffload"):
        attach_offload_hooks(model, on_disk(tmp_path, module_map=module_map))
    (warning,) = [r.getMessage() for r in caplog.records if "module_map" in r.message]
    assert "torch.nn.Linaer" in warning
    assert "torch.nn.modules.linear.Linear" in warning
    assert_same(run(model, tokens()), expected(tiny_model(), tokens()))
    detach(model)


# --- the model ---


@pytest.mark.parametrize("model", [None, "model", torch.zeros(3), nn.Linear])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, not"):
        attach_offload_hooks(model)
    with pytest.raises(RuntimeError, match="has no offload hooks"):
        detach(model)


@pytest.mark.parametrize(
    "model", [nn.Identity(), nn.ModuleList(), nn.Sequential(nn.ReLU(), nn.Dropout())]
)
def test_model_without_tensors_is_refused(tmp_path: Path, model: nn.Module) -> None:
    match = rf"{type(model).__name__} has no parameters and no buffers"
    with _refused(model, tmp_path, match):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


def test_model_of_empty_tensors_computes(tmp_path: Path) -> None:
    model = nn.Linear(0, 3, bias=False)
    with offloaded(model, on_disk(tmp_path)):
        assert run(model, torch.zeros(2, 0)).tolist() == [[0.0] * 3] * 2


def test_meta_parameter_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.blocks[1].down = nn.Linear(96, 48, bias=False, device="meta")
    match = r"blocks\.1\.down\.weight is on the meta device .*load_model"
    with _refused(model, tmp_path, match):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


def test_meta_buffer_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.blocks[0].shift = torch.empty(48, device="meta")
    with _refused(model, tmp_path, r"blocks\.0\.shift is on the meta device"):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


@pytest.mark.parametrize(
    ("lazy", "name"),
    [
        (nn.LazyLinear(4), "1.weight is not initialised"),
        (nn.LazyBatchNorm1d(), r"1\.\w+ is not initialised"),
    ],
    ids=["parameter", "buffer too"],
)
def test_lazy_module_is_refused_until_it_is_initialised(
    tmp_path: Path, lazy: nn.Module, name: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 5), lazy)
    hooks = dict(lazy._forward_pre_hooks)
    with pytest.raises(ValueError, match=name):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))
    assert dict(lazy._forward_pre_hooks) == hooks
    assert not model[0]._forward_pre_hooks and list(tmp_path.iterdir()) == []
    x = torch.randn(2, 3)
    run(model, x)
    model.eval()
    wanted = expected(model, x)
    with offloaded(model, OffloadPolicy(**STREAMED)):
        assert_same(run(model, x), wanted)


@pytest.mark.parametrize(
    "lazy",
    [torch.tensor([1 + 2j]).conj(), torch._neg_view(torch.tensor([2.0]))],
    ids=["conjugate", "negative"],
)
def test_lazy_conjugates_and_negatives_are_refused_until_they_are_resolved(
    lazy: torch.Tensor, tmp_path: Path
) -> None:
    model = chain(4, 4)
    model.table = nn.Parameter(lazy)
    with _refused(model, tmp_path, r"table is a lazy .*resolve_conj\(\)"):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))
    model.table = nn.Parameter(lazy.resolve_conj().resolve_neg())
    with offloaded(model, OffloadPolicy(**STREAMED)):
        assert torch.equal(model.state_dict()["table"], lazy)
    assert torch.equal(model.table, lazy)


def test_sparse_parameter_is_refused(tmp_path: Path) -> None:
    model = chain(4, 4)
    model.table = nn.Parameter(torch.eye(4).to_sparse())
    with _refused(model, tmp_path, r"table is a Parameter with layout torch\.sparse"):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


def test_quantised_buffer_is_refused(tmp_path: Path) -> None:
    model = chain(4, 4)
    packed = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    model.register_buffer("packed", packed)
    with _refused(model, tmp_path, r"packed is a Tensor .*[Dd]equantise"):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


def test_dynamically_quantised_model_is_refused_or_computes(tmp_path: Path) -> None:
    """Its weights are packed outside of every tensor: they cannot be managed."""
    model = nn.Sequential(nn.Linear(4, 4), dynamic.Linear(4, 4))
    x = torch.randn(2, 4)
    wanted = run(model, x)
    with offloaded(model, OffloadPolicy(**STREAMED)):
        assert_same(run(model, x), wanted)


class Wrapped(torch.Tensor):
    """A tensor subclass whose bytes lie elsewhere, as those of quantised weights."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = [a.inner if isinstance(a, Wrapped) else a for a in args]
        if func is torch.ops.aten.detach.default:
            return Wrapped(*plain)
        return func(*plain, **(kwargs or {}))


def test_tensor_subclass_whose_bytes_lie_elsewhere_is_refused() -> None:
    model = chain(4, 4)
    model[0].weight = nn.Parameter(Wrapped(torch.randn(4, 4)), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight is a Wrapped"):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))
    assert isinstance(model[0].weight, Wrapped)
    assert not model[0]._forward_pre_hooks


def test_module_that_was_compiled_in_place_is_refused(tmp_path: Path) -> None:
    model = chain(4, 4, 4)
    model[1].compile(backend="eager")
    with _refused(model, tmp_path, r"1 was compiled in place .*Attach first"):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


def test_compiled_model_computes_or_is_refused(tmp_path: Path) -> None:
    model = torch.compile(chain(4, 4, 4), backend="eager")
    x = torch.randn(2, 4)
    wanted = run(chain(4, 4, 4), x)
    before = Snapshot(model, tmp_path)
    try:
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))
    except ValueError as error:
        assert "compile" in str(error)
    else:
        for _ in range(3):
            assert_same(run(model, x), wanted)
        detach(model)
    assert_untouched(model, before, same_memory=False)


def test_model_with_accelerates_hooks_is_refused_naming_them(tmp_path: Path) -> None:
    model = chain(4, 4, 4)
    add_hook_to_module(model[1], ModelHook())
    match = r"1 carries accelerate's hooks \(ModelHook.*remove_hook_from_module"
    with _refused(model, tmp_path, match, RuntimeError):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


@pytest.mark.parametrize(
    "hook",
    [
        lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
        lambda model: dispatch_model(
            model, {"0": "cpu", "1": "cpu"}, main_device="cpu", force_hooks=True
        ),
    ],
    ids=["cpu_offload", "dispatch_model"],
)
def test_model_that_accelerate_offloads_is_refused(
    tmp_path: Path, hook: Callable[[nn.Module], Any]
) -> None:
    model = chain(4, 4, 4)
    hook(model)
    with _refused(model, tmp_path, "carries accelerate's hooks", RuntimeError):
        attach_offload_hooks(model, OffloadPolicy(**STREAMED))


def test_accelerate_that_takes_an_attached_models_values_is_named() -> None:
    model = attach_offload_hooks(chain(4, 4, 4), OffloadPolicy(**STREAMED))
    x = torch.ones(2, 4)
    wanted = run(model, x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    hooks = r"accelerate's hooks \(\w+\).*remove_hook_from_submodules"
    with pytest.raises(RuntimeError, match=hooks):
        run(model, x)
    remove_hook_from_submodules(model)
    assert_same(run(model, x), wanted)
    detach(model)
    assert_same(run(model, x), wanted)


# --- attached twice, or never ---


@pytest.fixture(params=["ram", "disk"])
def attached(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TinyModel]:
    """Yield an attached model, and see that it still works and comes back whole."""
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    store = {} if request.param == "ram" else {"store": "disk"}
    attach_offload_hooks(model, OffloadPolicy(compute_device="cpu", **store))
    yield model
    assert_same(run(model, tokens()), wanted)
    detach(model)
    assert_untouched(model, before, same_memory=False)


def test_second_attach_is_refused(tmp_path: Path, attached: TinyModel) -> None:
    match = r"TinyModel has offload hooks already.*detach"
    with _refused(attached, tmp_path, match, RuntimeError):
        attach_offload_hooks(attached, OffloadPolicy(**STREAMED))
    with (
        _refused(attached, tmp_path, match, RuntimeError),
        offloaded(attached, **STREAMED),
    ):
        pass


def test_attach_to_a_part_of_an_attached_model_is_refused(
    tmp_path: Path, attached: TinyModel
) -> None:
    for name in ("blocks.0", "blocks.1.up", "statistics"):
        with _refused(attached, tmp_path, r"already.*TinyModel", RuntimeError):
            attach_offload_hooks(
                attached.get_submodule(name), OffloadPolicy(**STREAMED)
            )


def test_attach_to_what_contains_an_attached_model_is_refused(
    tmp_path: Path, attached: TinyModel
) -> None:
    whole = nn.ModuleDict({"first": nn.Linear(2, 2), "second": attached})
    with _refused(whole, tmp_path, r"^second has offload hooks", RuntimeError):
        attach_offload_hooks(whole, OffloadPolicy(**STREAMED))


def test_attach_to_a_model_that_shares_a_part_with_an_attached_one_is_refused(
    tmp_path: Path, attached: TinyModel
) -> None:
    other = nn.Sequential(nn.Linear(48, 48), attached.blocks[0])
    with _refused(other, tmp_path, r"^1 has offload hooks", RuntimeError):
        attach_offload_hooks(other, OffloadPolicy(**STREAMED))


def test_attach_to_a_model_that_shares_a_tensor_with_an_attached_one_is_refused(
    tmp_path: Path, attached: TinyModel
) -> None:
    """Two sessions would swap the data of one Parameter under each other."""
    other = nn.Linear(48, 96)
    other.weight = attached.blocks[0].up.weight
    with _refused(other, tmp_path, r"weight.*TinyModel", RuntimeError):
        attach_offload_hooks(other, OffloadPolicy(**STREAMED))


def test_tensors_that_came_and_went_while_attached_are_known(
    tmp_path: Path, attached: TinyModel
) -> None:
    up = attached.blocks[0].up
    gone, come = up.weight, nn.Parameter(torch.ones(96, 48))
    up.weight = come
    run(attached, tokens())
    other = nn.Linear(48, 96)
    other.weight = come
    with _refused(other, tmp_path, r"weight.*TinyModel", RuntimeError):
        attach_offload_hooks(other, OffloadPolicy(**STREAMED))
    other.weight = gone
    detach(attach_offload_hooks(other, OffloadPolicy(**STREAMED)))
    up.weight = gone


FUNCTIONS = [detach, onload, offload, offload_plan, offload_stats]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_model_that_was_never_attached_is_refused(
    tmp_path: Path, function: Callable[[nn.Module], Any]
) -> None:
    model = tiny_model()
    match = rf"{function.__name__}: TinyModel has no offload hooks; call attach"
    with _refused(model, tmp_path, match, RuntimeError):
        function(model)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_model_that_was_detached_is_refused(
    tmp_path: Path, function: Callable[[nn.Module], Any]
) -> None:
    model = tiny_model()
    with offloaded(model, **STREAMED):
        pass
    with _refused(model, tmp_path, "has no offload hooks", RuntimeError):
        function(model)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_part_of_an_attached_model_is_refused(
    tmp_path: Path, attached: TinyModel, function: Callable[[nn.Module], Any]
) -> None:
    match = rf"{function.__name__}: Block is a part of a TinyModel"
    with _refused(attached, tmp_path, match, RuntimeError):
        function(attached.blocks[0])


@pytest.mark.parametrize("function", [detach, onload, offload])
def test_switch_from_inside_the_models_own_forward_is_refused(
    tmp_path: Path, function: Callable[[nn.Module], Any]
) -> None:
    model = tiny_model()
    wanted = expected(model, tokens())
    before = Snapshot(model, tmp_path)
    attach_offload_hooks(model, OffloadPolicy(**STREAMED))
    match = rf"{function.__name__} was called from inside"

    def switch(*_: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            function(model)

    handle = model.blocks[1].register_forward_hook(switch)
    for _ in range(2):
        assert_same(run(model, tokens()), wanted)
    handle.remove()
    detach(model)
    assert_untouched(model, before, same_memory=False)


# --- the checkpoint ---


def _saved(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Write the checkpoint of a chain, with changes; None leaves a tensor out."""
    state: dict[str, Any] = dict(chain(8, 16, 8).state_dict())
    state |= {name.replace("_", "."): value for name, value in changes.items()}
    path = folder / "model.safetensors"
    save_file({k: v for k, v in state.items() if v is not None}, path)
    return path


def _load(checkpoint: Any, folder: Path, **fields: Any) -> nn.Module:
    return load_model(lambda: chain(8, 16, 8), checkpoint, on_disk(folder, **fields))


def _assert_load_refused(
    folder: Path,
    match: str,
    load: Callable[[], Any],
    error: type[BaseException] = CheckpointError,
) -> None:
    before = Snapshot(nn.Identity(), folder)
    with pytest.raises(error, match=match):
        load()
    gc.collect()  # the half-made model is nobody's, and its maps wait for this
    assert_same_surroundings(before)


every_store = pytest.mark.parametrize("store", ["cpu", "disk"])


def _policy(store: str) -> OffloadPolicy:
    return OffloadPolicy(**{**STREAMED, "store": store})


@every_store
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"0_bias": None}, r"model\.safetensors: .* 1 missing: 0\.bias"),
        ({"9_bias": torch.ones(1)}, r"1 that the model does not have: 9\.bias"),
        (
            {"1_weight": torch.ones(8, 4)},
            r"1 of another shape: 1\.weight has shape \(8, 4\), .* \(8, 16\)",
        ),
        ({"0_weight": torch.ones(16, 8, 1)}, r"0\.weight has shape \(16, 8, 1\)"),
        (
            {"0_bias": None, "1_bias": None, "x": torch.ones(1)},
            r"2 missing: 0\.bias, 1\.bias; 1 that the model does not have: x",
        ),
    ],
    ids=["missing", "extra", "shape", "more dimensions", "several"],
)
def test_checkpoint_of_another_model_is_refused_naming_the_tensors(
    tmp_path: Path, store: str, changes: dict[str, Any], match: str
) -> None:
    path = _saved(tmp_path, **changes)
    _assert_load_refused(
        tmp_path,
        match,
        lambda: load_model(lambda: chain(8, 16, 8), path, _policy(store)),
    )


@every_store
@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_file_that_was_cut_short_is_refused(
    tmp_path: Path, store: str, cut: int
) -> None:
    path = _saved(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    _assert_load_refused(
        tmp_path,
        r"model\.safetensors",
        lambda: load_model(lambda: chain(8, 16, 8), path, _policy(store)),
    )


@every_store
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 500,
        b"\x10" + b"\x00" * 7 + b"this is no json!" + b"\x00" * 300,
        b"\x02" + b"\x00" * 7 + b"{}" + b"trailing bytes",
        b"<!DOCTYPE html><html>Not found</html>" * 20,
    ],
    ids=["nothing", "ones", "no JSON", "too much", "a web page"],
)
def test_file_with_a_header_of_garbage_is_refused(
    tmp_path: Path, store: str, content: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    _assert_load_refused(
        tmp_path,
        r"model\.safetensors",
        lambda: load_model(lambda: chain(8, 16, 8), path, _policy(store)),
    )


def _folder(folder: Path) -> Path:
    """Write a checkpoint of two shards with an index."""
    folder.mkdir()
    state = chain(8, 16, 8).state_dict()
    files = {}
    for number in range(2):
        shard = {k: v for k, v in state.items() if k.startswith(str(number))}
        file = f"model-{number}.safetensors"
        save_file(shard, folder / file)
        files.update(dict.fromkeys(shard, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return folder


def test_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shards")
    (folder / "model.safetensors.index.json").unlink()
    _assert_load_refused(
        tmp_path,
        r"shards: holds 2 safetensors files and no index",
        lambda: _load(folder, tmp_path),
    )


def test_folder_without_any_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    _assert_load_refused(
        tmp_path,
        r"shards: holds no safetensors file",
        lambda: _load(tmp_path / "shards", tmp_path),
    )


def test_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shards")
    (folder / "model-1.safetensors").unlink()
    _assert_load_refused(
        tmp_path,
        r"model-1\.safetensors .*does not exist",
        lambda: _load(folder, tmp_path),
    )


def test_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "shards")
    save_file({"other": torch.ones(2)}, folder / "model-1.safetensors")
    _assert_load_refused(
        tmp_path,
        r"'1\.(weight|bias)' is in model-1\.safetensors",
        lambda: _load(folder, tmp_path),
    )


def test_checkpoint_that_does_not_exist_is_named(tmp_path: Path) -> None:
    _assert_load_refused(
        tmp_path,
        r"nothing\.safetensors.* does not exist",
        lambda: _load(tmp_path / "nothing.safetensors", tmp_path),
    )
    _assert_load_refused(
        tmp_path, r"list of files is empty", lambda: _load([], tmp_path)
    )


def test_factory_that_makes_no_module_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    _assert_load_refused(
        tmp_path,
        r"returned a dict, not a torch\.nn\.Module",
        lambda: load_model(dict, path, on_disk(tmp_path)),
        ValueError,
    )


def test_factory_that_raises_leaves_no_file_open(tmp_path: Path) -> None:
    path = _saved(tmp_path)

    def fail() -> nn.Module:
        raise ZeroDivisionError("mine")

    _assert_load_refused(
        tmp_path,
        "mine",
        lambda: load_model(fail, path, on_disk(tmp_path)),
        ZeroDivisionError,
    )


def test_converter_that_raises_leaves_no_file_open(tmp_path: Path) -> None:
    path = _saved(tmp_path)

    def fail(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise ZeroDivisionError("mine")

    _assert_load_refused(
        tmp_path,
        "mine",
        lambda: load_model(
            lambda: chain(8, 16, 8),
            path,
            on_disk(tmp_path),
            state_dict_converter=fail,
        ),
        ZeroDivisionError,
    )


@pytest.mark.parametrize("returned", [None, 3, {"0.weight": "text"}, ["0.weight"]])
def test_converter_that_returns_no_tensors_is_refused(
    tmp_path: Path, returned: Any
) -> None:
    path = _saved(tmp_path)
    _assert_load_refused(
        tmp_path,
        "state_dict_converter",
        lambda: load_model(
            lambda: chain(8, 16, 8),
            path,
            on_disk(tmp_path),
            state_dict_converter=lambda state: returned,
        ),
        ValueError,
    )


def test_limit_that_is_too_small_for_a_checkpoint_leaves_no_file_open(
    tmp_path: Path,
) -> None:
    path = _saved(tmp_path)
    _assert_load_refused(
        tmp_path,
        "below the least",
        lambda: _load(path, tmp_path, limit_gb=1e-7),
        RuntimeError,
    )


# --- the disk ---


def _fail_after(count: int, error: OSError) -> Callable[..., int]:
    """Return a pwrite that fails at its call of that number."""
    write, calls = os.pwrite, iter(range(10**6))

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if next(calls) >= count:
            raise error
        return write(fd, data, offset)

    return pwrite


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_that_fills_up_while_spilling_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, code: int
) -> None:
    model = tiny_model()
    failure = OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fail_after(count, failure))
        with _refused(
            model, tmp_path, rf"{os.strerror(code)}.*disk_dir", CheckpointError
        ):
            attach_offload_hooks(model, on_disk(tmp_path))
    with offloaded(model, on_disk(tmp_path)):
        run(model, tokens())


def test_write_that_the_system_cuts_off_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files is a real disk that is full."""
    resource = pytest.importorskip("resource")
    model = tiny_model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with _refused(model, tmp_path, r"cannot be written .*disk_dir", CheckpointError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes(model) // 2, hard))
        try:
            attach_offload_hooks(model, on_disk(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 64 KiB, where one may be mounted."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("no file system can be mounted here")
    size = "size=64k,nr_inodes=20"
    command = [mount, "-t", "tmpfs", "-o", size, "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_too_small_is_told_before_anything_is_written(
    small_disk: Path,
) -> None:
    model = tiny_model()
    assert nbytes(model) > 2**16
    with _refused(
        model, small_disk, r"GiB free\. .*pass another with disk_dir=", CheckpointError
    ):
        attach_offload_hooks(model, on_disk(small_disk))


def test_disk_that_lies_about_its_room_leaves_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may take the room between the look and the write."""
    usage = shutil.disk_usage(small_disk)._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    model = tiny_model()
    with _refused(model, small_disk, "No space left on device", CheckpointError):
        attach_offload_hooks(model, on_disk(small_disk))


def test_disk_dir_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model = tiny_model()
    with _refused(model, tmp_path, r"disk_dir='.*file/below'", CheckpointError):
        attach_offload_hooks(model, on_disk(tmp_path / "file" / "below"))


def test_disk_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model = tiny_model()
    with _refused(model, tmp_path, r"disk_dir='.*file' is not a folder"):
        attach_offload_hooks(model, on_disk(tmp_path / "file"))


@pytest.mark.parametrize("function", ["mkdir", "open", "replace"])
def test_disk_dir_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Root may write anywhere: the system's refusal is injected."""
    original = getattr(os, function)
    folder = tmp_path / "read-only"
    folder.mkdir()
    refusals = []

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        reads = function == "open" and not args[0] & os.O_CREAT
        if not str(path).startswith(str(folder)) or reads:
            return original(path, *args, **kwargs)
        refusals.append(path)
        raise PermissionError(errno.EACCES, "Permission denied")

    model = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with _refused(
            model,
            tmp_path,
            r"Permission denied.*disk_dir",
            CheckpointError,
            same_memory=False,
        ):
            attach_offload_hooks(model, on_disk(folder))
    assert refusals


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere"
)
def test_disk_dir_without_permission_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    model = tiny_model()
    with _refused(model, tmp_path, r"Permission denied.*disk_dir", CheckpointError):
        attach_offload_hooks(model, on_disk(folder))


# --- files that change under an attached model ---


def _vanish(path: Path) -> None:
    path.unlink()


def _replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    time = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time + 10**9, time + 10**9))


@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_vanish, r"model\.safetensors: is gone"),
        (_replace, r"model\.safetensors: was replaced by another file"),
        (_grow, r"model\.safetensors: changed its size from \d+ to \d+ bytes"),
        (_rewrite, r"model\.safetensors: was written to"),
    ],
    ids=["vanish", "replace", "grow", "rewrite"],
)
def test_checkpoint_that_changes_under_a_model_is_told_at_the_next_forward(
    tmp_path: Path, change: Callable[[Path], None], match: str, passes: int
) -> None:
    path = _saved(tmp_path)
    content = path.read_bytes()
    about = path.stat()
    model = _load(path, tmp_path)
    for _ in range(passes):
        run(model, torch.ones(1, 8))
    change(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=match):
            run(model, torch.ones(1, 8))
    detach(model)
    if change in (_grow, _rewrite):  # put back in place: the same file once more
        path.write_bytes(content)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        model = _load(path, tmp_path)
        assert_same(
            run(model, torch.ones(1, 8)), run(chain(8, 16, 8), torch.ones(1, 8))
        )
        detach(model)


def test_checkpoint_that_was_put_back_is_used_again(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    model = _load(path, tmp_path)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is gone"):
        run(model, torch.ones(1, 8))
    (tmp_path / "elsewhere").rename(path)
    assert_same(run(model, torch.ones(1, 8)), run(chain(8, 16, 8), torch.ones(1, 8)))
    detach(model)


def test_checkpoint_that_is_in_ram_may_go(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    policy = OffloadPolicy(limit_gb=0, compute_device="cpu")
    model = load_model(lambda: chain(8, 16, 8), path, policy)
    path.unlink()
    assert_same(run(model, torch.ones(1, 8)), run(chain(8, 16, 8), torch.ones(1, 8)))
    detach(model)


@pytest.mark.parametrize("passes", [0, 1])
def test_spill_file_that_vanishes_is_told_at_the_next_forward(
    tmp_path: Path, passes: int
) -> None:
    """Somebody cleans the temporary folder; what detach can still read is not lost."""
    model = tiny_model()
    before = Snapshot(model)
    attach_offload_hooks(model, on_disk(tmp_path))
    for _ in range(passes):
        run(model, tokens())
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        run(model, tokens())
    detach(model)
    assert_untouched(model, before, same_memory=False)


def test_read_error_in_a_forward_names_file_and_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _saved(tmp_path)
    model = _load(path, tmp_path)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(
                CheckpointError, match=r"model\.safetensors: tensor '\d\.\w+'.*Input"
            ):
                run(model, torch.ones(1, 8))
        x = torch.ones(1, 8)
        assert_same(run(model, x), run(chain(8, 16, 8), x))
    detach(model)


def test_interrupted_spill_of_replaced_weights_leaves_the_model_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that replace others while attached go to disk at the next forward."""
    model = tiny_model()
    attach_offload_hooks(model, on_disk(tmp_path))
    state = {k: v.clone() for k, v in tiny_model(1).state_dict().items()}
    model.load_state_dict(state, assign=True)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fail_after(0, full))
        with pytest.raises(CheckpointError, match="No space left"):
            run(model, tokens())
    wanted = expected(tiny_model(1), tokens())
    for _ in range(2):
        assert_same(run(model, tokens()), wanted)
    detach(model)
    assert_same(run(model, tokens()), wanted)
    assert list(tmp_path.iterdir()) == []

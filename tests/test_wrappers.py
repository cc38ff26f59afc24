"""Models in the wrappers of other libraries: right, or refused by name."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from hookoffload import (
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload_plan,
    offload_stats,
    offloaded,
)
from hookoffload.state_hooks import session_of
from tests.samples import GIB, run, same_bits, weight_bytes

if not distributed.is_available():
    pytest.skip("PyTorch without torch.distributed", allow_module_level=True)

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make this process a group of its own."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    model.insert(3, nn.BatchNorm1d(32))
    return model


def _policy(**fields: Any) -> OffloadPolicy:
    fields = {"store": "disk", "limit_gb": 0.5 * weight_bytes(_model()) / GIB, **fields}
    return OffloadPolicy(compute_device="cpu", **fields)


def _same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    same = (same_bits(value, theirs[name]) for name, value in mine.items())
    return list(mine) == list(theirs) and all(same)


def _attached_around(
    wrap: Callable[[nn.Module], nn.Module], first: str, model: nn.Module
) -> tuple[nn.Module, nn.Module]:
    """Return what to call, and what is attached."""
    if first == "attached":
        attach_offload_hooks(model, _policy())
        return wrap(model), model
    wrapped = wrap(model)
    attached = model if first == "wrapped, its module attached" else wrapped
    attach_offload_hooks(attached, _policy())
    return wrapped, attached


ORDERS = ["attached", "wrapped", "wrapped, its module attached"]


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel])
def test_a_model_that_is_wrapped_for_several_processes_or_devices_computes_the_same(
    wrap: Callable[[nn.Module], nn.Module], first: str
) -> None:
    model = _model()
    plain = wrap(copy.deepcopy(model))
    wrapped, attached = _attached_around(wrap, first, model)
    for _ in range(3):  # batch norm counts them
        assert same_bits(run(wrapped, X), run(plain, X))
    stats = offload_stats(attached)
    assert stats.limit_bytes is not None
    assert stats.bytes_moved > 0
    assert stats.peak_bytes <= stats.limit_bytes
    detach(attached)
    assert _same_state(wrapped, plain)
    assert same_bits(run(wrapped, X), run(plain, X))


@pytest.mark.parametrize("first", ORDERS)
def test_gradients_of_a_wrapped_model_that_streams_are_refused(first: str) -> None:
    wrapped, attached = _attached_around(DistributedDataParallel, first, _model())
    with pytest.raises(RuntimeError, match="To train, detach"):
        wrapped(X)
    detach(attached)
    wrapped(X).sum().backward()


def _fsdp1(model: nn.Module, **fields: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **fields)


def _fsdp1_of_originals(model: nn.Module) -> nn.Module:
    return _fsdp1(model, use_orig_params=True)


def _fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    if TorchVersion(torch.__version__) < (2, 7):
        pytest.skip("fully_shard of this PyTorch does not run on a CPU")
    mesh = distributed.init_device_mesh("cpu", (1,))
    for child in model.children():
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


MANAGED = r"managed by FSDP.*on a model without offload hooks"
FSDP = pytest.mark.parametrize("wrap", [_fsdp1, _fsdp1_of_originals, _fsdp2])


@FSDP
@pytest.mark.filterwarnings("ignore")  # of one process, with nothing to divide
@pytest.mark.parametrize("part", ["", "0"])
def test_a_model_under_fsdp_is_refused_by_name(
    wrap: Callable[[nn.Module], nn.Module], part: str
) -> None:
    model = _model().eval()
    want = run(model, X)
    wrapped = wrap(model)
    given = model.get_submodule(part) if part else wrapped
    with pytest.raises(RuntimeError, match=r"managed by FSDP.*CPUOffloadPolicy"):
        attach_offload_hooks(given, _policy())
    with pytest.raises(RuntimeError, match="managed by FSDP"):
        offload_plan(given, _policy())
    assert session_of(given) is None
    assert same_bits(run(wrapped, X), want)


@FSDP
@pytest.mark.filterwarnings("ignore")
def test_fsdp_around_an_attached_model_is_refused_by_the_next_forward(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model = _model().eval()
    want = run(model, X)
    attach_offload_hooks(model, _policy())
    wrapped = wrap(model)
    for _ in range(2):
        # FSDP of PyTorch 2.6 may say first that the parameters are not as it left them.
        with pytest.raises(RuntimeError, match=rf"{MANAGED}|Cannot writeback"):
            run(wrapped, X)
    detach(model)
    assert session_of(model) is None
    if wrap is not _fsdp1_of_originals:  # it has lost the bytes that it gave them
        assert same_bits(run(wrapped, X), want)


def test_a_model_under_tensor_parallelism_is_refused_by_name() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = distributed.init_device_mesh("cpu", (1,))
    model = parallelize_module(_model(), mesh, {"1": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=r"^1\.weight is a DTensor.*tp_plan"):
        attach_offload_hooks(model, _policy())
    model = attach_offload_hooks(_model(), _policy())
    parallelize_module(model, mesh, {"1": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=r"^1\.weight is a DTensor"):
        run(model, X)
    detach(model)


def test_data_parallel_of_several_devices_is_refused_by_name() -> None:
    wrapped = nn.DataParallel(_model())
    wrapped.device_ids = [0]  # as on a machine with a GPU
    with pytest.raises(RuntimeError, match=r"^DataParallel is .*Attach to its"):
        attach_offload_hooks(wrapped, _policy())


class _DeepSpeedEngine(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_model_of_deepspeed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = ModuleType("deepspeed")
    library.DeepSpeedEngine = _DeepSpeedEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    with pytest.raises(RuntimeError, match=r"is a DeepSpeed .*that was not given"):
        attach_offload_hooks(_DeepSpeedEngine(_model()), _policy())


def test_parameters_that_deepspeed_divides_are_refused_by_name() -> None:
    model = _model()
    model[2].weight.ds_id = 4  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"^2\.weight is divided by DeepSpeed"):
        attach_offload_hooks(model, _policy())


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    """Return what makes an Accelerator, of which a process has one kind."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **fields: accelerate.Accelerator(cpu=True, **fields)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("first", ["attached", "prepared"])
def test_a_model_that_accelerate_prepares_computes_the_same(
    first: str, precision: str, accelerator: Callable[..., Any]
) -> None:
    one = accelerator(mixed_precision=precision)
    model = _model()
    plain = one.prepare(copy.deepcopy(model))
    if first == "attached":
        attach_offload_hooks(model, _policy())
        prepared = one.prepare(model)
    else:
        prepared = attach_offload_hooks(one.prepare(model), _policy())
    for _ in range(3):
        assert same_bits(run(prepared, X), run(plain, X))
    assert offload_stats(prepared).bytes_moved > 0
    assert one.unwrap_model(prepared) is model
    detach(prepared)
    assert _same_state(prepared, plain)
    assert same_bits(run(prepared, X), run(plain, X))


def test_an_attached_model_is_not_moved_by_accelerate(
    accelerator: Callable[..., Any],
) -> None:
    one = accelerator()
    one.state.device = torch.device("meta")  # another one than where the model is
    model = _model().eval()
    want = run(model, X)
    with offloaded(model, _policy()):
        with pytest.raises(RuntimeError, match=r"device_placement=\[False\]"):
            one.prepare(model)
        assert one.prepare(model, device_placement=[False]) is model
        assert same_bits(run(model, X), want)

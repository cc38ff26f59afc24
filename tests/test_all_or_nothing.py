"""Invariant 6: attach does everything or nothing, and detach undoes it all."""

from __future__ import annotations

import copy
import gc
import resource
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    offload,
    offload_stats,
    offloaded,
)
from tests.samples import STREAMING, Picture, Stack, linears, run, same_bits

FIELDS: dict[str, dict[str, Any]] = {
    "cpu, cast at rest": {"storage_dtype": torch.float64, "limit_gb": 0},
    **STREAMING,
}


class _Stubborn(nn.Linear):
    """Fails when one kind of hook is registered on it.

    Args:
        method: the method that fails.
        error: what it raises.
    """

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__(32, 32)
        self.failing = (method, error)

    def _fail_in(self, method: str) -> None:
        if self.failing[0] == method:
            raise self.failing[1]

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._fail_in("register_forward_pre_hook")
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._fail_in("register_forward_hook")
        return super().register_forward_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._fail_in("register_state_dict_post_hook")
        return super().register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._fail_in("register_load_state_dict_pre_hook")
        return super().register_load_state_dict_pre_hook(*args, **kwargs)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("error", [ValueError("no hooks here"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "method",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
    ],
)
def test_an_attach_that_fails_late_leaves_the_model_as_it_was(
    method: str, error: BaseException, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = nn.Sequential(Stack(), _Stubborn(method, error))
    if fields.get("store") == "disk":
        fields = {**fields, "disk_dir": tmp_path}
    before = Picture(model)
    with pytest.raises(type(error)):
        attach_offload_hooks(model, OffloadPolicy(**fields))
    assert before.differences(model) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="attach_offload_hooks"):
        detach(model)
    model[1].failing = ("", error)
    with offloaded(model, **fields):
        run(model, torch.randn(2, 32, dtype=fields.get("compute_dtype")))
    assert before.differences(model) == []


@contextmanager
def _files_no_longer_than(nbytes: int) -> Iterator[None]:
    """Make writes fail behind so many bytes, as on a disk that fills."""
    limit = resource.RLIMIT_FSIZE
    before = resource.getrlimit(limit)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(limit, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)
        signal.signal(signal.SIGXFSZ, kept)


def test_a_disk_that_fills_while_weights_are_written_loses_nothing(
    tmp_path: Path,
) -> None:
    model, x = linears(width=128, depth=8), torch.randn(2, 128)
    before, want = Picture(model), run(copy.deepcopy(model), x)
    policy = OffloadPolicy(store="disk", disk_dir=tmp_path, limit_gb=0)
    with _files_no_longer_than(3 * 128 * 128 * 4):
        with pytest.raises((ValueError, OSError)):
            attach_offload_hooks(model, policy)
        assert before.differences(model) == []
        assert list(tmp_path.iterdir()) == []
    attach_offload_hooks(model, policy)
    assert same_bits(run(model, x), want)


@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_a_limit_that_is_too_small_is_refused_before_anything_moved(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model = Stack()
    before = Picture(model)
    if fields.get("store") == "disk":
        fields = {**fields, "disk_dir": tmp_path}
    with pytest.raises(BudgetExceededError, match=r"limit_gb=\S+ is below the least"):
        attach_offload_hooks(model, OffloadPolicy(**{**fields, "limit_gb": 1e-6}))
    assert before.differences(model) == []
    assert list(tmp_path.iterdir()) == []


class _Exploding(nn.Module):
    """Raises what it is told to, once."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return x


class _Outer(nn.Module):
    """Has tensors of its own, is inside while its children run."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(32))
        self.bomb = _Exploding()
        self.inner = Stack(depth=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bomb(self.inner(x)) * self.gain


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an exception": lambda: RuntimeError("in the middle"),
    "Ctrl-C": KeyboardInterrupt,
    "an exit": SystemExit,
    "out of memory": lambda: torch.OutOfMemoryError("no memory"),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make_error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_detach_after_an_exception_restores_the_model(
    fields: dict[str, Any], make_error: Callable[[], BaseException], warm: bool
) -> None:
    model = nn.Sequential(_Outer(), nn.Linear(32, 32))
    before = Picture(model)
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    attach_offload_hooks(model, OffloadPolicy(**fields))
    if warm:
        run(model, x)
    error = model[0].bomb.error = make_error()
    with pytest.raises(type(error)):
        run(model, x)
    detach(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("place", ["in a layer", "between layers"])
@pytest.mark.parametrize("make_error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_a_model_goes_on_after_an_exception(
    fields: dict[str, Any], make_error: Callable[[], BaseException], place: str
) -> None:
    model = nn.Sequential(_Outer(), _Exploding(), nn.Linear(32, 32))
    bomb = model[0].bomb if place == "in a layer" else model[1]
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    before = Picture(model)
    want = run(copy.deepcopy(model).to(x.dtype), x)
    with offloaded(model, **fields):
        for part in (model, model, model[:2]):
            error = bomb.error = make_error()
            with pytest.raises(type(error)):
                run(part, x)
            assert same_bits(run(model, x), want)
        assert offload_stats(model).forwards == 3
        error = bomb.error = make_error()
        with pytest.raises(type(error)):
            run(model, x)
        offload(model)
        assert same_bits(run(model, x), want)
    assert before.differences(model) == []


@pytest.mark.parametrize("where", ["pre", "post"])
@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("fields", STREAMING.values(), ids=STREAMING)
def test_an_exception_in_a_hook_of_the_user_is_raised_and_harmless(
    fields: dict[str, Any], prepend: bool, where: str
) -> None:
    model = Stack()
    x = torch.randn(2, 32, dtype=fields.get("compute_dtype"))
    before = Picture(model)
    want = run(copy.deepcopy(model).to(x.dtype), x)

    def explode(*_: object) -> None:
        raise LookupError("in the user's hook")

    with offloaded(model, **fields):
        for module in (model, model.blocks[1], model.blocks[1].up):
            register = getattr(
                module, f"register_forward_{'pre_' if where == 'pre' else ''}hook"
            )
            handle = register(explode, prepend=prepend)
            for _ in range(2):
                with pytest.raises(LookupError, match="in the user's hook"):
                    run(model, x)
            handle.remove()
            assert all(same_bits(run(model, x), want) for _ in range(2))
    assert before.differences(model) == []


@pytest.mark.parametrize("several", [False, True], ids=["one", "one of several"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_model_that_is_dropped_behind_detach_goes_at_once(
    fields: dict[str, Any], several: bool
) -> None:
    model: nn.Module = Stack()
    attached: Any = {"a": model, "b": linears()} if several else model
    attach_offload_hooks(attached, OffloadPolicy(compute_device="cpu", **fields))
    for _ in range(2):
        dtype = fields.get("compute_dtype", torch.float32)
        if "storage_dtype" not in fields:
            run(model, torch.ones(1, 32, dtype=dtype))
    gc.collect()
    gc.disable()  # which would find it some time
    try:
        detach(attached)
        left = [weakref.ref(t) for t in (model, *model.parameters())]
        del model, attached
        assert not [one() for one in left if one() is not None]
    finally:
        gc.enable()

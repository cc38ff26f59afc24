"""A model with offload hooks and its reference, driven through the same actions."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookoffload import (
    BudgetExceededError,
    OffloadPolicy,
    Placement,
    attach_offload_hooks,
    detach,
    offload,
    offload_stats,
    onload,
)
from tests.model_trees import Printed, Spec, build
from tests.traces import Traces, assert_same_output, same_bits, tensors_of
from tests.tree_modules import (
    VOCABULARY,
    WIDTH,
    Block,
    Boom,
    Control,
    Node,
    Sideways,
    Stop,
    unpack,
)

Place = Literal["cpu", "disk"]


@dataclass(frozen=True, repr=False)
class PolicySpec(Printed):
    """A policy that prints as the code that makes it.

    Attributes:
        offload: Where layers rest.
        onload: Where they wait.
        offload_dtype: Name of the dtype at rest; "" is each tensor's own.
        onload_dtype: Name of the dtype while waiting; "" is that at rest.
        compute_dtype: Name of the computation dtype; "" is each tensor's own.
        short: Say it with the short fields as far as they can.
        residents: "default", "none" (preparing on disk), or "cast" (in the computation
            dtype).
        limit: None, 0, or a number from 0 (the least) to 1 (more than everything) as a
            string that `float` reads.
        host_kib: The host limit in KiB; None is none.
        module_map: Pairs of a class's dotted name and a kind.
        debug: As the policy's.
    """

    offload: Place = "cpu"
    onload: Place = "cpu"
    offload_dtype: str = ""
    onload_dtype: str = ""
    compute_dtype: str = ""
    short: bool = False
    residents: str = "default"
    limit: str | int | None = None
    host_kib: int | None = None
    module_map: tuple[tuple[str, str], ...] = ()
    debug: bool = False

    def make(self, limit_gb: float | None, folder: Path) -> OffloadPolicy:
        """Makes the policy."""
        fields: dict[str, Any] = {
            "limit_gb": limit_gb,
            "module_map": dict(self.module_map),
            "debug": self.debug,
            "compute_device": "cpu",
        }
        if self.offload == "disk":
            fields["disk_dir"] = folder
        if self.host_kib is not None:
            fields["host_limit_gb"] = self.host_kib / 2**20
        rest, wait = _dtype(self.offload_dtype), _dtype(self.onload_dtype)
        compute = _dtype(self.compute_dtype)
        if self.short and self.offload == self.onload and not self.onload_dtype:
            fields |= {
                # Where layers wait follows from a host limit.
                "store": self.offload if self.host_kib is None else None,
                "storage_dtype": rest,
                "compute_dtype": compute,
            }
        else:
            fields["offload"] = Placement(device=self.offload, dtype=rest)
            fields["onload"] = Placement(device=self.onload, dtype=wait)
            fields["computation"] = Placement(device="cpu", dtype=compute)
        if self.residents == "none":
            fields["preparing"] = Placement(device="disk")
        elif self.residents == "cast":
            fields["preparing"] = Placement(device="cpu", dtype=compute)
        return OffloadPolicy(**fields)

    @property
    def casts(self) -> bool:
        """Whether any tensor has another dtype at rest, while waiting or computing."""
        return bool(self.offload_dtype or self.onload_dtype or self.compute_dtype)

    def at_rest(self, own: torch.dtype) -> torch.dtype:
        """Returns the dtype of a resting parameter."""
        return _dtype(self.offload_dtype) or own

    def waiting(self, own: torch.dtype) -> torch.dtype:
        """Returns the dtype of a waiting parameter."""
        return _dtype(self.onload_dtype) or _dtype(self.offload_dtype) or own

    def computing(self, own: torch.dtype) -> torch.dtype:
        """Returns the dtype in which a tensor computes."""
        return _dtype(self.compute_dtype) or own


def _dtype(name: str) -> torch.dtype | None:
    return getattr(torch, name) if name else None


@dataclass(frozen=True, repr=False)
class Forward(Printed):
    """One forward.

    Attributes:
        mode: "no_grad", "inference", "autocast" (under no_grad too) or "grad".
        skip: Numbers of modules that are not called.
        repeat: Numbers of modules that are called twice.
        fail: The step at which an exception is raised; 0 for none.
        stop: Raise Ctrl-C instead of an exception.
        batch: Rows of x.
        seed: Of the inputs.
        part: Call one of the modules below the root, this one modulo their number; 0
            calls the root.
        handling: Call it while another exception is being handled.
    """

    mode: str = "no_grad"
    skip: tuple[int, ...] = ()
    repeat: tuple[int, ...] = ()
    fail: int = 0
    stop: bool = False
    batch: int = 2
    seed: int = 0
    part: int = 0
    handling: bool = False


@dataclass(frozen=True, repr=False)
class Train(Printed):
    """`model.train(on)`."""

    on: bool = True


@dataclass(frozen=True, repr=False)
class State(Printed):
    """Compares the state dicts."""


@dataclass(frozen=True, repr=False)
class Load(Printed):
    """`load_state_dict` with new values for every ``step``-th tensor."""

    assign: bool = False
    step: int = 1
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Edit(Printed):
    """Gives a tensor new values between forwards.

    Attributes:
        index: Which tensor, modulo their number.
        how: "copy" (``tensor.copy_(new)``), "swap" (``tensor.data = new``) or "data"
            (``tensor.data.copy_(new)``, which is seen only in an offloaded model: the
            model is offloaded before).
        seed: Of the values.
    """

    index: int = 0
    how: str = "copy"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Move(Printed):
    """`onload` or `offload`."""

    there: bool = False


@dataclass(frozen=True, repr=False)
class Reattach(Printed):
    """`detach`, and attach again with the next policy."""


Action = Forward | Train | State | Load | Edit | Move | Reattach


@dataclass(frozen=True, repr=False)
class Case(Printed):
    """A model, policies to attach it with in turn, and what is done with it."""

    spec: Spec
    policies: tuple[PolicySpec, ...]
    actions: tuple[Action, ...]


class GaveUp(Exception):
    """A forward met the limit in a way that no plan could foresee."""


class Twin:
    """A model under test and its reference.

    The reference keeps its parameters in the dtype of the resting model. Where the
    policy casts, a second reference computes; what its forward changes is written back
    to the first.

    Args:
        spec: What both are built from.
        folder: An empty folder for files.
    """

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.spec = spec
        self.model = build(spec)
        self._rest = build(spec)
        self._computing = self._rest
        self._folder = folder
        self._traces = Traces(self.model, folder)
        self._own = [t.dtype for t in tensors_of(self.model).values()]
        self._policy = PolicySpec()
        self._limit_bytes: int | None = None
        self._attached = False
        self._interrupted = False
        # Tensors that shared memory may have been untied: they take more than before.
        self._parted = False
        self._swapped: set[int] = set()
        self._kept: list[tuple[Tensor, Tensor]] = []

    # -- attach and detach ----------------------------------------------------------

    def attach(self, policy: PolicySpec) -> None:
        """Attaches the model, and casts the reference as the policy says."""
        limit = self._limit(policy)
        self._limit_bytes = int(limit * 2**30) if limit else None
        attach_offload_hooks(self.model, policy.make(limit, self._folder))
        self._policy = policy
        self._attached = True
        self._computing = self._rest
        if policy.casts:
            self._computing = build(self.spec)
            self._computing.train(self._rest.training)
            _cast_tied(self._computing, map(policy.computing, self._own))
            self._cast_rest(policy.at_rest)
            for index in self._swapped:
                self._swap_computing(index)

    def least(self, policy: PolicySpec) -> float:
        """Returns the least limit in GiB, as the error for a smaller one names it.

        The model is not attached; the error leaves no trace.
        """
        try:
            attach_offload_hooks(self.model, policy.make(2**-30, self._folder))
        except BudgetExceededError as error:
            named = re.search(r"limit_gb=([0-9.]+) or more", str(error))
            assert named, str(error)
            self._traces.assert_none_left()
            return float(named[1])
        detach(self.model)
        self._traces.assert_none_left()
        return 2**-30

    def _limit(self, policy: PolicySpec) -> float | None:
        if not isinstance(policy.limit, str):
            return policy.limit
        everything = sum(2 * t.nbytes + 512 for t in tensors_of(self.model).values())
        return self.least(policy) + float(policy.limit) * 2 * everything / 2**30

    def detach(self) -> None:
        """Detaches the model; checks that it is as before, but for the values."""
        self._check_kept()
        detach(self.model)
        self._attached = self._interrupted = False
        self._check_kept()
        self._traces.assert_none_left()
        self._compare_rest()
        if self._policy.casts:
            self._cast_rest(lambda own: own)
            for rest, tensor in self._pairs():
                _give(rest, tensor.data)

    def give_up(self) -> None:
        """Detaches whatever has happened; compares no values."""
        if self._attached:
            detach(self.model)
            self._traces.assert_none_left()

    def _cast_rest(self, dtype_of: Callable[[torch.dtype], torch.dtype]) -> None:
        tensors = tensors_of(self._rest).values()
        dtypes = [
            dtype_of(own) if isinstance(tensor, nn.Parameter) else own
            for tensor, own in zip(tensors, self._own, strict=True)
        ]
        _cast_tied(self._rest, dtypes)

    # -- actions --------------------------------------------------------------------

    def run(self, action: Action) -> None:
        """Does the same to the model and to the reference, and compares."""
        if isinstance(action, Forward):
            self._forward(action)
        else:
            self._check_kept()
            self._models_do(action)
        if not self._interrupted:
            self._compare_rest()
        self._check_limit()
        self._check_kept()
        self._traces.assert_objects()

    def _models_do(self, action: Action) -> None:
        if isinstance(action, Train):
            for model in (self.model, self._rest, self._computing):
                model.train(action.on)
        elif isinstance(action, State):
            self._compare_state()
        elif isinstance(action, Load):
            self._kept.clear()
            self._load(action)
        elif isinstance(action, Edit):
            self._kept.clear()
            self._edit(action)
        elif isinstance(action, Move):
            (onload if action.there else offload)(self.model)
            self._interrupted = False

    def _forward(self, action: Forward) -> None:
        if self.spec.writes:
            self._kept.clear()
        if action.mode == "grad" and self.spec.writes:
            return  # how far a forward that is refused has come cannot be known
        model, reference = self._called(action.part)
        output = _call(model, action, self._policy)
        if action.mode == "grad" and _is_refusal(output):
            return
        if isinstance(output, BudgetExceededError):
            unforeseen = self.spec.reads_sideways or self._parted
            if self._limit_bytes and unforeseen:
                raise GaveUp from output
            raise output
        self._refresh_computing()
        expected = _call(reference, action, self._policy)
        self._write_back()
        self._interrupted = isinstance(output, Stop)
        if "objects" in self.spec.writes:
            self._traces.note_tensors()
        if isinstance(expected, BaseException):
            if not isinstance(output, type(expected)):
                raise AssertionError(f"{output!r} instead of {expected!r}")
            return
        if isinstance(output, BaseException):
            raise output
        assert_same_output(output, expected, repr(action))
        x, more = unpack(output)
        plain = [t for t in [x, *more] if not isinstance(t, nn.Parameter)]
        self._kept += [(tensor, tensor.detach().clone()) for tensor in plain]

    def _called(self, part: int) -> tuple[nn.Module, nn.Module]:
        """Returns the modules to call; a part must not rely on its parents.

        After Ctrl-C the root is called: only that, and not a part, tells the library
        that the interrupted call is over.
        """
        if not part or self._policy.module_map or self._interrupted:
            return self.model, self._computing
        parts = [
            pair
            for pair in zip(
                self.model.modules(), self._computing.modules(), strict=True
            )
            if isinstance(pair[0], Node | Block)
            and not any(isinstance(m, Sideways) for m in pair[0].modules())
        ]
        return parts[part % len(parts)] if parts else (self.model, self._computing)

    def _load(self, action: Load) -> None:
        state = self._rest.state_dict()
        for index, name in enumerate(list(state)):
            if index % action.step or 0 in state[name].stride():
                del state[name]
            else:
                state[name] = _new_values(state[name], action.seed + index)
        complete = len(state) == len(self._rest.state_dict())
        for model in (self.model, self._rest):
            own = {name: tensor.clone() for name, tensor in state.items()}
            model.load_state_dict(own, strict=complete, assign=action.assign)
        self._interrupted = False
        if action.assign:
            self._parted = True
            self._traces.note_tensors()
            self._own = [t.dtype for t in tensors_of(self.model).values()]

    def _edit(self, action: Edit) -> None:
        # Behind Ctrl-C tensors are still bound, maybe in another dtype and without the
        # strides that swapped data would have at rest.
        if action.how == "data" or (action.how == "swap" and self._interrupted):
            offload(self.model)
            self._interrupted = False
        tensors = list(tensors_of(self.model).values())
        references = list(tensors_of(self._rest).values())
        index = action.index % len(tensors)
        for tensor in (tensors[index], references[index]):
            if 0 in tensor.stride():
                return
            new = _new_values(tensor, action.seed)
            if action.how == "swap":
                tensor.data = new  # unties it from tensors that it shared memory with
            elif action.how == "data":
                tensor.data.copy_(new)
            else:
                with torch.no_grad():
                    tensor.copy_(new)
        if action.how == "swap":
            self._parted = True
            self._traces.note_untied(tensors[index])
            self._swapped.add(index)
            if self._computing is not self._rest:
                self._swap_computing(index)

    def _swap_computing(self, index: int) -> None:
        alone = list(tensors_of(self._computing).values())[index]
        rest = list(tensors_of(self._rest).values())[index]
        alone.data = rest.data.clone().to(alone.dtype)

    # -- the reference --------------------------------------------------------------

    def _refresh_computing(self) -> None:
        if self._computing is self._rest:
            return
        tensors = tensors_of(self._computing).values()
        rests = tensors_of(self._rest).values()
        for tensor, rest, own in zip(tensors, rests, self._own, strict=True):
            value = rest.data
            if isinstance(rest, nn.Parameter) and own.is_floating_point:
                value = value.to(self._policy.waiting(own))
            _give(tensor, value)

    def _write_back(self) -> None:
        if self._computing is self._rest:
            return
        for tensor, rest in zip(
            self._computing.buffers(), self._rest.buffers(), strict=True
        ):
            if not same_bits(tensor, rest.to(tensor.dtype)):
                rest.copy_(tensor)

    # -- checks ---------------------------------------------------------------------

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        rests = tensors_of(self._rest).values()
        yield from zip(rests, tensors_of(self.model).values(), strict=True)

    def _compare_rest(self) -> None:
        names = tensors_of(self.model)
        for name, own, (rest, tensor) in zip(
            names, self._own, self._pairs(), strict=True
        ):
            self._compare(name, tensor, rest, own)

    def _compare_state(self) -> None:
        state = self.model.state_dict()
        reference = self._rest.state_dict(keep_vars=True)
        assert list(state) == list(reference)
        tensors = tensors_of(self._rest).values()
        owns = {id(t): own for t, own in zip(tensors, self._own, strict=True)}
        for name, rest in reference.items():
            self._compare(name, state[name], rest, owns[id(rest)])

    def _compare(
        self, name: str, tensor: Tensor, rest: Tensor, own: torch.dtype
    ) -> None:
        """Compares a value between forwards with that of the reference."""
        policy = self._policy
        via = own
        allowed = {own}
        if self._attached and own.is_floating_point:
            if isinstance(rest, nn.Parameter) and rest.numel():
                allowed = {policy.at_rest(own), policy.waiting(own)}
            else:
                allowed.add(policy.computing(own))
        if isinstance(rest, nn.Parameter) and own.is_floating_point:
            via = policy.waiting(own)
        what = f"{name} between forwards"
        assert tensor.dtype in allowed, f"{what} is {tensor.dtype}"
        direct = rest.detach().to(tensor.dtype)
        # It may or may not have been rounded to the waiting dtype so far.
        rounded = rest.detach().to(via).to(tensor.dtype)
        if same_bits(tensor, direct) or same_bits(tensor, rounded):
            return
        value = tensor.detach().double()
        either = (value == direct.double()) | (value == rounded.double())
        assert rounded.dtype != via and either.all(), (
            f"{what} is\n{tensor}\ninstead of\n{direct}"
        )

    def _check_limit(self) -> None:
        if self._limit_bytes:
            peak = offload_stats(self.model).peak_bytes
            assert peak <= self._limit_bytes, f"{peak} > {self._limit_bytes}"
        host_kib = self._policy.host_kib
        if self._attached and host_kib is not None:
            stats = offload_stats(self.model)
            assert stats.host_bytes <= host_kib * 1024 == stats.host_limit_bytes

    def _check_kept(self) -> None:
        for tensor, before in self._kept:
            assert same_bits(tensor, before), "an earlier output has changed"


def run_case(case: Case, folder: Path) -> None:
    """Drives a model and its reference through a case.

    Args:
        case: What to do.
        folder: For files; emptied first.
    """
    for left in folder.iterdir():
        shutil.rmtree(left)
    twin = Twin(case.spec, folder)
    policies = itertools.cycle(case.policies)
    try:
        twin.attach(next(policies))
        for action in case.actions:
            if isinstance(action, Reattach):
                twin.detach()
                twin.attach(next(policies))
            else:
                twin.run(action)
        twin.detach()
    except GaveUp:
        twin.give_up()
    except BaseException:
        # Nothing of a failed example may reach the next.
        with contextlib.suppress(Exception):
            twin.give_up()
        while torch.overrides._get_current_function_mode_stack():
            torch.overrides._pop_mode()
        raise


def _call(model: nn.Module, action: Forward, policy: PolicySpec) -> Any:
    """Returns what a forward returned, or what it raised."""
    generator = torch.Generator().manual_seed(action.seed)
    x = torch.randn(action.batch, WIDTH, generator=generator)
    ids = torch.randint(VOCABULARY, (action.batch,), generator=generator)
    control = Control(
        skip=action.skip,
        repeat=action.repeat,
        fail=action.fail,
        error=Stop if action.stop else Boom,
        compute=_dtype(policy.compute_dtype),
    )
    torch.manual_seed(action.seed)
    with contextlib.ExitStack() as stack:
        if action.mode == "inference":
            stack.enter_context(torch.inference_mode())
        elif action.mode != "grad":
            stack.enter_context(torch.no_grad())
        if action.mode == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        try:
            if not action.handling:
                return model(x, ids, control=control)
            try:
                raise Boom("handled by the caller")
            except Boom:
                return model(x, ids, control=control)
        except (Exception, Stop) as error:
            return error


def _is_refusal(output: Any) -> bool:
    return isinstance(output, RuntimeError) and "need a gradient" in str(output)


def _new_values(tensor: Tensor, seed: int) -> Tensor:
    """Returns other values, which every dtype of a policy holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-8, 9, tensor.shape, generator=generator)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return (numbers / 8).to(tensor.dtype)
    return numbers.abs().to(tensor.dtype)


def _give(tensor: Tensor, value: Tensor) -> None:
    """Copies a value, also to a tensor whose elements share memory."""
    if 0 in tensor.stride():
        tensor.data = value[:1].to(tensor.dtype).expand(tensor.shape)
    else:
        tensor.data.copy_(value)


def _cast_tied(model: nn.Module, dtypes: Iterable[torch.dtype]) -> None:
    """Casts floating tensors; those that share memory go on sharing it."""
    groups: dict[int, list[tuple[Tensor, torch.dtype]]] = {}
    for tensor, dtype in zip(tensors_of(model).values(), dtypes, strict=True):
        if tensor.dtype.is_floating_point and tensor.dtype != dtype:
            key = tensor.untyped_storage()._cdata
            groups.setdefault(key, []).append((tensor, dtype))
    for group in groups.values():
        first, dtype = group[0]
        flat = torch.empty(0, dtype=first.dtype).set_(first.untyped_storage())
        flat = flat.to(dtype)
        for tensor, _ in group:
            place = (tensor.shape, tensor.stride(), tensor.storage_offset())
            tensor.data = flat.as_strided(*place)

"""Any model, any policy, any sequence of actions: as if there were no hooks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookoffload import BudgetExceededError, attach_offload_hooks, bundles
from tests.model_trees import FLOATS, Own, Spec, build, specs
from tests.traces import same_bits, tensors_of
from tests.twins import (
    Action,
    Case,
    Edit,
    Forward,
    Load,
    Move,
    Place,
    PolicySpec,
    Reattach,
    State,
    Train,
    Twin,
    run_case,
)

_MAPPED = (
    ("torch.nn.modules.linear.Linear", "layer"),
    ("torch.nn.modules.linear.Linear", "atomic"),
    ("torch.nn.modules.normalization.LayerNorm", "atomic"),
    ("tests.tree_modules.Block", "atomic"),
    ("tests.tree_modules.Node", "atomic"),
    ("tests.tree_modules.Listed", "layer"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@st.composite
def policies(draw: st.DrawFn) -> PolicySpec:
    rest, wait = draw(st.sampled_from(_PLACES))
    host_kib = draw(st.sampled_from(_HOST_KIB)) if rest == "disk" else None
    rest_dtype = wait_dtype = compute_dtype = ""
    # Nothing moves from host RAM to a CPU unless it is cast.
    if wait == "cpu" or draw(st.booleans()):
        rest_dtype, wait_dtype, compute_dtype = draw(st.sampled_from(_DTYPES))
    return PolicySpec(
        offload=rest,
        onload=wait,
        offload_dtype=rest_dtype,
        # Layers that wait in RAM and on disk have the same dtype.
        onload_dtype=wait_dtype if wait == "cpu" and host_kib is None else "",
        compute_dtype=compute_dtype,
        short=draw(st.booleans()),
        residents=draw(st.sampled_from(_RESIDENTS)) if compute_dtype else "default",
        limit=draw(st.sampled_from(_LIMITS)),
        host_kib=host_kib,
        module_map=draw(st.sampled_from(_MAPS)),
        debug=draw(st.booleans()),
    )


_PLACES: list[tuple[Place, Place]] = [("disk", "disk"), ("disk", "cpu"), ("cpu", "cpu")]
_NARROW = ("float8_e4m3fn", "float8_e5m2")
_DTYPES = [
    (rest, wait, compute)
    for compute in ("", *FLOATS)
    for wait in ("", *FLOATS, *_NARROW)
    for rest in ("", *FLOATS, *_NARROW)
]
_RESIDENTS = ["default", "default", "none", "cast"]
_LIMITS = [None, 0, "0", "0.02", "0.1", "0.3", "0.5", "1"]
_HOST_KIB = [None, None, 0, 1, 2, 4, 16]
_MAPS = [
    (),
    (),
    *itertools.combinations(_MAPPED, 1),
    *itertools.combinations(_MAPPED, 2),
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chosen = draw(_SOME_POLICIES)
    casts = any(policy.casts for policy in chosen)
    computed = {policy.compute_dtype for policy in chosen}
    writes = {"parameters"} if not casts else set()
    # What is written in float64 does not go back into narrower masters unrounded.
    if "float64" not in computed:
        writes.add("buffers")
    if computed == {""}:
        writes.add("objects")
    spec = draw(
        specs(
            writes=frozenset(writes),
            narrow_buffers_change=computed == {""},
            bits=not casts,
        )
    )
    # A forward that replaces tensors makes inference tensors, and nobody can write to
    # those later.
    inference = "objects" not in spec.writes
    return Case(spec, chosen, draw(_actions(inference=inference, assign=not casts)))


_SOME_POLICIES = st.lists(policies(), min_size=1, max_size=2).map(tuple)


@functools.lru_cache
def _actions(*, inference: bool, assign: bool) -> st.SearchStrategy[tuple[Action, ...]]:
    modes = ["no_grad", "autocast", "grad", *(["inference"] if inference else [])]
    numbers = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    seeds = st.integers(0, 99)
    forwards = st.builds(
        Forward,
        mode=st.sampled_from(modes),
        skip=numbers,
        repeat=numbers,
        fail=st.one_of(st.just(0), st.integers(0, 30)),
        stop=st.sampled_from([False, False, True]),
        batch=st.integers(1, 3),
        seed=seeds,
        part=st.one_of(st.just(0), st.just(0), st.integers(0, 9)),
        handling=st.sampled_from([False, False, True]),
    )
    loads = [
        Load(assign=assigned, step=step)
        for assigned in ([False, True] if assign else [False])
        for step in (1, 2)
    ]
    ways = st.sampled_from(["copy", "swap", "data"])
    action = st.one_of(
        st.builds(Forward, mode=st.sampled_from(modes), seed=seeds),
        forwards,
        st.sampled_from([State(), Train(), Train(on=False)]),
        st.sampled_from([Move(there=True), Move(), Reattach()]),
        st.sampled_from(loads),
        st.builds(Edit, index=st.integers(0, 30), how=ways, seed=seeds),
    )
    return st.lists(action, min_size=1, max_size=12).map(tuple)


@settings(max_examples=4 * settings.default.max_examples)
@given(case=cases())
def test_attached_model_and_untouched_twin_cannot_be_told_apart(
    case: Case, folder: Path
) -> None:
    run_case(case, folder)


@st.composite
def bundled_cases(draw: st.DrawFn) -> Case:
    """Cases whose models have small layers side by side, below the limit."""
    case = draw(cases())
    kinds = st.sampled_from(["linear", "linear", "layernorm", "conv", "block"])
    blocks = draw(st.lists(st.lists(kinds, min_size=2, max_size=4), max_size=4))
    children = [
        Spec("block", children=tuple(_simple(kind) for kind in block))
        for block in blocks
    ]
    children.insert(draw(st.integers(0, len(children))), case.spec)
    chosen = tuple(
        dataclasses.replace(policy, limit=draw(st.sampled_from(["0.1", "0.3", "0.6"])))
        for policy in case.policies
    )
    spec = Spec("block", children=tuple(children))
    return Case(spec, chosen, (Forward(), Forward(seed=1), *case.actions, Forward()))


def _simple(kind: str) -> Spec:
    inside = (Spec("linear"), Spec("layernorm")) if kind == "block" else ()
    return Spec(kind, children=inside)


@given(case=bundled_cases())
def test_layers_that_move_as_one_cannot_be_told_apart(case: Case, folder: Path) -> None:
    with patch.multiple(bundles, LEAST_SAVED=1, BUNDLE_SHARE=1):
        run_case(case, folder)


@given(spec=specs(writes=frozenset(), bits=False), policy=policies())
def test_least_that_an_infeasible_limit_names_works_and_is_kept(
    spec: Spec, policy: PolicySpec, folder: Path
) -> None:
    twin = Twin(spec, folder)
    least = twin.least(policy)
    # A little less is refused, unless the least is that of a model in place. The error
    # gives three digits, or three decimals.
    if least > 2**-30:
        below = least - max(least * 0.02, 0.001 if least >= 0.01 else 0.0)
        with pytest.raises(BudgetExceededError):
            attach_offload_hooks(twin.model, policy.make(below, folder))
    actions = (Forward(), Forward(seed=1), Move(), Forward(seed=2))
    run_case(Case(spec, (dataclasses.replace(policy, limit="0"),), actions), folder)


@given(spec=specs())
def test_spec_prints_as_the_code_that_builds_the_same_bits(spec: Spec) -> None:
    again = eval(repr(spec), {"Spec": Spec, "Own": Own})
    assert again == spec
    one, other = tensors_of(build(spec)), tensors_of(build(again))
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert same_bits(tensor, other[name]), name

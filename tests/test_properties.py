"""Any model, any policy, any sequence of actions: as if there were no hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_trees import FLOATS, Own, Spec, build, specs
from tests.traces import same_bits, tensors_of
from tests.twins import (
    Action,
    Case,
    Edit,
    Forward,
    Load,
    Move,
    PolicySpec,
    Reattach,
    State,
    Train,
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


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # The tensors are tiny: threads would only get in each other's way.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def policies(draw: st.DrawFn) -> PolicySpec:
    places = [("disk", "disk"), ("disk", "cpu"), ("cpu", "cpu")]
    rests, waits = draw(st.sampled_from(places))
    narrow = ["float8_e4m3fn", "float8_e5m2"]
    rest_dtype = wait_dtype = compute_dtype = ""
    # Nothing rests in host RAM and computes there, unless it is cast.
    if waits == "cpu" or draw(st.booleans()):
        rest_dtype = draw(st.sampled_from(["", *FLOATS, *narrow]))
        compute_dtype = draw(st.sampled_from(["", *FLOATS]))
        if (rests, waits) == ("disk", "cpu"):
            wait_dtype = draw(st.sampled_from(["", "", *FLOATS, *narrow]))
    residents = ["default", "default", "none", "cast"]
    limits = st.sampled_from([None, 0, "0", "0.02", "0.1", "0.3", "0.5", "1"])
    return PolicySpec(
        offload=rests,
        onload=waits,
        offload_dtype=rest_dtype,
        onload_dtype=wait_dtype,
        compute_dtype=compute_dtype,
        short=draw(st.booleans()),
        residents=draw(st.sampled_from(residents)) if compute_dtype else "default",
        limit=draw(limits),
        module_map=draw(
            st.lists(
                st.sampled_from(_MAPPED), max_size=2, unique_by=lambda pair: pair[0]
            ).map(tuple)
        ),
        debug=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chosen = draw(st.lists(policies(), min_size=1, max_size=2).map(tuple))
    casts = any(policy.casts for policy in chosen)
    computed = {policy.compute_dtype for policy in chosen}
    writes = ["parameters"] if not casts else []
    # What is written in float64 does not go back into narrower masters unrounded.
    if "float64" not in computed:
        writes += ["buffers"]
    if computed == {""}:
        writes += ["objects"]
    spec = draw(specs(writes=writes, narrow_buffers_change=computed == {""}))
    modes = ["no_grad", "inference", "autocast", "grad"]
    if "objects" in spec.writes:
        modes.remove("inference")  # its tensors cannot be written to later
    numbers = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    seeds = st.integers(0, 99)
    plain = st.builds(Forward, seed=seeds)
    forwards = st.builds(
        Forward,
        mode=st.sampled_from(modes),
        skip=numbers,
        repeat=numbers,
        fail=st.one_of(st.just(0), st.integers(0, 20)),
        stop=st.sampled_from([False, False, True]),
        batch=st.integers(1, 3),
        seed=seeds,
        part=st.one_of(st.just(0), st.integers(0, 9)),
        handling=st.sampled_from([False, False, True]),
    )
    others: list[st.SearchStrategy[Action]] = [
        st.builds(Train, on=st.booleans()),
        st.builds(State),
        st.builds(
            Load,
            assign=st.just(False) if casts else st.booleans(),
            step=st.integers(1, 2),
            seed=seeds,
        ),
        st.builds(
            Edit,
            index=st.integers(0, 30),
            how=st.sampled_from(["copy", "swap", "data"]),
            seed=seeds,
        ),
        st.builds(Move, there=st.booleans()),
        st.builds(Reattach),
    ]
    actions = st.lists(st.one_of(plain, forwards, *others), min_size=1, max_size=7)
    return Case(spec, chosen, tuple(draw(actions)))


@settings(max_examples=3 * settings.default.max_examples)
@given(case=cases())
def test_attached_model_and_untouched_twin_cannot_be_told_apart(
    case: Case, folder: Path
) -> None:
    run_case(case, folder)


@given(spec=specs(), policy=policies(), more=st.integers(0, 3))
def test_least_that_an_infeasible_limit_names_works(
    spec: Spec, policy: PolicySpec, more: int, folder: Path
) -> None: ...


@given(spec=specs())
def test_spec_prints_as_the_code_that_builds_the_same_bits(spec: Spec) -> None:
    again = eval(repr(spec), {"Spec": Spec, "Own": Own})
    assert again == spec
    one, other = tensors_of(build(spec)), tensors_of(build(again))
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert same_bits(tensor, other[name]), name

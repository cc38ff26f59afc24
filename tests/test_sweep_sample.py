"""A sample of the sweep; ``python -m tests.sweep`` runs all of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import nn

from tests.sweep.__main__ import compact_table
from tests.sweep.classes import LIBRARIES, class_names, try_class
from tests.sweep.pool import Task, run_tasks
from tests.sweep.recipe import Recipe
from tests.sweep.trial import Place, Result, run_trial

_SAMPLE = {
    "transformers": (
        "BartModel",  # encoder and decoder
        "DeepseekV3Model",  # low-rank attention
        "MixtralModel",  # fused experts
        "Qwen3NextModel",  # linear attention
        "ResNetModel",  # batch norm
        "SmolVLMModel",  # images put into text
    ),
    "diffusers": (
        "AutoencoderKL",
        "FluxTransformer2DModel",
        "UNetSpatioTemporalConditionModel",
    ),
}
if settings.get_current_profile_name() == "long":
    _SAMPLE["transformers"] += (
        "CLIPSegModel",  # two towers
        "TapasModel",  # many embeddings
        "WhisperModel",  # sound
    )
    _SAMPLE["diffusers"] += ("WanTransformer3DModel", "ZImageTransformer2DModel")
_CASES = [(library, name) for library, names in _SAMPLE.items() for name in names]


@pytest.mark.parametrize(("library", "name"), _CASES, ids=[n for _, n in _CASES])
def test_model_class_computes_the_same_in_a_third_of_its_size(
    library: str, name: str
) -> None:
    pytest.importorskip(library)
    result = try_class(library, name, Place())
    assert result.outcome == "equal", result.reason
    assert 0 < result.peak <= result.limit
    assert result.moved > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("library", "name"), _CASES, ids=[n for _, n in _CASES])
def test_model_class_computes_the_same_on_a_gpu_from_ram_in_bf16(
    library: str, name: str
) -> None:
    pytest.importorskip(library)
    place = Place(device="cuda", dtype=torch.bfloat16)
    result = try_class(library, name, place)
    assert result.outcome == "equal", result.reason
    assert result.moved > 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_list_of_classes_comes_from_the_library(library: str) -> None:
    pytest.importorskip(library)
    names = class_names(library, every=False)
    assert set(_SAMPLE[library]) <= set(names)
    assert set(names) <= set(class_names(library, every=True))


class _Counting(nn.Module):
    """Gives another result in each process-wide call."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return self.linear(x) + type(self).calls


def test_a_class_that_does_not_repeat_itself_is_not_called_equal() -> None:
    recipe = Recipe(build=lambda: _seeded(_Counting), inputs={"x": torch.ones(1, 4)})
    result = run_trial("_Counting", recipe, Place())
    assert result.outcome == "unbuilt"
    assert "run to run" in result.reason


class _TellsApart(nn.Module):
    """Computes something else when hooks hang on a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + len(self.linear._forward_pre_hooks)


def test_a_class_that_computes_something_else_has_failed() -> None:
    recipe = Recipe(build=lambda: _seeded(_TellsApart), inputs={"x": torch.ones(1, 4)})
    result = run_trial("_TellsApart", recipe, Place())
    assert result.outcome == "failed"
    assert "forward 1" in result.reason


def test_a_sweep_stops_when_its_time_is_over() -> None:
    tasks = [Task(library="transformers", name="BartModel", place=Place())]
    assert list(run_tasks(tasks, jobs=1, timeout=60, most=0)) == []


def test_the_compact_table_has_figures_of_what_ran_and_names_of_what_did_not() -> None:
    ran = Result(
        name="BartModel",
        outcome="equal",
        size=100 * 2**10,
        limit=38 * 2**10,
        beside=8 * 2**10,
        peak=36 * 2**10,
        moved=300 * 2**10,
    )
    refused = Result(name="OtherModel", outcome="refused", reason="because")
    table = compact_table([("transformers", ran), ("transformers", refused)])
    assert "| BartModel | 100 | 30% | 28 | 300 |" in table
    assert table.endswith("refused: OtherModel")


def _seeded(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()

"""Files that are cut short while a model rests in them: an error, and no dead process.

The system kills a process (SIGBUS) that touches what is no longer behind a memory map.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    attach_offload_hooks,
    detach,
    load_model,
    onload,
    save_model,
    set_limit,
)
from hookoffload.safetensors_file import CheckpointFile
from tests.small_models import (
    TinyModel,
    assert_same,
    on_disk,
    run,
    tiny_model,
    tokens,
)

PART = torch.ones(1, 3, 48)

ACTIONS: dict[str, Callable[[nn.Module, Path], object]] = {
    "state_dict": lambda model, _: [t.sum() for t in model.state_dict().values()],
    "state_dict of a part": lambda model, _: [
        tensor.sum() for tensor in model.blocks[0].state_dict().values()
    ],
    "load_state_dict": lambda model, _: model.load_state_dict(
        tiny_model(1).state_dict()
    ),
    "forward": lambda model, _: run(model, tokens()),
    "forward of a part": lambda model, _: run(model.blocks[0], PART),
    "save_model": lambda model, folder: save_model(model, folder),
    "set_limit": lambda model, _: set_limit(model, host_limit_gb=1),
    "onload": lambda model, _: [onload(model), run(model, tokens())],
}


def _rests_in(folder: Path, owner: str) -> tuple[nn.Module, Path]:
    """Return a model whose weights rest in a file, and the file."""
    if owner == "library":
        model = attach_offload_hooks(
            tiny_model(), on_disk(folder / "spill", limit_gb=0)
        )
        return model, next(folder.rglob("*.safetensors"))
    save_model(tiny_model(), folder / "model", progress=False)
    path = folder / "model" / "model.safetensors"
    policy = OffloadPolicy(compute_device="cpu", limit_gb=0, host_limit_gb=0)
    return load_model(TinyModel, path, policy), path


@pytest.mark.parametrize("owner", ["library", "user"])
@pytest.mark.parametrize("runs", [0, 1])
@pytest.mark.parametrize("what", ACTIONS)
def test_what_needs_a_file_that_was_cut_short_says_so(
    tmp_path: Path, owner: str, runs: int, what: str
) -> None:
    model, path = _rests_in(tmp_path, owner)
    for _ in range(runs):
        run(model, tokens())
    content, about = path.read_bytes(), path.stat()
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*(size|cut short)"):
        ACTIONS[what](model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert_same(run(model, tokens()), run(tiny_model(), tokens()))
    ACTIONS[what](model, tmp_path / "saved")
    detach(model)


def test_no_map_is_handed_out_of_what_is_not_there(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path, progress=False)
    file = CheckpointFile(tmp_path / "model.safetensors")
    first, *_, last = sorted(file.tensors.values(), key=lambda at: at.offset)
    file.mapped(first)
    os.truncate(file.path, last.offset + 1)
    with pytest.raises(CheckpointError, match=rf"{last.name}.*ends after 1 of"):
        file.mapped(last)
    assert file.mapped(first).sum().isfinite()
    file.close()

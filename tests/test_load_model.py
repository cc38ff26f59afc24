"""A model comes from its checkpoint: never initialised, read late, the file kept."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from hookoffload import (
    CheckpointError,
    OffloadPolicy,
    Placement,
    detach,
    load_model,
    offload,
    offload_plan,
    onload,
)
from tests.process_memory import anonymous_bytes, settled_bytes
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
from tests.snapshots import tensors_of

MIB = 2**20
STORES = ["cpu", "disk"]
every_store = pytest.mark.parametrize("store", STORES)


def _policy(store: str, folder: Path, **fields: Any) -> OffloadPolicy:
    if store == "disk":
        fields["disk_dir"] = folder / "spill"
    fields = {"limit_gb": 0, "compute_device": "cpu", **fields}
    return OffloadPolicy(store=store, **fields)


def _save(model: nn.Module, path: Path, *without: str) -> Path:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({k: v for k, v in state.items() if k not in without}, path)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny_file(tmp_path: Path) -> Iterator[Path]:
    """Yield a checkpoint of the tiny model, and see that nobody changed it."""
    path = _save(tiny_model(), tmp_path / "model.safetensors", "head.weight")
    digest, about = _digest(path), path.stat()
    yield path
    assert _digest(path) == digest
    assert path.stat().st_mtime_ns == about.st_mtime_ns


def _assert_tiny(model: nn.Module) -> None:
    for seed in range(2):
        assert_same(run(model, tokens(seed)), expected(tiny_model(), tokens(seed)))


# --- how the model is made ---


class Configured(nn.Module):
    """Is made from one configuration object, as models of transformers are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@every_store
def test_without_a_config_the_factory_is_called_alone(
    tmp_path: Path, tiny_file: Path, store: str
) -> None:
    model = load_model(TinyModel, tiny_file, _policy(store, tmp_path))
    assert type(model) is TinyModel
    _assert_tiny(model)
    detach(model)
    _assert_tiny(model)


@every_store
def test_mapping_as_config_gives_keyword_arguments(tmp_path: Path, store: str) -> None:
    plain = tiny_model(depth=1, width=16)
    path = _save(plain, tmp_path / "model.safetensors", "head.weight")
    config = {"depth": 1, "width": 16}
    model = load_model(TinyModel, path, _policy(store, tmp_path), config=config)
    assert_same(run(model, tokens()), expected(plain, tokens()))
    detach(model)


def test_empty_mapping_as_config_gives_no_arguments(
    tmp_path: Path, tiny_file: Path
) -> None:
    model = load_model(TinyModel, tiny_file, on_disk(tmp_path), config={})
    _assert_tiny(model)
    detach(model)


@every_store
def test_any_other_config_is_the_only_argument(tmp_path: Path, store: str) -> None:
    config = SimpleNamespace(width=8)
    plain = Configured(config)
    path = _save(plain, tmp_path / "model.safetensors")
    model = load_model(Configured, path, _policy(store, tmp_path), config=config)
    assert_same(run(model, torch.ones(2, 8)), run(plain, torch.ones(2, 8)))
    detach(model)


def test_checkpoint_may_be_a_text_path_or_a_list(
    tmp_path: Path, tiny_file: Path
) -> None:
    for checkpoint in (str(tiny_file), [str(tiny_file)], (tiny_file,)):
        model = load_model(TinyModel, checkpoint, on_disk(tmp_path))  # type: ignore[arg-type]
        _assert_tiny(model)
        detach(model)


@every_store
def test_later_file_of_a_list_wins(tmp_path: Path, store: str) -> None:
    first = _save(chain(4, 8, 4), tmp_path / "first.safetensors")
    last = tmp_path / "last.safetensors"
    save_file({"0.bias": torch.full((8,), 9.0)}, last)
    policy = _policy(store, tmp_path)
    model = load_model(lambda: chain(4, 8, 4), [first, last], policy)
    plain = chain(4, 8, 4)
    nn.init.constant_(plain[0].bias, 9.0)
    assert_same(run(model, torch.ones(1, 4)), run(plain, torch.ones(1, 4)))
    detach(model)


@every_store
def test_parameter_that_replaces_one_of_the_file_is_used(
    tmp_path: Path, tiny_file: Path, store: str
) -> None:
    model = load_model(TinyModel, tiny_file, _policy(store, tmp_path))
    plain = tiny_model()
    for one in (model, plain):
        run(one, tokens())
        torch.manual_seed(1)
        one.blocks[1].up.weight = nn.Parameter(torch.randn(2 * 48, 48))
    assert_same(run(model, tokens()), run(plain, tokens()))
    detach(model)
    assert_same(run(model, tokens()), run(plain, tokens()))


def test_pattern_stands_for_the_files_that_it_fits(tmp_path: Path) -> None:
    plain = chain(4, 8, 4)
    for number, (name, tensor) in enumerate(plain.state_dict().items()):
        save_file({name: tensor}, tmp_path / f"part-{number}.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    for pattern in ("part-*.safetensors", "part-[0-9].safetensors"):
        model = load_model(
            lambda: chain(4, 8, 4), f"{tmp_path}/{pattern}", on_disk(tmp_path / "spill")
        )
        assert_same(run(model, torch.ones(1, 4)), run(plain, torch.ones(1, 4)))
        detach(model)
    with pytest.raises(CheckpointError, match="no file fits this pattern"):
        load_model(lambda: chain(4, 8, 4), f"{tmp_path}/x-*.safetensors")


def test_name_with_the_characters_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    path = _save(chain(4, 8, 4), tmp_path / "model[1].safetensors")
    model = load_model(lambda: chain(4, 8, 4), path, on_disk(tmp_path / "spill"))
    detach(model)


def test_default_policy_attaches_too(tiny_file: Path) -> None:
    model = load_model(TinyModel, tiny_file)
    assert offload_plan(model).limit_bytes is None
    with torch.no_grad():
        output = model(tokens()).cpu()
    torch.testing.assert_close(output, expected(tiny_model(), tokens()))
    detach(model)


class Random(nn.Module):
    """Takes its time, and random numbers, where it is initialised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(2000, 2000) for _ in range(4)])
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)


def test_model_is_never_initialised(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Random().state_dict().items()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    state = torch.get_rng_state()
    model = load_model(Random, path, on_disk(tmp_path))
    assert torch.equal(torch.get_rng_state(), state), "no random number was drawn"
    assert not run(model.layers, torch.ones(1, 2000)).any()
    detach(model)


# --- what the tensors are ---


@every_store
def test_model_is_in_eval_mode(tmp_path: Path, tiny_file: Path, store: str) -> None:
    model = load_model(TinyModel, tiny_file, _policy(store, tmp_path))
    assert not any(module.training for module in model.modules())
    detach(model)
    assert not any(module.training for module in model.modules())


@every_store
def test_dtype_of_the_checkpoint_is_kept(tmp_path: Path, store: str) -> None:
    plain = tiny_model().bfloat16()
    path = _save(plain, tmp_path / "model.safetensors", "head.weight")
    model = load_model(TinyModel, path, _policy(store, tmp_path))
    for name, tensor in plain.state_dict().items():
        assert_same(model.state_dict()[name], tensor)
    x = torch.randn(2, 48).bfloat16()
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        assert_same(run(block.up, x), run(other.up, x))
    detach(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@every_store
def test_checkpoint_in_eight_bits_computes_in_sixteen(
    tmp_path: Path, store: str
) -> None:
    plain = chain(16, 32, 16)
    state = {k: v.to(torch.float8_e4m3fn) for k, v in plain.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    policy = _policy(store, tmp_path, compute_dtype=torch.bfloat16)
    model = load_model(lambda: chain(16, 32, 16), path, policy)
    rounded = chain(16, 32, 16).bfloat16()
    rounded.load_state_dict({k: v.bfloat16() for k, v in state.items()})
    x = torch.randn(2, 16).bfloat16()
    for _ in range(2):
        assert_same(run(model, x), run(rounded, x))
    assert model[0].weight.dtype == torch.float8_e4m3fn
    detach(model)


class Frozen(nn.Module):
    """Some parameters learn, some do not, some cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.learns = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)
        self.late = nn.Linear(3, 3)
        self.late.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(x) * self.learns + self.frozen + self.count


@every_store
def test_parameters_learn_or_not_as_the_model_says(tmp_path: Path, store: str) -> None:
    plain = Frozen()
    path = _save(plain, tmp_path / "model.safetensors")
    model = load_model(Frozen, path, _policy(store, tmp_path))
    wanted = {name: p.requires_grad for name, p in plain.named_parameters()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert_same(run(model, torch.ones(2, 3)), run(plain, torch.ones(2, 3)))
    detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted


class Buffers(nn.Module):
    """Buffers that the checkpoint has, and buffers that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.statistics = nn.BatchNorm1d(4)
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("computed", torch.arange(4.0) ** 2, persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.statistics(self.layer(x)) + self.kept
        return (x + self.computed) * self.steps


@every_store
def test_persistent_buffers_are_read_and_the_others_computed(
    tmp_path: Path, store: str
) -> None:
    plain = Buffers()
    run(plain, torch.randn(8, 4))
    plain.kept.fill_(2.5)
    plain.steps.fill_(7)
    plain.eval()
    path = _save(plain, tmp_path / "model.safetensors")
    assert "computed" not in load_file(path)
    model = load_model(Buffers, path, _policy(store, tmp_path))
    for _ in range(2):
        assert_same(run(model, torch.ones(2, 4)), run(plain, torch.ones(2, 4)))
    detach(model)
    for name, buffer in plain.named_buffers():
        assert_same(model.get_buffer(name), buffer)
    assert model.nothing is None


@every_store
@pytest.mark.parametrize("stored", ["first", "second", "both"])
def test_tied_weights_are_tied_however_they_are_stored(
    tmp_path: Path, store: str, stored: str
) -> None:
    plain = tiny_model()
    without = {"first": ["head.weight"], "second": ["embed.weight"], "both": []}
    path = _save(plain, tmp_path / "model.safetensors", *without[stored])
    model = load_model(TinyModel, path, _policy(store, tmp_path))
    assert model.head.weight is model.embed.weight
    _assert_tiny(model)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        model.head.weight.mul_(2)
        plain.head.weight.mul_(2)
    assert_same(run(model, tokens()), run(plain, tokens()))
    detach(model)
    assert model.head.weight is model.embed.weight
    assert_same(run(model, tokens()), run(plain, tokens()))


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@every_store
def test_shared_modules_are_filled_once(tmp_path: Path, store: str) -> None:
    plain = Shared()
    path = _save(plain, tmp_path / "m.safetensors", "second.weight", "second.bias")
    model = load_model(Shared, path, _policy(store, tmp_path))
    assert model.first is model.second
    assert_same(run(model, torch.ones(1, 4)), run(plain, torch.ones(1, 4)))
    detach(model)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class OldNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.weight_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Recurrent(nn.Module):
    """Keeps its weights in a list of its own beside the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x[None])[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[None]
        return self.encoder(self.attention(x, x, x)[0])


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.randn(8) for _ in range(3)])
        self.table = nn.ParameterDict({"a": torch.randn(8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = x * scale
        return x + self.table["a"]


@every_store
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [Normed, OldNormed, Recurrent, Attending, Listed])
def test_modules_with_ways_of_their_own_are_filled(
    tmp_path: Path, store: str, make: Callable[[], nn.Module]
) -> None:
    plain = make().eval()
    path = _save(plain, tmp_path / "model.safetensors")
    model = load_model(make, path, _policy(store, tmp_path))
    x = torch.randn(3, 8)
    for _ in range(2):
        assert_same(run(model, x), run(plain, x))
    detach(model)
    # Maps of the file lie as the file has them, and some processors' kernels add up in
    # another order where a matrix does not begin on a multiple of 16 bytes.
    torch.testing.assert_close(run(model, x), run(plain, x))
    for name, tensor in tensors_of(model).items():
        assert_same(tensor, tensors_of(plain)[name])


# --- names converted ---


class Calls:
    """Wraps a converter and counts the calls with real values."""

    def __init__(self, converter: Callable[[dict[str, Any]], Any]) -> None:
        self.converter = converter
        self.real = 0

    def __call__(self, state: dict[str, torch.Tensor]) -> Any:
        self.real += not any(tensor.is_meta for tensor in state.values())
        return self.converter(state)


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {re.sub(r"^old\.(\d)", r"\1", name): t for name, t in state.items()}


@every_store
def test_converter_may_rename(tmp_path: Path, store: str) -> None:
    plain = chain(4, 8, 4)
    state = {f"old.{name}": tensor for name, tensor in plain.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    converter = Calls(_renamed)
    model = load_model(
        lambda: chain(4, 8, 4),
        path,
        _policy(store, tmp_path),
        state_dict_converter=converter,
    )
    assert_same(run(model, torch.ones(1, 4)), run(plain, torch.ones(1, 4)))
    assert converter.real == 0, "renaming needs no values"
    assert not (tmp_path / "spill").exists()
    detach(model)


@every_store
def test_converter_may_drop_and_exchange(tmp_path: Path, store: str) -> None:
    plain = chain(4, 4, 4)
    state = dict(plain.state_dict()) | {"unused": torch.ones(1000)}
    path = tmp_path / "model.safetensors"
    save_file(state, path)

    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del state["unused"]  # its own dictionary: changing it in place is legal
        state["0.weight"], state["1.weight"] = state["1.weight"], state["0.weight"]
        return state

    model = load_model(
        lambda: chain(4, 4, 4),
        path,
        _policy(store, tmp_path),
        state_dict_converter=convert,
    )
    assert_same(model.state_dict()["0.weight"], plain[1].weight)
    assert_same(model.state_dict()["1.weight"], plain[0].weight)
    detach(model)


def _stacked(path: Path) -> nn.Sequential:
    """Write a checkpoint whose two layers are one tensor, transposed and halved."""
    plain = chain(4, 4, 4)
    weights = torch.stack([plain[0].weight, plain[1].weight]).detach()
    save_file(
        {
            "weights": (weights.mT / 2).contiguous(),
            "0.bias": plain[0].bias.detach(),
            "1.bias": plain[1].bias.detach(),
        },
        path,
    )
    return plain


def _unstacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = state.pop("weights") * 2
    return state | {"0.weight": weights[0].T, "1.weight": weights[1].T}


@every_store
def test_converter_may_compute(tmp_path: Path, store: str) -> None:
    path = tmp_path / "model.safetensors"
    plain = _stacked(path)
    digest = _digest(path)
    model = load_model(
        lambda: chain(4, 4, 4),
        path,
        _policy(store, tmp_path),
        state_dict_converter=_unstacked,
        cache_dir=tmp_path / "cache",
    )
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    held = sum(tensor.nbytes for tensor in load_file(file).values())
    assert held == plain[0].weight.nbytes + plain[1].weight.nbytes
    x = torch.randn(2, 4)
    for _ in range(2):
        assert_same(run(model, x), run(plain, x))
    detach(model)
    assert not (tmp_path / "spill").exists(), "it is read from the cache"
    assert_same(run(model, x), run(plain, x))
    assert _digest(path) == digest


@every_store
def test_converter_may_look_at_values(tmp_path: Path, store: str) -> None:
    plain = chain(4, 8, 4)
    save_file(
        {f"old.{k}": v for k, v in plain.state_dict().items()}
        | {"version": torch.tensor(3)},
        tmp_path / "model.safetensors",
    )

    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert state.pop("version").item() == 3
        return _renamed(state)

    model = load_model(
        lambda: chain(4, 8, 4),
        tmp_path / "model.safetensors",
        _policy(store, tmp_path),
        state_dict_converter=convert,
    )
    assert_same(run(model, torch.ones(1, 4)), run(plain, torch.ones(1, 4)))
    assert not (tmp_path / "spill").exists(), "the rest is read where it lies"
    detach(model)


def _negated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state["0.weight"].neg_()
    return state


def _transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state["0.weight"].t_()
    return state


@every_store
@pytest.mark.parametrize("convert", [_negated, _transposed])
def test_converter_may_compute_in_place(
    tmp_path: Path, store: str, convert: Callable[[Any], Any]
) -> None:
    """Nothing is returned that was not given, and yet it is not renaming."""
    plain = chain(4, 4, 4)
    path = _save(plain, tmp_path / "model.safetensors")
    digest = _digest(path)
    plain.load_state_dict(
        convert({k: v.clone() for k, v in plain.state_dict().items()})
    )
    model = load_model(
        lambda: chain(4, 4, 4),
        path,
        _policy(store, tmp_path),
        state_dict_converter=convert,
    )
    x = torch.randn(2, 4)
    for _ in range(2):
        assert_same(run(model, x), run(plain, x))
    detach(model)
    assert_same(run(model, x), run(plain, x))
    assert _digest(path) == digest


@every_store
def test_tensor_that_a_converter_gives_two_names_is_not_tied(
    tmp_path: Path, store: str
) -> None:
    """One tensor of the file fills two parameters, as load_state_dict would."""
    plain = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    plain[1].weight = nn.Parameter(plain[0].weight.detach().clone())
    path = tmp_path / "model.safetensors"
    save_file({"both": plain[0].weight.detach()}, path)
    model = load_model(
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)),
        path,
        _policy(store, tmp_path),
        state_dict_converter=lambda s: {"0.weight": s["both"], "1.weight": s["both"]},
    )
    x = torch.randn(2, 4)
    for edit in (False, True):
        if edit:
            for one in (model, plain):
                nn.init.zeros_(one[0].weight[0:1])
                nn.init.constant_(one[1].weight, 3.0)
        assert_same(run(model, x), run(plain, x))
    assert model[0].weight is not model[1].weight
    detach(model)
    assert_same(run(model, x), run(plain, x))


# --- nothing read too early, nothing held too long ---


def _resident_bytes(path: Path) -> int:
    """Return how much of a mapped file lies in this process's memory."""
    if not os.path.exists("/proc/self/smaps"):
        pytest.skip("the system does not tell which pages of a map are there")
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


WIDTH = 3000  # 34 MiB a layer: each is a mapping of its own, returned when freed


def _large() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    state = {
        f"{number}.weight": torch.full((WIDTH, WIDTH), number / 1e5)
        for number in range(4)
    }
    save_file(state, path)
    digest = _digest(path)
    yield path
    assert _digest(path) == digest
    path.unlink()


@pytest.mark.parametrize("rename", [False, True])
def test_nothing_is_read_while_loading(
    tmp_path: Path, large_file: Path, monkeypatch: pytest.MonkeyPatch, rename: bool
) -> None:
    reads: list[int] = []
    read = os.preadv

    def note(*args: Any) -> int:
        reads.append(read(*args))
        return reads[-1]

    monkeypatch.setattr(os, "preadv", note)
    start = settled_bytes()
    model = load_model(
        _large,
        large_file,
        on_disk(tmp_path / "spill"),
        state_dict_converter=_renamed if rename else None,
    )
    size = large_file.stat().st_size
    assert sum(reads) == 0
    assert _resident_bytes(large_file) < MIB
    assert anonymous_bytes() - start < size / 8
    output = run(model, torch.ones(1, WIDTH))
    assert sum(reads) >= size - MIB
    # One layer of four at a time, and only through the window.
    assert _resident_bytes(large_file) < MIB
    assert anonymous_bytes() - start < size / 2
    assert output.shape == (1, WIDTH)
    detach(model)
    assert _resident_bytes(large_file) < MIB, "detach reads nothing either"


IN_RAM_WHILE_USED = [
    OffloadPolicy(
        offload=Placement(device="disk"),
        onload=Placement(device="cpu"),
        compute_device="cpu",
    ),
    OffloadPolicy.from_vram_config(
        {
            "offload_dtype": "disk",
            "offload_device": "disk",
            "onload_device": "cpu",
            "preparing_device": "cpu",
            "computation_device": "cpu",
        }
    ),
]


@pytest.mark.parametrize("policy", IN_RAM_WHILE_USED, ids=["placements", "vram_config"])
def test_model_on_disk_takes_ram_only_while_it_is_onloaded(
    large_file: Path, policy: OffloadPolicy
) -> None:
    size = large_file.stat().st_size
    start = settled_bytes()
    model = load_model(_large, large_file, policy)
    assert anonymous_bytes() - start < size / 8
    x = torch.ones(1, WIDTH)
    wanted = run(model, x)
    for switch in (onload, lambda model: run(model, x)):
        assert anonymous_bytes() - start > 0.9 * size
        offload(model)
        assert anonymous_bytes() - start < size / 8
        switch(model)
    assert_same(run(model, x), wanted)
    offload(model)
    detach(model)
    assert anonymous_bytes() - start < size / 8, "it stays a map of its file"
    assert_same(run(model, x), wanted)


@pytest.mark.parametrize("policy", IN_RAM_WHILE_USED, ids=["placements", "vram_config"])
def test_edits_of_an_onloaded_model_are_kept_and_the_file_is_not_changed(
    tiny_file: Path, policy: OffloadPolicy
) -> None:
    model, plain = load_model(TinyModel, tiny_file, policy), tiny_model()

    def edit() -> None:
        for one in (model, plain):
            with torch.no_grad():
                one.blocks[0].gain.mul_(2)
                one.blocks[1].up.weight[3] = 1.5
                one.statistics.running_mean.add_(1)

    for switch in (onload, offload, onload, offload):
        switch(model)
        edit()
        assert_same(run(model, tokens()), run(plain, tokens()))
    offload(model)
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        assert_same(state[name], tensor)
    detach(model)
    assert_same(run(model, tokens()), run(plain, tokens()))


# --- the user's file is the user's ---


@every_store
def test_checkpoint_is_never_modified(
    tmp_path: Path, tiny_file: Path, store: str
) -> None:
    """The fixture compares the file's bytes and time when this is over."""
    for limit_gb in (0, 0.00008, None):
        policy = _policy(store, tmp_path, limit_gb=limit_gb)
        model, plain = load_model(TinyModel, tiny_file, policy), tiny_model()
        for one in (model, plain):
            one.train()
            run(one, tokens())
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.add_(0.5)
            run(one, tokens(1))
            one.load_state_dict(tiny_model(2).state_dict())
            run(one, tokens(2))
            one.eval()
        assert_same(run(model, tokens()), run(plain, tokens()))
        offload(model)
        onload(model)
        assert_same(run(model, tokens()), run(plain, tokens()))
        detach(model)
        for one in (model, plain):
            with torch.no_grad():
                one.blocks[0].up.weight.zero_()
        assert_same(run(model, tokens()), run(plain, tokens()))
        assert_same(load_file(tiny_file)["position"], tiny_model().position)


def test_checkpoint_may_be_read_only(tmp_path: Path, tiny_file: Path) -> None:
    tiny_file.chmod(0o400)
    model = load_model(TinyModel, tiny_file, on_disk(tmp_path))
    _assert_tiny(model)
    with torch.no_grad():
        model.position.zero_()
    assert not run(model, tokens()).isnan().any()
    detach(model)


def test_two_models_from_one_checkpoint_do_not_share_weights(
    tmp_path: Path, tiny_file: Path
) -> None:
    one = load_model(TinyModel, tiny_file, on_disk(tmp_path))
    other = load_model(TinyModel, tiny_file, on_disk(tmp_path))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert not run(one, tokens()).any()
    _assert_tiny(other)
    detach(one)
    _assert_tiny(other)
    detach(other)
    _assert_tiny(other)


@every_store
def test_loaded_model_outlives_its_checkpoint_after_detach(
    tmp_path: Path, store: str
) -> None:
    path = _save(tiny_model(), tmp_path / "model.safetensors", "head.weight")
    model = load_model(TinyModel, path, _policy(store, tmp_path))
    run(model, tokens())
    detach(model)
    path.unlink()
    _assert_tiny(model)
    assert nbytes(model) == nbytes(tiny_model())

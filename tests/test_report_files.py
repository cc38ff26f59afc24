"""What a report is written to: a trace, a picture, a page, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hookoffload.report_html as report_html
from hookoffload import Report, offloaded, report
from hookoffload.aside import written_aside
from hookoffload.timeline import Span
from tests.small_models import run, tiny_model, tokens

# What a page and a trace must carry unharmed: modules may be called anything.
ODD_NAMES = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "@@DATA@@",
    "层 \u2028 \U0001f600 \"quoted\" & 'so'",
)


def odd_model() -> torch.nn.Sequential:
    """Return layers with names that mean something in HTML or JavaScript."""
    model = torch.nn.Sequential()
    for name in ODD_NAMES:
        model.add_module(name, torch.nn.Linear(16, 16))
    return model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("weights")
    model = tiny_model()
    policy: dict[str, Any] = {"store": "disk", "disk_dir": folder, "record": True}
    with offloaded(model, compute_device="cpu", limit_gb=0.00008, **policy):
        for _ in range(3):
            run(model, tokens())
        return report(model)


def test_bytes_that_are_compared_have_one_unit(found: Report) -> None:
    layers = tuple(
        dataclasses.replace(layer, bytes_moved=2 * 2**30 if number else 5 * 2**20)
        for number, layer in enumerate(found.layers)
    )
    stats = dataclasses.replace(found.stats, peak_bytes=5 * 2**20, limit_bytes=2**30)
    told = dataclasses.replace(found, layers=layers, stats=stats)
    lines = str(told).splitlines()
    head = next(at for at, line in enumerate(lines) if "misses" in line.split()[-1:])
    table = lines[head : head + len(layers) + 1]
    assert len({line.find("GiB") for line in table[1:]}) == 1
    assert {len(line) for line in table} == {len(table[0])}, "and the columns hold"
    assert sum("0.00488 GiB" in line for line in table) == 1
    figures = {label: text for label, text, _ in told.figures()}
    assert (figures["peak"], figures["limit"]) == ("0.00488 GiB", "1.000 GiB")


def events_of(found: Report, path: Path) -> list[dict[str, Any]]:
    found.save_trace(path)
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert trace["otherData"]["stats"] == dataclasses.asdict(found.stats)
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


def lanes_of(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    lanes: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            lanes[names[event["tid"]]].append(event)
    return lanes


def assert_nests(lane: list[dict[str, Any]]) -> None:
    """Check that events follow each other or lie inside each other."""
    around: list[int] = []
    for event in lane:  # viewers take them by their starts, the longer first
        start, end = event["ts"], event["ts"] + event["dur"]
        while around and around[-1] <= start:
            around.pop()
        assert not around or end <= around[-1], event
        around.append(end)


# -- trace ----------------------------------------------------------------------------


def test_a_trace_has_a_lane_for_everything_and_its_events_nest(
    found: Report, tmp_path: Path
) -> None:
    lanes = lanes_of(events_of(found, tmp_path / "run.json"))
    timeline = found.timeline
    assert list(lanes) == ["passes", "compute", "stalls", "copies", "disk reads"]
    assert [event["name"] for event in lanes["passes"]] == [
        "pass 1",
        "pass 2",
        "pass 3",
    ]
    assert len(lanes["compute"]) == len(timeline.computes)
    assert len(lanes["copies"]) == len(timeline.copies)
    assert {event["name"] for event in lanes["compute"]} >= {"blocks.0.up", "embed"}
    copied = sum(event["args"]["bytes"] for event in lanes["copies"])
    assert copied == sum(span.nbytes for span in timeline.copies)
    for lane in lanes.values():
        assert_nests(lane)
        assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in lane)


def test_memory_in_a_trace_is_what_the_timeline_has(
    found: Report, tmp_path: Path
) -> None:
    events = events_of(found, tmp_path / "run.json")
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert counters == [point.by_kind for point in found.timeline.memory]


def test_reads_at_the_same_time_get_lanes_of_their_own(
    found: Report, tmp_path: Path
) -> None:
    reads = tuple(
        Span(name=f"layer {start}", start=start / 10, end=start / 10 + 0.15)
        for start in range(5)
    )
    timeline = dataclasses.replace(found.timeline, reads=reads)
    several = dataclasses.replace(found, timeline=timeline)
    lanes = lanes_of(events_of(several, tmp_path / "run.json"))
    reading = {name: lane for name, lane in lanes.items() if name.startswith("disk")}
    assert list(reading) == ["disk reads 1", "disk reads 2"]
    assert sum(map(len, reading.values())) == 5
    for lane in reading.values():
        assert_nests(lane)


def test_a_report_of_nothing_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with offloaded(tiny_model(), compute_device="cpu", record=True) as model:
        empty = report(model)
        str(empty)
        empty.save(tmp_path / "run.html")
        empty.plot(tmp_path / "run.png")
        assert events_of(empty, tmp_path / "run.json")


# -- page -----------------------------------------------------------------------------


def test_names_of_layers_cannot_break_out_of_a_page(tmp_path: Path) -> None:
    model = odd_model()
    policy: dict[str, Any] = {"store": "disk", "disk_dir": tmp_path, "record": True}
    with offloaded(model, compute_device="cpu", limit_gb=0, **policy):
        run(model, torch.randn(1, 16))
        found = report(model)
    found.save(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page.count("</script") == page.count("<script") == 2
    assert "<!--<" not in page
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    names = json.loads(data[1])["names"]
    assert set(names) == set(ODD_NAMES)
    lanes = lanes_of(events_of(found, tmp_path / "run.json"))
    assert {event["name"] for event in lanes["compute"]} == set(ODD_NAMES)


def test_a_page_names_no_address(found: Report, tmp_path: Path) -> None:
    found.save(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://|src=|@import|url\(", page) == []


# -- picture --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")]
)
def test_a_picture_has_the_format_of_its_ending(
    found: Report, tmp_path: Path, ending: str, begins: bytes
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"run.{ending}"
    found.plot(path)
    content = path.read_bytes()
    assert content.startswith(begins)
    assert len(content) > 5000


@pytest.mark.parametrize("name", ["run.docx", "run", "run.html"])
def test_a_picture_in_an_unknown_format_is_refused(
    found: Report, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"run.*\.png"):
        found.plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_picture_says_all_of_its_title_in_one_unit(
    found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    made: list[Any] = []

    class Watched(figures.Figure):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Watched)
    stats = dataclasses.replace(
        found.stats, limit_bytes=2**30 // 8, peak_bytes=2**30 // 10
    )
    name = "SomeTransformerWithALongName" * 3
    dataclasses.replace(found, model=name, stats=stats).plot(tmp_path / "run.png")
    [figure] = made
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    memory = figure.axes[0]
    assert memory.get_ylabel() == "GiB"
    assert memory.get_title(loc="left") == "peak 0.100 GiB"


def test_without_matplotlib_the_error_names_the_extra(
    found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hookoffload\[plot\]'"):
        found.plot(tmp_path / "run.png")


# -- files ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["save", "plot", "save_trace"])
def test_a_folder_that_does_not_exist_is_named(
    found: Report, tmp_path: Path, kind: str
) -> None:
    if kind == "plot":
        pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="does not exist"):
        getattr(found, kind)(tmp_path / "missing" / "run.png")
    (tmp_path / "run.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        getattr(found, kind)(tmp_path / "run.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


def test_a_file_is_replaced_as_a_whole(
    found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    path.write_text("the one before")
    monkeypatch.setattr(report_html.html, "escape", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.save(path)
    assert path.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    found.save(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_between_two_writes_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []

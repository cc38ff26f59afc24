"""The page of a report in a real browser: what it shows, and what it asks for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hookoffload import Report, offloaded, report
from tests.browser import Page, find_browser, open_browser
from tests.small_models import run, tiny_model, tokens
from tests.test_report_files import ODD_NAMES, odd_model

BROWSER = find_browser()

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser: apt-get install chromium"
)

DESKTOP, PHONE = (1280, 900), (360, 740)

OUTPUT = Path(__file__).parent / "output"


@pytest.fixture(scope="module")
def pictures() -> Path:
    """Return the folder of pictures that a person can look at after the tests."""
    OUTPUT.mkdir(exist_ok=True)
    return OUTPUT


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert BROWSER is not None
    with open_browser(BROWSER, tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """Give each test a fresh list of complaints, and see that it stays empty."""
    browser.problems.clear()
    browser.requests.clear()
    browser.size(*DESKTOP)
    browser.scheme("light")
    yield browser
    browser.value("0")  # so that everything it had to say has come
    assert browser.problems == []


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("weights")
    model = tiny_model(depth=12)
    policy: dict[str, Any] = {"store": "disk", "disk_dir": folder, "record": True}
    with offloaded(model, compute_device="cpu", limit_gb=0.0002, **policy):
        for _ in range(4):
            run(model, tokens())
        return report(model)


@pytest.fixture(scope="module")
def path(found: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run.html"
    found.save(path)
    return path


def tip(page: Page) -> str | None:
    """Return what is written beside the mouse, None if nothing is."""
    text = "document.getElementById('tip')"
    found: str | None = page.value(f"{text}.hidden ? null : {text}.innerText")
    return found


def box_of(page: Page, element: str) -> dict[str, float]:
    """Return where an element lies in the window, after scrolling to it."""
    box: dict[str, float] = page.value(
        f"(e => (e.scrollIntoView({{block: 'center'}}), "
        f"e.getBoundingClientRect().toJSON()))(document.getElementById('{element}'))"
    )
    return box


def pixels(page: Page, lane: str) -> set[tuple[int, ...]]:
    """Return the colours of a lane."""
    rgba = page.value(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {"
        f"const c = document.getElementById('lane-{lane}');"
        "const copy = document.createElement('canvas');"
        "[copy.width, copy.height] = [c.width, c.height];"
        "const pen = copy.getContext('2d', {willReadFrequently: true});"
        "pen.drawImage(c, 0, 0);"
        "const all = pen.getImageData(0, 0, c.width, c.height).data;"
        "const seen = new Set();"
        "for (let i = 0; i < all.length; i += 4) "
        "seen.add([all[i], all[i+1], all[i+2]].join());"
        "done([...seen])})))"
    )
    return {tuple(map(int, one.split(","))) for one in rgba}


def test_the_page_asks_nothing_of_the_network(page: Page, path: Path) -> None:
    page.open(path)
    assert page.requests == [path.as_uri()]


def test_the_numbers_are_those_of_the_stats(
    page: Page, path: Path, found: Report
) -> None:
    page.open(path)
    shown = page.value(
        "Object.fromEntries([...document.querySelectorAll('data')]"
        ".map(e => [e.dataset.figure, [e.textContent, e.value]]))"
    )
    stats = found.stats
    exact = {label: float(value) for label, (_, value) in shown.items()}
    assert exact == {
        "forwards": stats.forwards,
        "peak": stats.peak_bytes,
        "limit": stats.limit_bytes,
        "copied": stats.bytes_moved,
        "written back": stats.bytes_written_back,
        "stalled": stats.stall_seconds,
        "hits": stats.hits,
        "misses": stats.misses,
    }
    texts = {label: text for label, text, _ in found.figures()}
    assert {label: text for label, (text, _) in shown.items()}.items() <= texts.items()


def test_every_layer_is_in_the_table_with_its_figures(
    page: Page, path: Path, found: Report
) -> None:
    page.open(path)
    page.value("document.getElementById('all').click()")
    rows = page.value(
        "[...document.querySelectorAll('#rows tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    shown = {row[0]: [int(n) for n in (row[2], row[4], row[5])] for row in rows}
    assert len(rows) == len(found.layers) > 30
    assert shown == {
        one.name: [one.copies, one.hits, one.misses] for one in found.layers
    }
    page.value("document.querySelector('#head th:nth-child(6) button').click()")
    order = page.value(
        "[...document.querySelectorAll('#rows tr')].map(r => +r.cells[5].textContent)"
    )
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("lane", ["compute", "copies", "reads", "stalls"])
def test_the_layer_under_the_mouse_is_named(
    page: Page, path: Path, found: Report, lane: str
) -> None:
    page.open(path)
    spans = getattr(found.timeline, "computes" if lane == "compute" else lane)
    longest = max(
        (span for span in spans if span.depth == 0), key=lambda span: span.seconds
    )
    box = box_of(page, f"lane-{lane}")
    middle = (longest.start + longest.end) / 2 / found.timeline.end
    rows = 1 + max(span.depth for span in spans)
    page.move_mouse(
        box["x"] + box["width"] * middle, box["y"] + box["height"] * 0.5 / rows
    )
    text = tip(page)
    assert text is not None
    assert text.splitlines()[0] == longest.name
    page.move_mouse(2, 2)
    assert tip(page) is None


def test_the_memory_under_the_mouse_is_told_by_kind(
    page: Page, path: Path, found: Report
) -> None:
    page.open(path)
    box = box_of(page, "lane-memory")
    page.move_mouse(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    text = tip(page)
    assert text is not None
    for kind, nbytes in found.timeline.memory[-1].by_kind.items():
        assert f"{kind} {nbytes / 2**20:.3f} MiB" in text


def test_a_pass_can_be_looked_at_by_itself(
    page: Page, path: Path, found: Report
) -> None:
    page.open(path)
    page.value("[...document.querySelectorAll('#passes button')].at(-1).click()")
    last = found.timeline.passes[-1]
    inside = [s for s in found.timeline.computes if s.start >= last.start]
    first = next(span for span in inside if span.depth == 0)
    where = ((first.start + first.end) / 2 - last.start) / last.seconds
    box = box_of(page, "lane-compute")
    page.move_mouse(box["x"] + box["width"] * where, box["y"] + 3)
    text = tip(page)
    assert text is not None
    assert first.name in text
    pressed = "document.querySelector('#passes [aria-pressed=true]').textContent"
    assert page.value(pressed) == "pass 4"


def ticks(page: Page, lane: str) -> tuple[list[float], str]:
    """Return the numbers along a lane, and their unit."""
    frame = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done"
    page.value(f"{frame})))")
    text = page.value(f"document.getElementById('lane-{lane}').dataset.ticks")
    numbers, units = zip(*(one.split(" ") for one in text.split(" | ")), strict=True)
    assert len(set(units)) == 1
    return [float(number) for number in numbers], units[0]


def assert_round(numbers: list[float]) -> None:
    steps = {f"{b - a:.6e}" for a, b in itertools.pairwise(numbers)}
    assert len(steps) <= 1, numbers
    for step in steps:
        assert step.split("e")[0] in ("1.000000", "2.000000", "5.000000"), numbers


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_seconds_and_bytes_stand_at_round_ticks(
    page: Page, path: Path, found: Report, size: tuple[int, int]
) -> None:
    page.size(*size)
    page.open(path)
    numbers, unit = ticks(page, "time")
    scale = {"s": 1, "ms": 1e3, "\N{MICRO SIGN}s": 1e6}[unit]
    end = found.timeline.end * scale
    assert numbers[0] == 0
    assert end - (numbers[1] - numbers[0]) <= numbers[-1] <= end
    assert 2 <= len(numbers) <= 13
    assert_round(numbers)
    page.value("document.querySelectorAll('#passes button')[3].click()")
    inside, unit = ticks(page, "time")
    third = found.timeline.passes[2]
    scale = {"s": 1, "ms": 1e3, "\N{MICRO SIGN}s": 1e6}[unit]
    assert all(third.start * scale <= at <= third.end * scale for at in inside)
    assert_round(inside)
    sizes, _ = ticks(page, "memory")
    assert 2 <= len(sizes) <= 6
    assert_round([0, *sizes])


def test_bytes_of_layers_are_told_in_one_unit(
    page: Page, found: Report, tmp_path: Path
) -> None:
    sizes = [2 * 2**30, *[5 * 2**20] * (len(found.layers) - 1)]
    layers = tuple(
        dataclasses.replace(layer, bytes_moved=size)
        for layer, size in zip(found.layers, sizes, strict=True)
    )
    dataclasses.replace(found, layers=layers).save(tmp_path / "run.html")
    page.open(tmp_path / "run.html")
    page.value("document.getElementById('all').click()")
    cells = "[...document.querySelectorAll('#rows td:nth-child(2)')]"
    shown = page.value(f"[...new Set({cells}.map(cell => cell.textContent))].sort()")
    assert shown == ["0.00488 GiB", "2.000 GiB"]


def test_stalls_are_drawn_in_their_colour(page: Page, path: Path) -> None:
    page.open(path)
    assert any(red > 180 and green < 80 for red, green, _ in pixels(page, "stalls"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_in_light_and_dark(
    page: Page, path: Path, pictures: Path, scheme: str
) -> None:
    page.scheme(scheme)
    page.open(path)
    for element in ("h1", ".soft", ".tile dt", "td", ".stalled", "button"):
        contrast = page.value(
            f"(() => {{ const e = document.querySelector('{element}');"
            "const numbers = c => c.match(/[0-9.]+/g).map(Number);"
            "let back = e, under;"
            "do { under = numbers(getComputedStyle(back).backgroundColor); "
            "back = back.parentElement; } while (under[3] === 0);"
            "const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; "
            "return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });"
            "return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
            "const [a, b] = [light(numbers(getComputedStyle(e).color)), light(under)];"
            "return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })()"
        )
        assert contrast >= 4.5, f"{element} in {scheme}: {contrast:.2f}"
    picture = page.screenshot(pictures / f"report_{scheme}.png")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_the_lanes_follow_a_change_of_scheme(page: Page, path: Path) -> None:
    page.open(path)
    light = pixels(page, "memory")
    dark_ground = (14, 19, 26)
    assert dark_ground not in light
    page.scheme("dark")
    page.wait_until(
        lambda: dark_ground in pixels(page, "memory"), "the lanes stay light"
    )


def test_on_a_phone_the_page_does_not_scroll_sideways(
    page: Page, path: Path, found: Report, pictures: Path
) -> None:
    page.size(*PHONE, phone=True)
    page.open(path)
    assert page.value("document.documentElement.scrollWidth") == PHONE[0]
    page.value("scrollTo(500, 0)")
    assert page.value("scrollX") == 0
    box = box_of(page, "lane-compute")
    outer = [span for span in found.timeline.computes if span.depth == 0]
    longest = max(outer, key=lambda span: span.seconds)
    where = (longest.start + longest.end) / 2 / found.timeline.end
    page.tap(box["x"] + box["width"] * where, box["y"] + 4)
    text = tip(page)
    assert text is not None
    assert text.splitlines()[0] == longest.name
    shown = box_of(page, "tip")
    assert shown["left"] >= 0
    assert shown["right"] <= PHONE[0]
    assert len(page.screenshot(pictures / "report_phone.png")) > 20_000


def test_odd_names_of_layers_are_shown_as_they_are(page: Page, tmp_path: Path) -> None:
    model = odd_model()
    policy: dict[str, Any] = {"store": "disk", "disk_dir": tmp_path, "record": True}
    with offloaded(model, compute_device="cpu", limit_gb=0, **policy):
        for _ in range(2):
            run(model, torch.randn(1, 16))
        report(model).save(tmp_path / "run.html")
    page.open(tmp_path / "run.html")
    names = page.value(
        "[...document.querySelectorAll('#rows td:first-child')].map(e => e.textContent)"
    )
    assert set(names) == set(ODD_NAMES)
    assert page.value("document.title") == "Sequential - hookoffload report"


def test_a_report_of_nothing_is_a_page_too(page: Page, tmp_path: Path) -> None:
    with offloaded(tiny_model(), compute_device="cpu", record=True) as model:
        report(model).save(tmp_path / "run.html")
    page.open(tmp_path / "run.html")
    assert "no complete pass" in page.value("document.body.innerText").lower()

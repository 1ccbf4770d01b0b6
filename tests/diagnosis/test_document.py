"""The report as a document, and as a page in a browser."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from batchnorm.diagnosis.document import document
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import ReportedLayer
from batchnorm.report.page import page
from diagnosis.reports import finding, fixed, full, not_finite
from report.test_page import read
from support import browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_the_summary_has_the_findings_themselves_not_their_lines() -> None:
    made = document(full())
    assert made.tally == [("no", 2, "errors"), ("open", 18, "warnings"), ("note", 2, "info")]
    assert [(row.outcome, row.claim) for section in made.sections for row in section.judged][:3] == [
        ("no", "BN001 layer1.1.bn"),
        ("no", "BN301 layer1.2.bn"),
        ("open", "BN101 layer1.0.bn and 11 more layers"),
    ]


def test_the_strip_is_as_high_as_layers_are_off() -> None:
    (strip,) = document(full()).strips
    assert [cell.level for cell in strip.cells] == [*[0, 2, 3, 4] * 3, None]
    assert strip.cells[2].label == "layer1.2.bn: mean off by -2 SD, log variance ratio -0.1"
    assert strip.cells[-1].label == "aux.bn: no numbers"
    assert document(Report([finding()], [ReportedLayer("a", "BatchNorm1d", 3)])).strips == []


@pytest.mark.parametrize(
    ("values", "bins"),
    [
        ([0.0, 0.01, -0.02], {6: 3}),
        ([0.05, 0.2, 0.5, 2.0, 5.0, 50.0], {7: 1, 8: 1, 9: 1, 10: 1, 11: 1, 12: 1}),
        ([-0.05, -0.2, -0.5, -2.0, -5.0, -50.0], {5: 1, 4: 1, 3: 1, 2: 1, 1: 1, 0: 1}),
        ([math.nan, math.inf, -math.inf], {12: 2, 0: 1}),
    ],
)
def test_histograms(values: list[float], bins: dict[int, int]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    layer = ReportedLayer("a", "BatchNorm1d", len(values), None, None, tensor, tensor)
    profile = document(Report([], [layer])).sections[-1].profiles[0]
    shift, ratio = profile.histograms
    assert {i: count for i, count in enumerate(shift.counts) if count} == bins
    assert ratio.counts == shift.counts
    assert list(shift.levels) == [4, 4, 3, 2, 1, 0, 0, 0, 1, 2, 3, 4, 4]
    assert {word: x for x, word in shift.ticks}["0"] == 6.5
    assert {word: x for x, word in shift.ticks}["1"] == 10.0


def test_what_is_not_finite_is_said() -> None:
    histogram = document(not_finite()).sections[-1].profiles[0].histograms[0]
    assert histogram.description.endswith("8 channels, from -0.02 over 0.00286 in the middle to 0.02, 1 not finite")


@pytest.mark.parametrize("report", [full(), fixed(), not_finite(), Report([], []), Report([finding("XY1")], [])])
def test_every_report_is_a_page_whose_links_lead_somewhere(report: Report) -> None:
    reader = read(page(document(report)))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value.removeprefix("#") for name, value in reader.attributes if name == "href"} <= set(ids)
    assert {value for name, value in reader.attributes if name == "aria-labelledby"} <= set(ids)
    assert reader.count["script"] == 0
    assert not set("".join(reader.text)) & {"\x1b", "\u202e"}


def test_the_page_needs_no_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<svg" in page(document(full()))


LIMIT = 2_000_000  # bytes
SIZES = pytest.mark.parametrize("size", [browser.DESK, browser.PHONE, (390, 844)], ids=["desk", "small phone", "phone"])
DARK = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("page")
    for name, report in (("full", full(161)), ("fixed", fixed(53))):
        report.to_html(folder / f"{name}.html")
    return sorted(folder.iterdir())


@pytest.mark.long
@SIZES
@DARK
def test_it_can_be_read(chromium: Browser, files: list[Path], size: tuple[int, int], dark: bool) -> None:
    for file in files:
        assert file.stat().st_size < LIMIT
        with browser.shown(chromium, file, size, dark=dark) as shown:
            browser.nothing_sticks_out(shown)
            browser.drawings_are_legible(shown)
            browser.contrast_is_enough(shown)


@pytest.mark.long
def test_the_summary_with_its_strip_fits_one_screen(chromium: Browser, files: list[Path]) -> None:
    for file in files:
        with browser.shown(chromium, file) as shown:
            browser.summary_fits_one_screen(shown)


@pytest.mark.long
@SIZES
def test_a_keyboard_is_enough(chromium: Browser, tmp_path: Path, size: tuple[int, int]) -> None:
    full().to_html(tmp_path / "report.html")
    with browser.shown(chromium, tmp_path / "report.html", size) as shown:
        browser.keyboard_reaches_everything(shown)


@pytest.mark.long
def test_a_cell_leads_to_its_layer(chromium: Browser, files: list[Path]) -> None:
    with browser.shown(chromium, files[1]) as shown:
        cell = shown.locator(".overview .cells a").nth(40)
        assert cell.get_attribute("title") == cell.get_attribute("aria-label")
        cell.click()
        top = shown.evaluate("document.getElementById('layer-40').getBoundingClientRect().top")
        assert 0 <= top < browser.DESK[1] / 2


@pytest.mark.long
@DARK
def test_it_prints(chromium: Browser, files: list[Path], dark: bool) -> None:
    for file in files:
        with browser.shown(chromium, file, browser.PAPER, dark=dark, paper=True) as shown:
            browser.prints_well(shown)
            browser.nothing_sticks_out(shown)
            browser.contrast_is_enough(shown)

"""The page in a browser: on a desk, on a phone, in the dark, on paper, by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchnorm.report.page import page
from report import documents
from support import browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.long
LIMIT = 2_000_000  # bytes


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(documents.rich()), encoding="utf-8")
    return path


def test_it_is_a_small_file(file: Path) -> None:
    assert file.stat().st_size < LIMIT


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [browser.DESK, browser.PHONE], ids=["desk", "phone"])
def test_it_can_be_read(chromium: Browser, file: Path, size: tuple[int, int], dark: bool) -> None:
    with browser.shown(chromium, file, size, dark=dark) as shown:
        browser.nothing_sticks_out(shown)
        browser.drawings_are_legible(shown)
        browser.contrast_is_enough(shown)


@pytest.mark.parametrize("statements", [20, 34])
def test_the_summary_fits_one_screen(chromium: Browser, tmp_path: Path, statements: int) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(documents.rich(statements)), encoding="utf-8")
    with browser.shown(chromium, file) as shown:
        assert shown.locator(".claims .verdict").count() == statements
        browser.summary_fits_one_screen(shown)


@pytest.mark.parametrize("size", [browser.DESK, browser.PHONE], ids=["desk", "phone"])
def test_a_keyboard_is_enough(chromium: Browser, file: Path, size: tuple[int, int]) -> None:
    with browser.shown(chromium, file, size) as shown:
        browser.keyboard_reaches_everything(shown)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_prints(chromium: Browser, file: Path, dark: bool) -> None:
    with browser.shown(chromium, file, browser.PAPER, dark=dark, paper=True) as shown:
        browser.prints_well(shown)
        browser.nothing_sticks_out(shown)
        browser.drawings_are_legible(shown)
        browser.contrast_is_enough(shown)
        assert shown.evaluate("getComputedStyle(document.body).color") == "rgb(29, 28, 26)", "dark ink, in the dark too"
        assert shown.pdf(format="A4").startswith(b"%PDF")


def test_links_of_the_summary_lead_to_their_sections(chromium: Browser, file: Path) -> None:
    with browser.shown(chromium, file) as shown:
        link = shown.locator(".claims a").nth(7)
        link.click()
        key = (link.get_attribute("href") or "").removeprefix("#")
        top = shown.evaluate("key => document.getElementById(key).getBoundingClientRect().top", key)
        assert 0 <= top < browser.DESK[1] / 2
        shown.locator(f"#{key} .back a").click()
        assert shown.evaluate("document.getElementById('page-summary').getBoundingClientRect().top") >= 0


# What the checks are for: each has to see its fault.
FAULTS = {
    "a wide element": ("<main", '<div style="width: 2000px">wide</div><main', browser.nothing_sticks_out),
    "a hidden focus": (
        "</style>",
        ":focus-visible { outline: none !important; }</style>",
        browser.keyboard_reaches_everything,
    ),
    "a region out of reach": ('class="wide" role="region"', 'class="wide" data-x', browser.keyboard_reaches_everything),
    "faint text": ("</style>", ".evidence { color: #bbb !important; }</style>", browser.contrast_is_enough),
    "a faint curve": ("</style>", ":root { --curve-0: #f0e8d0 !important; }</style>", browser.contrast_is_enough),
    "a faint level": ("</style>", ":root { --level-0: #f0e8d0 !important; }</style>", browser.contrast_is_enough),
    "a flat drawing": ("</style>", "figure svg { width: 100px !important; }</style>", browser.drawings_are_legible),
    "a long summary": (
        "</style>",
        ".claims li { padding: 1rem 0 !important; }</style>",
        browser.summary_fits_one_screen,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_see(chromium: Browser, file: Path, tmp_path: Path, fault: str) -> None:
    old, new, check = FAULTS[fault]
    html = file.read_text(encoding="utf-8")
    assert old in html
    if fault == "a region out of reach":
        html = html.replace('tabindex="0"', "")
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace(old, new), encoding="utf-8")
    with browser.shown(chromium, broken) as shown, pytest.raises(AssertionError):
        check(shown)


def test_the_network_and_the_console_are_watched(chromium: Browser, file: Path, tmp_path: Path) -> None:
    loading = tmp_path / "loading.html"
    html = file.read_text(encoding="utf-8").replace("default-src 'none'", "default-src *")
    loading.write_text(html.replace("<main", '<img src="https://example.org/x.png" alt=""><main'), encoding="utf-8")
    with pytest.raises(AssertionError, match="one file"), browser.shown(chromium, loading):
        pass
    blocked = tmp_path / "blocked.html"
    html = file.read_text(encoding="utf-8").replace("<main", '<img src="picture.png" alt=""><main')
    blocked.write_text(html, encoding="utf-8")
    with pytest.raises(AssertionError), browser.shown(chromium, blocked):
        pass

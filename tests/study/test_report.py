"""The study's own page in a browser: every section that there is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from batchnorm.study.experiments import EXPERIMENTS
from batchnorm.study.runner import study
from study.plans import TINY
from support import browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.long
LIMIT = 2_000_000  # bytes
SIZES = pytest.mark.parametrize("size", [browser.DESK, browser.PHONE], ids=["desk", "phone"])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = [replace(row, full=TINY[row.name], quick=TINY[row.name]) for row in EXPERIMENTS]
    console = Console(file=io.StringIO())
    return study(tmp_path_factory.mktemp("out"), console=console, quick=True, experiments=small, processes=1).page


@SIZES
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read(chromium: Browser, file: Path, size: tuple[int, int], dark: bool) -> None:
    assert file.stat().st_size < LIMIT
    with browser.shown(chromium, file, size, dark=dark) as shown:
        assert shown.locator(".part").count() >= len(EXPERIMENTS)
        browser.nothing_sticks_out(shown)
        browser.drawings_are_legible(shown)
        browser.contrast_is_enough(shown)


def test_the_summary_fits_one_screen(chromium: Browser, file: Path) -> None:
    with browser.shown(chromium, file) as shown:
        assert shown.locator(".claims .verdict").count() == sum(len(row.claims) for row in EXPERIMENTS)
        browser.summary_fits_one_screen(shown)


@SIZES
def test_a_keyboard_is_enough(chromium: Browser, file: Path, size: tuple[int, int]) -> None:
    with browser.shown(chromium, file, size) as shown:
        browser.keyboard_reaches_everything(shown)


def test_it_prints(chromium: Browser, file: Path) -> None:
    with browser.shown(chromium, file, browser.PAPER, paper=True) as shown:
        browser.prints_well(shown)
        browser.nothing_sticks_out(shown)
        browser.drawings_are_legible(shown)

"""A page as Chromium shows it, and what has to hold of every page of ours.

Chromium is the system's own; Playwright only drives it, and downloads none. It is imported where a browser starts: the
files that use it have tests for `make test` too, which does without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# In pixels of CSS.
DESK, PHONE, PAPER = (1280, 800), (360, 740), (680, 960)  # the last is A4 without its margins, at 96 to the inch
ENOUGH = {"text": 4.5, "large": 3.0, "graphics": 3.0}  # WCAG 2.2, level AA: 1.4.3 and 1.4.11
SMALLEST_TEXT = 9.0  # of drawings, which shrink with the page


def executable() -> str:
    """Where Chromium is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            f"these tests look at pages in a browser, and there is none: no {', '.join(names)} on PATH. "
            "On Debian: apt-get install chromium"
        )
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    # Root has no sandbox, and containers often have no large /dev/shm.
    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def shown(
    browser: Browser, file: Path, size: tuple[int, int] = DESK, *, dark: bool = False, paper: bool = False
) -> Iterator[Page]:
    """The file in a window of this size, with the page's own scripts forbidden.

    In the end the page must have asked for nothing but itself, and the console must be empty.
    """
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        java_script_enabled=False,
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.emulate_media(media="print" if paper else "screen")
        page.goto(file.as_uri())
        yield page
        assert asked == [file.as_uri()], "a report is one file"
        assert said == []
    finally:
        context.close()


def nothing_sticks_out(page: Page) -> None:
    """The page has no horizontal scrolling, and nothing is cut off but inside regions that scroll."""
    outside = page.evaluate(
        """() => [...document.body.querySelectorAll("*")].filter(element => {
            const box = element.getBoundingClientRect();
            const scroller = element.parentElement.closest(".wide, pre");
            return !scroller && box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map(element => element.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def drawings_are_legible(page: Page) -> None:
    """Every figure holds a drawing of some size, inside its figure, with text that can be read.

    Histograms are many and alike: they need be less high.
    """
    figures = page.evaluate(
        """() => [...document.querySelectorAll("figure")].map(figure => {
            const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
            const scale = box.width / svg.viewBox.baseVal.width;
            const sizes = [...svg.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize) * scale);
            const cut = [...svg.querySelectorAll("text")].filter(t => {
                const text = t.getBoundingClientRect();
                return text.left < box.left - 1 || text.right > box.right + 1 || text.bottom > box.bottom + 1;
            }).map(t => t.textContent);
            const lowest = figure.matches(".histogram") ? 50 : 120;
            return {lowest, width: box.width, height: box.height, smallest: Math.min(...sizes), cut: cut,
                    name: svg.getAttribute("aria-label") || ""};
        })"""
    )
    assert figures, "nothing to look at"
    for figure in figures:
        assert figure["width"] >= 200, figure
        assert figure["height"] >= figure["lowest"], figure
        assert figure["smallest"] >= SMALLEST_TEXT, figure
        assert figure["cut"] == [], figure
        assert figure["name"].strip(), "a drawing without words"


# Colours as [r, g, b, a], the background behind an element, and WCAG's contrast of two colours.
_COLOURS = """
    const parse = colour => { const p = colour.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const behind = element => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            layers.push(colour);
            if (colour[3] === 1) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    };
    const light = colour => {
        const [r, g, b] = colour.map(v => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (first, second) => {
        const [dim, bright] = [light(first), light(second)].sort((a, b) => a - b);
        return (bright + 0.05) / (dim + 0.05);
    };
"""


def contrast_is_enough(page: Page) -> None:
    """All text, all lines of drawings and all signs stand out from what is behind them."""
    seen = page.evaluate(
        "() => {"
        + _COLOURS
        + """
        const found = [];
        const look = (element, colour, kind, what) => {
            const below = behind(element);
            found.push({kind, what, ratio: contrast(over(parse(colour), below), below)});
        };
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const element = node.parentElement, style = getComputedStyle(element);
            if (!node.textContent.trim() || element.closest("style") || !element.getClientRects().length) continue;
            const size = parseFloat(style.fontSize), bold = parseInt(style.fontWeight) >= 700;
            const kind = size >= 24 || (bold && size >= 18.66) ? "large" : "text";
            look(element, element.closest("svg") ? style.fill : style.color, kind, node.textContent.trim());
        }
        for (const element of document.querySelectorAll("figure svg path, figure svg use, .sign *")) {
            const style = getComputedStyle(element);
            if (element.classList.contains("cut")) {
                const body = getComputedStyle(element.parentElement.querySelector(".body")).fill;
                found.push({kind: "graphics", what: "sign", ratio: contrast(parse(style.stroke), parse(body))});
            } else if (element.matches(".body")) {
                look(element, style.fill, "graphics", "sign");
            } else if (style.stroke !== "none" && style.strokeOpacity === "1") {  // the grid is faint on purpose
                look(element, style.stroke, "graphics", "line");
            }
        }
        for (const element of document.querySelectorAll(".cells i, .legend i, .histogram path:not(.axis)")) {
            look(element.parentElement, getComputedStyle(element).color, "graphics", "level");
        }
        return found;
    }"""
    )
    assert {entry["kind"] for entry in seen} >= {"text", "graphics"}, "nothing to look at"
    faint = [entry for entry in seen if entry["ratio"] < ENOUGH[entry["kind"]]]
    assert faint == []


def keyboard_reaches_everything(page: Page) -> None:
    """Tab comes first to a link that skips to the content, then to every link and region, each with a visible focus.

    Regions that have more than fits can be scrolled by arrow keys.
    """
    focused = (
        "() => {"
        + _COLOURS
        + """
        const element = document.activeElement;
        const box = element.getBoundingClientRect(), style = getComputedStyle(element);
        const around = behind(element.parentElement || element);
        return {
            body: element === document.body,
            index: [...document.querySelectorAll("a[href], [tabindex='0']")].indexOf(element),
            skip: element.matches("a.skip"),
            main: !!element.closest("main"),
            visible: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
            outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
            contrast: contrast(over(parse(style.outlineColor), around), around),
            name: (element.textContent || "").trim().slice(0, 60),
        };
    }"""
    )
    expected = page.evaluate("document.querySelectorAll(\"a[href], [tabindex='0']\").length")
    page.keyboard.press("Tab")
    first = page.evaluate(focused)
    assert first["skip"], first
    assert first["visible"], "whoever tabs has to see where"
    reached = [first["index"]]
    while len(reached) <= expected:
        page.keyboard.press("Tab")
        now = page.evaluate(focused)
        if now["body"] or now["index"] == reached[0]:
            break
        assert now["visible"], now
        assert now["outline"] >= 2, now
        assert now["contrast"] >= ENOUGH["graphics"], now
        reached.append(now["index"])
    assert reached == list(range(expected)), "in the order of the page, none left out"

    page.locator("a.skip").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(focused)["main"], "skipping leads into the content"

    for region in page.locator(".wide, pre").all():
        if region.evaluate("e => e.scrollWidth > e.clientWidth"):
            region.focus()
            page.keyboard.press("ArrowRight")
            # Scrolling is animated: what counts is that it moves.
            page.wait_for_timeout(50)
            for _ in range(40):
                if region.evaluate("e => e.scrollLeft > 0"):
                    break
                page.wait_for_timeout(50)
            assert region.evaluate("e => e.scrollLeft > 0"), region.inner_text()[:80]


def summary_fits_one_screen(page: Page) -> None:
    """The summary ends above the lower edge of the window."""
    bottom, height = page.evaluate('[document.querySelector(".overview").getBoundingClientRect().bottom, innerHeight]')
    assert bottom <= height


def prints_well(page: Page) -> None:
    """On paper: black on white, nothing to click or to scroll, drawings and rows unbroken."""
    assert page.evaluate('matchMedia("print").matches')
    assert not page.locator(".skip, .back").filter(visible=True).count()
    assert page.evaluate('getComputedStyle(document.querySelector(".part")).display') == "block"
    for region in page.locator(".wide, pre").all():
        assert region.evaluate("e => getComputedStyle(e).overflowX === 'visible' && e.scrollWidth <= e.clientWidth + 1")
    broken = page.evaluate(
        """() => [...document.querySelectorAll("figure, .judged, tbody tr")]
            .filter(e => getComputedStyle(e).breakInside !== "avoid").length"""
    )
    assert broken == 0

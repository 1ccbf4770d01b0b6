"""Charts as SVG."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest

from batchnorm.report.charts import LINE_STYLES, svg
from batchnorm.report.document import Chart, Curve

ONE = Curve("ours", [1, 2, 3], [10.0, 20.0, 30.0], [9.0, 19.0, 29.0], [11.0, 21.0, 31.0])
OTHER = Curve("theirs", [1, 2, 3], [30.0, None, 10.0], [29.0, None, 9.0], [31.0, None, 11.0])
CHART = Chart('"Title" <b>', 'What "it" <shows> & more', "step", "accuracy, %", [ONE, OTHER], mark=25)
SVG = "{http://www.w3.org/2000/svg}"


def lines(drawing: str) -> list[str]:
    """The path of every curve, by the colours that curves have."""
    return re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--curve-\d\)', drawing, re.DOTALL)


def test_it_is_one_element_with_a_label_that_scales() -> None:
    root = ElementTree.fromstring(svg(CHART, "one"))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label") == CHART.description
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.get("height") is None


def test_drawing_twice_gives_the_same_bytes() -> None:
    assert svg(CHART, "one") == svg(CHART, "one")


def test_nothing_tells_when_or_by_what_it_was_drawn() -> None:
    drawing = svg(CHART, "one")
    assert "metadata" not in drawing
    assert "Matplotlib" not in drawing


def test_ids_are_the_drawings_own_and_all_references_resolve() -> None:
    one, other = svg(CHART, "one"), svg(replace(CHART, mark=None), "other")
    ids, others = (set(re.findall(r'\bid="([^"]*)"', drawing)) for drawing in (one, other))
    assert ids
    assert not ids & others
    references = set(re.findall(r'(?:url\(|href=")#([^")]*)', one))
    assert references
    assert references <= ids


def test_colours_are_the_pages() -> None:
    drawing = svg(CHART, "one")
    assert "currentColor" in drawing
    assert {"var(--curve-0)", "var(--curve-1)"} <= set(re.findall(r"var\(--curve-\d\)", drawing))
    colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", drawing))
    assert not colours, "a fixed colour would be illegible on one of light and dark"


def test_text_stays_text() -> None:
    texts = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(svg(CHART, "one")).iter(f"{SVG}text")}
    assert {"step", "accuracy, %", "ours", "theirs"} <= texts


def test_a_gap_is_a_gap() -> None:
    whole = replace(OTHER, middle=[30.0, 20.0, 10.0])
    gaps = [max(path.count("M") for path in lines(svg(replace(CHART, curves=[c]), "g"))) for c in (whole, OTHER)]
    assert gaps == [1, 2]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_curves_without_a_single_number_can_be_drawn(logarithmic: bool) -> None:
    nothing = Curve("nothing", [1, 2], [None, None], [None, None], [None, None])
    drawing = svg(replace(CHART, curves=[nothing], log_y=logarithmic, mark=None), "nothing")
    assert "nothing" in drawing


def test_a_logarithmic_axis_spreads_powers_evenly_and_bears_zero() -> None:
    x, powers = [1, 2, 3], [1.0, 10.0, 100.0]
    curve = Curve("powers", x, powers, [0.0, 10.0, 100.0], powers)
    drawing = svg(replace(CHART, curves=[curve], log_y=True, mark=None), "log")
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", lines(drawing)[0])]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], rel=1e-3)


def test_there_is_a_style_and_a_colour_for_as_many_curves_as_are_promised() -> None:
    curves = [replace(ONE, label=str(i)) for i in range(len(LINE_STYLES))]
    drawing = svg(replace(CHART, curves=curves), "many")
    assert set(re.findall(r"var\(--curve-(\d)\)", drawing)) == {str(i) for i in range(len(LINE_STYLES))}


def test_the_users_matplotlib_is_neither_used_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # the global state; importing it would fail
    plain = svg(CHART, "one")
    with matplotlib.rc_context({"font.size": 30, "xtick.direction": "in", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams.copy())
        assert svg(CHART, "one") == plain
        assert dict(matplotlib.rcParams.copy()) == before

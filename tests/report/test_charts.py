"""Charts as SVG."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest

from batchnorm.report.charts import STYLES, file, svg
from batchnorm.report.document import Chart, Curve

ONE = Curve("ours", [1, 2, 3], [10.0, 20.0, 30.0], [9.0, 19.0, 29.0], [11.0, 21.0, 31.0])
OTHER = Curve("torch", [1, 2, 3], [30.0, None, 10.0], [29.0, None, 9.0], [31.0, None, 11.0])
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
    assert {"step", "accuracy, %", "ours", "torch"} <= texts


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
    curves = [replace(ONE, label=str(i)) for i in range(len(STYLES))]
    drawing = svg(replace(CHART, curves=curves), "many")
    assert set(re.findall(r"var\(--curve-(\d)\)", drawing)) == {str(i) for i in range(len(STYLES))}


def test_more_curves_than_styles_are_refused() -> None:
    with pytest.raises(ValueError, match=f"{len(STYLES) + 1} curves.*at most {len(STYLES)}"):
        svg(replace(CHART, curves=[ONE] * (len(STYLES) + 1)), "many")


def coordinates(drawing: str) -> list[tuple[float, float]]:
    """Where the markers of the first curve are."""
    used = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--curve-0\)', drawing)
    return [(float(x), float(y)) for x, y in used]


@pytest.mark.parametrize("points", [False, True])
def test_few_values_are_markers_and_many_are_only_a_line(points: bool) -> None:
    few = Curve("few", range(16), [float(x) for x in range(16)], points=points)
    many = replace(few, x=range(17), middle=[float(x) for x in range(17)])
    drawn = [len(coordinates(svg(replace(CHART, curves=[curve], mark=None), "few"))) for curve in (few, many)]
    legend = 1
    assert drawn == [16 + legend, 17 + legend if points else 0]


def test_points_are_not_joined_and_their_bars_reach_from_low_to_high() -> None:
    chart = replace(CHART, curves=[replace(ONE, points=True)], mark=None)
    drawing = svg(chart, "points")
    assert len(coordinates(drawing)) == 3 * 3 + 1  # values, both ends of their intervals, the legend
    ends: dict[float, list[float]] = {}
    for x, y in coordinates(drawing):
        ends.setdefault(x, []).append(y)
    at = {x: (min(ys), max(ys)) for x, ys in ends.items() if len(ys) == 3}
    bars = re.findall(r"M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)[^>]*stroke: var\(--curve-0\)", drawing)
    upright = {float(x): sorted((float(y), float(end))) for x, y, last, end in bars if x == last}
    assert len(at) == 3
    for x, reach in at.items():
        assert upright[x] == pytest.approx(list(reach))
    assert svg(replace(chart, curves=[replace(ONE, low=None, high=None, points=True)]), "bare") != drawing


def test_points_of_one_name_stand_beside_each_other() -> None:
    names = [(1, "an <odd> $name$"), (2, "two words"), (3, "3")]
    both = [replace(ONE, low=None, high=None, points=True), replace(OTHER, low=None, high=None, points=True)]
    drawing = svg(replace(CHART, curves=both, names=names, mark=None), "names")
    ours, others = (
        sorted({float(x) for x in re.findall(rf'<use [^>]*x="([\d.]+)"[^>]*style="fill: var\(--curve-{i}\)', drawing)})
        for i in (0, 1)
    )
    assert not set(ours) & set(others)
    texts = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(drawing).iter(f"{SVG}text")}
    assert {"an <odd> $name$", "two words", "3"} <= {" ".join(text.split()) for text in texts}


def test_logarithmic_ticks_are_numbers_as_one_writes_them() -> None:
    x = [1e-4, 1e-2, 1, 1e2, 1e6]
    drawing = svg(replace(CHART, curves=[Curve("wide", x, [3, 4, 5, 6, 7])], log_x=True, log_y=True, mark=None), "log")
    texts = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(drawing).iter(f"{SVG}text")}
    assert {"10⁻⁴", "0.01", "1", "5"} <= texts
    assert not [text for text in texts if "$" in text or "mathdefault" in text]


def test_x_may_be_logarithmic() -> None:
    curve = Curve("powers", [1, 10, 100], [1.0, 2.0, 3.0])
    drawing = svg(replace(CHART, curves=[curve], log_x=True, mark=None), "log")
    at = sorted({x for x, _ in coordinates(drawing)})[-3:]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], rel=1e-3)


def test_a_file_stands_alone() -> None:
    drawing = file(CHART, "alone")
    root = ElementTree.fromstring(drawing.encode())
    assert root.get("width")
    assert root.get("height")
    assert root.findtext(f"{SVG}title") == CHART.title
    assert root.findtext(f"{SVG}desc") == CHART.description
    assert "var(" not in drawing
    assert "currentColor" not in drawing
    colours = set(re.findall(r"#[0-9a-fA-F]{6}\b", drawing))
    assert colours == {STYLES[0].light, STYLES[1].light, "#1b1b1b", "#ffffff"}
    assert file(CHART, "alone") == drawing


def test_the_users_matplotlib_is_neither_used_nor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # the global state; importing it would fail
    plain = svg(CHART, "one")
    with matplotlib.rc_context({"font.size": 30, "xtick.direction": "in", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams.copy())
        assert svg(CHART, "one") == plain
        assert dict(matplotlib.rcParams.copy()) == before

"""Charts as SVG: inside a page, in the page's colours, or as files that stand alone.

Inside a page ink is `currentColor` and curve i is `var(--curve-i)`, so that one drawing is legible on light and dark.
Text stays text. Drawing the same chart twice gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from batchnorm.report.document import Chart, Curve, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Style:
    """How a curve differs from the others: in more than its colour, for print in grey and for all eyes.

    Attributes:
        light: its colour on white; 4.5:1 at least, since a legend's line is as thin as text.
        dark: its colour on black, likewise.
        line: matplotlib's line style.
        marker: matplotlib's marker.
    """

    light: str
    dark: str
    line: Any
    marker: str


STYLES = (
    Style("#0061a8", "#6cb6ff", "solid", "o"),
    Style("#b84a00", "#ff9f5c", "dashed", "s"),
    Style("#007257", "#4fd1a5", "dashdot", "^"),
    Style("#8a3a8f", "#dc9be0", "dotted", "D"),
    Style("#7a5c00", "#e3c04a", (0, (6, 1, 1, 1, 1, 1)), "v"),
    Style("#4a4a4a", "#c4c4c4", (0, (2, 1)), "X"),
)
# matplotlib wants real colours; these stand for the page's and are replaced in the finished drawing.
_INK = "#010203"
_CURVES = tuple(f"#01020{4 + i}" for i in range(len(STYLES)))
_SIZE = (4.2, 2.9)  # inches: as wide as a phone, where text is to be legible, and two beside each other on a desk
_LEGEND_LINE = 60  # letters that a line of the legend has room for
_SAMPLE = 9  # of those, what a curve's sample and the space around it take
_NAMES_LINE = 48  # letters of a line of names below the axis
_FEW = 16  # as many values are markers on their line, to tell what was measured from what joins it


def svg(chart: Chart, name: str) -> str:
    """Draw `chart` for a page.

    Args:
        chart: what to draw.
        name: put before every id inside, so that several drawings fit into one page; letters, digits and hyphens.

    Returns:
        One `<svg>` element, which scales to the width that it is given, and carries the chart's description as label.

    Raises:
        ValueError: there are more curves than styles.
    """
    chart = shown(chart)
    element = _drawing(chart, name)
    for i, colour in enumerate(_CURVES):
        element = element.replace(colour, f"var(--curve-{i})")
    opening, rest = element.replace(_INK, "currentColor").split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(chart.description)}">{rest}'


def file(chart: Chart, name: str) -> str:
    """Draw `chart` for a file of its own: dark on white, with title and description inside.

    Args:
        chart: what to draw.
        name: as in `svg`.
    """
    chart = shown(chart)
    element = _drawing(chart, name)
    for style, colour in zip(STYLES, _CURVES, strict=True):
        element = element.replace(colour, style.light)
    opening, rest = element.replace(_INK, "#1b1b1b").split(">", 1)
    words = f"<title>{escape(chart.title)}</title><desc>{escape(chart.description)}</desc>"
    paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening} role="img">{words}{paper}{rest}'


def _drawing(chart: Chart, name: str) -> str:
    """One `<svg>` element in the colours that stand for others, with ids that begin with `name`."""
    if len(chart.curves) > len(STYLES):
        raise ValueError(
            f"the chart {chart.title!r} has {len(chart.curves)} curves; at most {len(STYLES)} can be told "
            "apart. Make it two charts"
        )
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own settings are for the user's own figures
        matplotlib.rc("svg", fonttype="none", hashsalt=name)
        matplotlib.rc("font", size=9)
        matplotlib.rc("text", parse_math=False)
        matplotlib.rc("axes", edgecolor=_INK, labelcolor=_INK, linewidth=0.7)
        for part in ("text", "xtick", "ytick", "grid"):
            matplotlib.rc(part, color=_INK)
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.margins(y=0.08)
        handles = [_curve(axes, chart, i) for i in range(len(chart.curves))]
        _axes(axes, chart)
        labels = [curve.label for curve in chart.curves]
        # Above the axes, where no curve can be hidden.
        figure.legend(
            handles, labels, loc="outside upper left", ncols=_columns(labels), frameon=False, handlelength=2.6,
            columnspacing=1.4, borderpad=0.1,
        )  # fmt: skip
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True)
    element = drawing.getvalue()
    element = element[element.index("<svg") :].rstrip()
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r"url\(#", f"url(#{name}-", element)
    return re.sub(r'href="#', f'href="#{name}-', element)


def _curve(axes: Axes, chart: Chart, i: int) -> Line2D:
    """Draw curve i; what the legend is to show of it."""
    curve, colour, style = chart.curves[i], _CURVES[i], STYLES[i]
    # Points of the same name stand beside each other, so that none hides another.
    aside = 0.13 * (i - (len(chart.curves) - 1) / 2) if chart.names and curve.points else 0.0
    x, middle = [value + aside for value in curve.x], _floats(curve.middle)
    interval = _interval(curve)
    if interval is not None and curve.points:
        axes.vlines(x, *interval, color=colour, linewidth=1.4)
        for ends in interval:
            axes.plot(x, ends, color=colour, linestyle="none", marker="_", markersize=6)
    elif interval is not None:
        axes.fill_between(x, *interval, color=colour, alpha=0.18, linewidth=0)
    marked = curve.points or len(x) <= _FEW
    (handle,) = axes.plot(
        x,
        middle,
        color=colour,
        linestyle="none" if curve.points else style.line,
        linewidth=1.6,
        marker=style.marker if marked else "none",
        markersize=5 if curve.points else 3.5,
    )
    return handle


def _interval(curve: Curve) -> tuple[list[float], list[float]] | None:
    if curve.low is None or curve.high is None:
        return None
    return _floats(curve.low), _floats(curve.high)


def _axes(axes: Axes, chart: Chart) -> None:
    # Without a value above 0 there is nothing to draw, and no power of ten to begin with.
    if chart.log_x and math.isfinite(axes.xaxis.get_minpos()):
        axes.set_xscale("log")
        _powers(axes.xaxis)
    if chart.log_y and math.isfinite(axes.yaxis.get_minpos()):
        axes.set_yscale("log")
        _powers(axes.yaxis)
    if chart.names:
        width = _NAMES_LINE // len(chart.names)
        positions = [position for position, _ in chart.names]
        axes.set_xticks(positions, [textwrap.fill(name, width) for _, name in chart.names])
        axes.set_xlim(min(positions) - 0.5, max(positions) + 0.5)
        axes.tick_params("x", length=0)
    if chart.mark is not None:
        axes.axhline(chart.mark, color=_INK, linestyle="dotted", linewidth=1)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", alpha=0.16, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _powers(axis: Axis) -> None:
    """Ticks of a logarithmic axis: powers of ten, and some between them where there are too few of those."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    """A number as short as may be: 0.001, 200, 10⁻⁴, 5·10⁶."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    factor, exponent = f"{value:e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if float(factor) == 1 else f"{float(factor):g}·10{raised}"


def _columns(labels: Sequence[str]) -> int:
    """How many labels stand beside each other: all, or as many columns as fit that are as wide as the longest."""
    widths = [len(label) + _SAMPLE for label in labels]
    if sum(widths) <= _LEGEND_LINE:
        return max(1, len(labels))
    return max(1, _LEGEND_LINE // max(widths))


def _floats(values: Sequence[float | None]) -> list[float]:
    """None as not a number, which matplotlib leaves out."""
    return [float("nan") if value is None else float(value) for value in values]

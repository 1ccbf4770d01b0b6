"""Charts as SVG to put inside an HTML page.

Colours are left to the page: ink is `currentColor`, curve i is `var(--curve-i)`, so that one drawing is legible on
light and dark. Text stays text. Drawing the same chart twice gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape

from batchnorm.report.document import Chart

# Curves differ in style as well as in colour: for print in grey, and for eyes that see colours differently.
LINE_STYLES = ("solid", "dashed", "dashdot", "dotted")
# matplotlib wants real colours; these stand for the page's and are replaced in the finished drawing.
_INK = "#010203"
_CURVES = tuple(f"#01020{4 + i}" for i in range(len(LINE_STYLES)))
_SIZE = (5.6, 3.4)  # inches: two beside each other on a desk, one on a phone


def svg(chart: Chart, name: str) -> str:
    """Draw `chart`.

    Args:
        chart: what to draw.
        name: put before every id inside, so that several drawings fit into one page; letters, digits and hyphens.

    Returns:
        One `<svg>` element, which scales to the width that it is given and carries the chart's description as label.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own settings are for the user's own figures
        matplotlib.rc("svg", fonttype="none", hashsalt=name)
        matplotlib.rc("font", size=10)
        matplotlib.rc("axes", edgecolor=_INK, labelcolor=_INK)
        for part in ("text", "xtick", "ytick", "grid"):
            matplotlib.rc(part, color=_INK)
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        for i, curve in enumerate(chart.curves):
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    curve.x, _floats(curve.low), _floats(curve.high), color=_CURVES[i], alpha=0.2, linewidth=0
                )
            axes.plot(
                curve.x,
                _floats(curve.middle),
                color=_CURVES[i],
                linestyle=LINE_STYLES[i],
                linewidth=1.6,
                label=curve.label,
            )
        if chart.log_y:
            axes.set_yscale("log")
        if chart.mark is not None:
            axes.axhline(chart.mark, color=_INK, linestyle="dotted", linewidth=1)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.grid(axis="y", alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        # Above the axes, where no curve can be hidden.
        figure.legend(loc="outside upper left", ncols=len(chart.curves), frameon=False, handlelength=3)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True)
    return _embeddable(drawing.getvalue(), name, chart.description)


def _floats(values: Sequence[float | None]) -> list[float]:
    """None as not a number, which matplotlib leaves out."""
    return [float("nan") if value is None else float(value) for value in values]


def _embeddable(drawing: str, name: str, description: str) -> str:
    """The drawing without what only a file of its own needs, with the page's colours and unique ids."""
    element = drawing[drawing.index("<svg") :]
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r"url\(#", f"url(#{name}-", element)
    element = re.sub(r'href="#', f'href="#{name}-', element)
    element = element.replace(_INK, "currentColor")
    for i, colour in enumerate(_CURVES):
        element = element.replace(colour, f"var(--curve-{i})")
    opening, rest = element.split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(description)}">{rest}'

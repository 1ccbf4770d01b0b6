"""What a report is made of, before anything decides how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row.

    Attributes:
        caption: what the table holds, in one line.
        columns: the headings.
        rows: as many cells each as there are columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Curve:
    """A line with a band around it; None is a gap.

    Attributes:
        label: the name in the legend.
        x: positions, shared by the other three.
        middle: the line.
        low: the lower edge of the band.
        high: the upper edge of the band.
    """

    label: str
    x: Sequence[float]
    middle: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
        title: what is drawn.
        description: the same in words and numbers, for those who cannot see it.
        x_label: what runs to the right.
        y_label: what runs upwards.
        curves: at most as many as `charts.LINE_STYLES`.
        logarithmic: whether y is on a logarithmic scale.
        mark: a height to draw a dotted line at, if any.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Section:
    """One question with its answer.

    Attributes:
        title: the question.
        summary: the answer in plain sentences.
        table: the numbers behind it.
        charts: the curves behind it.
        notes: how it was measured, and what was not.
    """

    title: str
    summary: Sequence[str]
    table: Table
    charts: Sequence[Chart]
    notes: Sequence[str]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: its heading.
        sections: in order.
        command: the command line that makes it again.
        facts: names and values of what it ran on.
    """

    title: str
    sections: Sequence[Section]
    command: str
    facts: Sequence[tuple[str, str]]


def percent(fraction: float) -> str:
    """A fraction in per cent with one decimal, without the sign: 0.975 is "97.5"."""
    return f"{100 * fraction:.1f}"

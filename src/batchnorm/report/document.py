"""What a report is made of, before anything decides how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from batchnorm.messages import printable

T = TypeVar("T")

Outcome = Literal["yes", "no", "open", "note"]
LEVELS = 5  # of cells and bins: as many colours and heights as can be told apart


@dataclass(frozen=True)
class Judged:
    """A statement, and what became of it.

    Attributes:
        claim: the statement, in words short enough for one line.
        outcome: whether it holds; "open" where that cannot be told, "note" where nothing was judged. It decides colour
            and sign, never the words.
        verdict: the same as the reader is told it: "supported".
        criterion: what decides, fixed before the numbers were known.
        evidence: what was measured, on one line too.
        margin: how far that was from what decides; nothing where the evidence says it.
    """

    claim: str
    outcome: Outcome
    verdict: str
    criterion: str
    evidence: str
    margin: str = ""


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
    """A line, or separate points; None is a gap.

    Attributes:
        label: the name in the legend.
        x: positions, as many as there are values.
        middle: the values.
        low: the lower ends of their intervals, if they have any: a band around a line, bars at points.
        high: the upper ends.
        points: whether the values are separate points, not joined by a line.
    """

    label: str
    x: Sequence[float]
    middle: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    points: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over one pair of axes.

    Attributes:
        title: what is drawn.
        description: the same in words and numbers, for those who cannot see it.
        x_label: what runs to the right.
        y_label: what runs upwards.
        curves: at most as many as `charts.STYLES`.
        log_x: whether x is on a logarithmic scale.
        log_y: whether y is.
        names: names for positions of x, in place of numbers.
        mark: a height to draw a dotted line at, if any.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    names: Sequence[tuple[float, str]] = ()
    mark: float | None = None


@dataclass(frozen=True)
class Cell:
    """One of a strip.

    Attributes:
        label: what it stands for, and its numbers, in words.
        level: from 0 to `LEVELS` - 1: how high it is, and in which colour; None where there are no numbers.
        target: the key of the section, or of the profile, that it leads to.
    """

    label: str
    level: int | None
    target: str


@dataclass(frozen=True)
class Strip:
    """Things in a row, as high as something about them.

    Attributes:
        caption: what the things are, and what their height is.
        cells: in order.
        legend: what each level means, from 0 on.
    """

    caption: str
    cells: Sequence[Cell]
    legend: Sequence[str]


@dataclass(frozen=True)
class Histogram:
    """How many values there are in each of some bins.

    Attributes:
        title: of what, in a few words.
        description: the same in numbers, for those who cannot see it.
        counts: in the bins, from left to right.
        levels: the level of each bin, as of a cell: its colour.
        ticks: positions, in bins from the left end, and what stands there; far enough from the ends for the words.
    """

    title: str
    description: str
    counts: Sequence[int]
    levels: Sequence[int]
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Profile:
    """One thing with its distributions.

    Attributes:
        key: its address in the page, unlike any section's and any other's.
        name: of the thing.
        facts: about it, in one line.
        histograms: beside each other.
    """

    key: str
    name: str
    facts: str
    histograms: Sequence[Histogram] = ()


@dataclass(frozen=True)
class Section:
    """One question with its answer.

    Attributes:
        key: its address in the page: letters, digits and hyphens, unlike any other section's.
        title: the question.
        summary: the answer in plain sentences.
        judged: the statements that it decides.
        tables: the numbers behind it.
        charts: the curves behind it.
        notes: how it was measured, and what was not.
        code: what to type to see it oneself; several lines, or nothing.
        code_title: what the code is for.
        strips: things in rows.
        profiles: things with their distributions.
    """

    key: str
    title: str
    summary: Sequence[str]
    judged: Sequence[Judged] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    code: str = ""
    code_title: str = "See it yourself"
    strips: Sequence[Strip] = ()
    profiles: Sequence[Profile] = ()


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: its heading.
        introduction: what it is, in one or two sentences.
        sections: in order.
        command: the command line that makes it again.
        facts: names and values of what it ran on.
        tally: outcomes, how often, and of what: the first line of the summary; None to count the statements.
        strips: rows at the end of the summary.
        named: whether claims are names, which need less room than what was measured.
    """

    title: str
    introduction: str
    sections: Sequence[Section]
    command: str
    facts: Sequence[tuple[str, str]]
    tally: Sequence[tuple[Outcome, int, str]] | None = None
    strips: Sequence[Strip] = ()
    named: bool = False


def percent(fraction: float) -> str:
    """A fraction in per cent with one decimal, without the sign: 0.975 is "97.5"."""
    return f"{100 * fraction:.1f}"


def shown(part: T) -> T:
    """A part of a document with all its text `printable`: names of others come as they are."""
    return _shown(part)  # type: ignore[no-any-return]  # of the same type


def _shown(part: Any) -> Any:  # noqa: ANN401 - dataclasses, sequences, text and numbers
    if isinstance(part, str):
        return printable(part)
    if isinstance(part, (tuple, list)):
        return type(part)(_shown(item) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{field.name: _shown(getattr(part, field.name)) for field in fields(part)})
    return part

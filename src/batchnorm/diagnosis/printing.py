"""A report in a terminal, and as plain text: the first lines are enough, the rest is for who looks closer."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from batchnorm.diagnosis import tables
from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.finding import Severity
from batchnorm.diagnosis.grouping import Group, counted, grouped, layer_name, scope, tally
from batchnorm.diagnosis.report import Report
from batchnorm.messages import one_line
from batchnorm.report import text as report_text
from batchnorm.report.document import Table

STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}
SKIPPED = 5  # lines
# As plain text nothing is broken: lines are as long as they are, and can be searched.
_ENDLESS = 100_000


def plain(part: Report | Table) -> str:
    """A report, or a table, as text without colour, whatever the environment says."""
    stream = io.StringIO()
    show(part, Console(file=stream, width=_ENDLESS, color_system=None, force_terminal=False, legacy_windows=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def show(part: Report | Table, console: Console) -> None:
    """Print a report, or a table, to a console."""
    for piece in _parts(part) if isinstance(part, Report) else [report_text.table(part)]:
        console.print(piece, crop=False, highlight=False)


def _parts(report: Report) -> Iterator[RenderableType]:
    groups = grouped(report.findings)
    yield _verdict(report)
    if groups:
        yield _summary(groups)
    if report.before is not None:
        yield ""
        yield report_text.table(tables.changes(report.before, report))
    for group in groups:
        yield from _details(group)
    for table in (
        tables.modes(report),
        tables.attribution(report, tables.ROWS),
        tables.layers(report, tables.ROWS) if report.findings else None,
    ):
        if table is not None:
            yield ""
            yield report_text.table(table)
    if report.skipped:
        yield ""
        yield from _skipped(report)


def _verdict(report: Report) -> Text:
    words = Text()
    for severity, number, word in tally(report):
        words.append(", " if words else "").append(f"{number:,} {word}", style=STYLES[severity])
    if not words:
        words.append("nothing found", style="bold green")
    return words.append(f" {scope(report)}")


def _summary(groups: list[Group]) -> Grid:
    """A line for each finding that has one; in a narrow terminal a message goes on below itself."""
    grid = Grid.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold", ratio=2)
    grid.add_column(overflow="fold", ratio=5)
    for group in groups:
        for line in group.lines():
            layer = Text(line.layer, style="bold")
            if line.more:
                layer.append(f" and {counted(line.more, 'more layer')}", style="not bold")
            severity = Text(group.severity, style=STYLES[group.severity])
            grid.add_row(severity, group.code, layer, Text(line.message))
    return grid


def _details(group: Group) -> Iterator[RenderableType]:
    """Of one code: what it is about, the evidence of what hurts most, and what to type."""
    check = CHECKS.get(group.code)
    evidence = next(((f.layer, f.evidence) for f in group.findings if f.evidence is not None), None)
    remedy = group.remedy()
    if check is None and evidence is None and not remedy:
        return
    yield ""
    yield Text.assemble((group.title, "bold"), f": {check.found}" if check else "")
    if evidence is not None:
        layer, table = evidence
        yield Padding(Text(layer_name(layer), style="bold"), (0, 0, 0, 2), expand=False)
        yield Padding(report_text.table(table), (0, 0, 0, 2), expand=False)
    if remedy:
        # The code stands alone at its margin, so that it can be copied.
        yield Padding(Text("what to do:"), (0, 0, 0, 2), expand=False)
        yield Padding(Text(remedy, style="cyan"), (0, 0, 0, 4), expand=False)


def _skipped(report: Report) -> Iterator[Text]:
    for layer in report.skipped[:SKIPPED]:
        yield Text(f"skipped: {layer_name(layer.name)} ({one_line(layer.reason)})")
    if (more := len(report.skipped) - SKIPPED) > 0:
        yield Text(f"and {counted(more, 'more layer')} skipped")

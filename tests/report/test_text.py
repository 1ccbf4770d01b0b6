"""Reports in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from batchnorm.report.document import Judged, Outcome, Section, Table
from batchnorm.report.text import following, progress, show, table

CONTENT = Table(
    "ten of each [bold]",
    ("network", "a rather long heading", "steps"),
    [("batch norm", "97.2 (96.9-97.5)", "120"), ("[red]plain[/red]", "never", "310")],
)


def printed(width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=width, legacy_windows=False).print(table(CONTENT))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_every_cell_is_printed_whole_and_literally() -> None:
    lines = printed(80).splitlines()
    assert lines[0].startswith("ten of each [bold]")
    assert any("batch norm" in line and "97.2 (96.9-97.5)" in line and "120" in line for line in lines)
    assert any("[red]plain[/red]" in line and "never" in line and "310" in line for line in lines)


def test_headings_break_so_that_the_table_is_as_narrow_as_its_cells() -> None:
    lines = [line.rstrip() for line in printed(200).splitlines()]
    assert max(map(len, lines)) <= len("[red]plain[/red]") + len("97.2 (96.9-97.5)") + len("steps") + 2 * 2 + 2
    assert "a rather long heading" not in "\n".join(lines)


def test_a_terminal_without_unicode_can_show_it() -> None:
    assert "97.2 (96.9-97.5)" in printed(80, "ascii")


def test_a_section_is_its_title_its_statements_its_tables_and_its_summary() -> None:
    stream = io.StringIO()
    judged = Judged("it is [so]", "open", "inconclusive", "not shown", "+1 [0 to 2]")
    other = Table("another", ("a", "b"), [("c", "d")])
    section = Section(
        "why", "Why?", ["Because [it] is.", "And so on."], [judged], [CONTENT, other], [], ["not shown"], "not shown"
    )
    show(section, Console(file=stream, width=80))
    text = stream.getvalue()
    parts = (
        *("Why?", "inconclusive: it is [so]", "+1 [0 to 2]"),
        *("batch norm", "another", "Because [it] is.", "And so on."),
    )
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert "not shown" not in text


def test_a_table_wider_than_the_terminal_loses_nothing() -> None:
    stream = io.StringIO()
    wide = Table("wide", ("network", *map(str, range(12))), [("plain", *(f"{i} (9{i}.1-9{i}.9)" for i in range(12)))])
    show(Section("wide", "Wide", [], [], [wide]), Console(file=stream, width=60))
    assert all(cell in stream.getvalue() for cell in wide.rows[0])


@pytest.mark.parametrize("outcome", ["yes", "no", "open"])
def test_a_verdict_is_coloured_and_said(outcome: Outcome) -> None:
    stream = io.StringIO()
    judged = Judged("claim", outcome, "verdict", "criterion", "evidence")
    show(Section("key", "Title", [], [judged]), Console(file=stream, width=60, force_terminal=True))
    assert re.search("\x1b\\[1;3\\dmverdict\x1b\\[0m: claim", stream.getvalue())


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals_only(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal)
    with progress(console, "speed", 10) as advance:
        advance(4)
        advance(6)
    assert ("100%" in stream.getvalue()) is terminal
    assert ("speed" in stream.getvalue()) is terminal
    assert (stream.getvalue() == "") is not terminal


def test_work_whose_amount_is_told_later() -> None:
    stream = io.StringIO()
    with following(Console(file=stream, width=80, force_terminal=True), "exact") as follow:
        follow(1, None)
        follow(3, 4)
    assert "75%" in stream.getvalue()


def test_what_a_terminal_would_obey_is_shown() -> None:
    hostile = "a\u202e\x1b[2J"
    stream = io.StringIO()
    content = Table(hostile, [hostile], [[hostile]])
    section = Section("key", hostile, [hostile], [Judged(hostile, "yes", hostile, hostile, hostile)], [content])
    show(section, Console(file=stream, width=200))
    assert stream.getvalue().count(r"a\u202e\x1b[2J") == 8
    assert not set(stream.getvalue()) & {"\u202e", "\x1b"}

"""Reports in a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from batchnorm.report.document import Judged, Outcome, Section, Table
from batchnorm.report.text import following, in_words, progress, show, table, time_left

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
    judged = Judged("it is [so]", "open", "inconclusive", "not shown", "+1 [0 to 2]", "by [2]")
    other = Table("another", ("a", "b"), [("c", "d")])
    section = Section(
        "why", "Why?", ["Because [it] is.", "And so on."], [judged], [CONTENT, other], [], ["not shown"], "not shown"
    )
    show(section, Console(file=stream, width=80))
    text = stream.getvalue()
    parts = (
        *("Why?", "inconclusive: it is [so]", "+1 [0 to 2]", "by [2]"),
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


def printed_meanwhile(terminal: bool, known: tuple[float, float] | None, seconds: float = 0.6) -> str:
    """What is shown around work that gets nothing done for a while."""
    stream = io.StringIO()
    with time_left(Console(file=stream, width=80, force_terminal=terminal), "study", lambda: known):
        time.sleep(seconds)
    return stream.getvalue()


def test_a_log_gets_lines_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed_meanwhile(False, (0.254, 42.0)) == "study: 25% done, about 40 s left\n"
    monkeypatch.setattr("batchnorm.report.text._LINES", 0.2)
    monkeypatch.setattr("batchnorm.report.text._TICK", 0.01)
    lines = printed_meanwhile(False, (0.254, 42.0), 1.0).splitlines()
    assert 2 <= len(lines) <= 5, "one at once, then one in 0.2 seconds"
    assert set(lines) == {"study: 25% done, about 40 s left"}


def test_a_terminal_gets_a_bar_before_anything_is_done() -> None:
    shown = printed_meanwhile(True, (0.0, 130.0))
    assert "study" in shown
    assert "0%" in shown
    assert "about 2 min left" in shown


def test_before_anything_is_known_a_log_gets_nothing() -> None:
    assert printed_meanwhile(False, None) == ""
    assert "study" in printed_meanwhile(True, None)


def test_where_nothing_can_be_shown_the_work_goes_on() -> None:
    stream = io.StringIO()
    stream.close()
    with time_left(Console(file=stream, force_terminal=False), "study", lambda: (0.0, 5.0)):
        time.sleep(0.3)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "5 s"), (43, "45 s"), (87, "85 s"), (95, "2 min"), (560, "9 min")],
)
def test_times_are_no_closer_than_they_are_known(seconds: float, words: str) -> None:
    assert in_words(seconds) == f"about {words} left"


def test_what_a_terminal_would_obey_is_shown() -> None:
    hostile = "a\u202e\x1b[2J"
    stream = io.StringIO()
    content = Table(hostile, [hostile], [[hostile]])
    section = Section("key", hostile, [hostile], [Judged(hostile, "yes", hostile, hostile, hostile)], [content])
    show(section, Console(file=stream, width=200))
    assert stream.getvalue().count(r"a\u202e\x1b[2J") == 8
    assert not set(stream.getvalue()) & {"\u202e", "\x1b"}

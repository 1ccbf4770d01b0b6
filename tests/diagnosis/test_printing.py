"""The report in a terminal, and as text."""

from __future__ import annotations

import io
import unicodedata

import pytest
from rich.console import Console

from batchnorm.diagnosis.printing import plain, show
from batchnorm.diagnosis.report import Report
from batchnorm.population.result import SkippedLayer
from batchnorm.report.document import Table
from diagnosis.reports import finding, fixed, full, reported

SCREEN = 24  # lines of the smallest terminal that people use


def printed(part: Report | Table, width: int, *, colour: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None)
    show(part, console)
    return stream.getvalue()


def test_the_first_lines_are_enough() -> None:
    lines = str(full()).splitlines()
    assert lines[0] == "2 errors, 18 warnings, 2 info in 13 layers; 4 batches with 128 samples, 1.4 passes over them"
    assert [line.split()[:2] for line in lines[1 : lines.index("")]] == [
        ["error", "BN001"],
        ["error", "BN301"],
        ["warning", "BN101"],
        *[["warning", "BN205"]] * 3,
        ["info", "BN201"],
        ["info", "BN404"],
    ]
    assert lines[2].endswith("running mean 3.1 SD from the data's")
    assert "layer1.0.bn and 11 more layers" in lines[3]
    assert "layer1.2.bn and 3 more layers" in lines[6]


def test_the_summary_fits_the_smallest_terminal() -> None:
    lines = [line.strip() for line in printed(full(), 80).splitlines()]
    assert lines.index("") <= SCREEN


def test_details_are_evidence_remedies_and_tables() -> None:
    text = str(full())
    parts = (
        "BN301",
        "Worst channels",
        "1.24",
        "what to do:\n    bn.recalibrate(model, batches)\n",
        "BN101 momentum-convention: momentum is 0.5 or more",
        'model.layer1.0.bn.momentum = 0.01',
        "The same batches in inference",
        "62.0 %",
        "Which layers the gap in the loss comes from",
        "93.0 %",
        "How far the running statistics are",
        "skipped: aux.bn (never called)",
    )  # fmt: skip
    position = text.index("\n\n")
    for part in parts:
        position = text.index(part, position)


def test_a_healthy_network_is_one_line() -> None:
    assert str(Report([], [reported("a")], batches=1, samples=4, passes=1.0)) == (
        "nothing found in 1 layer; 1 batch with 4 samples, 1 pass over them"
    )


def test_many_skipped_layers_are_counted() -> None:
    text = str(Report([], [], skipped=[SkippedLayer(f"a{i}", "never called") for i in range(8)]))
    assert text.count("skipped: ") == 5
    assert text.endswith("and 3 more layers skipped")


def test_before_and_after_stand_beside_each_other() -> None:
    lines = [line.split() for line in str(fixed()).splitlines()]
    assert ["BN101", "momentum-convention", "12", "0"] in lines


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_hostile_reaches_the_terminal_and_nothing_is_lost(width: int) -> None:
    text = printed(full(), width)
    assert not {c for c in text if unicodedata.category(c) in {"Cc", "Cf"}} - {"\n"}
    assert (
        "".join(printed(full(), 80).split()).count("valuesachannel") == 4
    )  # three findings, and the check's own words
    assert r"x\x1b[2J<script>[red]" in str(full())


def test_colour_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[1;31m2 errors\x1b[0m" in printed(full(), 100, colour=True)
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(variable, "1")
    assert "\x1b" not in str(full())


def test_long_messages_stay_in_one_line_of_plain_text() -> None:
    text = str(Report([finding(message="so " * 300)], []))
    assert ("so " * 300).strip() in text.splitlines()[1]


def test_a_table_alone() -> None:
    assert plain(Table("what", ("a", "b"), [("c", "d")])).splitlines()[0] == "what"

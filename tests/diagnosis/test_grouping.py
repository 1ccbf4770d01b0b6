"""Many findings in few lines."""

from __future__ import annotations

import pytest

from batchnorm.diagnosis.grouping import LAYER, Line, grouped, layer_name, verdict
from batchnorm.diagnosis.report import Report
from diagnosis.reports import HOSTILE, finding, reported


def lines(*layers_and_messages: tuple[str, str]) -> list[Line]:
    (group,) = grouped([finding(layer=layer, message=message) for layer, message in layers_and_messages])
    return group.lines()


def test_the_same_about_many_layers_is_one_line() -> None:
    assert lines(*((name, "so") for name in "abcd")) == [Line("a", "so", 3)]


def test_few_different_ones_have_a_line_each() -> None:
    assert lines(("a", "x"), ("b", "y"), ("c", "x")) == [Line("a", "x", 1), Line("b", "y")]


def test_of_many_different_ones_the_last_line_counts_the_rest() -> None:
    found = lines(*((name, f"{name}!") for name in "abcdef"), ("g", "d!"))
    assert found == [Line("a", "a!"), Line("b", "b!"), Line("c", "c!", 4)]


def test_code_and_severity_make_a_group() -> None:
    report = Report([finding("BN301", "error"), finding("BN301", "warning"), finding("BN101"), finding("BN101")], [])
    groups = grouped(report.findings)
    assert [(g.severity, g.code, len(g.findings)) for g in groups] == [
        ("error", "BN301", 1),
        ("warning", "BN101", 2),
        ("warning", "BN301", 1),
    ]
    assert groups[1].title == "BN101 momentum-convention"


def test_remedies_once_each_and_no_more_than_can_be_read() -> None:
    (group,) = grouped([finding(layer=f"l{i // 2}") for i in range(24)])
    remedy = group.remedy().splitlines()
    assert remedy[0] == "model.l0.momentum = 0.01"
    assert len(remedy) == len(set(remedy)) == 9
    assert remedy[-1] == "# and so on, for 4 more"
    compile(group.remedy(), "remedy", "exec")


def test_hostile_names_and_messages_are_one_printable_line() -> None:
    (line,) = lines((HOSTILE, f"got\n{HOSTILE}"))
    assert line.layer.startswith(r"x\x1b[2J<script>[red]")
    assert len(line.layer) <= LAYER
    assert line.message.startswith(r"got x\x1b[2J<script>[red]\u202e")
    assert (line.layer + line.message).isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("", "the model itself"), (" ", '""'), ("a.bn", "a.bn"), ("a" * 30 + "." + "b" * 30, "a" * 22 + "..." + "b" * 22)],
)
def test_names(name: str, shown: str) -> None:
    assert layer_name(name) == shown


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (Report([], [reported("a")]), "nothing found in 1 layer; no data"),
        (
            Report([finding(severity="error")], [reported("a")] * 1200, batches=1, samples=1, passes=1.0),
            "1 error in 1,200 layers; 1 batch with 1 sample, 1 pass over them",
        ),
        (
            Report([finding(), finding(), finding(severity="info")], [], batches=2, passes=2.25),
            "2 warnings, 1 info in 0 layers; 2 batches, 2.25 passes over them",
        ),
    ],
)
def test_the_verdict(report: Report, words: str) -> None:
    assert verdict(report) == words

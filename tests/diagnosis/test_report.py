"""The report as an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import Fix, Fixed
from batchnorm.errors import OptionError
from diagnosis.reports import finding, full, reported


def test_what_hurts_most_is_first() -> None:
    findings = [
        finding("BN301", "info"),
        finding("BN102", "warning"),
        finding("BN101", "warning", weight=1.0),
        finding("BN101", "warning", weight=2.0),
        finding("BN301", "error"),
    ]
    report = Report(findings, [])
    assert isinstance(report.findings, tuple)
    assert [(f.severity, f.code, f.weight) for f in report.findings] == [
        ("error", "BN301", 0.0),
        ("warning", "BN101", 2.0),
        ("warning", "BN101", 1.0),
        ("warning", "BN102", 0.0),
        ("info", "BN301", 0.0),
    ]


@pytest.mark.parametrize(
    ("severities", "ok"), [((), True), (("info",), True), (("info", "warning"), False), (("error",), False)]
)
def test_ok_is_neither_error_nor_warning(severities: tuple[Any, ...], ok: bool) -> None:
    assert Report([finding(severity=severity) for severity in severities], []).ok is ok


def test_at_least_counts_what_is_above() -> None:
    report = Report([finding(severity=severity) for severity in ("info", "warning", "error")], [])
    assert [len(report.at_least(severity)) for severity in ("error", "warning", "info")] == [1, 2, 3]


def test_it_can_be_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = full()
    report.print()
    assert "2 errors, 18 warnings, 2 info" in capsys.readouterr().out
    assert repr(report).startswith("<Report: 2 errors, 18 warnings, 2 info in 13 layers; 4 batches")
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text == report.to_json()
    assert json.loads(text)["version"] == 1
    report.to_html(str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(list(tmp_path.iterdir())) == 2


def test_fix_is_what_made_the_report() -> None:
    after = Report([], [reported("a")])
    fixed = Fixed((Fix("BN301", "a", "recalibrated", "3.1 SD", "0 SD"),), after)
    done, then = full(fixer=lambda: fixed).fix()
    assert (done, then) == (fixed.done, after)


def test_a_report_without_a_model_cannot_be_fixed() -> None:
    with pytest.raises(OptionError, match=r"no model to put right; call fix\(\) on what check"):
        full().fix()

"""Findings in the order of what hurts."""

from __future__ import annotations

from batchnorm.diagnosis.finding import Finding, by_severity


def test_the_order() -> None:
    findings = [
        Finding("BN201", "info", "a", "", "", weight=9),
        Finding("BN301", "error", "b", "", "", weight=1),
        Finding("BN301", "error", "c", "", "", weight=2),
        Finding("BN101", "warning", "d", "", ""),
        Finding("BN002", "error", "e", "", ""),
    ]
    assert "".join(f.layer for f in by_severity(findings)) == "ecbda"

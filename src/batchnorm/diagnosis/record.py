"""A report as JSON; docs/diagnosis-json.md says what the fields are."""

from __future__ import annotations

import json
import math
from typing import Any

from torch import Tensor

from batchnorm.diagnosis.finding import SEVERITIES, Finding
from batchnorm.diagnosis.grouping import name_of
from batchnorm.diagnosis.report import Report
from batchnorm.diagnosis.result import ReportedLayer

VERSION = 1


def text(report: Report) -> str:
    """The report in ASCII, with a line's end at the end."""
    return json.dumps(record(report), allow_nan=False, indent=1) + "\n"


def record(report: Report) -> dict[str, Any]:
    """The report as JSON's own types."""
    return {
        "version": VERSION,
        "ok": report.ok,
        "counts": {severity: sum(f.severity == severity for f in report.findings) for severity in SEVERITIES},
        "batches": report.batches,
        "samples": report.samples,
        "passes": _number(report.passes),
        "findings": [_finding(finding) for finding in report.findings],
        "layers": [_layer(layer) for layer in report.layers],
        "skipped": [{"layer": layer.name, "reason": layer.reason} for layer in report.skipped],
        "modes": None if report.modes is None else [_numbers(mode._asdict()) for mode in report.modes],
        "attribution": None
        if report.attribution is None
        else {"measure": report.measure, "layers": [_numbers(row._asdict()) for row in report.attribution]},
        "before": None if report.before is None else record(report.before),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    evidence = finding.evidence
    return {
        "code": finding.code,
        "name": name_of(finding.code),
        "severity": finding.severity,
        "layer": finding.layer,
        "message": finding.message,
        "remedy": finding.remedy,
        "weight": _number(finding.weight),
        "evidence": None
        if evidence is None
        else {
            "caption": evidence.caption,
            "columns": list(evidence.columns),
            "rows": [list(row) for row in evidence.rows],
        },
    }


def _layer(layer: ReportedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "channels": layer.channels,
        "input_shape": None if layer.input_shape is None else list(layer.input_shape),
        "count": _number(layer.count),
        "worst_shift": _number(layer.worst_shift),
        "worst_log_variance_ratio": _number(layer.worst_log_variance_ratio),
        "shift": _values(layer.shift),
        "log_variance_ratio": _values(layer.log_variance_ratio),
    }


def _values(values: Tensor | None) -> list[int | float | None] | None:
    return None if values is None else [_number(value) for value in values.tolist()]


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(value) if isinstance(value, float) else value for name, value in fields.items()}


def _number(value: int | float | None) -> int | float | None:
    return value if value is None or math.isfinite(value) else None

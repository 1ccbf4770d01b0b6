"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchnorm.report.document import Table

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # what hurts most comes first


@dataclass(frozen=True)
class Finding:
    """One thing that one check found, in one layer.

    Attributes:
        code: of the check, as "BN101".
        severity: "error", "warning" or "info".
        layer: its path in the model; "" is the model itself.
        message: what is, with the number, in one line.
        remedy: what to do: Python to paste.
        evidence: the numbers: the worst channels, before and after; None where the message has them all.
        weight: how much it hurts beside others of the same code, in whatever the check measures.
    """

    code: str
    severity: Severity
    layer: str
    message: str
    remedy: str
    evidence: Table | None = None
    weight: float = 0.0


def by_severity(findings: list[Finding]) -> list[Finding]:
    """What hurts most first: by severity, then by code, then by weight."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.code, -f.weight))

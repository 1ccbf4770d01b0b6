"""One check on one model, without the entry point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.subject import Subject, subject_of_model


def found(code: str, subject: nn.Module | Subject, **rest: Any) -> dict[str, Finding]:
    """By layer, what a check says; `rest` are other attributes of the subject. No layer is named twice."""
    if isinstance(subject, nn.Module):
        subject = subject_of_model(subject, **rest)
    check = CHECKS[code]
    findings = list(check.run(subject))
    for finding in findings:
        assert finding.code == code
        assert "\n" not in finding.message
        table = finding.evidence
        assert table is None or all(len(row) == len(table.columns) for row in table.rows)
    by_layer = {finding.layer: finding for finding in findings}
    assert len(by_layer) == len(findings)
    return by_layer


def severities(code: str, subject: nn.Module | Subject, **rest: Any) -> dict[str, str]:
    """By layer, how severe it is."""
    return {layer: finding.severity for layer, finding in found(code, subject, **rest).items()}


def remedied(finding: Finding, model: nn.Module, **names: object) -> None:
    """Do what a remedy says."""
    import batchnorm

    exec(compile(finding.remedy, finding.code, "exec"), {"bn": batchnorm, "model": model, "torch": torch, **names})


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Values of order 1, with a mean."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5

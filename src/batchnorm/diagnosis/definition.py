"""What a check is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from batchnorm.diagnosis.finding import Finding, Severity
from batchnorm.diagnosis.subject import Subject

Needs = Literal["state", "model", "data", "second", "optimizer", "loss"]


@dataclass(frozen=True)
class Check:
    """One check. Its page has the same name as its code, in `explanations/`.

    Attributes:
        code: "BN101": the group, and a number in it.
        name: "momentum-convention".
        severity: the highest that it gives.
        needs: the least that it looks at: state alone, the model's graph, data, a second set of data, an optimizer, or
            a loss.
        found: when it speaks, in one sentence.
        remedy: what to do, in a few words.
        fixed: whether `Report.fix` does it.
        run: what it says of a subject that has what it needs.
    """

    code: str
    name: str
    severity: Severity
    needs: Needs
    found: str
    remedy: str
    fixed: bool
    run: Callable[[Subject], Iterable[Finding]]

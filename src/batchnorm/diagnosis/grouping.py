"""Findings in few lines: the same about many layers is said once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from batchnorm.diagnosis.catalogue import CHECKS
from batchnorm.diagnosis.finding import SEVERITIES, Finding, Severity
from batchnorm.diagnosis.report import Report
from batchnorm.messages import one_line, printable
from batchnorm.models.norm_layers import display_name

LINES = 3  # of one code: a screen has to hold all codes
REMEDIES = 8  # of one code
LAYER = 48  # characters of a layer's name in a line
LEFT_OUT = "..."


@dataclass(frozen=True)
class Line:
    """One line of a summary.

    Attributes:
        layer: the layer's name, fit to print.
        message: what is.
        more: of how many more layers the same is said.
    """

    layer: str
    message: str
    more: int = 0


@dataclass(frozen=True)
class Group:
    """The findings of one code and severity.

    Attributes:
        code: of the check.
        name: of the check, or "".
        severity: of all of them.
        findings: what hurts most first.
    """

    code: str
    name: str
    severity: Severity
    findings: Sequence[Finding]

    @property
    def title(self) -> str:
        """Code and name."""
        return f"{self.code} {self.name}".strip()

    def lines(self) -> list[Line]:
        """At most `LINES`: findings with one message are one, and the last says how many layers have no line."""
        messages: dict[str, list[Finding]] = {}
        for finding in self.findings:
            messages.setdefault(one_line(finding.message), []).append(finding)
        lines = [Line(layer_name(same[0].layer), message, len(same) - 1) for message, same in messages.items()]
        if len(lines) <= LINES:
            return lines
        first, last = lines[: LINES - 1], lines[LINES - 1 :]
        return [*first, Line(last[0].layer, last[0].message, sum(1 + line.more for line in last) - 1)]

    def remedy(self) -> str:
        """The remedies as code, each once; of many the first ones, and how many more there are."""
        remedies = list(dict.fromkeys(printable(f.remedy).strip("\n") for f in self.findings if f.remedy))
        more = len(remedies) - REMEDIES
        return "\n".join([*remedies[:REMEDIES], *([f"# and so on, for {more} more"] if more > 0 else [])])


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """Sorted findings, those of one code and severity together."""
    groups = groupby(findings, key=lambda finding: (finding.severity, finding.code))
    return [Group(code, name_of(code), severity, list(same)) for (severity, code), same in groups]


def name_of(code: str) -> str:
    """The name of the check that has this code; "" where none has."""
    return CHECKS[code].name if code in CHECKS else ""


def layer_name(name: str) -> str:
    """A layer's name in one line, its middle left out where it is long."""
    name = one_line(display_name(name)) or '""'
    if len(name) <= LAYER:
        return name
    half = (LAYER - len(LEFT_OUT)) // 2
    return f"{name[:half]}{LEFT_OUT}{name[-half:]}"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """A number and what it counts: "1 layer", "1,000 layers"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def tally(report: Report) -> list[tuple[Severity, int, str]]:
    """How many findings there are of each severity that there are any of, and the word for so many."""
    plural = {"error": "errors", "warning": "warnings", "info": "info"}
    found = [(severity, sum(f.severity == severity for f in report.findings)) for severity in SEVERITIES]
    return [(severity, n, severity if n == 1 else plural[severity]) for severity, n in found if n]


def verdict(report: Report) -> str:
    """All in one line: "2 errors, 1 warning in 53 layers; 4 batches with 128 samples, 1.4 passes over them"."""
    found = ", ".join(f"{number:,} {word}" for _, number, word in tally(report))
    return f"{found or 'nothing found'} {scope(report)}"


def scope(report: Report) -> str:
    """What was looked at: layers and data."""
    words = f"in {counted(len(report.layers), 'layer')}; "
    if not report.batches:
        return words + "no data"
    words += counted(report.batches, "batch", "batches")
    if report.samples is not None:
        words += f" with {counted(report.samples, 'sample')}"
    return f"{words}, {report.passes:.3g} {'pass' if report.passes == 1 else 'passes'} over them"

"""The report of a check: what was found, to read, to print and to write to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.diagnosis.finding import SEVERITIES, Finding, Severity, by_severity
from batchnorm.diagnosis.result import Fixed, LayerAttribution, Measure, Mode, ReportedLayer
from batchnorm.errors import OptionError
from batchnorm.files import write_text
from batchnorm.population.result import SkippedLayer

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, eq=False)
class Report:
    """What `batchnorm.check` found. Prints as text, for people first: what hurts most is at the top.

    Attributes:
        findings: what hurts most first: by severity, then by code, then by weight.
        layers: every layer, in the model's order.
        skipped: layers that could not be examined, and why.
        batches: how many batches were used; 0 without data.
        samples: how many samples they held; None without data, and where there was no tensor to count by.
        passes: how many forward passes over all of the data it took.
        attribution: how much of the gap between running and exact statistics is each layer's, the largest share first;
            None where it was not measured.
        measure: what the gap was measured in.
        modes: inference with running, exact and batch statistics beside each other; None where it was not measured.
        before: the report before `fix`; None of any other.
        fixer: what `fix` calls.
    """

    findings: Sequence[Finding]
    layers: Sequence[ReportedLayer]
    skipped: Sequence[SkippedLayer] = ()
    batches: int = 0
    samples: int | None = None
    passes: float = 0.0
    attribution: Sequence[LayerAttribution] | None = None
    measure: Measure = "output"
    modes: Sequence[Mode] | None = None
    before: Report | None = None
    fixer: Callable[[], Fixed] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "skipped", "attribution", "modes"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "findings", tuple(by_severity(list(self.findings))))

    @property
    def ok(self) -> bool:
        """Whether there is no error and no warning."""
        return not self.at_least("warning")

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of a severity, and of those above it."""
        return tuple(f for f in self.findings if SEVERITIES.index(f.severity) <= SEVERITIES.index(severity))

    def __str__(self) -> str:
        from batchnorm.diagnosis.printing import plain

        return plain(self)

    def __repr__(self) -> str:
        from batchnorm.diagnosis.grouping import verdict

        return f"<Report: {verdict(self)}>"

    def print(self, console: Console | None = None) -> None:
        """Print to a terminal, in colour where it has any.

        Args:
            console: rich's; stdout by default.
        """
        from rich.console import Console

        from batchnorm.diagnosis.printing import show

        show(self, Console() if console is None else console)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON; docs/diagnosis-json.md has the fields. Numbers that are not finite are null.

        Args:
            path: a file to write it to as well: whole or not at all.

        Returns:
            The JSON text.

        Raises:
            OSError: the file cannot be written.
        """
        from batchnorm.diagnosis.record import text

        content = text(self)
        if path is not None:
            write_text(Path(path), content)
        return content

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML file that needs nothing else: no script, no network.

        Args:
            path: the file, written as a whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        from batchnorm.diagnosis.document import document
        from batchnorm.report.page import page

        write_text(Path(path), page(document(self)))

    def fix(self) -> Fixed:
        """Put right what can be put right without changing what a correct network computes: all of it or nothing.

        Returns:
            What was done, and the same check again: `done, after = report.fix()`.

        Raises:
            OptionError: there is no model: the report is of a state_dict, or of another process.
        """
        if self.fixer is None:
            raise OptionError("this report has no model to put right; call fix() on what check(model, ...) returned")
        return self.fixer()

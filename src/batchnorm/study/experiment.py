"""What an experiment is, for the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from batchnorm.report.document import Chart, Section, Table
from batchnorm.study import networks
from batchnorm.study.dataset import Data
from batchnorm.study.grid import Grid, Results
from batchnorm.study.networks import Layers, Placement
from batchnorm.study.verdict import Claim, Finding, Postponed

P = TypeVar("P")
_POSTPONED = (
    "This question needs the full study: batchnorm study without --quick. Its trainings are too long for the quick "
    "form, and what shorter ones show is another stage of training, with other answers."
)


@dataclass(frozen=True)
class Setting:
    """What the whole study is about, the same for every experiment."""

    data: Data
    layers: Layers

    def perceptron(
        self, hidden: Sequence[int], placement: Placement, generator: torch.Generator, dropout: float = 0.0
    ) -> nn.Sequential:
        """A `networks.perceptron` for this data and of these layers."""
        sizes = (self.data.features, hidden, self.data.classes)
        return networks.perceptron(
            *sizes, placement=placement, layers=self.layers, generator=generator, dropout=dropout
        )

    def residual(self, width: int, blocks: int, placement: Placement, generator: torch.Generator) -> nn.Sequential:
        """A `networks.residual` for this data and of these layers."""
        sizes = (self.data.shape, width, blocks, self.data.classes)
        return networks.residual(*sizes, placement=placement, layers=self.layers, generator=generator)


@dataclass(frozen=True)
class Conclusion:
    """What an experiment comes to.

    Attributes:
        numbers: what results.json holds of it, JSON-able; what is not a finite number is None.
        findings: one for each claim, in their order.
        summary: the answer in plain sentences.
        tables: the numbers behind it.
        charts: the curves behind it.
        notes: how it was measured, and what was not.
    """

    numbers: dict[str, Any]
    findings: Sequence[Finding]
    summary: Sequence[str]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment(Generic[P]):
    """One row of the table.

    Attributes:
        name: its key in results.json, and its address in the report.
        title: the question, as the report asks it.
        claims: what it decides, declared before any number is known.
        full: the plan of a whole run, a frozen dataclass.
        quick: the plan of `--quick`, whose trainings are as long as the full ones: what holds after a few steps says
            nothing of what holds after many. None where that takes too long: then `--quick` says so of its claims.
        grid: the settings and seeds of a plan; there is one task for each combination.
        run: does one task, `run(setting, plan, *args)`, and returns JSON-able numbers. A function at the top level of
            its module, which depends on its arguments and seeds only: tasks are done in any order, in any process.
        conclude: makes the conclusion from what all tasks found.
        seconds: of a plan, about how many a task takes on one core: the time left is told by it at first.
        code: what a reader can type to see it, several lines.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    full: P
    quick: P | None
    grid: Callable[[P], Grid]
    run: Callable[..., dict[str, Any]]
    conclude: Callable[[Setting, P, Results], Conclusion]
    seconds: Callable[[P], float]
    code: str = ""

    def __post_init__(self) -> None:
        full, quick = (getattr(plan, "steps", None) for plan in (self.full, self.quick))
        if self.quick is not None and quick != full:
            raise ValueError(
                f"the quick plan of {self.name!r} trains for {quick} steps, the full one for {full}; claims are judged "
                "at one stage of training. Make quick plans smaller in another way, or quick=None"
            )

    def postponed(self) -> list[Postponed]:
        """What is said of the claims where the plan is None."""
        return [Postponed(claim) for claim in self.claims]

    def section(self, conclusion: Conclusion | None) -> Section:
        """The experiment's part of the report; without a conclusion it says that the full study is needed."""
        if conclusion is None:
            judged = [claim.judged() for claim in self.postponed()]
            return Section(self.name, self.title, [_POSTPONED], judged, code=self.code)
        return Section(
            key=self.name,
            title=self.title,
            summary=conclusion.summary,
            judged=[finding.judged() for finding in conclusion.findings],
            tables=conclusion.tables,
            charts=conclusion.charts,
            notes=conclusion.notes,
            code=self.code,
        )

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
from batchnorm.study.verdict import Claim, Finding

P = TypeVar("P")


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
        quick: the plan of `--quick`.
        grid: the settings and seeds of a plan; there is one task for each combination.
        run: does one task, `run(setting, plan, *args)`, and returns JSON-able numbers. A function at the top level of
            its module, which depends on its arguments and seeds only: tasks are done in any order, in any process.
        conclude: makes the conclusion from what all tasks found.
        code: what a reader can type to see it, several lines.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    full: P
    quick: P
    grid: Callable[[P], Grid]
    run: Callable[..., dict[str, Any]]
    conclude: Callable[[Setting, P, Results], Conclusion]
    code: str = ""

    def section(self, conclusion: Conclusion) -> Section:
        """The experiment's part of the report."""
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

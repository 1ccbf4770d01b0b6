"""What an experiment is, for the runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from batchnorm.report.document import Section
from batchnorm.study.dataset import Data
from batchnorm.study.networks import Layers
from batchnorm.study.verdict import Claim, Finding

# The arguments that tell one task of an experiment from another: text and numbers.
Args = tuple[str | int | float, ...]
# What each task of an experiment found, in the order of the tasks.
Results = Mapping[Args, dict[str, Any]]

P = TypeVar("P")


@dataclass(frozen=True)
class Setting:
    """What the whole study is about, the same for every experiment."""

    data: Data
    layers: Layers


@dataclass(frozen=True)
class Conclusion:
    """What an experiment comes to.

    Attributes:
        numbers: what results.json holds of it, JSON-able; what is not a finite number is None.
        findings: one for each claim, in their order.
        section: the same in words, tables and charts.
    """

    numbers: dict[str, Any]
    findings: Sequence[Finding]
    section: Section


@dataclass(frozen=True)
class Experiment(Generic[P]):
    """One row of the table.

    Attributes:
        name: its key in results.json.
        claims: what it decides, declared before any number is known.
        full: the plan of a whole run, a frozen dataclass.
        quick: the plan of `--quick`.
        tasks: the arguments of each task of a plan.
        run: does one task, `run(setting, plan, *args)`, and returns JSON-able numbers. A function at the top level of
            its module, which depends on its arguments and seeds only: tasks are done in any order, in any process.
        conclude: makes of all tasks' numbers the conclusion.
    """

    name: str
    claims: tuple[Claim, ...]
    full: P
    quick: P
    tasks: Callable[[P], Sequence[Args]]
    run: Callable[..., dict[str, Any]]
    conclude: Callable[[Setting, P, Results], Conclusion]

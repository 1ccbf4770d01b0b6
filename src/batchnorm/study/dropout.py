"""Regularisation: batch normalization and dropout, each, both and neither, on few samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Curve, Section, Table, percent
from batchnorm.study import training
from batchnorm.study.dataset import Part
from batchnorm.study.experiment import Args, Conclusion, Experiment, Results, Setting
from batchnorm.study.formatting import chosen, in_points, points
from batchnorm.study.networks import Placement, perceptron
from batchnorm.study.statistics import Interval, best_of_the_others, effect_size, mean_interval
from batchnorm.study.verdict import Claim, Finding

NAME = "dropout"


@dataclass(frozen=True)
class Kind:
    """One of the four networks."""

    placement: Placement
    dropped: bool


PLAIN, DROPOUT, NORM, BOTH = "plain", "dropout", "batch norm", "batch norm and dropout"
NETWORKS = {
    PLAIN: Kind("none", dropped=False),
    DROPOUT: Kind("none", dropped=True),
    NORM: Kind("before", dropped=False),
    BOTH: Kind("before", dropped=True),
}

# Above 0: any reduction counts, how large it is the interval says.
GAP = Claim(
    "smaller-gap",
    "M13",
    "It regularises: training and test accuracy are closer",
    "generalisation gap without batch norm minus the gap with it, the pairs' mean",
    0.0,
    "percentage points",
)
# Redundant is what can be left out at no cost. One point is what a practitioner would hardly keep another
# hyperparameter for; from below, because dropout that does harm is redundant too.
REDUNDANT = Claim(
    "dropout-redundant",
    "M13",
    "It makes dropout redundant: leaving it out costs less than 1 point",
    "test accuracy with batch norm alone minus with dropout besides, the pairs' mean",
    -1.0,
    "percentage points",
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        seeds: sets of four networks at each learning rate; their seeds are 0, 1, ...
        samples: how many of the training samples are learnt from, others for each seed: few, so that there is something
            to overfit.
        steps: optimiser steps of each training.
        rates: the learning rates.
        hidden: features of each hidden layer.
        batch_size: samples in a step.
        dropout: the probability with which a hidden feature is dropped.
    """

    seeds: int = 10
    samples: int = 300
    steps: int = 600
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    hidden: tuple[int, ...] = (64,) * 4
    batch_size: int = 32
    dropout: float = 0.2


def tasks(plan: Plan) -> list[Args]:
    """A training for each network, rate and seed."""
    return [(network, rate, seed) for network in NETWORKS for rate in plan.rates for seed in range(plan.seeds)]


def run(setting: Setting, plan: Plan, network: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once; the accuracies that it settles at."""
    data, kind = setting.data, NETWORKS[network]
    generator = torch.Generator().manual_seed(seed)  # samples, weights, order: all four networks draw alike
    few = torch.randperm(len(data.train.labels), generator=generator)[: plan.samples]
    part = Part(data.train.indices[few], data.train.inputs[few], data.train.labels[few])
    model = perceptron(
        data.features,
        plan.hidden,
        data.classes,
        placement=kind.placement,
        layers=setting.layers,
        generator=generator,
        dropout=plan.dropout if kind.dropped else 0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # what is dropped comes from torch's global generator
        descent = training.descend(model, part, learning_rate=rate, batch_size=plan.batch_size, generator=generator)
        train, test = training.settle(model, descent, plan.steps, [part, data.test])
    return {"train": train, "test": test}


@dataclass(frozen=True)
class Cell:
    """One network, each seed at the learning rate that was best for the others.

    Attributes:
        network: a key of `NETWORKS`.
        rates: each seed's learning rate.
        train: each seed's accuracy on the samples that it learnt from.
        test: each seed's test accuracy.
    """

    network: str
    rates: tuple[float, ...]
    train: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def gaps(self) -> tuple[float, ...]:
        """Each seed's generalisation gap."""
        return tuple(a - b for a, b in zip(self.train, self.test, strict=True))


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Choose the rates, and compare the four."""
    cells = {network: _cell(plan, network, results) for network in NETWORKS}
    gap = _differences(cells[PLAIN].gaps, cells[NORM].gaps)
    alone = _differences(cells[NORM].test, cells[BOTH].test)
    gained = {
        "batch norm, without dropout": _differences(cells[NORM].test, cells[PLAIN].test),
        "dropout, without batch norm": _differences(cells[DROPOUT].test, cells[PLAIN].test),
        "dropout, with batch norm": _differences(cells[BOTH].test, cells[NORM].test),
    }
    findings = [
        claim.judge(mean_interval(differences).map(in_points), effect_size(differences), plan.seeds)
        for claim, differences in ((GAP, gap), (REDUNDANT, alone))
    ]
    gains = {what: mean_interval(differences) for what, differences in gained.items()}
    numbers = {
        "networks": [asdict(cell) for cell in cells.values()],
        "gains": [{"of": what, **asdict(gain)} for what, gain in gains.items()],
    }
    return Conclusion(numbers, findings, _section(plan, cells, mean_interval(gap), gains, findings))


def _cell(plan: Plan, network: str, results: Results) -> Cell:
    def values(what: str, rate: float) -> list[float]:
        return [results[network, rate, seed][what] for seed in range(plan.seeds)]

    rates = best_of_the_others({rate: values("test", rate) for rate in plan.rates})
    train, test = (
        tuple(results[network, rate, seed][what] for seed, rate in enumerate(rates)) for what in ("train", "test")
    )
    return Cell(network, rates, train, test)


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _section(
    plan: Plan, cells: dict[str, Cell], gap: Interval, gains: dict[str, Interval], findings: Sequence[Finding]
) -> Section:
    before = gains["dropout, without batch norm"]
    if before.low > 0:
        helped = "so there was something for batch normalization to replace"
    elif before.high < 0:
        helped = "so it did harm, and there was nothing for batch normalization to replace"
    else:
        helped = "so whether there was anything for batch normalization to replace is open"
    return Section(
        key=NAME,
        title="Does it regularise, and make dropout redundant?",
        summary=[
            "The article says that batch normalization has a regularising effect, and in some cases makes dropout "
            f"redundant. Here a {len(plan.hidden)}-layer network learnt from {plan.samples} samples only, with "
            "batch normalization, dropout, both or neither, each at the learning rate that suits it best.",
            f"The generalisation gap, accuracy on the samples learnt from minus test accuracy, was "
            f"{_mean(cells[PLAIN].gaps)} points without batch normalization and {_mean(cells[NORM].gaps)} with: a "
            f"difference of {points(gap)}.",
            f"Dropout changed the test accuracy by {points(before)} without batch normalization, {helped}.",
            f"With batch normalization, it changed it by {points(gains['dropout, with batch norm'])}.",
        ],
        judged=[finding.judged() for finding in findings],
        tables=[_table(plan, cells), _gains(plan, gains)],
        charts=[_chart(plan, cells)],
        notes=[
            f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]} with ReLU, He's initialisation; batch "
            f"normalization before each ReLU, dropout of {plan.dropout:g} after it. The four of a seed start from the "
            f"same linear weights and see the same batches of {plan.batch_size} of the same samples, for {plan.steps} "
            "steps of plain stochastic gradient descent.",
            f"Learning rates: of {', '.join(f'{rate:g}' for rate in plan.rates)}, for each seed the one with the best "
            "mean test accuracy over the other seeds.",
            "Accuracies are those of inference: nothing dropped, running statistics.",
            "One network, one rate of dropout, one number of samples: where dropout helps more, the answer may differ.",
        ],
        code=CODE,
    )


def _mean(fractions: Sequence[float]) -> str:
    return percent(statistics.fmean(fractions))


def _table(plan: Plan, cells: dict[str, Cell]) -> Table:
    return Table(
        caption=f"Accuracies after {plan.steps} steps, %: means over {plan.seeds} seeds",
        columns=("network", "learning rate", "on its samples", "on the test samples", "gap"),
        rows=[
            (cell.network, chosen(cell.rates), _mean(cell.train), _mean(cell.test), _mean(cell.gaps))
            for cell in cells.values()
        ],
    )


def _gains(plan: Plan, gains: dict[str, Interval]) -> Table:
    def point(value: float) -> str:
        return f"{100 * value:+.2f}"

    return Table(
        caption=f"What each adds to the test accuracy, in percentage points, over {plan.seeds} seeds",
        columns=("added", "mean", "95 % interval"),
        rows=[(what, point(g.estimate), f"{point(g.low)} to {point(g.high)}") for what, g in gains.items()],
    )


def _chart(plan: Plan, cells: dict[str, Cell]) -> Chart:
    positions = range(len(cells))

    def curve(label: str, of: Callable[[Cell], Sequence[float]]) -> Curve:
        intervals = [mean_interval(of(cell)).map(in_points) for cell in cells.values()]
        return Curve(
            label,
            positions,
            [i.estimate for i in intervals],
            [i.low for i in intervals],
            [i.high for i in intervals],
            points=True,
        )

    values = ", ".join(f"{cell.network} {_mean(cell.train)} and {_mean(cell.test)}" for cell in cells.values())
    return Chart(
        title="Accuracy on the samples learnt from, and on the test samples",
        description=f"Mean accuracy in per cent with 95 % interval, learnt from and test: {values}.",
        x_label="",
        y_label="accuracy, %",
        curves=[curve("learnt from", lambda cell: cell.train), curve("test", lambda cell: cell.test)],
        names=tuple(zip(positions, cells, strict=True)),
    )


CODE = """\
import torch
from batchnorm.study.dataset import digits
from batchnorm.study.networks import OURS, perceptron
from batchnorm.study.training import train

data = digits()
for placement in ("before", "none"):
    for dropout in (0.0, 0.2):
        generator = torch.Generator().manual_seed(0)
        network = perceptron(64, (64,) * 4, 10, placement=placement, layers=OURS, generator=generator, dropout=dropout)
        curve = train(network, data, learning_rate=0.1, batch_size=32, steps=80, evaluate_every=80, generator=generator)
        print("batch norm:", placement, "dropout:", dropout, curve.test_accuracy)
"""

EXPERIMENT = Experiment(
    name=NAME,
    claims=(GAP, REDUNDANT),
    full=Plan(),
    quick=Plan(seeds=6, steps=150, rates=(0.1, 0.3), hidden=(48,) * 3),
    tasks=tasks,
    run=run,
    conclude=conclude,
)

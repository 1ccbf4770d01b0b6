"""Before the activation or after it: a deep perceptron and a residual network, normalised in either place or not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.report.document import Chart, Curve, Section, Table, percent
from batchnorm.study import training
from batchnorm.study.experiment import Args, Conclusion, Experiment, Results, Setting
from batchnorm.study.formatting import chosen, in_points, points
from batchnorm.study.networks import Placement, perceptron, residual
from batchnorm.study.statistics import Interval, best_of_the_others, effect_size, mean_interval, within
from batchnorm.study.verdict import Claim, Finding

NAME = "placement"
PLACEMENTS: dict[Placement, str] = {
    "before": "before the activation",
    "after": "after it",
    "none": "nowhere",
}
PERCEPTRON, RESIDUAL = "perceptron", "residual network"

# One point: less than that nobody would change the order of their layers for. A difference in either direction counts
# against the claim.
_MARGIN = 1.0
_MEASURE = f"{_MARGIN:g} point minus the difference in mean test accuracy, whichever is better"
CLAIMS = {
    PERCEPTRON: Claim(
        "placement-perceptron",
        "M1",
        "Before or after the activation: no matter in a deep perceptron",
        _MEASURE,
        0.0,
        "percentage points",
    ),
    RESIDUAL: Claim(
        "placement-residual",
        "M1",
        "Before or after the activation: no matter in a residual network",
        _MEASURE,
        0.0,
        "percentage points",
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        seeds: triples at each learning rate; their seeds are 0, 1, ...
        steps: optimiser steps of each training.
        rates: the learning rates.
        hidden: features of each hidden layer of the perceptron.
        width: channels of the residual network.
        blocks: of the residual network, two linear maps each.
        batch_size: samples in a step.
    """

    seeds: int = 10
    steps: int = 250
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    hidden: tuple[int, ...] = (48,) * 6
    width: int = 8
    blocks: int = 2
    batch_size: int = 32


def tasks(plan: Plan) -> list[Args]:
    """A training for each network, placement, rate and seed."""
    return [
        (network, placement, rate, seed)
        for network in CLAIMS
        for placement in PLACEMENTS
        for rate in plan.rates
        for seed in range(plan.seeds)
    ]


def run(setting: Setting, plan: Plan, network: str, placement: Placement, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once; the test accuracy that it settles at."""
    data = setting.data
    generator = torch.Generator().manual_seed(seed)  # the weights first, then the order: all three draw alike
    model = _made(setting, plan, network, placement, generator)
    descent = training.descend(model, data.train, learning_rate=rate, batch_size=plan.batch_size, generator=generator)
    (accuracy,) = training.settle(model, descent, plan.steps, [data.test])
    return {"accuracy": accuracy}


def _made(setting: Setting, plan: Plan, network: str, placement: Placement, generator: torch.Generator) -> nn.Module:
    data, layers = setting.data, setting.layers
    if network == PERCEPTRON:
        return perceptron(
            data.features, plan.hidden, data.classes, placement=placement, layers=layers, generator=generator
        )
    return residual(
        data.shape, plan.width, plan.blocks, data.classes, placement=placement, layers=layers, generator=generator
    )


@dataclass(frozen=True)
class Cell:
    """One network with one placement, each seed at the learning rate that was best for the others.

    Attributes:
        network: a key of `CLAIMS`.
        placement: a key of `PLACEMENTS`.
        rates: each seed's learning rate.
        accuracy: each seed's test accuracy.
    """

    network: str
    placement: Placement
    rates: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Differences:
    """Of one network's mean test accuracies.

    Attributes:
        network: a key of `CLAIMS`.
        after: after the activation minus before it.
        gain: before the activation minus not normalised.
        effect: of `after`.
    """

    network: str
    after: Interval
    gain: Interval
    effect: float | None


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Choose the rates, and compare the placements."""
    cells = [_cell(plan, network, placement, results) for network in CLAIMS for placement in PLACEMENTS]
    found = {(cell.network, cell.placement): cell.accuracy for cell in cells}
    differences = []
    for network in CLAIMS:
        before, after, none = (found[network, placement] for placement in PLACEMENTS)
        moved = [a - b for a, b in zip(after, before, strict=True)]
        gained = [a - b for a, b in zip(before, none, strict=True)]
        differences.append(Differences(network, mean_interval(moved), mean_interval(gained), effect_size(moved)))
    findings = [
        CLAIMS[d.network].judge(within(_MARGIN, d.after.map(in_points)), d.effect, plan.seeds) for d in differences
    ]
    numbers = {"networks": [asdict(cell) for cell in cells], "differences": [asdict(d) for d in differences]}
    return Conclusion(numbers, findings, _section(setting, plan, cells, differences, findings))


def _cell(plan: Plan, network: str, placement: Placement, results: Results) -> Cell:
    scores = {
        rate: [results[network, placement, rate, seed]["accuracy"] for seed in range(plan.seeds)] for rate in plan.rates
    }
    rates = best_of_the_others(scores)
    return Cell(network, placement, rates, tuple(scores[rate][seed] for seed, rate in enumerate(rates)))


def _section(
    setting: Setting, plan: Plan, cells: Sequence[Cell], differences: Sequence[Differences], findings: Sequence[Finding]
) -> Section:
    maps = "3x3 convolutions" if len(setting.data.shape) == 3 else "linear layers"
    return Section(
        key=NAME,
        title="Before the activation, or after it?",
        summary=[
            "The article puts batch normalization between a layer's linear map and its activation, and says that some "
            "put it after the activation. Here a perceptron and a residual network were trained both ways, and "
            "without, each at the learning rate that suits it best.",
            *(
                f"In the {d.network}, moving it from before to after the activation changed the test accuracy by "
                f"{points(d.after)}; having it before the activation rather than not at all, by {points(d.gain)}."
                for d in differences
            ),
        ],
        judged=[finding.judged() for finding in findings],
        tables=[_table(plan, cells)],
        charts=[_chart(cells)],
        notes=[
            f"Perceptron: {len(plan.hidden)} hidden layers of {plan.hidden[0]}. Residual network: {maps} of "
            f"{plan.width}, {plan.blocks} blocks of two. In a block, before: ReLU(BN(W ReLU(BN(W x))) + x); after: "
            "BN(ReLU(W BN(ReLU(W x)) + x)). He's initialisation, ReLU throughout.",
            "The three of a seed start from the same linear weights and see the same batches of "
            f"{plan.batch_size} in the same order, for {plan.steps} steps of plain stochastic gradient descent.",
            f"Learning rates: of {', '.join(f'{rate:g}' for rate in plan.rates)}, for each seed the one with the best "
            "mean test accuracy over the other seeds.",
        ],
        code=CODE,
    )


def _table(plan: Plan, cells: Sequence[Cell]) -> Table:
    return Table(
        caption=f"Test accuracy after {plan.steps} steps, %: mean and range over {plan.seeds} seeds",
        columns=("network", "batch norm", "learning rate", "accuracy", "range"),
        rows=[
            (
                cell.network,
                PLACEMENTS[cell.placement],
                chosen(cell.rates),
                percent(statistics.fmean(cell.accuracy)),
                f"{percent(min(cell.accuracy))}-{percent(max(cell.accuracy))}",
            )
            for cell in cells
        ],
    )


def _chart(cells: Sequence[Cell]) -> Chart:
    curves = []
    for network in CLAIMS:
        means = [mean_interval(cell.accuracy).map(in_points) for cell in cells if cell.network == network]
        values = [mean.estimate for mean in means]
        curves.append(
            Curve(network, range(len(means)), values, [i.low for i in means], [i.high for i in means], points=True)
        )
    ways = tuple(PLACEMENTS.values())
    described = "; ".join(
        f"{curve.label}: " + ", ".join(f"{way} {value:.1f}" for way, value in zip(ways, curve.middle, strict=True))
        for curve in curves
    )
    return Chart(
        title="Test accuracy by the place of batch normalization",
        description=f"Mean test accuracy in per cent with 95 % interval. {described}.",
        x_label="place of batch normalization",
        y_label="test accuracy, %",
        curves=curves,
        names=tuple(enumerate(ways)),
    )


CODE = """\
import torch
from batchnorm.study.dataset import digits
from batchnorm.study.networks import OURS, residual
from batchnorm.study.training import train

for placement in ("before", "after", "none"):
    generator = torch.Generator().manual_seed(0)
    network = residual((1, 8, 8), 8, 2, 10, placement=placement, layers=OURS, generator=generator)
    curve = train(network, digits(), learning_rate=0.1, batch_size=32, steps=60, evaluate_every=60, generator=generator)
    print("batch norm:", placement, curve.test_accuracy)
"""

EXPERIMENT = Experiment(
    name=NAME,
    claims=tuple(CLAIMS.values()),
    full=Plan(),
    quick=Plan(seeds=6, steps=100, rates=(0.2,), hidden=(32,) * 3, width=6, blocks=1),
    tasks=tasks,
    run=run,
    conclude=conclude,
)

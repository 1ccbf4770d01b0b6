"""Before the activation or after it: a deep perceptron and a residual network, normalised in either place or not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Table
from batchnorm.study import training
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import any_of, in_points, mean_curve, mean_percent, points, range_percent
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Paired
from batchnorm.study.networks import Placement
from batchnorm.study.verdict import Claim, Margin, Quantity

PLACEMENTS: dict[Placement, str] = {
    "before": "before the activation",
    "after": "after it",
    "none": "nowhere",
}
PERCEPTRON, RESIDUAL = "perceptron", "residual network"

# One point: less than that nobody would change the order of their layers for. A difference in either direction counts
# against the claim.
_MARGIN = 1.0
CLAIMS = {
    network: Claim(
        f"placement-{key}",
        "M1",
        f"Before or after the activation: no matter in a {name}",
        Quantity("test accuracy", "%", ".2f", 100),
        Margin(
            f"{_MARGIN:g} point minus the difference in mean test accuracy, whichever is better",
            0.0,
            "percentage points",
        ),
    )
    for network, key, name in ((PERCEPTRON, "perceptron", "deep perceptron"), (RESIDUAL, "residual", RESIDUAL))
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int = 10  # triples at each learning rate
    steps: int = 250  # optimiser steps of each training
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)  # the learning rates
    hidden: tuple[int, ...] = (48,) * 6  # features of each hidden layer of the perceptron
    width: int = 8  # channels of the residual network
    blocks: int = 2  # of the residual network, two linear maps each
    batch_size: int = 32  # samples in a step


def run(setting: Setting, plan: Plan, network: str, placement: Placement, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once; the test accuracy that it settles at."""
    train, test = setting.data.train, setting.data.test
    generator = torch.Generator().manual_seed(seed)  # the weights first, then the order: all three draw alike
    if network == PERCEPTRON:
        model = setting.perceptron(plan.hidden, placement, generator)
    else:
        model = setting.residual(plan.width, plan.blocks, placement, generator)
    descent = training.descend(model, train, learning_rate=rate, batch_size=plan.batch_size, generator=generator)
    (accuracy,) = training.settle(model, descent, plan.steps, [test])
    return {"accuracy": accuracy}


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Choose the rates, and compare the placements."""
    best = {
        (network, placement): results.best(lambda run: run["accuracy"], network, placement)
        for network in CLAIMS
        for placement in PLACEMENTS
    }
    accuracy = {key: chosen.column("accuracy") for key, chosen in best.items()}
    moved = {n: Paired(accuracy[n, "after"], accuracy[n, "before"]).difference() for n in CLAIMS}
    gains = {n: Paired(accuracy[n, "before"], accuracy[n, "none"]).difference().interval for n in CLAIMS}
    maps = "3x3 convolutions" if len(setting.data.shape) == 3 else "linear layers"
    return Conclusion(
        numbers={
            "networks": [
                {"network": n, "placement": p, "rates": chosen.values, "accuracy": accuracy[n, p]}
                for (n, p), chosen in best.items()
            ],
            "differences": [
                {"network": n, "after": asdict(m.interval), "gain": asdict(gains[n]), "effect": m.effect}
                for n, m in moved.items()
            ],
        },
        findings=[
            claim.judge(moved[n].map(in_points).equivalent(_MARGIN), {p: accuracy[n, p] for p in ("before", "after")})
            for n, claim in CLAIMS.items()
        ],
        summary=[
            "The article puts batch normalization between a layer's linear map and its activation, and says that some "
            "put it after the activation. Here a perceptron and a residual network were trained both ways, and "
            "without, each at the learning rate that suits it best.",
            *(
                f"In the {network}, moving it from before to after the activation changed the test accuracy by "
                f"{points(measured.interval)}; having it before the activation rather than not at all, by "
                f"{points(gains[network])}."
                for network, measured in moved.items()
            ),
        ],
        tables=[
            Table(
                caption=f"Test accuracy after {plan.steps} steps, %: mean and range over {plan.seeds} seeds",
                columns=("network", "batch norm", "learning rate", "accuracy", "range"),
                rows=[
                    (n, PLACEMENTS[p], any_of(best[n, p].values), mean_percent(values), range_percent(values))
                    for (n, p), values in accuracy.items()
                ],
            )
        ],
        charts=[_chart({n: [accuracy[n, placement] for placement in PLACEMENTS] for n in CLAIMS})],
        notes=[
            f"Perceptron: {len(plan.hidden)} hidden layers of {plan.hidden[0]}. Residual network: {maps} of "
            f"{plan.width}, {plan.blocks} blocks of two. In a block, before: ReLU(BN(W ReLU(BN(W x))) + x); after: "
            "BN(ReLU(W BN(ReLU(W x)) + x)). He's initialisation, ReLU throughout.",
            "The three of a seed start from the same linear weights and see the same batches of "
            f"{plan.batch_size} in the same order, for {plan.steps} steps of plain stochastic gradient descent.",
            f"Learning rates: of {', '.join(f'{rate:g}' for rate in plan.rates)}, for each seed the one with the best "
            "mean test accuracy over the other seeds.",
        ],
    )


def _chart(accuracy: dict[str, list[tuple[float, ...]]]) -> Chart:
    ways = tuple(PLACEMENTS.values())
    described = "; ".join(
        f"{network}: " + ", ".join(f"{way} {mean_percent(values)}" for way, values in zip(ways, at, strict=True))
        for network, at in accuracy.items()
    )
    return Chart(
        title="Test accuracy by the place of batch normalization",
        description=f"Mean test accuracy in per cent with 95 % interval. {described}.",
        x_label="place of batch normalization",
        y_label="test accuracy, %",
        curves=[mean_curve(name, range(len(ways)), at, times=100, points=True) for name, at in accuracy.items()],
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
    name="placement",
    title="Before the activation, or after it?",
    claims=tuple(CLAIMS.values()),
    full=Plan(),
    quick=None,
    grid=lambda plan: Grid(plan.seeds, network=CLAIMS, placement=PLACEMENTS, rate=plan.rates),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps / 200,
    code=CODE,
)

"""Larger learning rates: the same deep network, with and without batch normalization, over five decades of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Table, percent
from batchnorm.study import training
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import any_of, ends, mean_and_range, mean_percent, range_percent, span
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Paired
from batchnorm.study.networks import Placement
from batchnorm.study.verdict import Claim, Margin, Quantity

NETWORKS: dict[str, Placement] = {"batch norm": "before", "plain": "none"}
WITH, WITHOUT = NETWORKS
_LABELS = {"with": WITH, "without": WITHOUT}

# Above 0: any gain counts, how large it is the interval says. In decades, because rates are compared by their ratio.
LARGEST = Claim(
    "larger-rates",
    "M12",
    "It allows a larger learning rate",
    Quantity("largest usable rate", form=".2g", geometric=True),
    Margin(
        "largest usable learning rate with batch norm over the plain network's, as a logarithm, the pairs' mean",
        0.0,
        "decades",
    ),
)
RANGE = Claim(
    "wider-range-of-rates",
    "M12",
    "More learning rates are usable",
    Quantity("usable range", "decades", ".2f"),
    Margin("range of usable learning rates with batch norm minus the plain network's, the pairs' mean", 0.0, "decades"),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int = 10  # pairs at each learning rate
    steps: int = 300  # optimiser steps of each training
    # The learning rates, in equal steps on a logarithmic scale: half a decade, but for rounding.
    rates: tuple[float, ...] = (1e-4, 3.2e-4, 1e-3, 3.2e-3, 0.01, 0.032, 0.1, 0.32, 1.0, 3.2, 10.0)
    hidden: tuple[int, ...] = (48,) * 6  # features of each hidden layer
    batch_size: int = 32  # samples in a step
    usable: float = 0.9  # the accuracy at which a rate is usable, as a share of the way from chance to the best mean

    @property
    def decades(self) -> float:
        """Between one learning rate and the next."""
        return math.log10(self.rates[-1] / self.rates[0]) / (len(self.rates) - 1)


def run(setting: Setting, plan: Plan, network: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once; the test accuracy that it settles at."""
    train, test = setting.data.train, setting.data.test
    generator = torch.Generator().manual_seed(seed)  # the weights first, then the order: both kinds draw alike
    model = setting.perceptron(plan.hidden, NETWORKS[network], generator)
    descent = training.descend(model, train, learning_rate=rate, batch_size=plan.batch_size, generator=generator)
    (accuracy,) = training.settle(model, descent, plan.steps, [test])
    return {"accuracy": accuracy}


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Find which rates are usable, and compare."""
    accuracy = {
        network: tuple(tuple(results.column("accuracy", network, rate)) for rate in plan.rates) for network in NETWORKS
    }
    means = {network: [statistics.fmean(seeds) for seeds in rates] for network, rates in accuracy.items()}
    best = {network: plan.rates[of_network.index(max(of_network))] for network, of_network in means.items()}
    chance = setting.data.chance
    threshold = chance + plan.usable * (max(map(max, means.values())) - chance)
    usable = {
        network: [
            [rate for rate, reached in zip(plan.rates, seed, strict=True) if reached >= threshold]
            for seed in zip(*rates, strict=True)
        ]
        for network, rates in accuracy.items()
    }
    largest = {network: tuple(max(rates, default=None) for rates in usable[network]) for network in NETWORKS}
    # The range that the usable rates make up: each counts for one step.
    decades = {network: tuple(len(rates) * plan.decades for rates in usable[network]) for network in NETWORKS}
    exponents = {network: [_exponent(plan, rate) for rate in largest[network]] for network in NETWORKS}
    higher = Paired(exponents[WITH], exponents[WITHOUT]).difference()
    wider = Paired(decades[WITH], decades[WITHOUT]).difference()
    curves = [mean_and_range(network, plan.rates, accuracy[network]) for network in NETWORKS]
    spoken = ", ".join(f"{network} is best at {rate:g}" for network, rate in best.items())
    return Conclusion(
        numbers={
            "threshold": threshold,
            "networks": [
                {
                    "network": network,
                    "best": best[network],
                    "accuracy": accuracy[network],
                    "largest": largest[network],
                    "decades": decades[network],
                }
                for network in NETWORKS
            ],
        },
        findings=[
            LARGEST.judge(
                higher, {label: [10**power for power in exponents[network]] for label, network in _LABELS.items()}
            ),
            RANGE.judge(wider, {label: decades[network] for label, network in _LABELS.items()}),
        ],
        summary=[
            "The article says that batch normalization allows a larger learning rate. Here pairs of the same "
            f"{len(plan.hidden)}-layer network were trained for {plan.steps} steps at each of {len(plan.rates)} rates "
            f"from {plan.rates[0]:g} to {plan.rates[-1]:g}. A rate is usable if the network ends with "
            f"{percent(threshold)} % of the test samples right.",
            f"The largest usable rate was {_named(largest[WITH])} with batch normalization, "
            f"{_named(largest[WITHOUT])} without: a factor of {span(higher.interval.map(lambda x: 10**x))}.",
            f"The usable rates made up {statistics.fmean(decades[WITH]):.1f} decades with batch normalization, "
            f"{statistics.fmean(decades[WITHOUT]):.1f} without: a difference of "
            f"{span(wider.interval, '+.2f', 'decades')}.",
            f"The best rate was {best[WITH]:g} with batch normalization ({percent(max(means[WITH]))} % right on "
            f"average), {best[WITHOUT]:g} without ({percent(max(means[WITHOUT]))} %).",
        ],
        tables=[
            Table(
                caption=f"Test accuracy after {plan.steps} steps, %: mean and range over {plan.seeds} seeds",
                columns=("learning rate", *NETWORKS),
                rows=[
                    (f"{rate:g}", *(f"{mean_percent(seeds)} ({range_percent(seeds)})" for seeds in both))
                    for rate, *both in zip(plan.rates, *accuracy.values(), strict=True)
                ],
            )
        ],
        charts=[
            Chart(
                title="Test accuracy over learning rates",
                description=f"Test accuracy in per cent after {plan.steps} steps over learning rates: {spoken}; "
                f"{ends(curves)}.",
                x_label="learning rate",
                y_label="test accuracy, %",
                curves=curves,
                log_x=True,
                mark=100 * threshold,
            )
        ],
        notes=[
            f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]} with ReLU, He's initialisation; batch "
            f"normalization before each ReLU, or none. Both of a pair start from the same linear weights and see the "
            f"same batches of {plan.batch_size}. Plain stochastic gradient descent, no schedule.",
            f"Usable: {100 * plan.usable:g} % of the way from always guessing the commonest class to the best mean "
            "accuracy of either network at any rate. What is usable within so few steps is less than what would be in "
            "the end: small rates are still learning. That concerns both networks alike.",
            f"The grid's steps are a factor of {10**plan.decades:.2g}: no difference is known more closely. A network "
            "without any usable rate counts as one whose largest is a step below the grid.",
            "An output that is not a finite number counts as wrong: a network that diverged has less than chance.",
        ],
    )


def _exponent(plan: Plan, rate: float | None) -> float:
    """log10 of a rate; without one, a step of the grid below its smallest."""
    return math.log10(plan.rates[0]) - plan.decades if rate is None else math.log10(rate)


def _named(largest: Sequence[float | None]) -> str:
    """The largest usable rates of the seeds, in words."""
    found = [rate for rate in largest if rate is not None]
    none = len(largest) - len(found)
    return (any_of(found) or "none") + (f" (none with {none} of {len(largest)} seeds)" if found and none else "")


CODE = """\
import torch
from batchnorm.study.dataset import digits
from batchnorm.study.networks import OURS, perceptron
from batchnorm.study.training import train

data = digits()
for placement in ("before", "none"):
    for rate in (0.01, 0.1, 1.0):
        generator = torch.Generator().manual_seed(0)
        network = perceptron(64, (48,) * 6, 10, placement=placement, layers=OURS, generator=generator)
        curve = train(
            network, data, learning_rate=rate, batch_size=32, steps=80, evaluate_every=80, generator=generator
        )
        print("batch norm:", placement, "rate:", rate, curve.test_accuracy)
"""

EXPERIMENT = Experiment(
    name="rates",
    title="Does it allow a larger learning rate?",
    claims=(LARGEST, RANGE),
    full=Plan(),
    quick=Plan(seeds=6, rates=(0.01, 0.1, 1.0), hidden=(32,) * 3),
    grid=lambda plan: Grid(plan.seeds, network=NETWORKS, rate=plan.rates),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps * len(plan.hidden) / 3500,
    code=CODE,
)

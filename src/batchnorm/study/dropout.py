"""Regularisation: batch normalization and dropout, each, both and neither, on few samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Table
from batchnorm.study import training
from batchnorm.study.dataset import Part
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import any_of, in_points, mean_curve, mean_percent, points
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Paired
from batchnorm.study.networks import Placement
from batchnorm.study.statistics import Interval
from batchnorm.study.verdict import Claim, Margin, Quantity

PLAIN, DROPOUT, NORM, BOTH = "plain", "dropout", "batch norm", "batch norm and dropout"
NETWORKS: dict[str, Placement] = {PLAIN: "none", DROPOUT: "none", NORM: "before", BOTH: "before"}
DROPPED = (DROPOUT, BOTH)

# Above 0: any reduction counts, how large it is the interval says.
GAP = Claim(
    "smaller-gap",
    "M13",
    "It regularises: training and test accuracy are closer",
    Quantity("gap", "points", ".1f", 100),
    Margin("generalisation gap without batch norm minus the gap with it, the pairs' mean", 0.0, "percentage points"),
)
# Redundant is what can be left out at no cost. One point is what a practitioner would hardly keep another
# hyperparameter for; from below, because dropout that does harm is redundant too.
REDUNDANT = Claim(
    "dropout-redundant",
    "M13",
    "It makes dropout redundant: leaving it out costs less than 1 point",
    Quantity("test accuracy", "%", ".1f", 100),
    Margin(
        "test accuracy with batch norm alone minus with dropout besides, the pairs' mean", -1.0, "percentage points"
    ),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int = 10  # sets of four networks at each learning rate
    samples: int = 300  # training samples that are learnt from, others for each seed: few, to have something to overfit
    steps: int = 600  # optimiser steps of each training
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)  # the learning rates
    hidden: tuple[int, ...] = (64,) * 4  # features of each hidden layer
    batch_size: int = 32  # samples in a step
    dropout: float = 0.2  # the probability with which a hidden feature is dropped


def run(setting: Setting, plan: Plan, network: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once; the accuracies that it settles at."""
    train = setting.data.train
    generator = torch.Generator().manual_seed(seed)  # samples, weights, order: all four networks draw alike
    few = torch.randperm(len(train.labels), generator=generator)[: plan.samples]
    part = Part(train.indices[few], train.inputs[few], train.labels[few])
    dropout = plan.dropout if network in DROPPED else 0.0
    model = setting.perceptron(plan.hidden, NETWORKS[network], generator, dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # what is dropped comes from torch's global generator
        descent = training.descend(model, part, learning_rate=rate, batch_size=plan.batch_size, generator=generator)
        on_samples, on_test = training.settle(model, descent, plan.steps, [part, setting.data.test])
    return {"train": on_samples, "test": on_test}


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Choose the rates, and compare the four."""
    best = {network: results.best(lambda run: run["test"], network) for network in NETWORKS}
    rates = {network: chosen.values for network, chosen in best.items()}
    train, test = ({network: best[network].column(part) for network in NETWORKS} for part in ("train", "test"))
    gaps = {network: Paired(train[network], test[network]).differences() for network in NETWORKS}
    gap = Paired(gaps[PLAIN], gaps[NORM]).difference()
    alone = Paired(test[NORM], test[BOTH]).difference()
    gains = {
        "batch norm, without dropout": Paired(test[NORM], test[PLAIN]).difference().interval,
        "dropout, without batch norm": Paired(test[DROPOUT], test[PLAIN]).difference().interval,
        "dropout, with batch norm": Paired(test[BOTH], test[NORM]).difference().interval,
    }
    without = gains["dropout, without batch norm"]
    return Conclusion(
        numbers={
            "networks": [
                {"network": name, "rates": rates[name], "train": train[name], "test": test[name]} for name in NETWORKS
            ],
            "gains": [{"of": added, **asdict(gain)} for added, gain in gains.items()],
        },
        findings=[
            GAP.judge(gap.map(in_points), {"with": gaps[NORM], "without": gaps[PLAIN]}),
            REDUNDANT.judge(alone.map(in_points), {"without dropout": test[NORM], "with it": test[BOTH]}),
        ],
        summary=[
            "The article says that batch normalization has a regularising effect, and in some cases makes dropout "
            f"redundant. Here a {len(plan.hidden)}-layer network learnt from {plan.samples} samples only, with "
            "batch normalization, dropout, both or neither, each at the learning rate that suits it best.",
            f"The generalisation gap, accuracy on the samples learnt from minus test accuracy, was "
            f"{mean_percent(gaps[PLAIN])} points without batch normalization and {mean_percent(gaps[NORM])} with: a "
            f"difference of {points(gap.interval)}.",
            f"Dropout changed the test accuracy by {points(without)} without batch normalization, {_helped(without)}.",
            f"With batch normalization, it changed it by {points(gains['dropout, with batch norm'])}.",
        ],
        tables=[
            Table(
                caption=f"Accuracies after {plan.steps} steps, %: means over {plan.seeds} seeds",
                columns=("network", "learning rate", "on its samples", "on the test samples", "gap"),
                rows=[
                    (name, any_of(rates[name]), *(mean_percent(values[name]) for values in (train, test, gaps)))
                    for name in NETWORKS
                ],
            ),
            Table(
                caption=f"What each adds to the test accuracy, in percentage points, over {plan.seeds} seeds",
                columns=("added", "mean", "95 % interval"),
                rows=[
                    (added, f"{100 * gain.estimate:+.2f}", f"{100 * gain.low:+.2f} to {100 * gain.high:+.2f}")
                    for added, gain in gains.items()
                ],
            ),
        ],
        charts=[_chart(train, test)],
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
    )


# Of each network, each seed's accuracy at its learning rate.
Accuracies = Mapping[str, Sequence[float]]


def _helped(gain: Interval) -> str:
    if gain.low > 0:
        return "so there was something for batch normalization to replace"
    if gain.high < 0:
        return "so it did harm, and there was nothing for batch normalization to replace"
    return "so whether there was anything for batch normalization to replace is open"


def _chart(train: Accuracies, test: Accuracies) -> Chart:
    values = ", ".join(f"{name} {mean_percent(train[name])} and {mean_percent(test[name])}" for name in NETWORKS)
    return Chart(
        title="Accuracy on the samples learnt from, and on the test samples",
        description=f"Mean accuracy in per cent with 95 % interval, learnt from and test: {values}.",
        x_label="",
        y_label="accuracy, %",
        curves=[
            mean_curve(label, range(len(NETWORKS)), list(accuracies.values()), times=100, points=True)
            for label, accuracies in (("learnt from", train), ("test", test))
        ],
        names=tuple(enumerate(NETWORKS)),
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
    name="dropout",
    title="Does it regularise, and make dropout redundant?",
    claims=(GAP, REDUNDANT),
    full=Plan(),
    quick=None,
    grid=lambda plan: Grid(plan.seeds, network=NETWORKS, rate=plan.rates),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps / 500,
    code=CODE,
)

"""Fewer steps: pairs of the same deep network, with and without batch normalization, each at a fair learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Table, percent
from batchnorm.study import training
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import any_of, ends, mean_and_range, span
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Measured, Paired
from batchnorm.study.networks import Placement
from batchnorm.study.verdict import Claim, Margin, Quantity

NETWORKS: dict[str, Placement] = {"batch norm": "before", "plain": "none"}
WITH, WITHOUT = NETWORKS

_STEPS = Quantity("steps", form=".0f", geometric=True)
# More than once as many: any saving counts as "fewer steps", how large it is the interval says.
_RATIO = Margin("steps of the plain network over steps with batch norm, the pairs' geometric mean", 1.0, "times")
BEST = Claim(
    "fewer-steps-best-rates",
    "M11",
    "It needs fewer steps, each network at its best learning rate",
    _STEPS,
    _RATIO,
)
SAME = Claim(
    "fewer-steps-same-rate",
    "M11",
    "It needs fewer steps at the plain network's best rate",
    _STEPS,
    _RATIO,
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int = 10  # pairs at each learning rate
    steps: int = 500  # optimiser steps of each training
    evaluate_every: int = 5  # steps between two evaluations
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # the learning rates
    hidden: tuple[int, ...] = (64,) * 8  # features of each hidden layer
    batch_size: int = 32  # samples in a step
    reach: float = 0.95  # the target, as a share of the way from chance to the best mean accuracy at any rate


def run(setting: Setting, plan: Plan, network: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once."""
    generator = torch.Generator().manual_seed(seed)  # the weights first, then the order: both kinds draw alike
    curve = training.train(
        setting.perceptron(plan.hidden, NETWORKS[network], generator),
        setting.data,
        learning_rate=rate,
        batch_size=plan.batch_size,
        steps=plan.steps,
        evaluate_every=plan.evaluate_every,
        generator=generator,
    )
    return asdict(curve)


@dataclass(frozen=True)
class Comparison:
    """The pairs at the learning rates that were chosen for them."""

    rates: dict[str, tuple[float, ...]]  # of each network, each seed's rate, chosen by the other seeds
    steps: dict[str, tuple[int, ...]]  # of each network, each seed's steps, `Plan.steps` where it did not get there
    ratio: Measured  # plain over batch norm, the geometric mean

    def record(self) -> dict[str, Any]:
        """What results.json holds."""
        interval, effect = asdict(self.ratio.interval), self.ratio.effect
        return {"rates": self.rates, "steps": self.steps, "ratio": interval, "effect": effect}


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Find the target, each network's best rates, and compare."""
    accuracy = {
        (network, rate): statistics.fmean(curve[-1] for curve in results.column("test_accuracy", network, rate))
        for network in NETWORKS
        for rate in plan.rates
    }
    chance = setting.data.chance
    target = chance + plan.reach * (max(accuracy.values()) - chance)
    first = Results(
        {
            args: {"steps": training.first_step(run["steps"], run["test_accuracy"], target)}
            for args, run in results.items()
        }
    )
    cells = []
    for (network, rate), mean in accuracy.items():
        steps = first.column("steps", network, rate)
        reached = len(steps) - steps.count(None)
        cells.append({"network": network, "rate": rate, "accuracy": mean, "reached": reached, "steps": tuple(steps)})
    best = {network: best_rates(plan, first, network) for network in NETWORKS}
    fair = _compare(plan, first, best)
    same = _compare(plan, first, dict.fromkeys(NETWORKS, best[WITHOUT]))
    return Conclusion(
        numbers={"target": target, "cells": cells, "best_rates": fair.record(), "same_rate": same.record()},
        findings=[
            claim.judge(found.ratio, {"with": found.steps[WITH], "without": found.steps[WITHOUT]})
            for claim, found in ((BEST, fair), (SAME, same))
        ],
        summary=[
            "The article says that a network with batch normalization needs fewer training steps. Here pairs of the "
            f"same {len(plan.hidden)}-layer network, with and without it, were trained until they classified "
            f"{percent(target)} % of the test samples rightly.",
            _sentence(f"Each at the learning rate that suits it best ({_rates(fair)})", plan, fair),
            _sentence(f"Both at the rate that suits the plain network ({_rates(same)})", plan, same),
        ],
        tables=[_table(plan, target, cells)],
        charts=[_chart(plan, results, target, fair)],
        notes=[
            f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]} with ReLU; with batch normalization "
            "before each ReLU, or plain. Both of a pair start from the same linear weights (He's initialisation, made "
            f"for deep plain ReLU networks) and see the same batches of {plan.batch_size} in the same order.",
            "Plain stochastic gradient descent on the cross-entropy: no momentum, weight decay or schedule, each of "
            "which would change what a learning rate means.",
            f"The target, {percent(target)} %, is {100 * plan.reach:g} % of the way from always guessing the "
            "commonest class to the best mean accuracy of any network at any rate. Every "
            f"{plan.evaluate_every} steps the whole test set is classified, with batch normalization by its running "
            "statistics; the first time at the target counts, even if a later one is below.",
            "Best learning rate: for each seed, the rate at which the other seeds were quickest, so that no run takes "
            "part in the choice that it is for.",
            f"A run that did not reach the target counts as the {plan.steps} steps that it used.",
            "Not measured: time. A step with batch normalization costs more than one without.",
        ],
    )


def best_rates(plan: Plan, first: Results, network: str) -> tuple[float, ...]:
    """Each seed's rate: where the other seeds were quickest to the target, by their mean logarithm."""
    return first.best(lambda run: -math.log(run["steps"] or plan.steps), network).values


def _compare(plan: Plan, first: Results, rates: dict[str, tuple[float, ...]]) -> Comparison:
    steps = {
        network: tuple(first[network, rate, seed]["steps"] or plan.steps for seed, rate in enumerate(rates[network]))
        for network in NETWORKS
    }
    return Comparison(rates, steps, Paired(steps[WITHOUT], steps[WITH]).ratio())


def _rates(comparison: Comparison) -> str:
    ours, plain = (any_of(comparison.rates[network]) for network in NETWORKS)
    return ours if ours == plain else f"{ours} with, {plain} without"


def _sentence(where: str, plan: Plan, comparison: Comparison) -> str:
    medians = {network: statistics.median(steps) for network, steps in comparison.steps.items()}
    saved = Paired(comparison.steps[WITHOUT], comparison.steps[WITH]).differences()
    earlier, later = sum(steps > 0 for steps in saved), sum(steps < 0 for steps in saved)
    return (
        f"{where}, the network with batch normalization took a median of {medians[WITH]:g} steps, the plain one "
        f"{medians[WITHOUT]:g}; it was earlier with {earlier} of {plan.seeds} seeds, later with {later}. The plain one "
        f"took {span(comparison.ratio.interval, '.2f')} times as many."
    )


def _table(plan: Plan, target: float, cells: Sequence[dict[str, Any]]) -> Table:
    def median(steps: Sequence[int | None]) -> str:
        value = statistics.median(step or math.inf for step in steps)
        return f"> {plan.steps}" if value == math.inf else f"{value:g}"

    return Table(
        caption=f"Median steps to {percent(target)} % over {plan.seeds} seeds, and accuracy after {plan.steps} steps",
        columns=("network", "learning rate", "steps", "seeds that got there", "final accuracy, %"),
        rows=[
            (
                c["network"],
                f"{c['rate']:g}",
                median(c["steps"]) if c["reached"] else "never",
                f"{c['reached']}/{plan.seeds}",
                percent(c["accuracy"]),
            )
            for c in cells
        ],
    )


def _chart(plan: Plan, results: Results, target: float, fair: Comparison) -> Chart:
    curves = []
    for network, rates in fair.rates.items():
        runs = [results[network, rate, seed] for seed, rate in enumerate(rates)]
        accuracies = zip(*(run["test_accuracy"] for run in runs), strict=True)
        curves.append(mean_and_range(network, runs[0]["steps"], accuracies))
    return Chart(
        title="Test accuracy, each network at its best learning rate",
        description=f"Test accuracy in per cent over {plan.steps} steps, mean and range of the seeds: {ends(curves)}.",
        x_label="step",
        y_label="test accuracy, %",
        curves=curves,
        mark=100 * target,
    )


CODE = """\
import torch
from batchnorm.study.dataset import digits
from batchnorm.study.networks import OURS, perceptron
from batchnorm.study.training import train

data = digits()
for placement, rate in (("before", 0.2), ("none", 0.05)):
    generator = torch.Generator().manual_seed(0)
    network = perceptron(64, (64,) * 8, 10, placement=placement, layers=OURS, generator=generator)
    curve = train(network, data, learning_rate=rate, batch_size=32, steps=80, evaluate_every=20, generator=generator)
    print("batch norm:", placement, curve.test_accuracy)
"""

EXPERIMENT = Experiment(
    name="speed",
    title="Does it need fewer training steps?",
    claims=(BEST, SAME),
    full=Plan(),
    quick=Plan(seeds=6, evaluate_every=10, rates=(0.1, 0.4), hidden=(32,) * 3),
    grid=lambda plan: Grid(plan.seeds, network=NETWORKS, rate=plan.rates),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps * len(plan.hidden) / 2500,
    code=CODE,
)

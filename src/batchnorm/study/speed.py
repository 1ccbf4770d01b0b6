"""Fewer steps: pairs of the same deep network, with and without batch normalization, each at a fair learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchnorm.report.document import Chart, Section, Table, percent
from batchnorm.study import training
from batchnorm.study.experiment import Args, Conclusion, Experiment, Results, Setting
from batchnorm.study.formatting import chosen, ends, span, spread
from batchnorm.study.networks import Placement, perceptron
from batchnorm.study.statistics import Interval, best_of_the_others, effect_size, mean_interval
from batchnorm.study.verdict import Claim, Finding

NAME = "speed"
NETWORKS: dict[str, Placement] = {"batch norm": "before", "plain": "none"}
WITH, WITHOUT = NETWORKS

# More than once as many: any saving counts as "fewer steps", how large it is the interval says.
BEST = Claim(
    "fewer-steps-best-rates",
    "M11",
    "It needs fewer steps, each network at its best learning rate",
    "steps of the plain network over steps with batch norm, the pairs' geometric mean",
    1.0,
    "times",
)
SAME = Claim(
    "fewer-steps-same-rate",
    "M11",
    "It needs fewer steps at the plain network's best rate",
    "steps of the plain network over steps with batch norm, the pairs' geometric mean",
    1.0,
    "times",
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        seeds: pairs at each learning rate; their seeds are 0, 1, ...
        steps: optimiser steps of each training.
        evaluate_every: steps between two evaluations.
        rates: the learning rates.
        hidden: features of each hidden layer.
        batch_size: samples in a step.
        reach: the target, as a share of the way from chance to the best mean accuracy of any network at any rate.
    """

    seeds: int = 10
    steps: int = 500
    evaluate_every: int = 5
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    hidden: tuple[int, ...] = (64,) * 8
    batch_size: int = 32
    reach: float = 0.95


def tasks(plan: Plan) -> list[Args]:
    """A training for each network, rate and seed."""
    return [(network, rate, seed) for network in NETWORKS for rate in plan.rates for seed in range(plan.seeds)]


def run(setting: Setting, plan: Plan, network: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one network once."""
    data = setting.data
    generator = torch.Generator().manual_seed(seed)  # the weights first, then the order: both kinds draw alike
    model = perceptron(
        data.features,
        plan.hidden,
        data.classes,
        placement=NETWORKS[network],
        layers=setting.layers,
        generator=generator,
    )
    curve = training.train(
        model,
        data,
        learning_rate=rate,
        batch_size=plan.batch_size,
        steps=plan.steps,
        evaluate_every=plan.evaluate_every,
        generator=generator,
    )
    return asdict(curve)


@dataclass(frozen=True)
class Cell:
    """One network at one learning rate.

    Attributes:
        network: a key of `NETWORKS`.
        rate: the learning rate.
        accuracy: mean test accuracy after the last step.
        reached: seeds that reached the target.
        steps: of each seed, the first evaluated step at the target; None where there is none.
    """

    network: str
    rate: float
    accuracy: float
    reached: int
    steps: tuple[int | None, ...]


@dataclass(frozen=True)
class Comparison:
    """The pairs at the learning rates that were chosen for them.

    Attributes:
        rates: of each network, each seed's rate, chosen by the other seeds.
        steps: of each network, each seed's steps, `Plan.steps` where it did not reach the target.
        ratio: plain over batch norm, the geometric mean.
        effect: of the pairs' logarithms.
    """

    rates: dict[str, tuple[float, ...]]
    steps: dict[str, tuple[int, ...]]
    ratio: Interval
    effect: float | None


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Find the target, each network's best rates, and compare."""
    ends = {
        (network, rate): statistics.fmean(results[network, rate, seed]["test_accuracy"][-1] for seed in _seeds(plan))
        for network in NETWORKS
        for rate in plan.rates
    }
    chance = setting.data.chance
    target = chance + plan.reach * (max(ends.values()) - chance)
    cells = []
    for (network, rate), end in ends.items():
        curves = [results[network, rate, seed] for seed in _seeds(plan)]
        steps = tuple(training.first_step(curve["steps"], curve["test_accuracy"], target) for curve in curves)
        cells.append(Cell(network, rate, end, len(steps) - steps.count(None), steps))
    best = {network: _best(plan, cells, network) for network in NETWORKS}
    fair = _compare(plan, cells, best)
    same = _compare(plan, cells, dict.fromkeys(NETWORKS, best[WITHOUT]))
    findings = [BEST.judge(fair.ratio, fair.effect, plan.seeds), SAME.judge(same.ratio, same.effect, plan.seeds)]
    numbers = {
        "target": target,
        "cells": [asdict(cell) for cell in cells],
        "best_rates": asdict(fair),
        "same_rate": asdict(same),
    }
    return Conclusion(numbers, findings, _section(plan, results, target, cells, fair, same, findings))


def _seeds(plan: Plan) -> range:
    return range(plan.seeds)


def _best(plan: Plan, cells: Sequence[Cell], network: str) -> tuple[float, ...]:
    """Each seed's rate: where the other seeds were quickest to the target, by their mean logarithm."""
    return best_of_the_others(
        {
            cell.rate: [-math.log(steps or plan.steps) for steps in cell.steps]
            for cell in cells
            if cell.network == network
        }
    )


def _compare(plan: Plan, cells: Sequence[Cell], rates: dict[str, tuple[float, ...]]) -> Comparison:
    found = {(cell.network, cell.rate): cell.steps for cell in cells}
    steps = {
        network: tuple(found[network, rate][seed] or plan.steps for seed, rate in enumerate(rates[network]))
        for network in NETWORKS
    }
    logs = [math.log(plain / ours) for ours, plain in zip(steps[WITH], steps[WITHOUT], strict=True)]
    return Comparison(rates, steps, mean_interval(logs).map(math.exp), effect_size(logs))


def _section(
    plan: Plan,
    results: Results,
    target: float,
    cells: Sequence[Cell],
    fair: Comparison,
    same: Comparison,
    findings: Sequence[Finding],
) -> Section:
    return Section(
        key=NAME,
        title="Does it need fewer training steps?",
        summary=[
            "The article says that a network with batch normalization needs fewer training steps. Here pairs of the "
            f"same {len(plan.hidden)}-layer network, with and without it, were trained until they classified "
            f"{percent(target)} % of the test samples rightly.",
            _sentence(f"Each at the learning rate that suits it best ({_rates(fair)})", plan, fair),
            _sentence(f"Both at the rate that suits the plain network ({_rates(same)})", plan, same),
        ],
        judged=[finding.judged() for finding in findings],
        tables=[_table(plan, target, cells)],
        charts=[_chart(plan, results, target, fair)],
        notes=_notes(plan, target),
        code=CODE,
    )


def _rates(comparison: Comparison) -> str:
    ours, plain = (chosen(comparison.rates[network]) for network in NETWORKS)
    return ours if ours == plain else f"{ours} with, {plain} without"


def _sentence(where: str, plan: Plan, comparison: Comparison) -> str:
    medians = {network: statistics.median(steps) for network, steps in comparison.steps.items()}
    earlier = sum(a < b for a, b in zip(comparison.steps[WITH], comparison.steps[WITHOUT], strict=True))
    later = sum(a > b for a, b in zip(comparison.steps[WITH], comparison.steps[WITHOUT], strict=True))
    return (
        f"{where}, the network with batch normalization took a median of {medians[WITH]:g} steps, the plain one "
        f"{medians[WITHOUT]:g}; it was earlier with {earlier} of {plan.seeds} seeds, later with {later}. The plain one "
        f"took {span(comparison.ratio, '.2f')} times as many."
    )


def _table(plan: Plan, target: float, cells: Sequence[Cell]) -> Table:
    def median(cell: Cell) -> str:
        if cell.reached == 0:
            return "never"
        value = statistics.median(float("inf") if steps is None else steps for steps in cell.steps)
        return f"> {plan.steps}" if value == float("inf") else f"{value:g}"

    return Table(
        caption=f"Median steps to {percent(target)} % over {plan.seeds} seeds, and accuracy after {plan.steps} steps",
        columns=("network", "learning rate", "steps", "seeds that got there", "final accuracy, %"),
        rows=[
            (cell.network, f"{cell.rate:g}", median(cell), f"{cell.reached}/{plan.seeds}", percent(cell.accuracy))
            for cell in cells
        ],
    )


def _chart(plan: Plan, results: Results, target: float, fair: Comparison) -> Chart:
    curves = []
    for network, rates in fair.rates.items():
        runs = [results[network, rate, seed] for seed, rate in enumerate(rates)]
        accuracies = zip(*(run["test_accuracy"] for run in runs), strict=True)
        curves.append(spread(network, runs[0]["steps"], [[100 * value for value in at] for at in accuracies]))
    return Chart(
        title="Test accuracy, each network at its best learning rate",
        description=f"Test accuracy in per cent over {plan.steps} steps, mean and range of the seeds: {ends(curves)}.",
        x_label="step",
        y_label="test accuracy, %",
        curves=curves,
        mark=100 * target,
    )


def _notes(plan: Plan, target: float) -> list[str]:
    return [
        f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]} with ReLU; with batch normalization before "
        "each ReLU, or plain. Both of a pair start from the same linear weights (He's initialisation, made for deep "
        f"plain ReLU networks) and see the same batches of {plan.batch_size} in the same order.",
        "Plain stochastic gradient descent on the cross-entropy: no momentum, weight decay or schedule, each of which "
        "would change what a learning rate means.",
        f"The target, {percent(target)} %, is {100 * plan.reach:g} % of the way from always guessing the commonest "
        "class to the best mean accuracy of any network at any rate. Every "
        f"{plan.evaluate_every} steps the whole test set is classified, with batch normalization by its running "
        "statistics; the first time at the target counts, even if a later one is below.",
        "Best learning rate: for each seed, the rate at which the other seeds were quickest, so that no run takes part "
        "in the choice that it is for.",
        f"A run that did not reach the target counts as the {plan.steps} steps that it used.",
        "Not measured: time. A step with batch normalization costs more than one without.",
    ]


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
    name=NAME,
    claims=(BEST, SAME),
    full=Plan(),
    quick=Plan(seeds=6, steps=200, evaluate_every=10, rates=(0.1, 0.4), hidden=(32,) * 4),
    tasks=tasks,
    run=run,
    conclude=conclude,
)

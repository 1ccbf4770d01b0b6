"""Inputs on very different scales (M10): raw, standardised, and with a layer of batch normalization first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.report.document import Chart, Curve, Section, Table, percent
from batchnorm.study import training
from batchnorm.study.dataset import Data, Part
from batchnorm.study.experiment import Args, Conclusion, Experiment, Results, Setting
from batchnorm.study.networks import perceptron
from batchnorm.study.statistics import Interval, best_of_the_others, effect_size, mean_interval, within
from batchnorm.study.verdict import Claim

RAW, STANDARDISED, LAYER = "raw", "standardised", "batch norm first"
INPUTS = (RAW, STANDARDISED, LAYER)
_EPS = 1e-5

# Steps that were not enough count as the whole training, which can only make the slower one look faster.
SLOWER = Claim(
    "scales-slow",
    "M10",
    "Inputs on scales of 1 to 10,000 slow gradient descent down",
    "steps to the target from raw inputs over those from standardised ones, each at its best learning rate",
    1.0,
    "times",
)
# Mini-batch statistics are noisy, so that equal steps are not to be expected; half as many again is no other speed when
# scales cost a multiple.
_FACTOR = 1.5
SAME = Claim(
    "layer-standardises",
    "M10",
    "A batch-norm layer first does what standardising the inputs does",
    "log 1.5 less the distance of the logarithm of the ratio of their steps from 0",
    0.0,
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        seeds: how many trainings of each kind at each rate; their seeds are 0, 1, ...
        rates: learning rates, of which each kind of input has its own best one.
        decades: the features' scales run from 1 to 10 to this power.
        target: how much of the way from chance to 1 the accuracy on the training part has to go.
        steps: optimiser steps of each training.
        every: steps between two evaluations.
        batch_size: samples in a step.
        hidden: features of each hidden layer.
    """

    seeds: int
    rates: tuple[float, ...] = tuple(10 ** (power / 2) for power in range(-10, 1))
    decades: float = 4.0
    target: float = 0.9
    steps: int = 200
    every: int = 5
    batch_size: int = 32
    hidden: tuple[int, ...] = (64, 64)


def tasks(plan: Plan) -> Sequence[Args]:
    """A task for each kind of input and seed."""
    return [(inputs, seed) for seed in range(plan.seeds) for inputs in INPUTS]


def run(setting: Setting, plan: Plan, inputs: str, seed: int) -> dict[str, Any]:
    """Train at every rate; all kinds of input start from equal weights and see the samples in the same order.

    Returns:
        target: the accuracy on the training part that is looked for.
        at: the steps of the evaluations.
        curves: by rate, the accuracy on the training part at each.
        steps: by rate, the first evaluated step with the target accuracy, or None.
        test: by rate, the accuracy on the test part at the end.
    """
    scaled = rescale(setting.data, plan.decades, torch.Generator().manual_seed(seed))
    data = standardise(scaled) if inputs == STANDARDISED else scaled
    # Watched on what it learns from: it is the descent that is said to be slow.
    watched = Data(data.train, data.train, data.shape, data.classes, data.name)
    target = watched.chance + plan.target * (1 - watched.chance)
    curves, tests = [], []
    for rate in plan.rates:
        generator = torch.Generator().manual_seed(seed)
        network: nn.Module = perceptron(
            data.features, plan.hidden, data.classes, placement="none", layers=setting.layers, generator=generator
        )
        if inputs == LAYER:
            network = nn.Sequential(setting.layers.norm(data.features, affine=False), network)
        curve = training.train(
            network,
            watched,
            learning_rate=rate,
            batch_size=plan.batch_size,
            steps=plan.steps,
            evaluate_every=plan.every,
            generator=generator,
        )
        curves.append(curve)
        tests.append(training.accuracy(training.predict(network, data.test.inputs), data.test.labels))
    return {
        "target": target,
        "at": list(curves[0].steps),
        "curves": [list(curve.test_accuracy) for curve in curves],
        "steps": [training.first_step(curve.steps, curve.test_accuracy, target) for curve in curves],
        "test": tests,
    }


def rescale(data: Data, decades: float, generator: torch.Generator) -> Data:
    """The features, in a row, multiplied by scales from 1 to 10^decades, evenly over the decades, in random order."""
    order = torch.randperm(data.features, generator=generator)
    scales = 10 ** (decades * order / max(data.features - 1, 1))
    return _mapped(data, lambda x: x * scales.float())


def standardise(data: Data) -> Data:
    """Each feature less its mean over the training part, divided by its standard deviation there."""
    moments = Moments.of(data.train.inputs)
    return _mapped(data, lambda x: ((x - moments.mean) / torch.sqrt(moments.var() + _EPS)).float())


def _mapped(data: Data, function: Callable[[Tensor], Tensor]) -> Data:
    train, test = (
        Part(part.indices, function(part.inputs.flatten(1)), part.labels) for part in (data.train, data.test)
    )
    return Data(train, test, (data.features,), data.classes, data.name)


@dataclass(frozen=True)
class Row:
    """One kind of input over the seeds, each at the rate that the other seeds were quickest at.

    Attributes:
        inputs: which kind.
        rates: the rates.
        steps: to the target; the whole training where it was not reached.
        reached: seeds that reached it.
        curve: the accuracy on the training part at each evaluation: mean, lowest, highest.
        training: the accuracy on the training part at the end.
        test: the accuracy on the test part at the end.
    """

    inputs: str
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    reached: int
    curve: tuple[tuple[float, float, float], ...]
    training: Interval
    test: Interval


def summarize(plan: Plan, inputs: str, runs: Sequence[dict[str, Any]]) -> Row:
    """The row of one kind of input.

    Args:
        plan: what was trained.
        inputs: which kind.
        runs: the results of its tasks, in the order of the seeds.
    """
    chosen = best_of_the_others({i: [_score(plan, run, i) for run in runs] for i in range(len(plan.rates))})
    steps = [run["steps"][i] for run, i in zip(runs, chosen, strict=True)]
    curves = [run["curves"][i] for run, i in zip(runs, chosen, strict=True)]
    return Row(
        inputs,
        tuple(plan.rates[i] for i in chosen),
        tuple(step or plan.steps for step in steps),
        len(steps) - steps.count(None),
        tuple((statistics.fmean(values), min(values), max(values)) for values in zip(*curves, strict=True)),
        mean_interval([curve[-1] for curve in curves]),
        mean_interval([run["test"][i] for run, i in zip(runs, chosen, strict=True)]),
    )


def _score(plan: Plan, run: dict[str, Any], rate: int) -> float:
    """Quicker is better; of trainings that did not get there, the one that got furthest is."""
    steps = run["steps"][rate]
    return -math.log(steps) if steps else -math.log(plan.steps) - (1 - run["curves"][rate][-1])


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Each kind of input at its best learning rates, compared seed by seed."""
    by_inputs = {inputs: [results[inputs, seed] for seed in range(plan.seeds)] for inputs in INPUTS}
    rows = {inputs: summarize(plan, inputs, runs) for inputs, runs in by_inputs.items()}
    slower = _ratios(rows[RAW], rows[STANDARDISED])
    same = _ratios(rows[LAYER], rows[STANDARDISED])
    ratio = mean_interval(slower).map(math.exp)
    findings = [
        SLOWER.judge(ratio, effect_size(slower), plan.seeds),
        SAME.judge(within(math.log(_FACTOR), mean_interval(same)), effect_size(same), plan.seeds),
    ]
    target = results[RAW, 0]["target"]
    at = results[RAW, 0]["at"]
    relative = mean_interval(same).map(math.exp)
    section = Section(
        key="scales",
        title="What do inputs on very different scales do?",
        summary=[
            "The article says that inputs on very different scales slow gradient descent down, and that they are to be "
            "standardised. A layer of batch normalization without gamma and beta, put first, does that by itself.",
            f"The features of every sample were put on scales from 1 to {10**plan.decades:,.0f}. A network without any "
            f"other normalisation had to classify {percent(target)} % of the training samples rightly, at the learning "
            "rate that suited each kind of input best.",
            " ".join(_sentence(plan, row) for row in rows.values()),
            f"Raw inputs took {'at least ' if rows[RAW].reached < plan.seeds else ''}{ratio.estimate:.1f} times the "
            f"steps of standardised ones, the layer {relative.estimate:.2f} times "
            f"({relative.low:.2f} to {relative.high:.2f}).",
        ],
        judged=[finding.judged() for finding in findings],
        tables=[_table(plan, list(rows.values()))],
        charts=[_chart(at, target, list(rows.values()))],
        notes=[
            f"Learning rates: {', '.join(f'{rate:.1e}' for rate in plan.rates)}. For each "
            "seed the rate is the one at which the other seeds were quickest.",
            f"A training that did not get there counts as its {plan.steps} steps, so that the ratio is a lower bound.",
            f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]}, ReLU, plain gradient descent with "
            f"batches of {plan.batch_size}. Accuracy is that on the training part: the question is how fast the "
            "descent is. The layer is evaluated by its running statistics.",
        ],
        code=CODE,
    )
    return Conclusion({"target": target, "at": at, "rows": [asdict(row) for row in rows.values()]}, findings, section)


def _ratios(row: Row, base: Row) -> list[float]:
    return [math.log(steps / of_base) for steps, of_base in zip(row.steps, base.steps, strict=True)]


def _sentence(plan: Plan, row: Row) -> str:
    name = row.inputs[0].upper() + row.inputs[1:]
    if row.reached == 0:
        return f"{name}: no seed got there in {plan.steps} steps; {percent(row.training.estimate)} % were right then."
    got = f"{row.reached} of {plan.seeds} seeds"
    return f"{name}: {got} got there, the median after {statistics.median(row.steps):g} steps."


def _table(plan: Plan, rows: Sequence[Row]) -> Table:
    return Table(
        f"Training on inputs of each kind, {plan.seeds} seeds",
        ["Inputs", "Learning rate", "Seeds at the target", "Median steps", "Training (%)", "Test (%)"],
        [
            [
                row.inputs,
                " or ".join(f"{rate:.1e}" for rate in sorted(set(row.rates))),
                f"{row.reached} of {plan.seeds}",
                f"{statistics.median(row.steps):g}" if 2 * row.reached > plan.seeds else f"more than {plan.steps}",
                *(
                    f"{percent(part.estimate)} ({percent(part.low)} to {percent(part.high)})"
                    for part in (row.training, row.test)
                ),
            ]
            for row in rows
        ],
    )


def _chart(at: Sequence[int], target: float, rows: Sequence[Row]) -> Chart:
    spoken = ", ".join(f"{row.inputs} ends at {percent(row.training.estimate)}" for row in rows)
    return Chart(
        title="Accuracy on the training part, each at its best learning rate",
        description=f"Accuracy in per cent over {at[-1]} steps, mean and range of the seeds: {spoken}.",
        x_label="step",
        y_label="training accuracy (%)",
        curves=[Curve(row.inputs, at, _column(row, 0), _column(row, 1), _column(row, 2)) for row in rows],
        mark=100 * target,
    )


def _column(row: Row, i: int) -> list[float]:
    return [100 * values[i] for values in row.curve]


CODE = """\
import torch
import batchnorm as bn

x = torch.rand(32, 5) * torch.tensor([1.0, 10, 100, 1000, 10000])
standardise = bn.BatchNorm1d(5, affine=False)
print(x.std(0), standardise(x).std(0))
"""

EXPERIMENT = Experiment(
    name="scales",
    claims=(SLOWER, SAME),
    full=Plan(seeds=10),
    quick=Plan(seeds=6, rates=(3e-5, 0.1, 0.3), steps=60, hidden=(32, 32)),
    tasks=tasks,
    run=run,
    conclude=conclude,
)

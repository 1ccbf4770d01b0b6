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
from batchnorm.report.document import Chart, Table, percent
from batchnorm.study import training
from batchnorm.study.dataset import Data, Part
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import any_of, cell, in_points, mean_and_range
from batchnorm.study.grid import Grid, Results, Run
from batchnorm.study.measured import Paired
from batchnorm.study.statistics import Interval, mean_interval
from batchnorm.study.verdict import Claim, Margin, Quantity

RAW, STANDARDISED, LAYER = "raw", "standardised", "batch norm first"
INPUTS = (RAW, STANDARDISED, LAYER)
_LABELS = {RAW: "from raw inputs", STANDARDISED: "from standardised ones", LAYER: "with the layer"}
_EPS = 1e-5

_STEPS = Quantity("steps", form=".0f", geometric=True)
# Steps that were not enough count as the whole training, which can only make the slower one look faster.
SLOWER = Claim(
    "scales-slow",
    "M10",
    "Inputs on scales of 1 to 10,000 slow gradient descent down",
    _STEPS,
    Margin(
        "steps to the target from raw inputs over those from standardised ones, each at its best learning rate",
        1.0,
        "times",
    ),
)
# Mini-batch statistics are noisy, so that equal steps are not to be expected; half as many again is no other speed when
# scales cost a multiple.
_FACTOR = 1.5
SAME = Claim(
    "layer-standardises",
    "M10",
    "A batch-norm layer first does what standardising the inputs does",
    _STEPS,
    Margin("log 1.5 less the distance of the logarithm of the ratio of their steps from 0", 0.0),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int  # trainings of each kind at each rate
    # Learning rates, of which each kind of input has its own best one.
    rates: tuple[float, ...] = tuple(10 ** (power / 2) for power in range(-10, 1))
    decades: float = 4.0  # the features' scales run from 1 to 10 to this power
    target: float = 0.9  # how much of the way from chance to 1 the accuracy on the training part has to go
    steps: int = 200  # optimiser steps of each training
    every: int = 5  # steps between two evaluations
    batch_size: int = 32  # samples in a step
    hidden: tuple[int, ...] = (64, 64)  # features of each hidden layer


def run(setting: Setting, plan: Plan, inputs: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once; all kinds of input start from equal weights and see the samples in the same order.

    Returns:
        target: the accuracy on the training part that is looked for.
        at: the steps of the evaluations.
        curve: the accuracy on the training part at each.
        steps: the first evaluated step with the target accuracy, or None.
        test: the accuracy on the test part at the end.
    """
    scaled = rescale(setting.data, plan.decades, torch.Generator().manual_seed(seed))
    data = standardise(scaled) if inputs == STANDARDISED else scaled
    # Watched on what it learns from: it is the descent that is said to be slow.
    watched = Data(data.train, data.train, data.shape, data.classes, data.name)
    target = watched.chance + plan.target * (1 - watched.chance)
    generator = torch.Generator().manual_seed(seed)
    network: nn.Module = Setting(data, setting.layers).perceptron(plan.hidden, "none", generator)
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
    return {
        "target": target,
        "at": list(curve.steps),
        "curve": list(curve.test_accuracy),
        "steps": training.first_step(curve.steps, curve.test_accuracy, target),
        "test": training.accuracy(training.predict(network, data.test.inputs), data.test.labels),
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


def _score(plan: Plan, run: Run) -> float:
    """Quicker is better; of trainings that did not get there, the one that got furthest is."""
    steps = run["steps"]
    return -math.log(steps) if steps else -math.log(plan.steps) - (1 - run["curve"][-1])


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Each kind of input at its best learning rates, compared seed by seed."""
    best = {inputs: results.best(lambda run: _score(plan, run), inputs) for inputs in INPUTS}
    # The whole training where the target was not reached.
    steps = {inputs: tuple(run["steps"] or plan.steps for run in best[inputs].runs) for inputs in INPUTS}
    reached = {inputs: sum(run["steps"] is not None for run in best[inputs].runs) for inputs in INPUTS}
    curves = {inputs: list(zip(*best[inputs].column("curve"), strict=True)) for inputs in INPUTS}
    at_end = {inputs: mean_interval(curves[inputs][-1]) for inputs in INPUTS}
    test = {inputs: mean_interval(best[inputs].column("test")) for inputs in INPUTS}
    raw, layer = (Paired(steps[inputs], steps[STANDARDISED]) for inputs in (RAW, LAYER))
    ratio, relative = raw.ratio(), layer.ratio().interval
    target, at = (best[RAW].runs[0][name] for name in ("target", "at"))
    spoken = ", ".join(f"{inputs} ends at {percent(at_end[inputs].estimate)}" for inputs in INPUTS)
    return Conclusion(
        numbers={
            "target": target,
            "at": at,
            "rows": [
                {
                    "inputs": inputs,
                    "rates": best[inputs].values,
                    "steps": steps[inputs],
                    "reached": reached[inputs],
                    "curve": [(statistics.fmean(values), min(values), max(values)) for values in curves[inputs]],
                    "training": asdict(at_end[inputs]),
                    "test": asdict(test[inputs]),
                }
                for inputs in INPUTS
            ],
        },
        findings=[
            claim.judge(measured, {_LABELS[inputs]: steps[inputs] for inputs in (slower, STANDARDISED)})
            for claim, slower, measured in (
                (SLOWER, RAW, ratio),
                (SAME, LAYER, layer.log_ratio().equivalent(math.log(_FACTOR))),
            )
        ],
        summary=[
            "The article says that inputs on very different scales slow gradient descent down, and that they are to be "
            "standardised. A layer of batch normalization without gamma and beta, put first, does that by itself.",
            f"The features of every sample were put on scales from 1 to {10**plan.decades:,.0f}. A network without any "
            f"other normalisation had to classify {percent(target)} % of the training samples rightly, at the learning "
            "rate that suited each kind of input best.",
            " ".join(_sentence(plan, inputs, reached[inputs], steps[inputs], at_end[inputs]) for inputs in INPUTS),
            f"Raw inputs took {'at least ' if reached[RAW] < plan.seeds else ''}{ratio.interval.estimate:.1f} "
            f"times the steps of standardised ones, the layer {relative.estimate:.2f} times "
            f"({relative.low:.2f} to {relative.high:.2f}).",
        ],
        tables=[
            Table(
                f"Training on inputs of each kind, {plan.seeds} seeds",
                ["Inputs", "Learning rate", "Seeds at the target", "Median steps", "Training (%)", "Test (%)"],
                [
                    [
                        inputs,
                        any_of(best[inputs].values, ".1e"),
                        f"{reached[inputs]} of {plan.seeds}",
                        f"{statistics.median(steps[inputs]):g}"
                        if 2 * reached[inputs] > plan.seeds
                        else f"more than {plan.steps}",
                        cell(at_end[inputs].map(in_points)),
                        cell(test[inputs].map(in_points)),
                    ]
                    for inputs in INPUTS
                ],
            )
        ],
        charts=[
            Chart(
                title="Accuracy on the training part, each at its best learning rate",
                description=f"Accuracy in per cent over {at[-1]} steps, mean and range of the seeds: {spoken}.",
                x_label="step",
                y_label="training accuracy (%)",
                curves=[mean_and_range(inputs, at, curves[inputs]) for inputs in INPUTS],
                mark=100 * target,
            )
        ],
        notes=[
            f"Learning rates: {', '.join(f'{rate:.1e}' for rate in plan.rates)}. For each "
            "seed the rate is the one at which the other seeds were quickest.",
            f"A training that did not get there counts as its {plan.steps} steps, so that the ratio is a lower bound.",
            f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]}, ReLU, plain gradient descent with "
            f"batches of {plan.batch_size}. Accuracy is that on the training part: the question is how fast the "
            "descent is. The layer is evaluated by its running statistics.",
        ],
    )


def _sentence(plan: Plan, inputs: str, reached: int, steps: Sequence[int], at_end: Interval) -> str:
    name = inputs[0].upper() + inputs[1:]
    if reached == 0:
        return f"{name}: no seed got there in {plan.steps} steps; {percent(at_end.estimate)} % were right then."
    return f"{name}: {reached} of {plan.seeds} seeds got there, the median after {statistics.median(steps):g} steps."


CODE = """\
import torch
import batchnorm as bn

x = torch.rand(32, 5) * torch.tensor([1.0, 10, 100, 1000, 10000])
standardise = bn.BatchNorm1d(5, affine=False)
print(x.std(0), standardise(x).std(0))
"""

EXPERIMENT = Experiment(
    name="scales",
    title="What do inputs on very different scales do?",
    claims=(SLOWER, SAME),
    full=Plan(seeds=10),
    quick=Plan(seeds=6, rates=(3e-5, 0.3), every=10, hidden=(32, 32)),
    grid=lambda plan: Grid(plan.seeds, inputs=INPUTS, rate=plan.rates),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps / 800,
    code=CODE,
)

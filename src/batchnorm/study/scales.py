"""Inputs on very different scales (M10): raw, standardised, and with a layer of batch normalization first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.report.document import Chart, Curve, Table, percent
from batchnorm.study import training
from batchnorm.study.dataset import Data, Part
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import any_of, cell, in_points
from batchnorm.study.grid import Grid, Results
from batchnorm.study.measured import Paired
from batchnorm.study.statistics import Interval, mean_interval
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
class AtBestRates:
    """One kind of input over the seeds, each at the rate that the other seeds were quickest at."""

    inputs: str
    rates: tuple[float, ...]
    steps: tuple[int, ...]  # to the target; the whole training where it was not reached
    reached: int  # seeds that reached it
    curve: tuple[tuple[float, float, float], ...]  # accuracy in training at each evaluation: mean, lowest, highest
    training: Interval  # the accuracy on the training part at the end
    test: Interval  # the accuracy on the test part at the end


def at_best_rates(plan: Plan, inputs: str, results: Results) -> AtBestRates:
    """Choose the rates of one kind of input."""
    by_rate = Results(
        {
            (rate, seed): {"curve": run["curves"][i], "steps": run["steps"][i], "test": run["test"][i]}
            for seed, run in enumerate(results.runs(inputs))
            for i, rate in enumerate(plan.rates)
        }
    )
    rates, runs = by_rate.best(lambda run: _score(plan, run))
    curves = [run["curve"] for run in runs]
    return AtBestRates(
        inputs,
        rates,
        tuple(run["steps"] or plan.steps for run in runs),
        sum(run["steps"] is not None for run in runs),
        tuple((statistics.fmean(values), min(values), max(values)) for values in zip(*curves, strict=True)),
        mean_interval([curve[-1] for curve in curves]),
        mean_interval([run["test"] for run in runs]),
    )


def _score(plan: Plan, run: dict[str, Any]) -> float:
    """Quicker is better; of trainings that did not get there, the one that got furthest is."""
    steps = run["steps"]
    return -math.log(steps) if steps else -math.log(plan.steps) - (1 - run["curve"][-1])


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Each kind of input at its best learning rates, compared seed by seed."""
    best = {inputs: at_best_rates(plan, inputs, results) for inputs in INPUTS}
    raw, layer = (Paired(best[inputs].steps, best[STANDARDISED].steps) for inputs in (RAW, LAYER))
    ratio, relative = raw.ratio(), layer.ratio().interval
    target, at = (results[RAW, 0][name] for name in ("target", "at"))
    return Conclusion(
        numbers={"target": target, "at": at, "rows": [asdict(kind) for kind in best.values()]},
        findings=[SLOWER.judge(ratio), SAME.judge(layer.log_ratio().equivalent(math.log(_FACTOR)))],
        summary=[
            "The article says that inputs on very different scales slow gradient descent down, and that they are to be "
            "standardised. A layer of batch normalization without gamma and beta, put first, does that by itself.",
            f"The features of every sample were put on scales from 1 to {10**plan.decades:,.0f}. A network without any "
            f"other normalisation had to classify {percent(target)} % of the training samples rightly, at the learning "
            "rate that suited each kind of input best.",
            " ".join(_sentence(plan, kind) for kind in best.values()),
            f"Raw inputs took {'at least ' if best[RAW].reached < plan.seeds else ''}{ratio.interval.estimate:.1f} "
            f"times the steps of standardised ones, the layer {relative.estimate:.2f} times "
            f"({relative.low:.2f} to {relative.high:.2f}).",
        ],
        tables=[_table(plan, best)],
        charts=[_chart(at, target, best)],
        notes=[
            f"Learning rates: {', '.join(f'{rate:.1e}' for rate in plan.rates)}. For each "
            "seed the rate is the one at which the other seeds were quickest.",
            f"A training that did not get there counts as its {plan.steps} steps, so that the ratio is a lower bound.",
            f"Networks: {len(plan.hidden)} hidden layers of {plan.hidden[0]}, ReLU, plain gradient descent with "
            f"batches of {plan.batch_size}. Accuracy is that on the training part: the question is how fast the "
            "descent is. The layer is evaluated by its running statistics.",
        ],
    )


def _sentence(plan: Plan, kind: AtBestRates) -> str:
    name = kind.inputs[0].upper() + kind.inputs[1:]
    if kind.reached == 0:
        return f"{name}: no seed got there in {plan.steps} steps; {percent(kind.training.estimate)} % were right then."
    got = f"{kind.reached} of {plan.seeds} seeds"
    return f"{name}: {got} got there, the median after {statistics.median(kind.steps):g} steps."


def _table(plan: Plan, best: Mapping[str, AtBestRates]) -> Table:
    return Table(
        f"Training on inputs of each kind, {plan.seeds} seeds",
        ["Inputs", "Learning rate", "Seeds at the target", "Median steps", "Training (%)", "Test (%)"],
        [
            [
                inputs,
                any_of(kind.rates, ".1e"),
                f"{kind.reached} of {plan.seeds}",
                f"{statistics.median(kind.steps):g}" if 2 * kind.reached > plan.seeds else f"more than {plan.steps}",
                cell(kind.training.map(in_points)),
                cell(kind.test.map(in_points)),
            ]
            for inputs, kind in best.items()
        ],
    )


def _chart(at: list[int], target: float, best: Mapping[str, AtBestRates]) -> Chart:
    spoken = ", ".join(f"{inputs} ends at {percent(kind.training.estimate)}" for inputs, kind in best.items())
    curves = []
    for inputs, kind in best.items():
        mean, lowest, highest = ([100 * value for value in values] for values in zip(*kind.curve, strict=True))
        curves.append(Curve(inputs, at, mean, lowest, highest))
    return Chart(
        title="Accuracy on the training part, each at its best learning rate",
        description=f"Accuracy in per cent over {at[-1]} steps, mean and range of the seeds: {spoken}.",
        x_label="step",
        y_label="training accuracy (%)",
        curves=curves,
        mark=100 * target,
    )


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
    quick=Plan(seeds=6, rates=(3e-5, 0.1, 0.3), steps=60, hidden=(32, 32)),
    grid=lambda plan: Grid(plan.seeds, inputs=INPUTS),
    run=run,
    conclude=conclude,
    code=CODE,
)

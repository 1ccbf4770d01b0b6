"""Does batch normalization need fewer steps, and does it bear larger learning rates?

Pairs of the same deep network, with and without our layers, from the same initial weights, on the same batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from batchnorm.report.document import Chart, Curve, Section, Table, percent
from batchnorm.study import training
from batchnorm.study.data import Digits, digits
from batchnorm.study.networks import perceptron

WITH, WITHOUT = "batch norm", "plain"
NETWORKS = {WITH: True, WITHOUT: False}


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        seeds: how many pairs there are at each learning rate; their seeds are 0, 1, ...
        steps: optimiser steps of each training.
        evaluate_every: steps between two evaluations.
        learning_rates: a moderate and a large one. The moderate one is where the plain network learns fastest (of
            0.05, 0.1, 0.15 and 0.2); the large one is five times that.
        hidden: features of each hidden layer.
        batch_size: images in a step.
        target: the test accuracy whose first step is looked for.
    """

    seeds: int
    steps: int = 600
    evaluate_every: int = 5
    learning_rates: tuple[float, ...] = (0.1, 0.5)
    hidden: tuple[int, ...] = (64,) * 8
    batch_size: int = 32
    target: float = 0.95

    @property
    def work(self) -> int:
        """Steps of all trainings together."""
        return self.seeds * len(self.learning_rates) * len(NETWORKS) * self.steps


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: a key of `NETWORKS`.
        learning_rate: of every step.
        seed: of the initial weights and the order of the images.
        curve: how it went.
        steps_to_target: the first evaluated step at or above the target; None where there is none.
        one_at_a_time: test accuracy at the end, predicting single images.
        in_batches: the same, predicting batches.
        different: test images whose two predictions differ.
    """

    network: str
    learning_rate: float
    seed: int
    curve: training.Curve
    steps_to_target: int | None
    one_at_a_time: float
    in_batches: float
    different: int


@dataclass(frozen=True)
class Cell:
    """The runs of one network at one learning rate, over all seeds.

    Attributes:
        network: a key of `NETWORKS`.
        learning_rate: of every step.
        reached: seeds that reached the target.
        median_steps: the median of the steps to it over all seeds, where one that did not reach it counts as longer
            than any; None where that makes the median longer than the training.
        accuracy_mean: of the test accuracy after the last step.
        accuracy_low: its smallest.
        accuracy_high: its largest.
        one_at_a_time: mean test accuracy predicting single images.
        in_batches: mean test accuracy predicting batches.
        different: predictions that differ between the two, of all seeds together.
    """

    network: str
    learning_rate: float
    reached: int
    median_steps: float | None
    accuracy_mean: float
    accuracy_low: float
    accuracy_high: float
    one_at_a_time: float
    in_batches: float
    different: int


@dataclass(frozen=True)
class Speed:
    """The numbers of this experiment."""

    plan: Plan
    train_images: int
    test_images: int
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]


def run(plan: Plan, advance: Callable[[int], None]) -> Speed:
    """Train every pair.

    Args:
        plan: what to train.
        advance: called with the number of steps done since the last call; `plan.work` in all.
    """
    data = digits()
    # Seeds outermost, so that the time left can be told from the first runs.
    runs = tuple(
        _train(plan, data, network, rate, seed, advance)
        for seed in range(plan.seeds)
        for rate in plan.learning_rates
        for network in NETWORKS
    )
    cells = tuple(summarize(runs, network, rate) for rate in plan.learning_rates for network in NETWORKS)
    return Speed(plan, len(data.train.labels), len(data.test.labels), cells, runs)


def _train(plan: Plan, data: Digits, network: str, rate: float, seed: int, advance: Callable[[int], None]) -> Run:
    generator = torch.Generator().manual_seed(seed)  # the weights first, then the order: both kinds draw alike
    pixels = data.train.images.shape[1]
    model = perceptron(pixels, plan.hidden, 10, normalized=NETWORKS[network], generator=generator)
    curve = training.train(
        model,
        data,
        learning_rate=rate,
        batch_size=plan.batch_size,
        steps=plan.steps,
        evaluate_every=plan.evaluate_every,
        generator=generator,
        advance=advance,
    )
    single = training.predict(model, data.test.images, 1)
    batched = training.predict(model, data.test.images, plan.batch_size)
    return Run(
        network,
        rate,
        seed,
        curve,
        training.first_step(curve.steps, curve.test_accuracy, plan.target),
        training.accuracy(single, data.test.labels),
        training.accuracy(batched, data.test.labels),
        int((single != batched).sum()),
    )


def summarize(runs: Sequence[Run], network: str, rate: float) -> Cell:
    """One cell from the runs of its network at its learning rate, of which there is at least one."""
    chosen = [run for run in runs if run.network == network and run.learning_rate == rate]
    steps = [run.steps_to_target for run in chosen]
    median = statistics.median(float("inf") if step is None else step for step in steps)
    final = [run.curve.test_accuracy[-1] for run in chosen]
    return Cell(
        network=network,
        learning_rate=rate,
        reached=len(steps) - steps.count(None),
        median_steps=None if median == float("inf") else median,
        accuracy_mean=statistics.fmean(final),
        accuracy_low=min(final),
        accuracy_high=max(final),
        one_at_a_time=statistics.fmean(run.one_at_a_time for run in chosen),
        in_batches=statistics.fmean(run.in_batches for run in chosen),
        different=sum(run.different for run in chosen),
    )


def section(numbers: Speed) -> Section:
    """What the numbers say, in words, a table and curves."""
    plan = numbers.plan
    return Section(
        key="speed",
        title="Fewer steps, larger learning rates?",
        summary=[
            *(_steps_sentence(numbers, rate) for rate in plan.learning_rates),
            *([_rates_sentence(numbers)] if len(plan.learning_rates) > 1 else []),
            _inference_sentence(numbers),
        ],
        tables=[_table(numbers)],
        charts=[chart for rate in plan.learning_rates for chart in (_accuracy(numbers, rate), _loss(numbers, rate))],
        notes=_notes(numbers),
    )


def _cell(numbers: Speed, network: str, rate: float) -> Cell:
    return next(cell for cell in numbers.cells if (cell.network, cell.learning_rate) == (network, rate))


def _steps_sentence(numbers: Speed, rate: float) -> str:
    reach = {network: _reach(_cell(numbers, network, rate), numbers.plan) for network in NETWORKS}
    return (
        f"At learning rate {rate:g}, the network with batch normalization reached {100 * numbers.plan.target:g} % test "
        f"accuracy {reach[WITH]}, the plain one {reach[WITHOUT]}. {_order(numbers, rate)}"
    )


def _reach(cell: Cell, plan: Plan) -> str:
    if cell.reached == 0:
        return f"with none of {plan.seeds} seeds within {plan.steps} steps"
    if cell.median_steps is None:
        return f"with only {cell.reached} of {plan.seeds} seeds within {plan.steps} steps"
    share = "" if cell.reached == plan.seeds else f" (with {cell.reached} of {plan.seeds} seeds within {plan.steps})"
    return f"after a median of {cell.median_steps:g} steps{share}"


def _order(numbers: Speed, rate: float) -> str:
    """Which of each pair was first, and whether the seeds agree."""
    first = {
        (run.network, run.seed): run.steps_to_target or numbers.plan.steps + 1
        for run in numbers.runs
        if run.learning_rate == rate
    }
    seeds = numbers.plan.seeds
    earlier = sum(first[WITH, seed] < first[WITHOUT, seed] for seed in range(seeds))
    later = sum(first[WITH, seed] > first[WITHOUT, seed] for seed in range(seeds))
    if earlier == later == 0:
        return "Neither was earlier with any seed."
    if seeds in (earlier, later):
        return f"With every seed, the {'batch-normalised' if earlier else 'plain'} one was earlier."
    return f"The batch-normalised one was earlier with {earlier} of {seeds} seeds, the plain one with {later}."


def _rates_sentence(numbers: Speed) -> str:
    low, high = min(numbers.plan.learning_rates), max(numbers.plan.learning_rates)
    changes = []
    for network in NETWORKS:
        before, after = (_cell(numbers, network, rate).accuracy_mean for rate in (low, high))
        changes.append(f"from {percent(before)} % to {percent(after)} %")
    return (
        f"From learning rate {low:g} to {high:g}, the mean final test accuracy went {changes[0]} with batch "
        f"normalization, and {changes[1]} without."
    )


def _inference_sentence(numbers: Speed) -> str:
    differ = []
    for network in NETWORKS:
        count = sum(cell.different for cell in numbers.cells if cell.network == network)
        differ.append(f"{count:,}" if count else "none")
    total = numbers.test_images * numbers.plan.seeds * len(numbers.plan.learning_rates)
    return (
        f"Predicting one image at a time instead of {numbers.plan.batch_size} changed {differ[0]} of {total:,} "
        f"predictions with batch normalization (by its running statistics), and {differ[1]} without."
    )


def _table(numbers: Speed) -> Table:
    plan = numbers.plan
    return Table(
        caption=f"{plan.seeds} seeds each, {plan.steps} steps; accuracies in % of {numbers.test_images} test images",
        columns=(
            "network",
            "learning rate",
            f"steps to {100 * plan.target:g} % (seeds)",
            "final accuracy (range)",
            "one at a time",
            "in batches",
            "differ",
        ),
        rows=[
            (
                cell.network,
                f"{cell.learning_rate:g}",
                f"{_median_steps(cell, plan)} ({cell.reached}/{plan.seeds})",
                f"{percent(cell.accuracy_mean)} ({percent(cell.accuracy_low)}-{percent(cell.accuracy_high)})",
                percent(cell.one_at_a_time),
                percent(cell.in_batches),
                f"{cell.different}/{numbers.test_images * plan.seeds}",
            )
            for cell in numbers.cells
        ],
    )


def _median_steps(cell: Cell, plan: Plan) -> str:
    if cell.reached == 0:
        return "never"
    return f"> {plan.steps}" if cell.median_steps is None else f"{cell.median_steps:g}"


def _accuracy(numbers: Speed, rate: float) -> Chart:
    curves = _curves(numbers, rate, lambda curve: [100 * value for value in curve.test_accuracy])
    return Chart(
        title=f"Test accuracy at learning rate {rate:g}",
        description=_description(f"Test accuracy in per cent at learning rate {rate:g}", numbers, curves),
        x_label="step",
        y_label="test accuracy, %",
        curves=curves,
        mark=100 * numbers.plan.target,
    )


def _loss(numbers: Speed, rate: float) -> Chart:
    curves = _curves(numbers, rate, lambda curve: curve.training_loss)
    return Chart(
        title=f"Training loss at learning rate {rate:g}",
        description=_description(f"Training loss at learning rate {rate:g}", numbers, curves),
        x_label="step",
        y_label="training loss",
        curves=curves,
        log_y=True,
    )


def _curves(
    numbers: Speed, rate: float, values: Callable[[training.Curve], Sequence[float | None]]
) -> tuple[Curve, ...]:
    """Mean and range over the seeds; a gap where any seed has no number, lest the survivors flatter the rest."""
    curves = []
    for network in NETWORKS:
        chosen = [run.curve for run in numbers.runs if (run.network, run.learning_rate) == (network, rate)]
        points = [
            [value for value in at if value is not None] if None not in at else None
            for at in zip(*map(values, chosen), strict=True)
        ]
        middle, low, high = (
            [None if point is None else summary(point) for point in points] for summary in (statistics.fmean, min, max)
        )
        curves.append(Curve(network, chosen[0].steps, middle, low, high))
    return tuple(curves)


def _description(what: str, numbers: Speed, curves: Sequence[Curve]) -> str:
    ends = [
        f"{curve.label} ends at " + ("no number" if curve.middle[-1] is None else f"{curve.middle[-1]:.3g}")
        for curve in curves
    ]
    return f"{what}, mean and range over {numbers.plan.seeds} seeds, {numbers.plan.steps} steps: {', '.join(ends)}."


def _notes(numbers: Speed) -> list[str]:
    plan = numbers.plan
    return [
        f"Data: scikit-learn's handwritten digits, 8 by 8 pixels, {numbers.train_images:,} to train and "
        f"{numbers.test_images} to test, cut at random in equal shares of each digit. The same writers may be in both.",
        f"Networks: {len(plan.hidden)} hidden layers of {_widths(plan.hidden)} with ReLU; with batch normalization "
        f"before each ReLU, or plain. Both of a pair start from the same linear weights (He's initialisation, made for "
        f"deep plain ReLU networks) and see the same batches of {plan.batch_size} in the same order.",
        "Plain stochastic gradient descent on the cross-entropy: no momentum, weight decay or schedule, each of which "
        "would change what a learning rate means.",
        f"Every {plan.evaluate_every} steps the whole test set is classified, with batch normalization by its running "
        f"statistics. Steps to {100 * plan.target:g} % are those before the first such test at or above it; one such "
        "test is enough, even if a later one is below. A seed that never got there counts as slower than all others.",
        "Final accuracy: mean and range over the seeds after the last step. One at a time, in batches: the mean of the "
        "same network predicting single images, and in batches; differ: predictions that were not the same. An output "
        "that is not a finite number counts as wrong.",
        f"With {plan.seeds} seeds, a difference that is not larger than the ranges may be chance.",
        "Curves: mean and range over the seeds. The training loss is the mean of the batches since the point before; "
        "its curve has a gap where the loss of any seed is not a finite number.",
        "Not measured: time (a step with batch normalization costs more), other data, optimisers and learning rates. "
        "The learning rates were chosen with an eye on this test set: near the plain network's best, and beyond it.",
    ]


def _widths(hidden: Sequence[int]) -> str:
    return " and ".join(str(width) for width in sorted(set(hidden)))

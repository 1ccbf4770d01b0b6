"""Internal covariate shift (M9): what a step of all layers at once does to what each of them receives.

The linear example `y = x w1 w2 ... wk`, with the terms of its step written out, and the shift of every layer's input
in real training, with and without batch normalization.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.report.document import Chart, Table
from batchnorm.study import training
from batchnorm.study.equations import agreeing_digits
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import cell, in_points, interval_curve
from batchnorm.study.grid import Grid, Results, Run
from batchnorm.study.measured import Measured, Paired
from batchnorm.study.networks import Placement
from batchnorm.study.statistics import SMALLEST, bounded, mean_interval
from batchnorm.study.verdict import Claim, Margin, Quantity, Verdict

LINEAR = "linear"
PLAIN, WITH = "plain", "batch norm"
NETWORKS: dict[str, Placement] = {PLAIN: "none", WITH: "before"}
_LARGEST = 1e3  # of a network that diverges

SHIFT = Quantity("shift", "standard deviations", ".2g", geometric=True)
# float64 carries 15.9 digits; twelve leave room for the sum of a thousand terms.
EXPANDED = Claim(
    "linear-expansion",
    "M9",
    "The step of y = x w1 ... wk is the sum of its expanded terms",
    Quantity("largest error", form=".1e"),
    Margin("decimal digits in which the sum agrees with the step, at worst", 12.0, "digits"),
    counted="steps",
)
# A tenth of the step: as much as the learning rate, 0.1, moves a weight of 1.
UNFORESEEN = Claim(
    "linear-orders",
    "M9",
    "The deeper, the more of a linear net's step the gradient missed",
    Quantity("unforeseen share", "%", ".1f", 100),
    Margin("unforeseen share of the step at ten layers less that at three", 0.1),
)
DEEPER = Claim(
    "shift-grows",
    "M9",
    "Without batch norm the shift grows from layer to layer",
    SHIFT,
    Margin("shift of the last layer's input over that of the second's", 1.0, "times"),
)
LESS = Claim(
    "shift-reduced",
    "M9",
    "Batch norm reduces the shift of the layers' inputs",
    SHIFT,
    Margin("shift without batch norm over the shift with it, mean over the layers", 1.0, "times"),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int  # how many linear examples, and pairs of networks
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # layers of the linear example
    example_rate: float = 0.1  # its learning rate
    spread: float = 0.1  # the standard deviation of its weights around 1
    steps: int = 300  # optimiser steps of each training
    every: int = 10  # steps from one measured step to the next
    learning_rate: float = 0.1  # of every step
    batch_size: int = 32  # samples in a step
    hidden: tuple[int, ...] = (64,) * 8  # features of each hidden layer
    watched: int = 256  # training samples whose way through the layers is watched


def run(setting: Setting, plan: Plan, kind: str, seed: int) -> dict[str, Any]:
    """One linear example at every depth, or one training of one network."""
    generator = torch.Generator().manual_seed(seed)
    if kind == LINEAR:
        drawn = torch.randn(max(plan.depths), generator=generator, dtype=torch.float64)
        weights = (1 + plan.spread * drawn).tolist()
        return {"depths": [_example(weights[:depth], plan.example_rate) for depth in plan.depths]}
    data = setting.data
    network = setting.perceptron(plan.hidden, NETWORKS[kind], generator)
    watched = data.train.inputs[: plan.watched]
    descent = training.descend(
        network, data.train, learning_rate=plan.learning_rate, batch_size=plan.batch_size, generator=generator
    )
    measured = range(plan.every, plan.steps + 1, plan.every)
    shifts, widths = [], []
    for _ in measured:
        for _ in islice(descent, plan.every - 1):
            pass
        before = layer_inputs(network, watched)
        next(descent)
        after = layer_inputs(network, watched)
        shifts.append([shift(*pair) for pair in zip(before, after, strict=True)])
        widths.append([width_change(*pair) for pair in zip(before, after, strict=True)])
    return {
        "steps": list(measured),
        "shift_by_layer": _geometric(zip(*shifts, strict=True)),
        "spread_by_layer": _geometric(zip(*widths, strict=True)),
        "shift_by_step": _geometric(shifts),
    }


def expand(weights: Sequence[float], rate: float) -> list[float]:
    """The terms of one gradient step on `y = w1 w2 ... wk` (x = 1, and y itself is what descends), by their order.

    The new output is the product of all `w_i - rate g_i`, where `g_i` is the product of the other weights. Written
    out it has 2^k terms; those with j factors `-rate g_i` are of order j in the rate.

    Returns:
        k + 1 sums: order 0, the old output, to order k.

    Source: Goodfellow, Bengio and Courville, "Deep Learning", 2016, section 8.7.1.
    """
    orders = [1.0]
    for weight, gradient in zip(weights, _gradients(weights), strict=True):
        moved = -rate * gradient
        same_order = [weight * term for term in orders] + [0.0]
        next_order = [0.0] + [moved * term for term in orders]
        orders = [a + b for a, b in zip(same_order, next_order, strict=True)]
    return orders


def _gradients(weights: Sequence[float]) -> list[float]:
    return [math.prod(w for j, w in enumerate(weights) if j != i) for i in range(len(weights))]


def _example(weights: Sequence[float], rate: float) -> dict[str, Any]:
    """The step as it is and as it is written out."""
    old = math.prod(weights)
    new = math.prod(w - rate * g for w, g in zip(weights, _gradients(weights), strict=True))
    orders = expand(weights, rate)
    return {
        "step": new - old,
        "orders": orders[1:],
        "error": abs(math.fsum(orders) - new) / abs(new),
        "unforeseen": abs((new - old - orders[1]) / orders[1]),
    }


def layer_inputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What each linear layer but the first receives when `x` passes in training mode; the network stays as it is."""
    network = copy.deepcopy(network).train()
    seen: list[Tensor] = []
    for layer in [module for module in network.modules() if isinstance(module, nn.Linear)][1:]:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].double()))
    with torch.no_grad():
        network(x)
    return seen


def shift(before: Tensor, after: Tensor) -> float:
    """How far the features' means moved, in standard deviations: `rms(mean' - mean) / sqrt(mean of the variances)`.

    Args:
        before: (N, C) the inputs of a layer before a step.
        after: (N, C) the same after it.

    Returns:
        At least 1e-6 and at most 1e3; what is not a finite number counts as 1e3.
    """
    moved = float((after.mean(0) - before.mean(0)).square().mean().sqrt())
    return bounded(moved / max(_width(before), SMALLEST), _LARGEST)


def width_change(before: Tensor, after: Tensor) -> float:
    """How much their width changed: `|log(width' / width)|`, where the width is the root of the mean variance."""
    width, new = (max(_width(x), SMALLEST) for x in (before, after))
    return bounded(abs(math.log(new / width)), _LARGEST)


def _width(x: Tensor) -> float:
    return float(x.var(0, correction=0).mean().sqrt())


def _geometric(rows: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.geometric_mean(row) for row in rows]


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Judge the claims over the seeds."""
    # Of each depth, the examples of all seeds; of each network and layer, the shifts of all seeds.
    examples = list(zip(*results.column("depths", LINEAR), strict=True))
    shifts = {kind: list(zip(*results.column("shift_by_layer", kind), strict=True)) for kind in NETWORKS}
    errors = [example["error"] for of_depth in examples for example in of_depth]
    unforeseen = [[example["unforeseen"] for example in of_depth] for of_depth in examples]
    three, ten = plan.depths.index(3), plan.depths.index(10)
    # The geometric mean over the layers is the same as that over the steps.
    plain, ours = (_geometric(zip(*shifts[kind], strict=True)) for kind in NETWORKS)
    less = LESS.judge(Paired(plain, ours).ratio(), {"with": ours, "without": plain})
    first, last = shifts[PLAIN][0], shifts[PLAIN][-1]
    by_layer = {
        kind: [mean_interval([*map(math.log, of_layer)]).map(math.exp) for of_layer in of_kind]
        for kind, of_kind in shifts.items()
    }
    widths = {kind: _geometric(zip(*results.column("spread_by_layer", kind), strict=True)) for kind in NETWORKS}
    spoken = "; ".join(
        f"{kind}: from {intervals[0].estimate:.4f} at layer 2 to {intervals[-1].estimate:.4f} at the last"
        for kind, intervals in by_layer.items()
    )
    shares = [mean_interval(values).map(in_points) for values in unforeseen]
    return Conclusion(
        numbers={"runs": results.records("kind", "seed")},
        findings=[
            EXPANDED.judge(Measured.exact(agreeing_digits(max(errors)), len(errors)), {"": [max(errors)]}),
            UNFORESEEN.judge(
                Paired(unforeseen[ten], unforeseen[three]).difference(),
                {"at ten layers": unforeseen[ten], "at three": unforeseen[three]},
            ),
            DEEPER.judge(Paired(last, first).ratio(), {"at the last layer": last, "at the second": first}),
            less,
        ],
        summary=[
            "The article explains the trouble of deep networks by internal covariate shift: every layer is updated as "
            "if the others stood still, but all move at once, and so each layer's input changes under it. Its example "
            "is y = x w1 w2 w3, whose step has terms in which the updates of several layers multiply.",
            f"Written out for 1 to {max(plan.depths)} layers, the part of the step that the gradient did not foresee "
            f"was {shares[three].estimate:.0f} % of what it foresaw at three layers and "
            f"{shares[ten].estimate:.0f} % at ten.",
            f"In real training of {len(plan.hidden)} hidden layers, one step moved the inputs of the second layer by "
            f"{by_layer[PLAIN][0].estimate:.3f} standard deviations and those of the last by "
            f"{by_layer[PLAIN][-1].estimate:.3f}; with batch normalization by {by_layer[WITH][0].estimate:.4f} and "
            f"{by_layer[WITH][-1].estimate:.4f}.",
            _REDUCED[less.verdict],
        ],
        tables=[
            Table(
                "The step of y = x w1 ... wk by the order of its terms: means over the seeds",
                ["Layers", "Terms", "First: foreseen", "Second", "Third", "Higher", "Whole step"],
                [_row(depth, of_depth) for depth, of_depth in zip(plan.depths, examples, strict=True)],
            ),
            Table(
                "What one step of training does to a layer's input: shift in standard deviations, change of width in "
                "per cent",
                ["Layer", "Plain: shift", "Plain: width", "Batch norm: shift", "Batch norm: width"],
                [
                    [
                        str(i + 2),
                        *(
                            text
                            for kind in NETWORKS
                            for text in (cell(by_layer[kind][i], ".4f"), f"{100 * widths[kind][i]:.2f}")
                        ),
                    ]
                    for i in range(len(plan.hidden))
                ],
            ),
        ],
        charts=[
            Chart(
                title="The unforeseen part of a linear network's step",
                description=f"The part of the step that is not of first order, in per cent of the part that is, grows "
                f"from {shares[0].estimate:.0f} at {plan.depths[0]} layer to {shares[-1].estimate:.0f} at "
                f"{plan.depths[-1]} layers.",
                x_label="layers",
                y_label="unforeseen (% of the foreseen)",
                curves=[interval_curve("second and higher orders", plan.depths, shares)],
            ),
            Chart(
                title="Shift of each layer's input in one step of training",
                description=f"Shift of the features' means in standard deviations, logarithmic. {spoken}.",
                x_label="layer",
                y_label="shift (standard deviations)",
                curves=[
                    interval_curve(kind, range(2, len(plan.hidden) + 2), intervals)
                    for kind, intervals in by_layer.items()
                ],
                log_y=True,
            ),
        ],
        notes=[
            f"Linear example: x = 1, weights drawn around 1 with a standard deviation of {plan.spread}, learning rate "
            f"{plan.example_rate}, y itself descends.",
            f"Training: plain gradient descent, learning rate {plan.learning_rate} for both networks, {plan.steps} "
            f"steps, every {plan.every}th measured on {plan.watched} training samples that pass in training mode; "
            "geometric means over steps and seeds.",
            "The shift is that of each feature's mean, in standard deviations of the layer's input. That it is small "
            "where each feature has just been normalised to gamma and beta is what batch normalization is made for. "
            "Whether this is why it helps is another question: see the dispute.",
        ],
    )


_REDUCED = {
    Verdict.SUPPORTED: "So batch normalization did reduce the shift.",
    Verdict.NOT_SUPPORTED: "So batch normalization did not reduce the shift; it was larger with it.",
    Verdict.INCONCLUSIVE: "Whether batch normalization reduced the shift cannot be told from these numbers.",
}


def _row(depth: int, examples: Sequence[Run]) -> list[str]:
    orders = [statistics.fmean(terms) for terms in zip(*(example["orders"] for example in examples), strict=True)]
    shown = [f"{term:+.4f}" for term in orders[:3]] + ["-"] * (3 - len(orders))
    rest = f"{math.fsum(orders[3:]):+.4f}" if len(orders) > 3 else "-"
    step = statistics.fmean(example["step"] for example in examples)
    return [str(depth), f"{2**depth - 1:,}", *shown, rest, f"{step:+.4f}"]


CODE = """\
from batchnorm.study.shift import expand

for depth in (1, 3, 10):
    old, foreseen, *higher = expand([1.0] * depth, 0.1)
    print(depth, foreseen, sum(higher))
"""

EXPERIMENT = Experiment(
    name="shift",
    title="What does a step do to the layers above?",
    claims=(EXPANDED, UNFORESEEN, DEEPER, LESS),
    full=Plan(seeds=10),
    quick=Plan(seeds=6, every=20),
    grid=lambda plan: Grid(plan.seeds, kind=(LINEAR, *NETWORKS)),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps / 500,
    code=CODE,
)

"""Why it works is disputed (M14): covariate shift and smoothness, measured side by side.

Three networks from equal weights: plain, with batch normalization, and with noise after batch normalization that brings
the covariate shift back on purpose. Along their training: the shift of their layers' inputs, and how loss and gradient
change along the step.

Source: Santurkar, Tsipras, Ilyas and Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.population.recalibrate import recalibrate
from batchnorm.report.document import Chart, Curve, Table
from batchnorm.study import training
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import cell
from batchnorm.study.grid import Grid, Results
from batchnorm.study.loss_landscape import Loss, disturbance, measure_along_step
from batchnorm.study.measured import Measured, Paired
from batchnorm.study.networks import Placement
from batchnorm.study.noise_injection import Noise, add_noise
from batchnorm.study.shift import SHIFT, layer_inputs, shift
from batchnorm.study.statistics import Interval, mean_interval
from batchnorm.study.verdict import Claim, Finding, Margin, Quantity, Verdict

PLAIN, WITH, NOISY = "plain", "batch norm", "noisy batch norm"
NETWORKS: dict[str, Placement] = {PLAIN: "none", WITH: "before", NOISY: "before"}
_LABELS = {WITH: "with", NOISY: "noisy", PLAIN: "without"}

# Half: if the shift were the explanation, most of the gain would go with it.
EXPLAINS = Claim(
    "gain-goes-with-stability",
    "M14",
    "Most of batch norm's gain goes when noise brings the shift back",
    Quantity("gain in accuracy", "points", ".1f", 100),
    Margin("half of batch norm's gain in training accuracy less the gain that noisy batch norm keeps", 0.0),
)
NOISIER = Claim(
    "noise-shifts-more",
    "M14",
    "Noisy batch norm has more covariate shift than no batch norm",
    SHIFT,
    Margin("shift of the layers' inputs in noisy batch norm over that in the plain network", 1.0, "times"),
)
# One in a hundred, over the whole training: a difference that one would see in its curve.
STILL = Claim(
    "noisy-learns-faster",
    "M14",
    "Noisy batch norm learns faster than no batch norm all the same",
    Quantity("training accuracy", "%", ".1f", 100),
    Margin("training accuracy of noisy batch norm less that of the plain network, mean over the training", 0.01),
)
# The paper has "similar or worse"; 0.05 in a cosine is similar.
GRADIENTS = Claim(
    "gradients-not-calmer",
    "M14",
    "Steps of the layers below disturb gradients no less with batch norm",
    Quantity("1 - cosine", form=".3f"),
    Margin("1 - cosine of a layer's gradients before and after, with batch norm less without", -0.05),
)
LOSS, PREDICTIVE, SMOOTH = (
    Claim(
        key,
        "M14",
        f"With batch norm the {statement}",
        Quantity(measure, geometric=True),
        Margin(f"{measure} of the plain network over that with batch norm, along the step", 1.0, "times"),
    )
    for key, statement, measure in (
        ("smoother-loss", "loss changes less along the step", "range of the loss"),
        ("predictive-gradient", "gradient changes less along the step", "largest change of the gradient"),
        ("beta-smoothness", "gradient changes less per length of step", "effective beta-smoothness"),
    )
)
CLAIMS = (NOISIER, EXPLAINS, STILL, GRADIENTS, LOSS, PREDICTIVE, SMOOTH)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int  # how many of each network
    steps: int = 300  # optimiser steps of each training
    every: int = 15  # steps from one measured step to the next
    learning_rate: float = 0.1  # of every step, the same for all networks
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # the points along the step, in learning rates
    batch_size: int = 32  # samples in a step
    hidden: tuple[int, ...] = (64,) * 8  # features of each hidden layer
    watched: int = 256  # training samples whose way through the layers is watched


def network(setting: Setting, plan: Plan, kind: str, seed: int) -> tuple[nn.Sequential, torch.Generator]:
    """One of the three, and the generator that goes on to draw the order of the samples."""
    generator = torch.Generator().manual_seed(seed)
    quiet = setting.perceptron(plan.hidden, NETWORKS[kind], generator)
    return (add_noise(quiet, setting.layers, seed) if kind == NOISY else quiet), generator


def run(setting: Setting, plan: Plan, kind: str, seed: int) -> dict[str, Any]:
    """Train one network and measure along the way.

    Returns:
        learning: the mean accuracy on the mini-batches of all steps, each before its step.
        test: the test accuracy at the end, with the training set's statistics and without noise.
        at: the measured steps.
        curve: the mean accuracy on the mini-batches since the measured step before.
        shift: at each measured step, the geometric mean over the layers of `shift.shift`.
        disturbance, loss_range, gradient_change, smoothness: at each measured step, see `loss_landscape`.
    """
    train = setting.data.train
    model, generator = network(setting, plan, kind, seed)
    parameters = list(model.parameters())
    watched = train.inputs[: plan.watched]
    order = training.batches(len(train.labels), plan.batch_size, generator)
    right: list[float] = []
    measured: dict[str, list[float]] = {}
    rates = [factor * plan.learning_rate for factor in plan.factors]
    for step in range(1, plan.steps + 1):
        chosen = next(order)
        x, y = train.inputs[chosen], train.labels[chosen]
        model.train()
        # Before the step's own pass and after it: the noise is to be that of two steps, as anything watched would see.
        before = layer_inputs(model, watched) if step % plan.every == 0 else []
        again = _repeatable(model, x, y)
        outputs = model(x)
        right.append(training.accuracy(outputs.detach().argmax(1), y))
        gradients = torch.autograd.grad(nn.functional.cross_entropy(outputs, y), parameters)
        if step % plan.every:
            training.gradient_step(parameters, gradients, plan.learning_rate)
            continue
        found = asdict(measure_along_step(parameters, again, rates))
        found["disturbance"] = disturbance(model, again, plan.learning_rate)
        training.gradient_step(parameters, gradients, plan.learning_rate)
        after = layer_inputs(model, watched)
        found["shift"] = statistics.geometric_mean(shift(*pair) for pair in zip(before, after, strict=True))
        found["curve"] = statistics.fmean(right[-plan.every :])
        for name, value in found.items():
            measured.setdefault(name, []).append(value)
    recalibrate(model, torch.split(train.inputs, plan.watched))
    test = training.accuracy(training.predict(model, setting.data.test.inputs), setting.data.test.labels)
    at = list(range(plan.every, plan.steps + 1, plan.every))
    return {"learning": statistics.fmean(right), "test": test, "at": at, **measured}


def _repeatable(model: nn.Module, x: Tensor, y: Tensor) -> Loss:
    """The loss on one mini-batch as a function of the weights alone: each pass has the same noise, the next one's."""
    noises = [module for module in model.modules() if isinstance(module, Noise)]
    states = [noise.generator.get_state() for noise in noises]

    def loss() -> Tensor:
        for noise, state in zip(noises, states, strict=True):
            noise.generator.set_state(state)
        return nn.functional.cross_entropy(model(x), y)

    return loss


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Judge both accounts over the seeds."""
    plainly = {name: {kind: results.column(name, kind) for kind in NETWORKS} for name in ("learning", "test")}
    plainly["disturbance"] = {kind: [*map(statistics.fmean, results.column("disturbance", kind))] for kind in NETWORKS}
    # Logarithms of the means over the measured steps, so that differences of them are ratios.
    logs = {
        name: {
            kind: [math.log(statistics.geometric_mean(series)) for series in results.column(name, kind)]
            for kind in NETWORKS
        }
        for name in ("shift", "loss_range", "gradient_change", "smoothness")
    }
    learning, disturbed = plainly["learning"], plainly["disturbance"]
    gains = {kind: Paired(learning[kind], learning[PLAIN]).differences() for kind in (WITH, NOISY)}
    gone = [0.5 * ours - noisy for ours, noisy in zip(gains[WITH], gains[NOISY], strict=True)]
    ordinary = {
        EXPLAINS: (Measured.mean_difference(gone), {"with": gains[WITH], "noisy": gains[NOISY]}),
        STILL: (Measured.mean_difference(gains[NOISY]), {"noisy": learning[NOISY], "without": learning[PLAIN]}),
        GRADIENTS: (
            Paired(disturbed[WITH], disturbed[PLAIN]).difference(),
            {"with": disturbed[WITH], "without": disturbed[PLAIN]},
        ),
    }
    ratios = {
        NOISIER: ("shift", NOISY, PLAIN),
        LOSS: ("loss_range", PLAIN, WITH),
        PREDICTIVE: ("gradient_change", PLAIN, WITH),
        SMOOTH: ("smoothness", PLAIN, WITH),
    }
    findings = {
        claim: claim.judge(*(ordinary[claim] if claim in ordinary else _ratio(logs, *ratios[claim])))
        for claim in CLAIMS
    }
    means = {name: {kind: mean_interval(of_kind[kind]) for kind in NETWORKS} for name, of_kind in plainly.items()}
    for name, of_kind in logs.items():
        means[name] = {kind: mean_interval(of_kind[kind]).map(math.exp) for kind in NETWORKS}
    smoothness = [findings[claim] for claim in (LOSS, PREDICTIVE, SMOOTH)]
    factors = [f"{1 / finding.interval.estimate:.2f}" for finding in smoothness]
    verdicts = [finding.verdict for finding in smoothness]
    return Conclusion(
        numbers={"runs": results.records("network", "seed")},
        findings=list(findings.values()),
        summary=[
            "The article explains batch normalization by less covariate shift, and ends by saying that this is "
            "disputed: sceptics hold that the shift is not the cause, and that a smoother landscape of the loss is "
            "what helps. Both were measured on the same three networks: plain, with batch normalization, and with "
            "noise after each batch normalization, whose mean and variance change with every step.",
            f"Shift of the layers' inputs in one step, in standard deviations: {_three(means['shift'], '.4f')}. "
            f"Training accuracy, mean over the training, in per cent: {_three(means['learning'], '.1f', 100)}.",
            _account(findings),
            f"Batch normalization changed the range of the loss along the step by a factor of {factors[0]}, the "
            f"gradient's change by {factors[1]}, and effective beta-smoothness by {factors[2]} (below 1 is smoother). "
            f"{verdicts.count(Verdict.SUPPORTED)} of these 3 measures support the sceptics' account, "
            f"{verdicts.count(Verdict.NOT_SUPPORTED)} speak against it.",
        ],
        tables=[
            Table(
                "Means over seeds and measured steps (geometric for shift, loss and gradient) with 95 % intervals",
                ["Measure", *NETWORKS],
                [
                    [label, *(cell(means[name][kind], form, times) for kind in NETWORKS)]
                    for name, (label, form, times) in _NAMES.items()
                ],
            )
        ],
        charts=[
            _chart(results, "curve", "Training accuracy", "accuracy on mini-batches", log=False),
            _chart(results, "shift", "Covariate shift", "shift (standard deviations)"),
            _chart(results, "loss_range", "Range of the loss along the step", "range of the loss"),
            _chart(results, "gradient_change", "Change of the gradient along the step", "change of the gradient"),
        ],
        notes=[
            f"Networks of {len(plan.hidden)} hidden layers of {plan.hidden[0]}, all from the same weights, plain "
            f"gradient descent with the same learning rate {plan.learning_rate} and batches of {plan.batch_size}; one "
            f"step in {plan.every} of {plan.steps} is measured.",
            "Along the step: loss and gradient on the step's mini-batch at "
            + ", ".join(f"{factor:g}" for factor in plan.factors)
            + " times the step, on the path that each network takes itself, as the sceptics' paper does. The networks' "
            "gradients have other lengths, so equal rates are not equal distances; effective beta-smoothness is per "
            "distance.",
            "1 - cosine: how much the gradient of a layer's weights turns when all layers below have done their step "
            "and it has not: the paper's own definition of internal covariate shift.",
            "Test accuracy: without noise, with the statistics of the whole training set.",
        ],
    )


def _ratio(
    logs: Mapping[str, Mapping[str, list[float]]], name: str, a: str, b: str
) -> tuple[Measured, dict[str, list[float]]]:
    """The geometric mean of `a / b`, and both."""
    both = {_LABELS[kind]: [*map(math.exp, logs[name][kind])] for kind in sorted((a, b), key=[*_LABELS].index)}
    return Paired(logs[name][a], logs[name][b]).difference().map(math.exp), both


def _three(by_kind: dict[str, Interval], form: str, times: float = 1) -> str:
    return ", ".join(f"{kind} {times * interval.estimate:{form}}" for kind, interval in by_kind.items())


def _account(findings: dict[Claim, Finding]) -> str:
    """What noisy batch norm says about covariate shift as the cause."""
    shifts, goes, still = (findings[claim].verdict for claim in (NOISIER, EXPLAINS, STILL))
    if shifts is not Verdict.SUPPORTED:
        return "The noise did not surely bring back more shift than the plain network has, so it tests nothing here."
    if goes is Verdict.SUPPORTED:
        return "With the shift brought back most of the gain was gone: here the shift may well be the cause."
    if goes is Verdict.NOT_SUPPORTED and still is Verdict.SUPPORTED:
        return (
            "With more shift than the plain network has, most of the gain was still there: here less shift is not "
            "what it comes from."
        )
    return "How much of the gain is left when the shift is brought back cannot be told from these numbers."


_NAMES = {
    "learning": ("Training accuracy, mean over the training (%)", ".1f", 100),
    "test": ("Test accuracy at the end (%)", ".1f", 100),
    "shift": ("Shift of the layers' inputs (standard deviations)", ".4f", 1),
    "disturbance": ("1 - cosine of gradients when the layers below step", ".3f", 1),
    "loss_range": ("Range of the loss along the step", ".3f", 1),
    "gradient_change": ("Largest change of the gradient along the step", ".2f", 1),
    "smoothness": ("Effective beta-smoothness", ".1f", 1),
}


def _chart(results: Results, name: str, title: str, label: str, *, log: bool = True) -> Chart:
    curves = []
    for kind in NETWORKS:
        values = list(zip(*results.column(name, kind), strict=True))
        low, middle, high = ([of(at) for at in values] for of in (min, statistics.median, max))
        curves.append(Curve(kind, results[kind, 0]["at"], middle, low, high))
    ends = ", ".join(
        f"{curve.label} {curve.middle[0]:.3g} at first and {curve.middle[-1]:.3g} at last" for curve in curves
    )
    return Chart(
        title=title,
        description=f"{title} over the training, median and range of the seeds: {ends}.",
        x_label="step",
        y_label=label,
        curves=curves,
        log_y=log,
    )


CODE = """\
from batchnorm.study import dispute
from batchnorm.study.dataset import digits
from batchnorm.study.experiment import Setting
from batchnorm.study.networks import OURS

plan = dispute.Plan(seeds=1, steps=45, hidden=(32, 32, 32))
for kind in dispute.NETWORKS:
    found = dispute.run(Setting(digits(), OURS), plan, kind, 0)
    print(kind, found["learning"], found["shift"], found["loss_range"])
"""

EXPERIMENT = Experiment(
    name="dispute",
    title="Why does it work? The dispute",
    claims=CLAIMS,
    full=Plan(seeds=10),
    quick=Plan(seeds=6, every=50, hidden=(32,) * 8),
    grid=lambda plan: Grid(plan.seeds, network=NETWORKS),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps * len(plan.hidden) / 2500,
    code=CODE,
)

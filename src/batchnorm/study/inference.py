"""Single observations at inference: by what statistics to normalise them (M7, M8)."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.population.recalibrate import recalibrate
from batchnorm.report.document import Chart, Table, percent
from batchnorm.study import training
from batchnorm.study.experiment import Conclusion, Experiment, Setting
from batchnorm.study.formatting import in_points, interval_curve, mean_percent
from batchnorm.study.grid import Grid, Results, Run
from batchnorm.study.measured import Measured, Paired
from batchnorm.study.statistics import Interval, mean_interval
from batchnorm.study.verdict import Claim, Margin, Quantity

PERCEPTRON, RESIDUAL = "perceptron", "residual"
OWN, RUNNING, AVERAGE, POOLED, EXACT = "its own", "running average", "average", "pooled", "exact"
# What inference may normalise by; recalibrate's names are its methods.
RECALIBRATED = {AVERAGE: "average", POOLED: "pooled", EXACT: "exact"}
POPULATION = (RUNNING, *RECALIBRATED)

_ACCURACY = Quantity("test accuracy", "%", ".1f", 100)
# Half: by then more of what was learnt is gone than left.
MEANINGLESS = {
    network: Claim(
        f"own-statistics-{network}",
        "M7",
        f"A single observation's own statistics mean nothing: a {name}",
        _ACCURACY,
        Margin("share of what was learnt beyond chance that is lost, against the running average", 0.5),
    )
    for network, name in ((PERCEPTRON, "perceptron"), (RESIDUAL, "residual net"))
}
# One in a hundred: more than a change of the arithmetic's rounding could explain.
COMPANY = Claim(
    "test-batch-statistics",
    "M7",
    "By a test batch's statistics, the answer depends on the batch",
    Quantity("changed answers", "%", ".1f", 100),
    Margin("share of observations answered otherwise when batches of 8 are made up otherwise", 0.01),
)
# Rounding may decide a tie now and then: one in 200.
ALONE = Claim(
    "no-batch-needed",
    "M7",
    "By population statistics, an observation needs no batch",
    Quantity("equal answers", "%", ".2f", 100),
    Margin("share of observations answered alike alone and in a batch, the least of four kinds of statistics", 0.995),
)
# One in a hundred answers, as for the company: below that nobody would choose between the two.
EITHER = Claim(
    "whole-set-or-average",
    "M8",
    "The whole set's statistics and the running average serve alike",
    _ACCURACY,
    Margin("0.01 less the difference of their test accuracies", 0.0),
)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    seeds: int  # how many of each network
    steps: int = 400  # optimiser steps
    learning_rate: float = 0.1  # of every step
    batch_size: int = 32  # samples in a step
    hidden: tuple[int, ...] = (64,) * 4  # features of the perceptron's hidden layers
    width: int = 16  # channels of the residual network
    blocks: int = 1  # of the residual network
    company: int = 8  # samples in the batches whose own statistics are used
    shown: int = 360  # test samples that are shown, at most


def run(setting: Setting, plan: Plan, kind: str, seed: int) -> dict[str, Any]:
    """Train one network, then answer every test sample alone, by each kind of statistics.

    Returns:
        shown: how many test samples.
        accuracy, loss: of the answers given alone, by the name of the statistics.
        alike: the share answered alike alone and all at once, by the name of the population's statistics.
        company: the share that two ways of making up batches answer differently, by the batches' own statistics.
    """
    data = setting.data
    generator = torch.Generator().manual_seed(seed)
    network = _network(setting, plan, kind, generator)
    descent = training.descend(
        network, data.train, learning_rate=plan.learning_rate, batch_size=plan.batch_size, generator=generator
    )
    for _ in islice(descent, plan.steps):
        pass
    networks = {RUNNING: network}
    order = torch.randperm(len(data.train.labels), generator=generator)
    parts = torch.split(data.train.inputs[order], plan.batch_size)
    for name, method in RECALIBRATED.items():
        networks[name] = copy.deepcopy(network)
        recalibrate(networks[name], parts, method=method)
    inputs, labels = data.test.inputs[: plan.shown], data.test.labels[: plan.shown]
    alone = {name: training.infer(member, inputs, 1) for name, member in networks.items()}
    together = {name: training.infer(member, inputs) for name, member in networks.items()}
    return {
        "shown": len(labels),
        "accuracy": {
            name: training.accuracy(outputs.argmax(1), labels)
            for name, outputs in {OWN: by_own_statistics(network, inputs), **alone}.items()
        },
        "loss": {name: float(nn.functional.cross_entropy(outputs, labels)) for name, outputs in alone.items()},
        "alike": {name: training.accuracy(alone[name].argmax(1), together[name].argmax(1)) for name in networks},
        "company": _company(network, inputs, plan.company, generator),
    }


def _network(setting: Setting, plan: Plan, kind: str, generator: torch.Generator) -> nn.Module:
    if kind == PERCEPTRON:
        return setting.perceptron(plan.hidden, "before", generator)
    return setting.residual(plan.width, plan.blocks, "before", generator)


def by_own_statistics(network: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs for each sample normalised by its own statistics alone, as in training with a batch of one.

    A layer refuses to train on a single value, so the sample is shown twice: its mean and variance stay the same.
    """
    network = copy.deepcopy(network).train()
    with torch.no_grad():
        return torch.cat([network(torch.cat([sample, sample]))[:1] for sample in torch.split(inputs, 1)])


def _company(network: nn.Module, inputs: Tensor, size: int, generator: torch.Generator) -> float:
    """The share of samples whose class changes with the other samples in the batch."""
    network = copy.deepcopy(network).train()
    classes = []
    for _ in range(2):
        order = torch.randperm(len(inputs), generator=generator)
        # An incomplete last batch of one could not be normalised: it joins the one before.
        parts = list(torch.split(order, size))
        if len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        answers = torch.empty(len(inputs), dtype=torch.int64)
        with torch.no_grad():
            for part in parts:
                answers[part] = network(inputs[part]).argmax(1)
        classes.append(answers)
    return 1 - training.accuracy(*classes)


def conclude(setting: Setting, plan: Plan, results: Results) -> Conclusion:
    """Judge the claims over the seeds."""
    runs = {kind: results.runs(kind) for kind in MEANINGLESS}
    chance = setting.data.chance
    pairs = list(zip(*runs.values(), strict=True))
    company = [statistics.fmean(run["company"] for run in pair) for pair in pairs]
    alike = [min(share for run in pair for share in run["alike"].values()) for pair in pairs]
    both = {name: [statistics.fmean(run["accuracy"][name] for run in pair) for pair in pairs] for name in POPULATION}
    either = Paired(both[EXACT], both[RUNNING])
    accuracy = {
        kind: {name: mean_interval([run["accuracy"][name] for run in of_kind]) for name in (OWN, *POPULATION)}
        for kind, of_kind in runs.items()
    }
    return Conclusion(
        numbers={"chance": chance, "runs": results.records("network", "seed")},
        findings=[
            *(
                claim.judge(
                    Measured.mean_difference([_lost(run["accuracy"], chance) for run in runs[kind]]),
                    {
                        label: [run["accuracy"][name] for run in runs[kind]]
                        for name, label in ((OWN, "by its own"), (RUNNING, "by the running average"))
                    },
                )
                for kind, claim in MEANINGLESS.items()
            ),
            COMPANY.judge(Measured.mean(company), {"": company}),
            ALONE.judge(Measured.mean(alike), {"": alike}),
            EITHER.judge(
                either.equivalent(0.01), {"by the whole set's": both[EXACT], "by the running average": both[RUNNING]}
            ),
        ],
        summary=[
            "At inference observations may arrive one at a time. The article says that their own statistics then mean "
            "nothing, that those of the test set must not be used, and that the statistics come either from the whole "
            "training set or from a weighted average over the mini-batches.",
            f"{plan.seeds} perceptrons and {plan.seeds} residual networks were trained; then each of "
            f"{runs[PERCEPTRON][0]['shown']:,} test samples was shown alone.",
            *(_own_sentence(kind, accuracy[kind], chance) for kind in runs),
            f"By the statistics of test batches of {plan.company}, {mean_percent(company)} % of the "
            "answers changed with the other samples in the batch. By population statistics, "
            f"{mean_percent(alike)} % of the answers were the same alone and among all.",
            f"Statistics of the whole training set in place of the running average changed the accuracy by "
            f"{100 * statistics.fmean(either.differences()):+.2f} percentage points.",
        ],
        tables=[
            Table(
                "Single test samples, by the statistics that normalise them: means over the seeds",
                ["Network, statistics", "Accuracy (%)", "95 % interval", "Loss", "Answered otherwise in a batch (%)"],
                [_row(kind, name, accuracy[kind][name], runs[kind]) for kind in runs for name in (OWN, *POPULATION)],
            )
        ],
        charts=[_chart(accuracy)],
        notes=[
            "Its own statistics: the sample is shown twice, since a layer refuses to train on a single value; mean and "
            "variance of two equal samples are those of one. In a perceptron every channel then has variance 0; in a "
            "convolutional network the pixels of one sample still have a mean and a variance.",
            'Running average: kept during training. "average" is the equally weighted mean over the mini-batches, '
            '"pooled" one pass over the training set with batch statistics upstream, "exact" the moments of the whole '
            "training set as inference will see them.",
        ],
    )


def _lost(accuracy: dict[str, float], chance: float) -> float:
    """The share of what was learnt beyond chance that own statistics lose; 0 where nothing was learnt."""
    learnt = accuracy[RUNNING] - chance
    return (accuracy[RUNNING] - accuracy[OWN]) / learnt if learnt > 0 else 0.0


def _own_sentence(kind: str, accuracy: dict[str, Interval], chance: float) -> str:
    name = "residual network" if kind == RESIDUAL else kind
    own, running = (percent(accuracy[statistic].estimate) for statistic in (OWN, RUNNING))
    return (
        f"The {name} answered {own} % rightly by the sample's own statistics and {running} % by the running average; "
        f"always giving the commonest answer would be right in {percent(chance)} %."
    )


def _row(kind: str, name: str, accuracy: Interval, runs: list[Run]) -> list[str]:
    loss, different = "-", "-"
    if name != OWN:
        loss = f"{statistics.fmean(run['loss'][name] for run in runs):.4f}"
        different = percent(1 - statistics.fmean(run["alike"][name] for run in runs))
    around = f"{percent(accuracy.low)} to {percent(accuracy.high)}"
    return [f"{kind}, {name}", percent(accuracy.estimate), around, loss, different]


def _chart(accuracy: dict[str, dict[str, Interval]]) -> Chart:
    curves = []
    for offset, (kind, by_name) in enumerate(accuracy.items()):
        x = [i + 0.12 * (2 * offset - 1) for i in range(len(by_name))]
        curves.append(interval_curve(kind, x, [i.map(in_points) for i in by_name.values()], points=True))
    spoken = "; ".join(
        f"{kind}: " + ", ".join(f"{name} {percent(interval.estimate)}" for name, interval in by_name.items())
        for kind, by_name in accuracy.items()
    )
    return Chart(
        title="Test accuracy of single samples",
        description=f"Test accuracy in per cent by the statistics used. {spoken}.",
        x_label="statistics",
        y_label="test accuracy (%)",
        curves=curves,
        names=list(enumerate((OWN, *POPULATION))),
    )


CODE = """\
import torch
import batchnorm as bn
from batchnorm.study.dataset import digits

x = digits().train.inputs.flatten(1)
network = torch.nn.Sequential(torch.nn.Linear(64, 32), bn.BatchNorm1d(32, activation="relu"))
one = x[:1]
print(network(torch.cat([one, one])))  # its own statistics: nothing is left of it
bn.recalibrate(network, x.split(32), method="exact")
print(network.eval()(one))
"""

EXPERIMENT = Experiment(
    name="inference",
    title="How are single observations to be normalised?",
    claims=(*MEANINGLESS.values(), COMPANY, ALONE, EITHER),
    full=Plan(seeds=10),
    quick=Plan(seeds=6, hidden=(32, 32), width=4, shown=60),
    grid=lambda plan: Grid(plan.seeds, network=(PERCEPTRON, RESIDUAL)),
    run=run,
    conclude=conclude,
    seconds=lambda plan: plan.steps / 250,
    code=CODE,
)

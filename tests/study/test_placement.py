"""Before the activation or after it: what is trained, and what is said of made-up accuracies."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.study import placement, training
from batchnorm.study.dataset import Data
from batchnorm.study.experiment import Conclusion, Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers, Placement, perceptron, residual
from batchnorm.study.placement import CLAIMS, PERCEPTRON, PLACEMENTS, RESIDUAL, Plan, conclude, run
from batchnorm.study.verdict import Verdict
from study.plans import TINY, Start, carried_out
from support import tolerances

PLAN = TINY["placement"]
SEEN = replace(PLAN, steps=12, hidden=(8, 8))  # long enough for one training to end otherwise than another
RATE = 0.3
YES, NO, OPEN = Verdict.SUPPORTED, Verdict.NOT_SUPPORTED, Verdict.INCONCLUSIVE


def test_every_combination_once() -> None:
    plan = Plan(seeds=3, rates=(0.1, 0.2))
    expected = itertools.product(("perceptron", "residual network"), ("before", "after", "none"), (0.1, 0.2), (0, 1, 2))
    assert sorted(placement.EXPERIMENT.grid(plan).tasks()) == sorted(expected)


@pytest.mark.parametrize("network", CLAIMS)
@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_the_three_start_alike(setting: Setting, starts: list[Start], layers: Layers, network: str) -> None:
    """From equal weights, and from the same place in the generator that orders the samples."""
    for kind in PLACEMENTS:
        run(Setting(setting.data, layers), PLAN, network, kind, RATE, 1)
    run(Setting(setting.data, layers), PLAN, network, "before", RATE, 0)
    before, *others, another = starts
    maps = 2 if network == PERCEPTRON else 4  # the hidden layer or the first map and a block's two, and the last map
    assert len(before.weights) == maps
    for start in others:
        assert all(torch.equal(a, b) for a, b in zip(before.weights, start.weights, strict=True))
        assert torch.equal(before.order, start.order)
        assert start.options == {"learning_rate": RATE, "batch_size": 32}
    assert not torch.equal(before.weights[0], another.weights[0])


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("network", CLAIMS)
def test_what_is_trained(setting: Setting, network: str, kind: Placement, layers: Layers) -> None:
    """Against a training by hand: the mean accuracy on the test samples after each of the last five steps."""
    found = run(Setting(setting.data, layers), SEEN, network, kind, RATE, 1)
    generator = torch.Generator().manual_seed(1)
    if network == PERCEPTRON:
        model = perceptron(64, (8, 8), 10, placement=kind, layers=layers, generator=generator)
    else:
        model = residual((1, 8, 8), 2, 1, 10, placement=kind, layers=layers, generator=generator)
    test = setting.data.test
    descent = training.descend(model, setting.data.train, learning_rate=RATE, batch_size=32, generator=generator)
    right = []
    for _ in itertools.islice(descent, 12):
        answers = model.eval()(test.inputs).detach().numpy().argmax(1)
        right.append(np.mean(answers == test.labels.numpy()))
    assert found == {"accuracy": pytest.approx(np.mean(right[-5:]), rel=tolerances.STUDY_DOUBLE)}


@pytest.mark.parametrize("network", CLAIMS)
def test_a_diverged_training_has_nothing_right(setting: Setting, network: str) -> None:
    assert run(setting, PLAN, network, "none", math.inf, 0) == {"accuracy": 0.0}


Accuracies = Mapping[Placement, Sequence[float]]
ALIKE: Accuracies = {"before": [0.9] * 6, "after": [0.9] * 6, "none": [0.6] * 6}


def concluded(
    setting: Setting, of_perceptron: Accuracies, of_residual: Accuracies = ALIKE, seeds: int = 6
) -> Conclusion:
    """At a single rate, from each seed's accuracies."""
    results: dict[Any, Any] = {
        (network, kind, 0.1, seed): {"accuracy": accuracies[kind][seed]}
        for network, accuracies in ((PERCEPTRON, of_perceptron), (RESIDUAL, of_residual))
        for kind in PLACEMENTS
        for seed in range(seeds)
    }
    return conclude(setting, Plan(seeds=seeds, rates=(0.1,)), Results(results))


@pytest.mark.parametrize(
    ("after", "verdict", "measure"),
    [
        ([0.9] * 6, YES, 1.0),
        ([0.906] * 6, YES, 0.4),
        ([0.894] * 6, YES, 0.4),
        ([0.95] * 6, NO, -4.0),
        ([0.85] * 6, NO, -4.0),
        ([0.0] * 6, NO, -89.0),  # diverged
        ([0.86, 0.94] * 3, OPEN, 1.0),  # alike on average, but who knows
    ],
)
def test_verdicts(setting: Setting, after: list[float], verdict: Verdict, measure: float) -> None:
    """A point less the difference, in points, whichever of the two is better; of each network by itself."""
    moved = {**ALIKE, "after": after}
    for networks, verdicts, measures in (
        ((moved, ALIKE), (verdict, YES), (measure, 1.0)),
        ((ALIKE, moved), (YES, verdict), (1.0, measure)),
    ):
        found = concluded(setting, *networks).findings
        assert [finding.claim for finding in found] == [CLAIMS[PERCEPTRON], CLAIMS[RESIDUAL]]
        assert tuple(finding.verdict for finding in found) == verdicts
        assert [finding.interval.estimate for finding in found] == pytest.approx(measures)


def test_five_seeds_decide_nothing(setting: Setting) -> None:
    assert [finding.verdict for finding in concluded(setting, ALIKE, seeds=5).findings] == [OPEN, OPEN]


def test_the_effect_is_of_after_minus_before(setting: Setting) -> None:
    """Differences of 1, 2 and 3 points: mean 2, standard deviation 1."""
    changed: Accuracies = {"before": [0.9, 0.8, 0.7], "after": [0.91, 0.82, 0.73], "none": [0.5, 0.5, 0.5]}
    first, second = concluded(setting, changed, seeds=3).findings
    assert first.measured.effect == pytest.approx(2)
    assert first.interval.estimate == pytest.approx(-1)
    assert second.measured.effect is None


def test_the_rate_is_chosen_by_the_other_seeds(setting: Setting) -> None:
    """Seed 0 is best at 0.1 by far, and alone makes the others choose it; the diverged rate nobody chooses."""
    scores = {0.1: [0.9, 0.5, 0.5], 0.2: [0.6, 0.6, 0.6], 9.0: [0.0, 0.0, 0.0]}
    results: dict[Any, Any] = {
        (network, kind, rate, seed): {"accuracy": scores[rate][seed]}
        for network, kind, rate, seed in itertools.product(CLAIMS, PLACEMENTS, scores, range(3))
    }
    found = conclude(setting, Plan(seeds=3, rates=tuple(scores)), Results(results))
    assert [(cell["network"], cell["placement"]) for cell in found.numbers["networks"]] == list(
        itertools.product(CLAIMS, PLACEMENTS)
    )
    for cell in found.numbers["networks"]:
        assert (cell["rates"], cell["accuracy"]) == ((0.2, 0.1, 0.1), (0.6, 0.5, 0.5))
    assert found.tables[0].rows[0] == (
        "perceptron",
        "before the activation",
        "0.1 or 0.2",
        "53.3",
        "50.0-60.0",
    )


def test_what_is_said(setting: Setting) -> None:
    diverged: Accuracies = {"before": [0.9] * 6, "after": [0.85] * 6, "none": [0.0] * 6}
    better: Accuracies = {"before": [0.7] * 6, "after": [0.75] * 6, "none": [0.8] * 6}
    found = concluded(setting, diverged, better)
    json.dumps(found.numbers, allow_nan=False)
    _, of_perceptron, of_residual = found.summary
    for sentence, network, changes in (
        (of_perceptron, "perceptron", ("-5.00", "+90.00")),
        (of_residual, "residual network", ("+5.00", "-10.00")),
    ):
        after, gain = (f"{change} percentage points (95 % interval {change} to {change})" for change in changes)
        assert sentence == (
            f"In the {network}, moving it from before to after the activation changed the test accuracy by {after}; "
            f"having it before the activation rather than not at all, by {gain}."
        )
    assert [row[1:4] for row in found.tables[0].rows] == [
        (place, "0.1", accuracy)
        for place, accuracy in zip(
            ["before the activation", "after it", "nowhere"] * 2,
            ["90.0", "85.0", "0.0", "70.0", "75.0", "80.0"],
            strict=True,
        )
    ]


def test_what_is_drawn(setting: Setting) -> None:
    better: Accuracies = {"before": [0.7] * 6, "after": [0.65, 0.85] * 3, "none": [0.8] * 6}
    (chart,) = concluded(setting, ALIKE, better).charts
    assert chart.names == ((0, "before the activation"), (1, "after it"), (2, "nowhere"))
    for curve, label, heights in zip(chart.curves, CLAIMS, ([90, 90, 60], [70, 75, 80]), strict=True):
        assert curve.label == label
        assert list(curve.x) == [0, 1, 2]
        assert curve.middle == pytest.approx(heights)
        assert curve.points
    second = chart.curves[1]
    assert second.low is not None
    assert second.high is not None
    assert second.low[1] < 75 < second.high[1]
    assert (second.low[0], second.high[0]) == pytest.approx((70, 70))
    assert "residual network: before the activation 70.0, after it 75.0, nowhere 80.0" in chart.description


@pytest.mark.parametrize(("shape", "words"), [((1, 8, 8), "3x3 convolutions of 8"), ((64,), "linear layers of 8")])
def test_the_notes_name_the_linear_maps(setting: Setting, shape: tuple[int, ...], words: str) -> None:
    data = setting.data
    reshaped = Data(data.train, data.test, shape, data.classes, data.name)
    assert words in concluded(Setting(reshaped, OURS), ALIKE).notes[0]


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Layers) -> None:
    """Two seeds decide nothing."""
    found = carried_out(placement.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert {finding.verdict for finding in found.findings} == {OPEN}
    assert all(0 < accuracy < 1 for cell in found.numbers["networks"] for accuracy in cell["accuracy"])

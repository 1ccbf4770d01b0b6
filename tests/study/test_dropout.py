"""Batch normalization and dropout: what is trained, and what is said of made-up accuracies."""

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

from batchnorm.study import dropout, training
from batchnorm.study.dataset import Part
from batchnorm.study.dropout import (
    BOTH,
    DROPOUT,
    GAP,
    NETWORKS,
    NORM,
    PLAIN,
    REDUNDANT,
    Plan,
    conclude,
    run,
)
from batchnorm.study.experiment import Conclusion, Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers, perceptron
from batchnorm.study.verdict import Verdict
from study.plans import TINY, Start, carried_out
from support import tolerances

PLAN = TINY["dropout"]
SEEN = replace(PLAN, steps=12, hidden=(8, 8))  # long enough for one training to end otherwise than another
RATE = 0.3
YES, NO, OPEN = Verdict.SUPPORTED, Verdict.NOT_SUPPORTED, Verdict.INCONCLUSIVE


def test_every_combination_once() -> None:
    names = "plain", "dropout", "batch norm", "batch norm and dropout"
    expected = itertools.product(names, (0.1, 0.2), (0, 1, 2))
    assert sorted(dropout.EXPERIMENT.grid(Plan(seeds=3, rates=(0.1, 0.2))).tasks()) == sorted(expected)


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_the_four_start_alike(setting: Setting, starts: list[Start], layers: Layers) -> None:
    """From equal weights, with the same few samples, and from the same place in the generator that orders them."""
    chosen = Setting(setting.data, layers)
    for network in NETWORKS:
        run(chosen, replace(SEEN, dropout=0.4), network, RATE, 1)
    run(chosen, SEEN, PLAIN, RATE, 0)
    plain, *others, another = starts
    for start in others:
        assert all(torch.equal(a, b) for a, b in zip(plain.weights, start.weights, strict=True))
        assert torch.equal(plain.samples.indices, start.samples.indices)
        assert torch.equal(plain.order, start.order)
        assert start.options == {"learning_rate": RATE, "batch_size": 32}
    assert [start.dropped for start in starts] == [[], [0.4] * 2, [], [0.4] * 2, []]
    assert not torch.equal(plain.weights[0], another.weights[0])
    assert set(plain.samples.indices.tolist()) != set(another.samples.indices.tolist())


def test_few_training_samples_with_their_labels(setting: Setting, starts: list[Start]) -> None:
    run(setting, PLAN, PLAIN, RATE, 1)
    samples, train = starts[0].samples, setting.data.train
    assert len(set(samples.indices.tolist())) == len(samples.labels) == 64
    where = {index: place for place, index in enumerate(train.indices.tolist())}
    for index, x, y in zip(samples.indices.tolist(), samples.inputs, samples.labels, strict=True):
        assert torch.equal(x, train.inputs[where[index]])
        assert y == train.labels[where[index]]


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_trained(setting: Setting, network: str, layers: Layers) -> None:
    """Against a training by hand: mean accuracies after each of the last five steps, nothing dropped in them."""
    found = run(Setting(setting.data, layers), SEEN, network, RATE, 1)
    generator = torch.Generator().manual_seed(1)
    train, test = setting.data.train, setting.data.test
    few = torch.randperm(len(train.labels), generator=generator)[:64]
    part = Part(train.indices[few], train.inputs[few], train.labels[few])
    model = perceptron(
        64,
        (8, 8),
        10,
        placement="before" if "batch norm" in network else "none",
        layers=layers,
        generator=generator,
        dropout=0.2 if "dropout" in network else 0.0,
    )
    right = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        descent = training.descend(model, part, learning_rate=RATE, batch_size=32, generator=generator)
        for _ in itertools.islice(descent, 12):
            answers = [model.eval()(p.inputs).detach().numpy().argmax(1) for p in (part, test)]
            right.append([np.mean(a == p.labels.numpy()) for a, p in zip(answers, (part, test), strict=True)])
    on_its_samples, on_test = np.mean(right[-5:], axis=0)
    assert found["train"] == pytest.approx(on_its_samples, rel=tolerances.STUDY_DOUBLE)
    assert found["test"] == pytest.approx(on_test, rel=tolerances.STUDY_DOUBLE)


def test_a_diverged_training_has_nothing_right(setting: Setting) -> None:
    for network in (PLAIN, DROPOUT):
        assert run(setting, PLAN, network, math.inf, 0) == {"train": 0.0, "test": 0.0}


# Each network's accuracy on its samples and on the test samples, of all seeds or of one after the other.
Accuracies = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def alike(train: float, test: float) -> tuple[Sequence[float], Sequence[float]]:
    return [train] * 6, [test] * 6


AS_CLAIMED: Accuracies = {
    PLAIN: alike(1.0, 0.8),
    DROPOUT: alike(0.95, 0.85),
    NORM: alike(1.0, 0.9),
    BOTH: alike(0.95, 0.9),
}


def concluded(setting: Setting, changed: Accuracies, seeds: int = 6) -> Conclusion:
    """At a single rate."""
    accuracies = {**AS_CLAIMED, **changed}
    results: dict[Any, Any] = {
        (network, 0.1, seed): {"train": accuracies[network][0][seed], "test": accuracies[network][1][seed]}
        for network in NETWORKS
        for seed in range(seeds)
    }
    return conclude(setting, Plan(seeds=seeds, rates=(0.1,)), Results(results))


@pytest.mark.parametrize(
    ("changed", "measures", "verdicts"),
    [
        ({}, (10, 0), (YES, YES)),
        ({NORM: alike(1.0, 0.75)}, (-5, -15), (NO, NO)),
        ({PLAIN: alike(0.85, 0.8)}, (-5, 0), (NO, YES)),
        ({BOTH: alike(0.95, 0.93)}, (10, -3), (YES, NO)),
        ({BOTH: alike(0.95, 0.905)}, (10, -0.5), (YES, YES)),  # half a point: hardly worth another hyperparameter
        ({BOTH: alike(0.95, 0.5)}, (10, 40), (YES, YES)),  # does harm, so it can be left out
        ({PLAIN: alike(0.9, 0.8)}, (0, 0), (OPEN, YES)),
        ({PLAIN: ([1.0, 0.9] * 3, [0.8, 0.9] * 3)}, (0, 0), (OPEN, YES)),
        ({BOTH: ([0.95] * 6, [0.9, 0.95] * 3)}, (10, -2.5), (YES, OPEN)),
        ({PLAIN: alike(0.0, 0.0)}, (-10, 0), (NO, YES)),  # diverged: nothing learnt, nothing to overfit
        ({BOTH: alike(0.0, 0.0)}, (10, 90), (YES, YES)),
        ({NORM: alike(0.0, 0.0)}, (20, -90), (YES, NO)),
    ],
)
def test_verdicts(
    setting: Setting,
    changed: Accuracies,
    measures: tuple[float, float],
    verdicts: tuple[Verdict, Verdict],
) -> None:
    """How much smaller the gap is, and what leaving dropout out gains, in points."""
    found = concluded(setting, changed)
    assert [finding.claim for finding in found.findings] == [GAP, REDUNDANT]
    assert [finding.interval.estimate for finding in found.findings] == pytest.approx(measures, abs=1e-9)
    assert tuple(finding.verdict for finding in found.findings) == verdicts
    json.dumps(found.numbers, allow_nan=False)


def test_five_seeds_decide_nothing(setting: Setting) -> None:
    assert [finding.verdict for finding in concluded(setting, {}, seeds=5).findings] == [OPEN, OPEN]


def test_the_effects(setting: Setting) -> None:
    """Gaps smaller by 10, 20 and 30 points: mean 20, standard deviation 10. Dropout costs 1, 0 and 2: mean and so 1."""
    gaps = {PLAIN: ([1.0] * 3, [0.8, 0.7, 0.6]), NORM: ([1.0] * 3, [0.9] * 3), BOTH: ([0.9] * 3, [0.89, 0.9, 0.88])}
    gap, redundant = concluded(setting, gaps, seeds=3).findings
    assert gap.measured.effect == pytest.approx(2)
    assert redundant.measured.effect == pytest.approx(1)
    assert redundant.interval.estimate == pytest.approx(1)


def test_the_rate_is_chosen_by_the_other_seeds_on_the_test_samples(setting: Setting) -> None:
    """Seed 0 is best at 0.1 by far, and alone makes the others choose it; the diverged rate nobody chooses."""
    tests = {0.1: [0.9, 0.5, 0.5], 0.2: [0.6, 0.6, 0.6], 9.0: [0.0, 0.0, 0.0]}
    trains = {0.1: [0.95, 0.55, 0.65], 0.2: [1.0, 1.0, 1.0], 9.0: [0.0, 0.0, 0.0]}
    results: dict[Any, Any] = {
        (network, rate, seed): {"train": trains[rate][seed], "test": tests[rate][seed]}
        for network, rate, seed in itertools.product(NETWORKS, tests, range(3))
    }
    found = conclude(setting, Plan(seeds=3, rates=tuple(tests)), Results(results))
    assert [c["network"] for c in found.numbers["networks"]] == list(NETWORKS)
    for c in found.numbers["networks"]:
        assert c["rates"] == (0.2, 0.1, 0.1)
        assert c["train"] == (1.0, 0.55, 0.65)
        assert c["test"] == (0.6, 0.5, 0.5)
    # Means of 73.3 and 53.3 %; gaps of 40, 5 and 15 points.
    assert found.tables[0].rows[0] == ("plain", "0.1 or 0.2", "73.3", "53.3", "20.0")


@pytest.mark.parametrize(
    ("tests", "change", "words"),
    [
        ([0.85] * 6, "+5.00", "so there was something for batch normalization to replace"),
        ([0.75] * 6, "-5.00", "so it did harm, and there was nothing for batch normalization to replace"),
        ([0.8] * 6, "+0.00", "so whether there was anything for batch normalization to replace is open"),
        ([0.7, 0.92] * 3, "+1.00", "so whether there was anything for batch normalization to replace is open"),
        ([0.0] * 6, "-80.00", "so it did harm"),  # diverged
    ],
)
def test_whether_there_was_anything_to_replace(setting: Setting, tests: list[float], change: str, words: str) -> None:
    sentence = concluded(setting, {DROPOUT: ([0.95] * 6, tests)}).summary[2]
    assert sentence.startswith(f"Dropout changed the test accuracy by {change} percentage points (95 % interval ")
    assert f" without batch normalization, {words}" in sentence


def test_what_is_said_and_shown(setting: Setting) -> None:
    found = concluded(setting, {BOTH: ([0.95] * 6, [0.86, 0.88] * 3)})
    opening, gap, _, besides = found.summary
    assert "learnt from 300 samples only" in opening
    assert gap == (
        "The generalisation gap, accuracy on the samples learnt from minus test accuracy, was 20.0 points without "
        "batch normalization and 10.0 with: a difference of +10.00 percentage points (95 % interval +10.00 to +10.00)."
    )
    assert besides.startswith("With batch normalization, it changed it by -3.00 percentage points (95 % interval -")
    accuracies, gains = found.tables
    assert accuracies.rows == [
        ("plain", "0.1", "100.0", "80.0", "20.0"),
        ("dropout", "0.1", "95.0", "85.0", "10.0"),
        ("batch norm", "0.1", "100.0", "90.0", "10.0"),
        ("batch norm and dropout", "0.1", "95.0", "87.0", "8.0"),
    ]
    assert gains.rows[:2] == [
        ("batch norm, without dropout", "+10.00", "+10.00 to +10.00"),
        ("dropout, without batch norm", "+5.00", "+5.00 to +5.00"),
    ]
    assert gains.rows[2][:2] == ("dropout, with batch norm", "-3.00")
    assert [gain["of"] for gain in found.numbers["gains"]] == [row[0] for row in gains.rows]
    assert [gain["estimate"] for gain in found.numbers["gains"]] == pytest.approx([0.1, 0.05, -0.03])


def test_what_is_drawn(setting: Setting) -> None:
    (chart,) = concluded(setting, {BOTH: ([0.95] * 6, [0.86, 0.88] * 3)}).charts
    assert chart.names == ((0, "plain"), (1, "dropout"), (2, "batch norm"), (3, "batch norm and dropout"))
    learnt, test = chart.curves
    assert (learnt.label, test.label) == ("learnt from", "test")
    assert learnt.middle == pytest.approx([100, 95, 100, 95])
    assert test.middle == pytest.approx([80, 85, 90, 87])
    assert test.low is not None
    assert test.high is not None
    assert test.low[3] < 87 < test.high[3]
    assert (test.low[0], test.high[0]) == pytest.approx((80, 80))
    assert "plain 100.0 and 80.0" in chart.description
    assert "batch norm and dropout 95.0 and 87.0" in chart.description


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Layers) -> None:
    """Two seeds decide nothing."""
    found = carried_out(dropout.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert {finding.verdict for finding in found.findings} == {OPEN}
    assert all(0 < value < 1 for c in found.numbers["networks"] for value in (*c["train"], *c["test"]))

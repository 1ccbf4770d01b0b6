"""Learning rates: what is trained, which of them are usable, and what is said of made-up accuracies."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.study import rates, training
from batchnorm.study.experiment import Conclusion, Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers, perceptron
from batchnorm.study.rates import LARGEST, NETWORKS, RANGE, WITH, WITHOUT, Plan, conclude, run
from batchnorm.study.verdict import Verdict
from study.plans import TINY, Start, carried_out
from support import tolerances

PLAN = TINY["rates"]
SEEN = replace(PLAN, steps=12, hidden=(8, 8))  # long enough for one training to end otherwise than another
RATE = 0.3
YES, NO, OPEN = Verdict.SUPPORTED, Verdict.NOT_SUPPORTED, Verdict.INCONCLUSIVE


def test_every_combination_once() -> None:
    expected = itertools.product(("batch norm", "plain"), (0.1, 0.2), (0, 1, 2))
    assert sorted(rates.EXPERIMENT.grid(Plan(seeds=3, rates=(0.1, 0.2))).tasks()) == sorted(expected)


def test_the_steps_of_the_grid_are_equal() -> None:
    assert Plan(rates=(0.01, 0.1, 1.0)).decades == pytest.approx(1)
    assert Plan(rates=(1e-4, 1e-2)).decades == pytest.approx(2)
    for plan in (rates.EXPERIMENT.full, rates.EXPERIMENT.quick):
        assert plan is not None
        np.testing.assert_allclose(np.diff(np.log10(plan.rates)), plan.decades, atol=0.01)  # 3.2 for a root of 10


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_a_pair_starts_alike(setting: Setting, starts: list[Start], layers: Layers) -> None:
    """From equal weights, and from the same place in the generator that orders the samples."""
    for network, seed in ((WITH, 1), (WITHOUT, 1), (WITH, 0)):
        run(Setting(setting.data, layers), SEEN, network, RATE, seed)
    ours, plain, another = starts
    assert len(ours.weights) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.weights, plain.weights, strict=True))
    assert torch.equal(ours.order, plain.order)
    assert ours.options == plain.options == {"learning_rate": RATE, "batch_size": 32}
    assert not torch.equal(ours.weights[0], another.weights[0])


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_trained(setting: Setting, network: str, layers: Layers) -> None:
    """Against a training by hand: the mean accuracy on the test samples after each of the last five steps."""
    found = run(Setting(setting.data, layers), SEEN, network, RATE, 1)
    generator = torch.Generator().manual_seed(1)
    placement: Any = {"batch norm": "before", "plain": "none"}[network]
    model = perceptron(64, (8, 8), 10, placement=placement, layers=layers, generator=generator)
    test = setting.data.test
    descent = training.descend(model, setting.data.train, learning_rate=RATE, batch_size=32, generator=generator)
    right = []
    for _ in itertools.islice(descent, 12):
        answers = model.eval()(test.inputs).detach().numpy().argmax(1)
        right.append(np.mean(answers == test.labels.numpy()))
    assert found == {"accuracy": pytest.approx(np.mean(right[-5:]), rel=tolerances.STUDY_DOUBLE)}


def test_a_diverged_training_has_nothing_right(setting: Setting) -> None:
    assert run(setting, PLAN, WITHOUT, math.inf, 0) == {"accuracy": 0.0}


# A decade from one to the next. With four classes and a best mean accuracy of 1, half of the way is 0.625.
GRID = Plan(seeds=6, rates=(0.01, 0.1, 1.0), usable=0.5)
Accuracies = Sequence[Sequence[float]]  # each seed's, at each rate


def concluded(setting: Setting, ours: Accuracies, plain: Accuracies, plan: Plan = GRID) -> Conclusion:
    results: dict[Any, Any] = {
        (network, rate, seed): {"accuracy": accuracies[seed][i]}
        for network, accuracies in ((WITH, ours), (WITHOUT, plain))
        for i, rate in enumerate(plan.rates)
        for seed in range(plan.seeds)
    }
    return conclude(setting, plan, Results(results))


SMALL, LARGE, ALL, HOLE, NONE = [1, 1, 0.0], [0.3, 0.3, 1], [1, 1, 1], [1, 0.3, 1], [0.3, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ours", "plain", "higher", "wider", "verdicts"),
    [
        ([ALL] * 6, [SMALL] * 6, 1, 1, (YES, YES)),
        ([SMALL] * 6, [ALL] * 6, -1, -1, (NO, NO)),
        ([LARGE] * 6, [SMALL] * 6, 1, -1, (YES, NO)),
        ([SMALL] * 6, [LARGE] * 6, -1, 1, (NO, YES)),
        ([HOLE] * 6, [SMALL] * 6, 1, 0, (YES, OPEN)),
        ([ALL] * 6, [ALL] * 6, 0, 0, (OPEN, OPEN)),
        ([SMALL] * 6, [NONE] * 6, 2, 2, (YES, YES)),
        ([NONE] * 6, [SMALL] * 6, -2, -2, (NO, NO)),
        ([ALL, SMALL] * 3, [SMALL, ALL] * 3, 0, 0, (OPEN, OPEN)),
        ([LARGE, SMALL] * 3, [SMALL, LARGE] * 3, 0, 0, (OPEN, OPEN)),
    ],
)
def test_verdicts(
    four: Setting,
    ours: Accuracies,
    plain: Accuracies,
    higher: float,
    wider: float,
    verdicts: tuple[Verdict, Verdict],
) -> None:
    """In decades, one for each rate; without a usable one, a decade below the grid."""
    found = concluded(four, ours, plain)
    assert [finding.claim for finding in found.findings] == [LARGEST, RANGE]
    assert [finding.interval.estimate for finding in found.findings] == pytest.approx([higher, wider])
    assert tuple(finding.verdict for finding in found.findings) == verdicts
    json.dumps(found.numbers, allow_nan=False)


def test_five_seeds_decide_nothing(four: Setting) -> None:
    found = concluded(four, [ALL] * 5, [SMALL] * 5, replace(GRID, seeds=5))
    assert [finding.verdict for finding in found.findings] == [OPEN, OPEN]


def test_the_threshold_is_half_of_the_way_from_chance_to_the_best_mean(four: Setting) -> None:
    """The best mean is the plain network's at 0.1, 0.75: from a quarter, that makes 0.5. One seed alone has more."""
    plan = replace(GRID, seeds=2)
    ours, plain = [[0.5, 0.49, 0.0], [0.51, 0.5, 0.0]], [[1.0, 0.8, 0.0], [0.2, 0.7, 0.1]]
    found = concluded(four, ours, plain, plan)
    assert found.numbers["threshold"] == 0.5
    with_it, without = found.numbers["networks"]
    assert with_it["largest"] == (0.01, 0.1)  # at the threshold is enough
    assert without["largest"] == (0.1, 0.1)
    assert with_it["decades"] == pytest.approx((1, 2))
    assert without["decades"] == pytest.approx((2, 1))
    assert (with_it["network"], with_it["best"]) == ("batch norm", 0.01)
    assert (without["network"], without["best"]) == ("plain", 0.1)
    assert with_it["accuracy"] == ((0.5, 0.51), (0.49, 0.5), (0.0, 0.0))


def test_the_effects(four: Setting) -> None:
    """Decades higher: 0, 1 and 2, mean 1, standard deviation 1. Wider: 2, 1 and 1, mean 4/3, variance 1/3."""
    plain = [[0.3, 0.3, 1], SMALL, [1, 0.0, 0.0]]
    higher, wider = concluded(four, [ALL, ALL, HOLE], plain, replace(GRID, seeds=3)).findings
    assert higher.measured.effect == pytest.approx(1)
    assert wider.measured.effect == pytest.approx(4 / math.sqrt(3))


def test_what_is_said(four: Setting) -> None:
    found = concluded(four, [ALL] * 6, [SMALL, NONE] * 3)
    opening, largest, usable, best = found.summary
    assert "at each of 3 rates from 0.01 to 1. A rate is usable if the network ends with 62.5 %" in opening
    # Above by one decade with three seeds, by three with the others: by two on average, a factor of 100.
    assert largest.startswith(
        "The largest usable rate was 1 with batch normalization, 0.1 (none with 3 of 6 seeds) without: a factor of 100 "
    )
    assert usable.startswith(
        "The usable rates made up 3.0 decades with batch normalization, 1.0 without: a difference of +2.00 decades (95 "
    )
    assert best == "The best rate was 0.01 with batch normalization (100.0 % right on average), 0.01 without (65.0 %)."


def test_what_is_said_of_no_difference_and_of_none_usable(four: Setting) -> None:
    _, largest, usable, _ = concluded(four, [SMALL] * 6, [NONE] * 6).summary
    assert "was 0.1 with batch normalization, none without: a factor of 100 (95 % interval 100 to 100)" in largest
    assert "2.0 decades with batch normalization, 0.0 without" in usable
    _, largest, usable, _ = concluded(four, [SMALL, HOLE] * 3, [SMALL, HOLE] * 3).summary
    assert "was 0.1 or 1 with batch normalization, 0.1 or 1 without: a factor of 1 (95 % interval 1 to 1)" in largest
    assert "a difference of +0.00 decades (95 % interval +0.00 to +0.00)" in usable
    _, largest, _, _ = concluded(four, [SMALL] * 6, [ALL] * 6).summary
    assert "a factor of 0.1 (95 % interval 0.1 to 0.1)" in largest


def test_what_is_shown(four: Setting) -> None:
    found = concluded(four, [ALL] * 6, [SMALL, NONE] * 3)
    assert found.tables[0].columns == ("learning rate", "batch norm", "plain")
    assert found.tables[0].rows == [
        ("0.01", "100.0 (100.0-100.0)", "65.0 (30.0-100.0)"),
        ("0.1", "100.0 (100.0-100.0)", "50.0 (0.0-100.0)"),
        ("1", "100.0 (100.0-100.0)", "0.0 (0.0-0.0)"),
    ]
    (chart,) = found.charts
    assert chart.log_x
    assert chart.mark == 62.5
    ours, plain = chart.curves
    assert (ours.label, plain.label) == ("batch norm", "plain")
    assert list(plain.x) == [0.01, 0.1, 1]
    assert plain.middle == pytest.approx([65, 50, 0])
    assert plain.low == pytest.approx([30, 0, 0])
    assert plain.high == pytest.approx([100, 100, 0])
    assert "batch norm is best at 0.01, plain is best at 0.01" in chart.description
    assert "plain ends at 0" in chart.description
    assert "are a factor of 10:" in found.notes[2]


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Layers) -> None:
    """Two seeds decide nothing. The threshold lies between the digits' chance and the best mean."""
    found = carried_out(rates.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert {finding.verdict for finding in found.findings} == {OPEN}
    labels = setting.data.test.labels.numpy()
    chance = np.bincount(labels).max() / len(labels)
    best = max(np.mean(seeds) for network in found.numbers["networks"] for seeds in network["accuracy"])
    assert found.numbers["threshold"] == pytest.approx(0.1 * chance + 0.9 * best)

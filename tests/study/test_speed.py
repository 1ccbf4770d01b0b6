"""Fewer steps: what is trained, and what is said of made-up trainings."""

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

from batchnorm.study import speed, training
from batchnorm.study.experiment import Conclusion, Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers, perceptron
from batchnorm.study.speed import BEST, NETWORKS, SAME, WITH, WITHOUT, Plan, best_rates, conclude, run
from batchnorm.study.verdict import Verdict
from study.plans import TINY, Start, carried_out
from support import tolerances

PLAN = TINY["speed"]
SEEN = replace(PLAN, steps=13, evaluate_every=6, hidden=(8, 8))  # long enough for one training to end unlike another
RATE = 0.3
YES, NO, OPEN = Verdict.SUPPORTED, Verdict.NOT_SUPPORTED, Verdict.INCONCLUSIVE


def test_every_combination_once() -> None:
    expected = itertools.product(("batch norm", "plain"), (0.1, 0.2), (0, 1, 2))
    assert sorted(speed.EXPERIMENT.grid(Plan(seeds=3, rates=(0.1, 0.2))).tasks()) == sorted(expected)


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
    """Against a training by hand, seen after 6 steps, 12 and the last."""
    found = run(Setting(setting.data, layers), SEEN, network, RATE, 1)
    generator = torch.Generator().manual_seed(1)
    placement: Any = {"batch norm": "before", "plain": "none"}[network]
    model = perceptron(64, (8, 8), 10, placement=placement, layers=layers, generator=generator)
    test = setting.data.test
    descent = training.descend(model, setting.data.train, learning_rate=RATE, batch_size=32, generator=generator)
    right, losses = [], []
    for loss in itertools.islice(descent, 13):
        losses.append(loss.item())
        answers = model.eval()(test.inputs).detach().numpy().argmax(1)
        right.append(np.mean(answers == test.labels.numpy()))
    assert found["steps"] == (6, 12, 13)
    assert found["test_accuracy"] == pytest.approx((right[5], right[11], right[12]), rel=tolerances.STUDY_DOUBLE)
    means = np.mean(losses[:6]), np.mean(losses[6:12]), losses[12]
    assert found["training_loss"] == pytest.approx(means, rel=tolerances.STUDY_DOUBLE)


def test_a_diverged_training_has_nothing_right_and_no_loss(setting: Setting) -> None:
    found = run(setting, SEEN, WITHOUT, math.inf, 0)
    assert found["test_accuracy"] == (0.0, 0.0, 0.0)
    assert found["training_loss"] == (None, None, None)


# With four classes and a best mean accuracy of 1, half of the way from chance is 0.625.
MADE = Plan(seeds=6, steps=40, rates=(0.1, 0.5), reach=0.5)
AT = (10, 20, 30, 40)
First = int | None  # step at which a training reaches the target; None where it diverges
Trainings = Mapping[tuple[str, float], Sequence[First]]  # each seed's


def made(first: First) -> dict[str, Any]:
    if first is None:
        return {"steps": AT, "test_accuracy": [0.0] * 4, "training_loss": [None] * 4}
    return {"steps": AT, "test_accuracy": [0.3 if at < first else 1.0 for at in AT], "training_loss": [1.0] * 4}


def concluded(setting: Setting, trainings: Trainings, plan: Plan = MADE) -> Conclusion:
    results: dict[Any, Any] = {
        (network, rate, seed): made(first)
        for (network, rate), firsts in trainings.items()
        for seed, first in enumerate(firsts)
    }
    return conclude(setting, plan, Results(results))


def alike(ours: tuple[First, First], plain: tuple[First, First], seeds: int = 6) -> Trainings:
    """All seeds at the two rates."""
    firsts = zip(itertools.product((WITH, WITHOUT), MADE.rates), (*ours, *plain), strict=True)
    return {key: [first] * seeds for key, first in firsts}


@pytest.mark.parametrize(
    ("ours", "plain", "ratios", "verdicts"),
    [
        ((10, 20), (20, 40), (2, 2), (YES, YES)),
        ((30, 10), (20, None), (2, 2 / 3), (YES, NO)),
        ((20, 10), (20, None), (2, 1), (YES, OPEN)),
        ((20, 30), (10, None), (1 / 2, 1 / 2), (NO, NO)),
        ((20, None), (30, 10), (1 / 2, 1 / 4), (NO, NO)),
        ((10, 20), (None, None), (4, 4), (YES, YES)),  # counts as the 40 steps that it used
        ((None, None), (40, 20), (1 / 2, 1 / 2), (NO, NO)),
        ((20, 40), (20, 40), (1, 1), (OPEN, OPEN)),
    ],
)
def test_verdicts(
    four: Setting,
    ours: tuple[First, First],
    plain: tuple[First, First],
    ratios: tuple[float, float],
    verdicts: tuple[Verdict, Verdict],
) -> None:
    """Steps at 0.1 and at 0.5: each network at its quicker rate, and both at the plain network's."""
    found = concluded(four, alike(ours, plain))
    assert [finding.claim for finding in found.findings] == [BEST, SAME]
    assert [finding.interval.estimate for finding in found.findings] == pytest.approx(ratios)
    assert tuple(finding.verdict for finding in found.findings) == verdicts
    json.dumps(found.numbers, allow_nan=False)


def test_earlier_as_often_as_later_is_open(four: Setting) -> None:
    trainings = {**alike((10, 20), (20, None)), (WITH, 0.1): [10, 40] * 3, (WITH, 0.5): [40] * 6}
    found = concluded(four, trainings)
    for finding in found.findings:
        assert finding.verdict is OPEN
        assert finding.interval.estimate == pytest.approx(1)
        assert finding.interval.low < 1 < finding.interval.high


def test_five_seeds_decide_nothing(four: Setting) -> None:
    found = concluded(four, alike((10, 20), (20, 40), 5), replace(MADE, seeds=5))
    assert [finding.verdict for finding in found.findings] == [OPEN, OPEN]


def test_the_ratio_is_the_geometric_mean(four: Setting) -> None:
    """Ratios of 1, 2 and 4: on average 2; their logarithms have the mean ln 2 and that for a standard deviation too."""
    plan = replace(MADE, seeds=3, rates=(0.1,))
    found = concluded(four, {(WITH, 0.1): [10] * 3, (WITHOUT, 0.1): [10, 20, 40]}, plan)
    for finding in found.findings:
        assert finding.interval.estimate == pytest.approx(2)
        assert finding.measured.effect == pytest.approx(1)


def chosen(slow: Sequence[First], fast: int) -> tuple[float, ...]:
    """The rates that are chosen for three seeds, whose trainings take so long at 0.1, and equally long at 0.5."""
    steps = {0.1: slow, 0.5: [fast] * 3}
    first = Results({(WITH, rate, seed): {"steps": steps[rate][seed]} for seed in range(3) for rate in steps})
    return best_rates(Plan(seeds=3, steps=90), first, WITH)


def test_the_rate_is_chosen_by_the_other_seeds_mean_logarithm() -> None:
    """10 and 40 are 20 in the geometric mean, 25 in the arithmetic one: quicker than 22. Seed 1 leaves 40 and 40."""
    assert chosen([40, 10, 40], 22) == (0.1, 0.5, 0.1)
    # One that never got there counts as 90 steps, and is 30 together with 10.
    assert chosen([None, 10, None], 31) == (0.1, 0.5, 0.1)
    assert chosen([None, 10, None], 29) == (0.5, 0.5, 0.5)


def test_each_seed_is_compared_at_its_rate(four: Setting) -> None:
    trainings = {**alike((10, 30), (20, 40), 3), (WITH, 0.1): (40, 10, 40)}
    found = concluded(four, trainings, replace(MADE, seeds=3)).numbers
    assert found["best_rates"]["rates"] == {WITH: (0.1, 0.5, 0.1), WITHOUT: (0.1, 0.1, 0.1)}
    assert found["best_rates"]["steps"] == {WITH: (40, 30, 40), WITHOUT: (20, 20, 20)}
    assert found["same_rate"]["rates"] == {WITH: (0.1, 0.1, 0.1), WITHOUT: (0.1, 0.1, 0.1)}
    assert found["same_rate"]["steps"] == {WITH: (40, 10, 40), WITHOUT: (20, 20, 20)}


def test_the_target_is_half_of_the_way_from_chance_to_the_best_mean(four: Setting) -> None:
    """The best mean at the end is 0.75, of the plain network at the first rate: from a quarter, that makes 0.5."""
    ends = {(WITH, 0.1): (0.5, 0.5), (WITH, 0.5): (0.49, 0.6), (WITHOUT, 0.1): (0.5, 1.0), (WITHOUT, 0.5): (0.0, 0.9)}
    results: dict[Any, Any] = {
        (network, rate, seed): {"steps": (10, 20), "test_accuracy": [0.45 + 0.5 * seed, end], "training_loss": [1, 1]}
        for (network, rate), both in ends.items()
        for seed, end in enumerate(both)
    }
    found = conclude(four, Plan(seeds=2, steps=20, rates=(0.1, 0.5), reach=0.5), Results(results)).numbers
    assert found["target"] == 0.5
    assert [(c["network"], c["rate"], c["reached"], c["steps"]) for c in found["cells"]] == [
        ("batch norm", 0.1, 2, (20, 10)),  # at the target is enough, and so is the first time
        ("batch norm", 0.5, 1, (None, 10)),
        ("plain", 0.1, 2, (20, 10)),
        ("plain", 0.5, 1, (None, 10)),
    ]
    assert [c["accuracy"] for c in found["cells"]] == pytest.approx([0.5, 0.545, 0.75, 0.45])


def test_what_is_said(four: Setting) -> None:
    trainings = {**alike((30, 10), (20, None)), (WITHOUT, 0.1): [10, 20, 20, 20, 20, 30]}
    opening, best, same = concluded(four, trainings).summary
    assert "until they classified 62.5 % of the test samples rightly" in opening
    assert best.startswith(
        "Each at the learning rate that suits it best (0.5 with, 0.1 without), the network with batch normalization "
        "took a median of 10 steps, the plain one 20; it was earlier with 5 of 6 seeds, later with 0. The plain one "
        "took 1.91 (95 % interval "  # the sixth root of 2^4 * 3
    )
    assert same.startswith(
        "Both at the rate that suits the plain network (0.1), the network with batch normalization took a median of 30 "
        "steps, the plain one 20; it was earlier with 0 of 6 seeds, later with 5. The plain one took 0.64 (95 % "
    )


def test_what_is_shown(four: Setting) -> None:
    trainings = {**alike((30, 10), (20, None)), (WITH, 0.1): [10, 10, 20, None, None, None], (WITH, 0.5): [10, 20] * 3}
    found = concluded(four, trainings)
    assert found.tables[0].rows == [
        ("batch norm", "0.1", "> 40", "3/6", "50.0"),
        ("batch norm", "0.5", "15", "6/6", "100.0"),
        ("plain", "0.1", "20", "6/6", "100.0"),
        ("plain", "0.5", "never", "0/6", "0.0"),
    ]
    assert "62.5 %" in found.tables[0].caption
    (chart,) = found.charts
    assert chart.mark == 62.5
    ours, plain = chart.curves
    assert (ours.label, plain.label) == ("batch norm", "plain")
    assert tuple(ours.x) == AT
    assert ours.middle == pytest.approx([65, 100, 100, 100])
    assert ours.low == pytest.approx([30, 100, 100, 100])
    assert ours.high == pytest.approx([100, 100, 100, 100])
    assert plain.middle == pytest.approx([30, 100, 100, 100])
    assert "batch norm ends at 100, plain ends at 100" in chart.description


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Layers) -> None:
    """Two seeds decide nothing. The target lies between the digits' chance and the best mean."""
    found = carried_out(speed.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert {finding.verdict for finding in found.findings} == {OPEN}
    labels = setting.data.test.labels.numpy()
    chance = np.bincount(labels).max() / len(labels)
    best = max(c["accuracy"] for c in found.numbers["cells"])
    assert found.numbers["target"] == pytest.approx(0.05 * chance + 0.95 * best)

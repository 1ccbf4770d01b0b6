"""Inputs on several scales."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.study import scales, training
from batchnorm.study.dataset import Data, Part
from batchnorm.study.experiment import Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, perceptron
from batchnorm.study.scales import (
    INPUTS,
    LAYER,
    RAW,
    SAME,
    SLOWER,
    STANDARDISED,
    Plan,
    conclude,
    rescale,
    run,
    standardise,
)
from batchnorm.study.verdict import Verdict
from study.plans import TINY, carried_out
from support import tolerances

PLAN = TINY["scales"]


def small(features: int = 4, rows: int = 30) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, features, generator=generator) * 2 + 1
    y = torch.arange(rows) % 2
    return Data(Part(y, x[:20], y[:20]), Part(y, x[20:], y[20:]), (features,), 2, "numbers")


def test_scales_run_from_1_to_10_000() -> None:
    data = small()
    scaled = rescale(data, 4.0, torch.Generator().manual_seed(1))
    factors = (scaled.train.inputs / data.train.inputs).numpy()
    assert sorted(factors[0]) == pytest.approx([10 ** (4 * i / 3) for i in range(4)], rel=tolerances.STUDY)
    np.testing.assert_allclose(factors, np.tile(factors[0], (20, 1)), rtol=tolerances.STUDY)
    np.testing.assert_allclose((scaled.test.inputs / data.test.inputs).numpy()[0], factors[0], rtol=tolerances.STUDY)
    others = (rescale(data, 4.0, torch.Generator().manual_seed(2)).train.inputs / data.train.inputs).numpy()
    assert not np.allclose(others[0], factors[0])


def test_images_become_rows(setting: Setting) -> None:
    scaled = rescale(setting.data, 4.0, torch.Generator().manual_seed(1))
    assert scaled.shape == (64,)
    assert scaled.train.inputs.shape == (len(setting.data.train.labels), 64)


def test_one_feature_stays_as_it_is() -> None:
    data = small(features=1)
    assert torch.equal(rescale(data, 4.0, torch.Generator().manual_seed(0)).train.inputs, data.train.inputs)


def test_standardised_by_the_training_part_alone() -> None:
    data = rescale(small(), 4.0, torch.Generator().manual_seed(1))
    found = standardise(data)
    train, test = (part.inputs.double().numpy() for part in (data.train, data.test))
    mean, std = train.mean(0), np.sqrt(train.var(0) + 1e-5)
    np.testing.assert_allclose(
        found.train.inputs.numpy(), (train - mean) / std, rtol=tolerances.STUDY, atol=tolerances.STUDY
    )
    np.testing.assert_allclose(
        found.test.inputs.numpy(), (test - mean) / std, rtol=tolerances.STUDY, atol=tolerances.STUDY
    )


@pytest.mark.parametrize("inputs", INPUTS)
def test_what_is_trained(setting: Setting, inputs: str) -> None:
    """Against a training by hand."""
    found = run(setting, PLAN, inputs, PLAN.rates[1], 1)
    data = rescale(setting.data, 4.0, torch.Generator().manual_seed(1))
    if inputs == STANDARDISED:
        data = standardise(data)
    generator = torch.Generator().manual_seed(1)
    network: nn.Module = perceptron(64, PLAN.hidden, 10, placement="none", layers=OURS, generator=generator)
    if inputs == LAYER:
        network = nn.Sequential(nn.BatchNorm1d(64, affine=False), network)
    descent = training.descend(
        network, data.train, learning_rate=PLAN.rates[1], batch_size=PLAN.batch_size, generator=generator
    )
    accuracies = []
    for step in range(1, PLAN.steps + 1):
        next(descent)
        if step % PLAN.every == 0:
            accuracies.append(training.accuracy(training.predict(network, data.train.inputs), data.train.labels))
    # torch's layer rounds otherwise than ours: a sample or two may be on the other side.
    assert found["curve"] == pytest.approx(accuracies, abs=tolerances.STUDY_SHARE)
    chance = torch.bincount(data.train.labels).max().item() / len(data.train.labels)
    assert found["target"] == pytest.approx(chance + 0.9 * (1 - chance))
    test = training.accuracy(training.predict(network, data.test.inputs), data.test.labels)
    assert found["test"] == pytest.approx(test, abs=tolerances.STUDY_SHARE)
    reached = [step for step, value in zip(found["at"], found["curve"], strict=True) if value >= found["target"]]
    assert found["steps"] == (reached[0] if reached else None)


def made(steps: int | None, end: float) -> dict[str, Any]:
    return {"target": 0.9, "at": [5, 10], "curve": [0.1, end], "steps": steps, "test": end - 0.1}


def row(setting: Setting, plan: Plan, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What is said of raw inputs, from each seed's runs at each rate; the other inputs have the same."""
    results = {
        (inputs, rate, seed): run
        for inputs in INPUTS
        for seed, of_seed in enumerate(runs)
        for rate, run in zip(plan.rates, of_seed, strict=True)
    }
    found: dict[str, Any] = conclude(setting, plan, Results(results)).numbers["rows"][0]
    return found


def test_the_rate_is_chosen_by_the_other_seeds(setting: Setting) -> None:
    """Seed 2 is quickest at the first rate, the two others at the second."""
    plan = Plan(seeds=3, rates=(0.1, 0.2), steps=100)
    steps = [(40, 20), (40, 10), (5, 80)]
    found = row(setting, plan, [[made(first, 0.9), made(second, 0.95)] for first, second in steps])
    assert found["inputs"] == RAW
    assert found["rates"] == (0.1, 0.1, 0.2)
    assert found["steps"] == (40, 40, 80)


def test_of_rates_that_never_get_there_the_one_that_gets_furthest(setting: Setting) -> None:
    plan = Plan(seeds=2, rates=(0.1, 0.2, 0.3), steps=100)
    found = row(setting, plan, [[made(None, end) for end in (0.3, 0.6, 0.5)]] * 2)
    assert found["rates"] == (0.2, 0.2)
    assert (found["steps"], found["reached"]) == ((100, 100), 0)
    assert found["training"]["estimate"] == pytest.approx(0.6)
    assert found["test"]["estimate"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("raw", "layer", "verdicts", "words"),
    [
        (None, 20, (Verdict.SUPPORTED, Verdict.SUPPORTED), "at least 5.0 times"),
        (80, 20, (Verdict.SUPPORTED, Verdict.SUPPORTED), "took 4.0 times"),
        (10, 20, (Verdict.NOT_SUPPORTED, Verdict.SUPPORTED), "took 0.5 times"),
        (80, 40, (Verdict.SUPPORTED, Verdict.NOT_SUPPORTED), "the layer 2.00 times"),
        (80, 10, (Verdict.SUPPORTED, Verdict.NOT_SUPPORTED), "the layer 0.50 times"),
    ],
)
def test_verdicts(setting: Setting, raw: int | None, layer: int, verdicts: tuple[Verdict, Verdict], words: str) -> None:
    plan = Plan(seeds=6, rates=(0.1,), steps=100)
    steps = {RAW: raw, STANDARDISED: 20, LAYER: layer}
    results: Any = {(inputs, 0.1, seed): made(steps[inputs], 0.8) for inputs in INPUTS for seed in range(6)}
    found = conclude(setting, plan, Results(results))
    assert tuple(finding.verdict for finding in found.findings) == verdicts
    assert [finding.claim for finding in found.findings] == [SLOWER, SAME]
    assert words in " ".join(found.summary)
    ratio = found.findings[1].interval.estimate
    assert ratio == pytest.approx(math.log(1.5) - abs(math.log(layer / 20)))


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_it_runs_with_either_layer(setting: Setting, layers: Any) -> None:
    found = carried_out(scales.EXPERIMENT, Setting(setting.data, layers), PLAN)
    assert [row[0] for row in found.tables[0].rows] == list(INPUTS)

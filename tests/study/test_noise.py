"""The noise of mini-batch statistics, against NumPy and against the enumeration of all mini-batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.study import noise
from batchnorm.study.equations import preactivations
from batchnorm.study.experiment import Setting
from batchnorm.study.grid import Results
from batchnorm.study.networks import OURS, TORCH, Layers
from batchnorm.study.noise import FAR, GHOST, JOINED, LAW, conclude, draw, exponent, predicted, run
from batchnorm.study.verdict import Verdict
from study.plans import TINY, carried_out
from support import tolerances

PLAN = TINY["noise"]


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, dtype=np.float64)))))


def test_no_sample_is_drawn_twice() -> None:
    z = torch.arange(20.0)[:, None]
    drawn = draw(z, 15, torch.Generator().manual_seed(0)).flatten().tolist()
    assert len(set(drawn)) == 15
    assert drawn != sorted(drawn)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_the_law_is_the_spread_over_all_mini_batches(size: int) -> None:
    """Of six numbers every mini-batch can be listed."""
    values = np.array([1.0, 4.0, -2.0, 0.5, 7.0, 3.0])
    means = [np.mean(chosen) for chosen in itertools.combinations(values, size)]
    assert predicted(size, 6) == pytest.approx(
        rms(np.array(means) - values.mean()) / values.std(), rel=tolerances.STUDY_DOUBLE, abs=tolerances.STUDY_DOUBLE
    )


@pytest.mark.parametrize("power", [-0.5, -0.4, -1.0])
def test_the_exponent_is_found(power: float) -> None:
    samples = 1000
    levels = {m: 3.0 * m**power * math.sqrt((samples - m) / (samples - 1)) for m in (2, 4, 16, 256)}
    assert exponent(levels, samples) == pytest.approx(power)


@pytest.mark.parametrize("layers", [OURS, TORCH], ids=lambda layers: layers.name)
def test_numbers_of_a_layer(setting: Setting, layers: Layers) -> None:
    """The same draws, with NumPy's means and standard deviations."""
    found = run(Setting(setting.data, layers), PLAN, 3)
    generator = torch.Generator().manual_seed(3)
    z = preactivations(setting, PLAN.features, generator).double()
    mean, std = z.numpy().mean(0), z.numpy().std(0)
    for size, of_mean, of_std in zip(PLAN.sizes, found["mean"], found["std"], strict=True):
        parts = [z[torch.randperm(len(z), generator=generator)[:size]].numpy() for _ in range(PLAN.draws)]
        assert of_mean == pytest.approx(rms([(part.mean(0) - mean) / std for part in parts]), rel=tolerances.STUDY)
        assert of_std == pytest.approx(rms([part.std(0) / std - 1 for part in parts]), rel=tolerances.STUDY)
    small = [draw(z, PLAN.small, generator).numpy() for _ in range(PLAN.rounds * PLAN.large // PLAN.small)]
    ghost, joined, large = ([draw(z, PLAN.large, generator).numpy() for _ in range(PLAN.rounds)] for _ in range(3))
    eights = [part for batch in ghost for part in np.split(batch, PLAN.large // PLAN.small)]
    expected = {"small": small, "ghost": eights, "joined": joined, "large": large}
    for kind, batches in expected.items():
        off = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) - (x - mean) / np.sqrt(std**2 + 1e-5) for x in batches]
        assert found["output"][kind] == pytest.approx(rms(np.concatenate(off)), rel=tolerances.STUDY), kind


def test_a_constant_channel_is_left_out(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_constants(*arguments: Any) -> Tensor:
        z = preactivations(*arguments)
        z[:, 2:] = 5.0
        return z

    whole = run(setting, PLAN, 0)
    monkeypatch.setattr(noise, "preactivations", with_constants)
    found = run(setting, PLAN, 0)
    assert found["mean"] != whole["mean"]
    assert all(math.isfinite(value) and value < 2 for value in found["mean"] + found["std"])


def made(mean: float = 0.35, slope: float = -0.5, ghost: float = 0.43, joined: float = 0.07) -> dict[str, Any]:
    return {
        "samples": 1000,
        "mean": [0.7, mean, 0.2],
        "std": [0.6, 0.3, 0.1],
        "exponent": slope,
        "output": {"small": 0.43, "ghost": ghost, "joined": joined, "large": 0.07},
    }


@pytest.mark.parametrize(
    ("change", "claim", "words"),
    [
        ({}, None, "and holds"),
        ({"mean": 0.2}, FAR, "(root mean squares); with"),
        ({"slope": -0.3}, LAW, "which is not shown"),
        ({"ghost": 0.3}, GHOST, "inside 64 0.300"),
        ({"joined": 0.2}, JOINED, "added up it is 0.200"),
    ],
)
def test_each_claim_has_its_own_number(setting: Setting, change: dict[str, float], claim: Any, words: str) -> None:
    found = conclude(setting, PLAN, Results({(seed,): made(**change) for seed in range(6)}))
    for finding in found.findings:
        assert (finding.verdict is Verdict.NOT_SUPPORTED) == (finding.claim is claim)
    assert words in " ".join(found.summary)


def test_what_the_digits_say(setting: Setting) -> None:
    found = carried_out(noise.EXPERIMENT, setting, replace(PLAN, draws=200))  # as many as the law takes to be seen
    verdicts = {finding.claim: finding.verdict for finding in found.findings}
    assert verdicts[FAR] is Verdict.SUPPORTED
    assert verdicts[LAW] is Verdict.SUPPORTED
    assert "by hand" not in " ".join(found.notes)
    theirs = carried_out(noise.EXPERIMENT, Setting(setting.data, TORCH), PLAN)
    assert "by hand" in " ".join(theirs.notes)

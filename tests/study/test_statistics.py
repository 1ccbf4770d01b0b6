"""Intervals against their definition, closed forms, and what they promise."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import scipy.stats

from batchnorm.study.statistics import Interval, best_of_the_others, bounded, effect_size, mean_interval, within

VALUES = [0.3, 1.9, -0.4, 2.2, 0.8, 1.1, 5.0, 0.1, 0.9, 1.6]


def test_the_interval_is_the_expanded_percentile_bootstraps() -> None:
    """NumPy's own resampling, with another stream: the quantiles' own noise is what may differ."""
    n = len(VALUES)
    tail = scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.975, n - 1))
    resampled = np.random.default_rng(1).choice(VALUES, (200_000, n)).mean(1)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    found = mean_interval(VALUES)
    assert found.estimate == pytest.approx(np.mean(VALUES))
    # A quantile at p of B draws has standard error sqrt(p (1 - p) / B) / density: 0.03 here.
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)
    plain = np.quantile(resampled, [0.025, 0.975])
    assert found.high - found.low > plain[1] - plain[0]


def test_it_is_as_wide_as_students_for_many_values() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values.tolist())
    low, high = scipy.stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


@pytest.mark.parametrize("n", [6, 10])
def test_it_covers_the_mean_as_often_as_it_says(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 samples: a share of 0.95 has a standard error of 0.011. The plain percentiles' are 0.86 and 0.91."""
    monkeypatch.setattr("batchnorm.study.statistics.RESAMPLES", 2_000)
    generator = np.random.default_rng(0)
    found = [mean_interval(generator.normal(1.0, 1.0, n).tolist()) for _ in range(400)]
    assert sum(i.low <= 1.0 <= i.high for i in found) / 400 >= 0.92


def test_the_same_values_have_the_same_interval() -> None:
    assert mean_interval(VALUES) == mean_interval(VALUES)
    shifted = mean_interval([value + 7 for value in VALUES])
    assert shifted.low == pytest.approx(mean_interval(VALUES).low + 7)


@pytest.mark.parametrize("values", [[0.1] * 10, [2.0]])
def test_equal_values_have_no_width(values: list[float]) -> None:
    assert mean_interval(values) == Interval(values[0], values[0], values[0])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf"), 1.0]])
def test_what_is_no_sample(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite number at least"):
        mean_interval(values)


def test_an_interval_is_mapped_at_its_three_numbers() -> None:
    assert Interval(0.0, -1.0, 2.0).map(math.exp) == Interval(1.0, math.exp(-1), math.exp(2))


def test_the_effect_size_is_the_mean_in_standard_deviations() -> None:
    assert effect_size(VALUES) == pytest.approx(np.mean(VALUES) / np.std(VALUES, ddof=1))
    assert effect_size([-v for v in VALUES]) == pytest.approx(-np.mean(VALUES) / np.std(VALUES, ddof=1))
    assert effect_size([1.5, 1.5, 1.5]) is None
    assert effect_size([1.5]) is None


@pytest.mark.parametrize(
    ("low", "estimate", "high"), [(-0.5, 0.2, 0.7), (0.1, 0.3, 0.4), (-0.9, -0.5, -0.2), (-3, -1, 0.5), (2, 3, 4)]
)
def test_a_difference_within_a_margin(low: float, estimate: float, high: float) -> None:
    """Against all values that the difference may have."""
    found = within(1.0, Interval(estimate, low, high))
    values = 1.0 - np.abs(np.linspace(low, high, 100_001))
    assert (found.low, found.high) == pytest.approx((values.min(), values.max()), abs=1e-4)
    assert found.estimate == pytest.approx(1 - abs(estimate))


def test_each_seed_takes_what_was_best_for_the_others() -> None:
    scores = {0.1: [1.0, 0.0, 0.0], 0.3: [0.0, 0.6, 0.3], 1.0: [0.1, 0.1, 0.5]}
    expected = []
    for seed in range(3):
        others = [s for s in range(3) if s != seed]
        means = {rate: statistics.fmean(values[s] for s in others) for rate, values in scores.items()}
        expected.append(max(means, key=lambda rate: means[rate]))
    assert best_of_the_others(scores) == tuple(expected) == (0.3, 0.1, 0.1)


def test_a_seeds_own_score_has_no_say() -> None:
    for lucky in itertools.product([0.0, 100.0], repeat=2):
        scores = {"a": [lucky[0], 0.5, 0.6], "b": [lucky[1], 0.4, 0.5]}
        assert best_of_the_others(scores)[0] == "a"


def test_the_first_of_equals() -> None:
    assert best_of_the_others({0.1: [1.0, 1.0], 0.3: [1.0, 1.0]}) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("value", "expected"), [(2.5, 2.5), (0, 1e-6), (-1, 1e-6), (1e9, 1e6), (math.nan, 1e6), (math.inf, 1e6)]
)
def test_bounded(value: float, expected: float) -> None:
    assert bounded(value, 1e6) == expected

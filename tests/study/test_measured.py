"""Measured values, against the statistics that they are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from batchnorm.study.measured import Measured, Paired
from batchnorm.study.statistics import Interval, effect_size, mean_interval, within

A, B = [2.0, 3.0, 5.0, 4.0], [1.0, 2.0, 1.5, 3.0]
DIFFERENCES = [1.0, 1.0, 3.5, 1.0]


def test_a_mean_has_no_effect_size() -> None:
    assert Measured.mean(A) == Measured(mean_interval(A), 4, None)
    assert Measured.exact(3.0, 100) == Measured(Interval(3.0, 3.0, 3.0), 100, None)


def test_a_difference() -> None:
    expected = Measured(mean_interval(DIFFERENCES), 4, effect_size(DIFFERENCES))
    assert Paired(A, B).differences() == DIFFERENCES
    assert Paired(A, B).difference() == Measured.mean_difference(DIFFERENCES) == expected
    assert Paired(B, A).difference().interval.estimate == -expected.interval.estimate


def test_a_ratio_is_the_geometric_mean() -> None:
    found = Paired(A, B).ratio()
    logs = np.log(np.divide(A, B))
    assert found.interval.estimate == pytest.approx(np.exp(logs.mean()))
    assert found.interval == mean_interval(logs.tolist()).map(math.exp)
    assert found.effect == pytest.approx(logs.mean() / logs.std(ddof=1))
    assert Paired(A, B).log_ratio().interval.estimate == pytest.approx(logs.mean())


def test_equivalence_is_a_margin_less_the_distance() -> None:
    found = Paired(A, B).equivalent(4.0)
    assert found.interval == within(4.0, mean_interval(DIFFERENCES))
    assert found.effect == effect_size(DIFFERENCES)
    assert found == Paired(A, B).difference().equivalent(4.0)


def test_another_scale_keeps_count_and_effect() -> None:
    found = Paired(A, B).difference()
    scaled = found.map(lambda x: 100 * x)
    assert scaled.interval.high == 100 * found.interval.high
    assert (scaled.count, scaled.effect) == (found.count, found.effect)


def test_pairs_are_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Paired(A, B[:3]).difference()

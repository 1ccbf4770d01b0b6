"""Numbers in formatting."""

from __future__ import annotations

import pytest

from batchnorm.study import formatting
from batchnorm.study.statistics import Interval, mean_interval


def test_spans() -> None:
    interval = Interval(1.25, -0.5, 4.0)
    assert formatting.span(interval) == "1.25 (95 % interval -0.5 to 4)"
    assert formatting.span(interval, "+.1f", "decades") == "+1.2 decades (95 % interval -0.5 to +4.0)"
    assert formatting.points(Interval(0.0125, -0.005, 0.04)) == "+1.25 percentage points (95 % interval -0.50 to +4.00)"
    assert formatting.points(Interval(-1e-9, -0.005, 0.0)) == "+0.00 percentage points (95 % interval -0.50 to +0.00)"


def test_chosen_rates_are_named_once() -> None:
    assert formatting.any_of([0.3, 0.1, 0.3]) == "0.1 or 0.3"
    assert formatting.any_of([0.3]) == "0.3"
    assert formatting.any_of([0.01, 1e-4], ".1e") == "1.0e-04 or 1.0e-02"


def test_a_curve_is_mean_and_range() -> None:
    curve = formatting.mean_and_range("ours", [5, 10], [[0.01, 0.02, 0.06], [0.04, 0.04, 0.04]])
    assert (curve.label, list(curve.x)) == ("ours", [5, 10])
    assert curve.middle == pytest.approx([3.0, 4.0])
    assert (curve.low, curve.high) == ([1.0, 4.0], [6.0, 4.0])
    plain = formatting.mean_and_range("plain", [5], [[0.00123456]])
    assert formatting.ends([curve, plain]) == "ours ends at 4, plain ends at 0.123"


def test_a_curve_of_intervals() -> None:
    curve = formatting.interval_curve("ours", [5, 10], [Interval(1.0, 0.5, 2.0), Interval(3.0, 3.0, 3.5)], points=True)
    assert (curve.label, curve.x, curve.points) == ("ours", [5, 10], True)
    assert (curve.middle, curve.low, curve.high) == ([1.0, 3.0], [0.5, 3.0], [2.0, 3.5])


def test_a_curve_of_means() -> None:
    values = [[0.25, 0.75, 0.5], [0.125, 0.125, 0.125]]
    curve = formatting.mean_curve("ours", [5, 10], values, times=100, points=True)
    assert (curve.label, curve.x, curve.points) == ("ours", [5, 10], True)
    assert curve.middle == pytest.approx([50, 12.5])
    assert curve.low is not None
    assert curve.high is not None
    assert curve.low == pytest.approx([100 * mean_interval(at).low for at in values])
    assert curve.high == pytest.approx([100 * mean_interval(at).high for at in values])
    assert formatting.mean_curve("ours", [5], [[0.5, 0.5]]).middle == [0.5]


def test_cells_of_a_table() -> None:
    assert formatting.cell(Interval(1.25, -0.5, 4.0), ".2f") == "1.25 (-0.50 to 4.00)"
    assert formatting.cell(Interval(0.125, 0.1, 0.2), ".0f", 100) == "12 (10 to 20)"


def test_fractions_in_per_cent() -> None:
    fractions = [0.5, 0.75, 0.7]
    assert formatting.mean_percent(fractions) == "65.0"
    assert formatting.range_percent(fractions) == "50.0-75.0"
    assert formatting.in_points(0.25) == 25

"""Numbers in formatting."""

from __future__ import annotations

import pytest

from batchnorm.study import formatting
from batchnorm.study.statistics import Interval


def test_spans() -> None:
    interval = Interval(1.25, -0.5, 4.0)
    assert formatting.span(interval) == "1.25 (95 % interval -0.5 to 4)"
    assert formatting.span(interval, "+.1f", "decades") == "+1.2 decades (95 % interval -0.5 to +4.0)"
    assert formatting.points(Interval(0.0125, -0.005, 0.04)) == "+1.25 percentage points (95 % interval -0.50 to +4.00)"
    assert formatting.points(Interval(-1e-9, -0.005, 0.0)) == "+0.00 percentage points (95 % interval -0.50 to +0.00)"


def test_chosen_rates_are_named_once() -> None:
    assert formatting.chosen([0.3, 0.1, 0.3]) == "0.1 or 0.3"
    assert formatting.chosen([0.3]) == "0.3"


def test_a_curve_is_mean_and_range() -> None:
    curve = formatting.spread("ours", [5, 10], [[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert (curve.label, list(curve.x)) == ("ours", [5, 10])
    assert curve.middle == pytest.approx([3.0, 4.0])
    assert (curve.low, curve.high) == ([1.0, 4.0], [6.0, 4.0])
    assert (
        formatting.ends([curve, formatting.spread("plain", [5], [[0.123456]])]) == "ours ends at 4, plain ends at 0.123"
    )

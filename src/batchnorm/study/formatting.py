"""Numbers in the words and curves that sections share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from batchnorm.report.document import Curve
from batchnorm.study.statistics import Interval


def span(interval: Interval, form: str = ".3g", unit: str = "") -> str:
    """An estimate with its interval: "1.5 times (95 % interval 1.2 to 1.9)"."""
    estimate, low, high = (_formatted(x, form) for x in (interval.estimate, interval.low, interval.high))
    return f"{estimate}{' ' if unit else ''}{unit} (95 % interval {low} to {high})"


def _formatted(x: float, form: str) -> str:
    """As `format`, but what is written as zero has no minus sign."""
    text = format(x, form)
    return format(0.0, form) if float(text) == 0 else text


def in_points(fraction: float) -> float:
    """A fraction in percentage points."""
    return 100 * fraction


def points(interval: Interval) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return span(interval.map(in_points), "+.2f", "percentage points")


def chosen(rates: Sequence[float]) -> str:
    """Learning rates of several seeds, each once: "0.1 or 0.3"."""
    return " or ".join(f"{rate:g}" for rate in sorted(set(rates)))


def spread(label: str, x: Sequence[float], values: Sequence[Sequence[float]], *, points: bool = False) -> Curve:
    """Mean and range, at each x, of the values there."""
    means = [statistics.fmean(at) for at in values]
    return Curve(label, x, means, [min(at) for at in values], [max(at) for at in values], points)


def ends(curves: Sequence[Curve]) -> str:
    """Where curves end, for those who cannot see them."""
    last = [(curve.label, curve.middle[-1]) for curve in curves]
    return ", ".join(f"{label} ends at " + ("no number" if y is None else f"{y:.3g}") for label, y in last)

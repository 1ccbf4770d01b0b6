"""Intervals, ranges and learning rates as the text, tables and curves of the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from batchnorm.report.document import Curve, percent
from batchnorm.study.statistics import Interval, mean_interval


def span(interval: Interval, form: str = ".3g", unit: str = "") -> str:
    """An estimate with its interval: "1.5 times (95 % interval 1.2 to 1.9)"."""
    estimate, low, high = (formatted(x, form) for x in (interval.estimate, interval.low, interval.high))
    return f"{estimate}{' ' if unit else ''}{unit} (95 % interval {low} to {high})"


def formatted(x: float, form: str) -> str:
    """As `format`, but what is written as zero has no minus sign."""
    text = format(x, form)
    return format(0.0, form) if float(text) == 0 else text


def cell(interval: Interval, form: str = ".1f", times: float = 1.0) -> str:
    """An estimate with its interval in a table: "1.5 (1.2 to 1.9)"."""
    estimate, low, high = (format(times * x, form) for x in (interval.estimate, interval.low, interval.high))
    return f"{estimate} ({low} to {high})"


def in_points(fraction: float) -> float:
    """A fraction in percentage points."""
    return 100 * fraction


def points(interval: Interval) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return span(interval.map(in_points), "+.2f", "percentage points")


def mean_percent(fractions: Sequence[float]) -> str:
    """The mean of fractions in per cent: "97.5"."""
    return percent(statistics.fmean(fractions))


def range_percent(fractions: Sequence[float]) -> str:
    """The range of fractions in per cent: "95.0-98.0"."""
    return f"{percent(min(fractions))}-{percent(max(fractions))}"


def any_of(rates: Sequence[float], form: str = "g") -> str:
    """Learning rates of several seeds, each named once: "0.1 or 0.3"."""
    return " or ".join(format(rate, form) for rate in sorted(set(rates)))


def interval_curve(label: str, x: Sequence[float], intervals: Sequence[Interval], *, points: bool = False) -> Curve:
    """An estimate with its interval at each x."""
    return Curve(
        label,
        x,
        [interval.estimate for interval in intervals],
        [interval.low for interval in intervals],
        [interval.high for interval in intervals],
        points,
    )


def mean_curve(
    label: str, x: Sequence[float], values: Sequence[Sequence[float]], *, times: float = 1.0, points: bool = False
) -> Curve:
    """The mean of the values at each x, so many times as large, with its 95 % interval."""
    intervals = [mean_interval(at).map(lambda mean: times * mean) for at in values]
    return interval_curve(label, x, intervals, points=points)


def mean_and_range(label: str, x: Sequence[float], fractions: Iterable[Sequence[float]]) -> Curve:
    """The mean of the fractions at each x, from the smallest to the largest of them, in per cent."""
    values = [[100 * fraction for fraction in at] for at in fractions]
    means = [statistics.fmean(at) for at in values]
    return Curve(label, x, means, [min(at) for at in values], [max(at) for at in values])


def ends(curves: Sequence[Curve]) -> str:
    """Where curves end, for those who cannot see them."""
    last = [(curve.label, curve.middle[-1]) for curve in curves]
    return ", ".join(f"{label} ends at " + ("no number" if y is None else f"{y:.3g}") for label, y in last)

"""Intervals and effect sizes of what was measured several times over."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

CONFIDENCE = 0.95
RESAMPLES = 10_000
SMALLEST = 1e-6  # of what has to have a logarithm
_SEED = 20150211  # any; fixed, so that the same values have the same interval

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """An estimate, and the 95 % interval around it.

    Attributes:
        estimate: of the population's mean, or of what it was mapped to.
        low: the interval's lower end.
        high: its upper end.
    """

    estimate: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the mean, such as exp for the mean of logarithms."""
        return Interval(function(self.estimate), function(self.low), function(self.high))

    @classmethod
    def exact(cls, value: float) -> Interval:
        """What is known without error, such as the largest of all."""
        return cls(value, value, value)


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % bootstrap interval; of paired differences, mostly.

    The percentile bootstrap is too narrow for small samples: the resampled means spread by the divisor n instead of
    n - 1, and its quantiles are the normal's instead of Student's. So the percentiles are moved outwards until both
    are made good: to Phi(-sqrt(n / (n - 1)) * t(0.975, n - 1)) and its complement. Unlike an interval from Student's t
    itself, this one follows the values' skewness. Tried on 3,000 normal samples each, it covered the mean in 93.5 % for
    n = 6 and in 95.5 % for n = 10 (the plain percentiles in 86 % and 91 %). Of fewer than six values it is too narrow
    all the same: no interval inside their range can have 95 %, see `verdict.FEWEST`.

    Args:
        values: one or more finite numbers, independent of each other. Of a single one the interval is that number.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", 2015: the expanded percentile interval.
    """
    sample = torch.tensor(values, dtype=torch.float64)
    if sample.ndim != 1 or not len(sample) or not sample.isfinite().all():
        raise ValueError(f"got {values}; there must be one finite number at least")
    # Not the mean of equal values but the value, so that rounding makes no interval.
    if sample.min() == sample.max():
        return Interval.exact(float(sample[0]))
    from scipy.stats import t

    n = len(values)
    generator = torch.Generator().manual_seed(_SEED)
    means = sample[torch.randint(n, (RESAMPLES, n), generator=generator)].mean(1)
    tail = statistics.NormalDist().cdf(-math.sqrt(n / (n - 1)) * float(t.ppf((1 + CONFIDENCE) / 2, n - 1)))
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(statistics.fmean(values), low, high)


def effect_size(differences: Sequence[float]) -> float | None:
    """Cohen's d_z: the mean of paired differences over their standard deviation (n - 1); None where that is 0.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988, chapter 2.
    """
    if len(differences) < 2 or min(differences) == max(differences):
        return None
    return statistics.fmean(differences) / statistics.stdev(differences)


def within(margin: float, difference: Interval) -> Interval:
    """`margin - |difference|`: positive throughout where the difference is surely smaller than the margin.

    That it lies above 0 is a test of equivalence, a stricter one than two one-sided tests at 5 %: those ask the same
    of a 90 % interval.
    """
    largest = max(abs(difference.low), abs(difference.high))
    smallest = 0.0 if difference.low <= 0 <= difference.high else min(abs(difference.low), abs(difference.high))
    return Interval(margin - abs(difference.estimate), margin - largest, margin - smallest)


def bounded(value: float, largest: float) -> float:
    """At least 1e-6 and at most `largest`, so that it has a logarithm; what is not a finite number is the largest."""
    return min(max(value, SMALLEST), largest) if math.isfinite(value) else largest


def best_of_the_others(scores: Mapping[K, Sequence[float]]) -> tuple[K, ...]:
    """For each seed, the setting with the best mean score over the other seeds; the first of equals.

    A comparison of every network at its own best setting has to find that setting. Found with the same seed that is
    then measured, it would be flattered by that seed's luck; this way no run takes part in the choice that it is for.

    Args:
        scores: of each setting, a score for each seed, two at least; larger is better.

    Returns:
        As many settings as there are seeds.
    """
    seeds = len(next(iter(scores.values())))

    def mean_without(seed: int, setting: K) -> float:
        return statistics.fmean(score for other, score in enumerate(scores[setting]) if other != seed)

    return tuple(max(scores, key=lambda setting: mean_without(seed, setting)) for seed in range(seeds))

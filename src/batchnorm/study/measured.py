"""Measured values: an interval, how many independent values it is of, and an effect size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from batchnorm.study.statistics import Interval, effect_size, mean_interval, within


@dataclass(frozen=True)
class Measured:
    """What a claim is judged by.

    Attributes:
        interval: the estimate and the 95 % interval around it.
        count: how many independent values it is of.
        effect: Cohen's d_z of the paired differences behind it; None where there are none.
    """

    interval: Interval
    count: int
    effect: float | None = None

    @classmethod
    def exact(cls, value: float, count: int) -> Measured:
        """A value without an interval, such as the worst of `count`."""
        return cls(Interval.exact(value), count)

    @classmethod
    def mean(cls, values: Sequence[float]) -> Measured:
        """The mean of independent values."""
        return cls(mean_interval(values), len(values))

    @classmethod
    def mean_difference(cls, differences: Sequence[float]) -> Measured:
        """The mean of paired differences, with its effect size."""
        return cls(mean_interval(differences), len(differences), effect_size(differences))

    def map(self, function: Callable[[float], float]) -> Measured:
        """The same under an increasing function of the mean; the effect size stays that of the differences."""
        return replace(self, interval=self.interval.map(function))

    def equivalent(self, margin: float) -> Measured:
        """`margin - |difference|`: above 0 where the difference is surely smaller than the margin."""
        return replace(self, interval=within(margin, self.interval))


@dataclass(frozen=True)
class Paired:
    """Two settings that were measured with the same seeds.

    Attributes:
        a: of each seed, the value of the first setting.
        b: of each seed, the value of the second.
    """

    a: Sequence[float]
    b: Sequence[float]

    def differences(self) -> list[float]:
        """Of each seed, `a - b`."""
        return [a - b for a, b in zip(self.a, self.b, strict=True)]

    def difference(self) -> Measured:
        """The mean of `a - b`."""
        return Measured.mean_difference(self.differences())

    def log_ratio(self) -> Measured:
        """The mean of `log(a / b)`."""
        return Measured.mean_difference([math.log(a / b) for a, b in zip(self.a, self.b, strict=True)])

    def ratio(self) -> Measured:
        """The geometric mean of `a / b`."""
        return self.log_ratio().map(math.exp)

    def equivalent(self, margin: float) -> Measured:
        """`margin - |difference|`: above 0 where the two surely differ by less than the margin."""
        return self.difference().equivalent(margin)

"""How far statistics scatter because samples differ: what a difference has to exceed before it says anything."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.diagnosis.observation import ObservedLayer
from batchnorm.moments import Moments

# An estimate of the noise over channels that all move together may be off by so much: a chi-square variable with one
# degree of freedom is beyond 16 once in 16,000 times. Channels that differ make it rarer.
BEYOND_NOISE = 16.0


class Difference(NamedTuple):
    """How far two sets of moments are apart.

    Attributes:
        shift: (C,) of the means, in standard deviations of the first.
        log_ratio: (C,) log of the variances' ratio.
    """

    shift: Tensor
    log_ratio: Tensor


def difference(first: Moments, second: Moments, eps: float) -> Difference:
    """How far `second` is from `first`; eps keeps dead channels apart from none."""
    a, b = first.var() + eps, second.var() + eps
    return Difference((second.mean - first.mean) / a.sqrt(), (b / a).log())


def rms(values: Tensor) -> float:
    """The root of the mean square; 0 of nothing."""
    return math.sqrt(float(values.square().mean())) if values.numel() else 0.0


def share_of_samples(layer: ObservedLayer) -> float | None:
    """The variance of samples' means in parts of all values' variance, on average over channels.

    One in S where the S values of a sample are independent, 1 where they are all alike, or where there is only one.
    None where it cannot be told.
    """
    means = layer.sample_means
    if layer.population is None or len(means) < 2:
        return None
    variance = layer.variance.to(means.device)[layer.channels]
    # Below a float64's precision nothing is left of a variance.
    live = variance > 1e-20 * layer.population.mean.to(means.device)[layer.channels].square()
    live &= variance > 0
    if not bool(live.any()):
        return None
    share = means[:, live].var(0) / variance[live]
    return min(1.0, float(share.clamp(max=1.0).mean()))


def values_in_effect(layer: ObservedLayer, samples: float) -> float | None:
    """How many independent values have a mean as noisy as that of so many samples; None where it cannot be told."""
    share = share_of_samples(layer)
    return None if not share else samples / share


def samples_of_a_batch(layer: ObservedLayer) -> float:
    """The median number of samples in a batch; 0 where samples are not known."""
    if not len(layer.batch_of):
        return 0.0
    counts = torch.bincount(layer.batch_of)
    return float(counts[counts > 0].median())


def chi_square_quantile(probability: float, degrees: int) -> float:
    """The value that a chi-square variable stays below with this probability, by Wilson and Hilferty's approximation.

    Far out with few degrees it is too large, by 15 % at 1 - 1e-6 with one.

    Source: Wilson and Hilferty, "The Distribution of Chi-Square", 1931.
    """
    z = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
    part = 2 / (9 * degrees)
    return float(degrees * (1 - part + z * math.sqrt(part)) ** 3)

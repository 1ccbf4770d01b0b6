"""What came into a layer while it was adapted: its moments, and how much they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.call import Call
from batchnorm.moments import Moments, pool

# Of batches, as many as are needed to see how their means scatter. Decay leaves fractions of one.
_FREEDOM = 0.5


def samples_of(call: Call) -> float:
    """How many samples of a layer's input count: rows of its batch dimension of which the mask leaves anything."""
    if call.x.numel() == 0:
        return 0.0
    if call.mask is None:
        return float(call.num_samples)
    rows = (call.mask > 0).flatten(1) if call.mask.dim() > 1 else (call.mask > 0).unsqueeze(1)
    # One row of a mask may stand for all samples.
    return float(rows.any(1).sum()) * (call.num_samples / len(rows))


@dataclass(frozen=True, eq=False)
class Seen:
    """The joined moments of batches, each of a weight that has decayed since.

    Attributes:
        moments: of all.
        samples: how many samples, by weight.
        batches: how many batches, whatever they weigh.
        refused: how many batches had inf or NaN, and were left out.
        within: (C,) the batches' own sums of squared deviations, joined without what is between them.
        weights: the sum of the batches' weights.
        squares: the sum of their squared weights times their counts.
    """

    moments: Moments
    samples: float
    batches: int
    refused: int
    within: Tensor
    weights: float
    squares: float

    @classmethod
    def nothing(cls, num_channels: int, device: torch.device) -> Seen:
        """Before the first batch."""
        empty = Moments.empty(num_channels, device=device)
        return cls(empty, 0.0, 0, 0, empty.m2, 0.0, 0.0)

    @classmethod
    def of_batches(cls, batches: Sequence[Moments], samples: float) -> Seen:
        """Batches of equal weight, whose moments are finite: the same in any order, but for rounding."""
        counts, means, squares = (torch.stack([getattr(m, name) for m in batches]) for name in ("count", "mean", "m2"))
        whole = pool(counts, means, squares)
        used = int((counts > 0).sum())
        return cls(whole, samples, used, 0, squares.sum(0), float(used), float(whole.count))

    def join(self, moments: Moments, samples: float, decay: float | None) -> Seen:
        """One batch more, of weight 1. What was there weighs decay^samples of what it weighed.

        Args:
            moments: of the batch; with inf or NaN, it is counted as refused and nothing else.
            samples: how many there are in it.
            decay: for each sample; None for 1.
        """
        # One look at the device.
        count, finite = torch.stack([moments.count.double(), (moments.mean + moments.m2).isfinite().all()]).tolist()
        if not finite:
            return Seen(**vars(self) | {"refused": self.refused + 1})
        if count == 0:
            return self
        kept = 1.0 if decay is None else decay**samples
        if kept == 0 or self.batches == 0:  # and not a sum with nothing, whose count is no integer
            joined, within = moments, moments.m2
        else:
            old = self.moments if kept == 1 else _scaled(self.moments, kept)
            joined, within = old + moments, self.within * kept + moments.m2
        return Seen(
            joined,
            self.samples * kept + samples,
            self.batches + 1,
            self.refused,
            within,
            self.weights * kept + 1,
            self.squares * kept**2 + count,
        )

    def joined_with(self, mean: Tensor, var: Tensor, prior: float) -> Moments:
        """These moments and those of a stored population, of which each sample is worth as many values as one seen.

        Args:
            mean: (C,) float64, the population's.
            var: (C,) float64, likewise, biased.
            prior: how many samples it has.
        """
        if self.samples == 0 or prior == 0:
            return self.moments
        count = self.moments.count.to(mean.dtype) * (prior / self.samples)
        return Moments(count, mean, var * count) + self.moments

    @property
    def effective(self) -> float:
        """How many independent values would give batch means that scatter as these do; at most as many as there are.

        Of independent values, batches' means scatter by their variance over their count. What belongs together (pixels
        of a picture, frames of a film, a class) comes in the same batch, and lets them scatter more. One batch tells
        nothing of that: it counts its samples.
        """
        count = float(self.moments.count)
        if self.batches == 0 or count == 0:
            return 0.0
        freedom = self.weights - self.squares / count
        if self.batches < 2 or freedom < _FREEDOM:
            return self.samples
        var = self.moments.m2 / count
        varies = var > 0
        if not bool(varies.any()):
            return self.samples
        between = (self.moments.m2 - self.within)[varies] / var[varies]
        return count**2 / self.squares / max(float(between.mean()) / freedom, 1.0)

    def weight(self, prior: float) -> float:
        """The share of what was seen in what it is joined to: samples / (samples + prior)."""
        return self.samples / (self.samples + prior) if self.samples else 0.0


def _scaled(moments: Moments, weight: float) -> Moments:
    """The same of values that weigh less."""
    return Moments(moments.count.to(moments.m2.dtype) * weight, moments.mean, moments.m2 * weight)

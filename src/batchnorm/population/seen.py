"""What came into a layer while it was adapted: its moments, and how much they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batchnorm.call import Call
from batchnorm.moments import Moments, pool, union

# Of batches, as many as are needed to see how their means scatter. Decay leaves fractions of one.
_FREEDOM = 0.5


def samples_of(call: Call) -> float:
    """How many samples of a layer's input count: rows of its batch dimension of which the mask leaves anything."""
    if call.x.numel() == 0:
        return 0.0
    if call.mask is None:
        return float(call.num_samples)
    rows = (call.mask > 0).flatten(1) if call.mask.dim() > 1 else (call.mask > 0).unsqueeze(1)
    return float(rows.any(1).sum())


@dataclass(frozen=True, eq=False)
class Seen:
    """The joined moments of batches, each of a weight that has decayed since.

    Counts are numbers of Python, so that what is joined at every call takes few operations.

    Attributes:
        count: how many values of each channel, by weight; an int where all weigh 1.
        mean: (C,) float64.
        m2: (C,) float64.
        samples: how many samples, by weight.
        batches: how many batches, whatever they weigh.
        refused: how many batches had inf or NaN, and were left out.
        within: (C,) the batches' own sums of squared deviations, joined without what is between them.
        weights: the sum of the batches' weights.
        squares: the sum of their squared weights times their counts.
    """

    count: int | float
    mean: Tensor
    m2: Tensor
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
        return cls(0, empty.mean, empty.m2, 0.0, 0, 0, empty.m2, 0.0, 0.0)

    @classmethod
    def of_batches(cls, batches: Sequence[Moments], samples: float) -> Seen:
        """Batches of equal weight, whose moments are finite: the same in any order, but for rounding."""
        counts, means, squares = (torch.stack([getattr(m, name) for m in batches]) for name in ("count", "mean", "m2"))
        whole = pool(counts, means, squares)
        used, count = int((counts > 0).sum()), whole.count.item()
        return cls(count, whole.mean, whole.m2, samples, used, 0, squares.sum(0), float(used), float(count))

    def join(self, moments: Moments, samples: float, decay: float | None) -> Seen:
        """One batch more, of weight 1. What was there weighs decay^samples of what it weighed.

        Args:
            moments: of the batch; with inf or NaN, it is counted as refused and nothing else. They are looked at, which
                waits for the device.
            samples: how many there are in it.
            decay: for each sample; None for 1.
        """
        count = moments.count.item()
        if not math.isfinite(float((moments.mean + moments.m2).sum())):
            return replace(self, refused=self.refused + 1)
        if count == 0:
            return self
        kept = 1 if decay is None else decay**samples
        if self.batches == 0 or kept == 0:
            mean, m2, within, total = moments.mean, moments.m2, moments.m2, count
        else:
            old, m2, within = self.count, self.m2, self.within
            if kept != 1:
                old, m2, within = old * kept, m2 * kept, within * kept
            total = old + count
            mean, m2 = union(old, count / total, self.mean, m2, moments.mean, moments.m2)
            within = within + moments.m2
        return Seen(
            total,
            mean,
            m2,
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
        count, own, m2 = self.count, self.mean, self.m2
        if self.samples and prior:
            stored = count * (prior / self.samples)
            own, m2 = union(stored, self.weight(prior), mean, var * stored, own, m2)
            count = stored + count
        dtype = torch.int64 if isinstance(count, int) else own.dtype
        return Moments(torch.tensor(count, dtype=dtype, device=own.device), own, m2)

    @property
    def effective(self) -> float:
        """How many independent values would give batch means that scatter as these do; at most as many as there are.

        Of independent values, batches' means scatter by their variance over their count. What belongs together (pixels
        of a picture, frames of a film, a class) comes in the same batch, and lets them scatter more. One batch tells
        nothing of that: it counts its samples.
        """
        if self.count == 0:
            return 0.0
        freedom = self.weights - self.squares / self.count
        if self.batches < 2 or freedom < _FREEDOM:
            return self.samples
        var = self.m2 / self.count
        varies = var > 0
        if not bool(varies.any()):
            return self.samples
        between = (self.m2 - self.within)[varies] / var[varies]
        return self.count**2 / self.squares / max(float(between.mean()) / freedom, 1.0)

    def weight(self, prior: float) -> float:
        """The share of what was seen in what it is joined to: samples / (samples + prior)."""
        return self.samples / (self.samples + prior) if self.samples else 0.0

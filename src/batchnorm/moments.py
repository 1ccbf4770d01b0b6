"""Moments: the one object that batch, running and population statistics are made of.

The moments of a set of activations are its count, its mean and its sum of squared deviations, per channel:

    n,    mean = 1/n Σ x,    m2 = Σ (x - mean)^2

Moments of disjoint sets add up to the moments of their union, so they form a commutative monoid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm import _torch, layout, ops
from batchnorm.call import checked_mask
from batchnorm.errors import CountError, ShapeError
from batchnorm.kernels.reference import statistics_dtype


@dataclass(frozen=True, eq=False)
class Moments:
    r"""Count, mean and sum of squared deviations of a set of activations, per channel.

    Two sets a and b, with d = mean_b - mean_a and n = n_a + n_b, join as (Chan, Golub and LeVeque, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979)

        mean = mean_a + d n_b / n,    m2 = m2_a + m2_b + d^2 n_a n_b / n

    which never subtracts two large numbers. `sum(many, start=Moments.empty(C))` joins any number.

    Attributes:
        count: () int64, or float64 with sample weights.
        mean: (C,) float64, in the activations' unit; 0 for the empty set.
        m2: (C,) float64, in the activations' unit squared.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, num_channels: int, *, device: torch.device | str | None = None) -> Moments:
        """The moments of no activations: the neutral element of `+`."""
        zeros = torch.zeros(num_channels, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), zeros, zeros.clone())

    @classmethod
    def of(cls, x: Tensor, *, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
        """The moments of one tensor.

        With sample weights w: count = Σ w, mean = Σ w x / count, m2 = Σ w (x - mean)^2. What a mask leaves out
        has no influence whatever its value is, NaN included. Differentiable.

        Args:
            x: (N, C, *S) of any dtype, channels in dimension `channel_dim`.
            channel_dim: the dimension of the channels.
            mask: which positions count: bool, or sample weights >= 0. Of x's shape without the channel dimension (a
                size of 1 broadcasts), or (N,): one value for each sample.

        Returns:
            Moments with C channels.

        Raises:
            ShapeError: rank below 2, or a mask that does not fit.
            OptionError: a sample weight that is negative or not finite.
        """
        axis = layout.channel_axis(x.dim(), channel_dim)
        if mask is not None:
            mask = checked_mask(mask, x, axis)
        if not x.is_floating_point():
            x = x.to(statistics_dtype(x.device))
        if x.requires_grad and torch.is_grad_enabled():  # the kernels' moments have no derivatives of their own
            return cls(*ops.DIFFERENTIABLE.batch_moments(x, axis, mask))
        return cls(*ops.select(x, mask).batch_moments(x, axis, mask))

    def __add__(self, other: Moments) -> Moments:
        """The moments of the union of two disjoint sets."""
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise ShapeError(
                f"got moments of {self.mean.shape[0]} and of {other.mean.shape[0]} channels; "
                f"only moments of the same channels can be joined"
            )
        count = self.count + other.count
        # Two integer tensors would divide in torch's default dtype, float32.
        fraction = other.count.to(self.mean.dtype) / torch.where(count > 0, count, 1)
        mean, m2 = union(self.count, fraction, self.mean, self.m2, other.mean, other.m2)
        # Empty sets are chosen away rather than computed away: the other side comes back bit for bit.
        pick_self, pick_other = other.count == 0, self.count == 0
        return Moments(
            count,
            torch.where(pick_self, self.mean, torch.where(pick_other, other.mean, mean)),
            torch.where(pick_self, self.m2, torch.where(pick_other, other.m2, m2)),
        )

    def var(self, *, correction: int = 0) -> Tensor:
        """The variance m2 / (count - correction), (C,): biased by default, unbiased with correction=1.

        Raises:
            CountError: count <= correction. (Looking at the count waits for the device.)
        """
        count = self.count.item()
        if count <= correction:
            raise CountError(
                f"got {count} observations and correction={correction}; a variance needs count > correction. "
                f"Observe more, or lower the correction"
            )
        return self.m2 / (count - correction)

    def std(self, *, correction: int = 0) -> Tensor:
        """The square root of `var`, (C,). Raises as `var` does."""
        return self.var(correction=correction).sqrt()


def union(
    count: Tensor | float, fraction: Tensor | float, mean: Tensor, m2: Tensor, other_mean: Tensor, other_m2: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula by which moments add up: mean and m2 of both sets.

    Args:
        count: of the first.
        fraction: the other's count in the sum of both.
        mean: of the first.
        m2: likewise.
        other_mean: of the other.
        other_m2: likewise.
    """
    delta = other_mean - mean
    return mean + delta * fraction, m2 + other_m2 + delta.square() * (fraction * count)


def pool(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """The sum of G moments that lie in one tensor each: count (G,), mean and m2 (G, C).

    Or of each of D domains: count (G, D), mean and m2 (G, D, C).
    """
    total = count.sum(0)
    n = count.to(mean.dtype).unsqueeze(-1)
    pooled = (n * mean).sum(0) / torch.where(total > 0, total, 1).unsqueeze(-1)
    return Moments(total, pooled, (m2 + n * (mean - pooled).square()).sum(0))


# So that torch.func's transforms take and give moments as they do tensors.
_torch.register_tree(
    Moments, lambda moments: [moments.count, moments.mean, moments.m2], lambda leaves: Moments(*leaves)
)

"""Whether batches are random draws of the samples: a permutation test of variance components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PERMUTATIONS = 500
CHANNELS = 16  # of each layer: more say the same again
SAMPLES = 2048  # at most, in whole batches
_CHUNK = 1 << 22  # values that are permuted at once


class Between(NamedTuple):
    """What one layer shows of its batches.

    Attributes:
        share: of the variance of samples' means, what lies between batches: the intraclass correlation. About 0, and
            not below -1 / (samples of a batch - 1), of random draws.
        score: how far the sum of squares between batches is beyond that of permuted samples, in the latters' SD.
        significant: whether it is beyond that of every permutation, in every layer.
    """

    share: float
    score: float
    significant: bool


def between_batches(
    layers: Sequence[Tensor], batch_of: Tensor, *, least: float = 0.0, permutations: int = PERMUTATIONS
) -> list[Between]:
    r"""Variance components of samples' means, between batches and within, against permuted samples.

    With channels at unit variance, and sums over channels, SSB = \sum_b n_b |mean_b|^2 and SSW = SST - SSB,

        share = (MSB - MSW) / (MSB + (n - 1) MSW),    MSB = SSB / (B - 1),    MSW = SSW / (N - B),

    with n values a batch, by the harmonic rule for batches of several sizes. SSB is compared with that of the same
    samples in permuted order. All layers see the same permutations, and what counts is the largest score of a
    permutation over all layers: so the whole finds something in random draws once in `permutations` + 1 times.

    Args:
        layers: (N, K) samples' means of each layer, K may differ.
        batch_of: (N,) the batch of each sample.
        least: a share that does not matter: a layer with less is not significant, and if all have less, nothing is
            permuted, and scores are 0.
        permutations: how many.

    Returns:
        One for each layer; nothing is significant with one batch, or with one sample in each.

    Source: Searle, Casella and McCulloch, "Variance Components", 1992, chapter 3; Westfall and Young,
    "Resampling-Based Multiple Testing", 1993, on the maximum.
    """
    batch_of, keep = _some(batch_of.cpu())
    sizes = torch.bincount(batch_of).double()
    sizes = sizes[sizes > 0]
    total, batches = len(batch_of), len(sizes)
    if batches < 2 or total <= batches or not layers:
        return [Between(0.0, 0.0, False)] * len(layers)
    order = batch_of.argsort(stable=True)
    columns = [_standardised(layer.cpu().double()[keep][order]) for layer in layers]
    widths = [column.shape[1] for column in columns]
    together = torch.cat(columns, 1).float()
    ends = sizes.cumsum(0).long()
    observed = _squares_between(together.unsqueeze(0), sizes, ends, widths)[0]
    n = (total - float(sizes.square().sum()) / total) / (batches - 1)
    shares = []
    for width, squares in zip(widths, observed.tolist(), strict=True):
        between, within = squares / (batches - 1), (width * total - squares) / (total - batches)
        below = between + (n - 1) * within
        shares.append((between - within) / below if below > 0 else 0.0)
    if max(shares) <= least:
        return [Between(share, 0.0, False) for share in shares]
    chance = _permuted(together, sizes, ends, widths, permutations)
    spread = chance.std(0).clamp(min=1e-12)
    score = (observed - chance.mean(0)) / spread
    most = float(((chance - chance.mean(0)) / spread).max())
    return [
        Between(share, beyond, share > least and beyond > most)
        for share, beyond in zip(shares, score.tolist(), strict=True)
    ]


def _permuted(together: Tensor, sizes: Tensor, ends: Tensor, widths: Sequence[int], permutations: int) -> Tensor:
    """(R, L) SSB of samples in R random orders."""
    generator = torch.Generator().manual_seed(0)
    found, at_once = [], max(1, _CHUNK // together.numel())
    for done in range(0, permutations, at_once):
        orders = torch.rand(min(at_once, permutations - done), len(together), generator=generator).argsort(1)
        found.append(_squares_between(together[orders], sizes, ends, widths))
    return torch.cat(found)


def _some(batch_of: Tensor) -> tuple[Tensor, Tensor]:
    """The first whole batches that are not too many samples, at least two; and which samples those are."""
    counts = torch.bincount(batch_of)
    last = max(int((counts.cumsum(0) <= SAMPLES).sum()), 2)
    keep = batch_of < last
    return batch_of[keep], keep


def _standardised(means: Tensor) -> Tensor:
    """Channels at mean 0 and variance 1, without those that do not vary, and not more than some spread evenly."""
    spread = means.std(0, correction=0)
    varies = spread > 1e-9 * means.abs().amax(0)
    means, spread = means[:, varies], spread[varies]
    if means.shape[1] > CHANNELS:
        some = torch.linspace(0, means.shape[1] - 1, CHANNELS).long()
        means, spread = means[:, some], spread[some]
    return (means - means.mean(0)) / spread


def _squares_between(samples: Tensor, sizes: Tensor, ends: Tensor, widths: Sequence[int]) -> Tensor:
    """(R, L) SSB of (R, N, K) samples in order of batches, of each layer's channels."""
    sums = samples.cumsum(1, dtype=torch.float64)[:, ends - 1]
    sums = torch.diff(sums, dim=1, prepend=torch.zeros_like(sums[:, :1]))
    squares = (sums.square() / sizes.view(-1, 1)).sum(1)
    return torch.stack([part.sum(1) for part in squares.split(list(widths), 1)], 1)

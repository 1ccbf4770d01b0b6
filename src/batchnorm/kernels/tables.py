"""Tables: a row of one value for each channel, for each domain that samples come from.

Without domains a table is one row, (C,). With them it is (D, C), and `domain`, (N,) int64, says which row each sample
uses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import layout


def spread(table: Tensor, rank: int, axis: int, domain: Tensor | None) -> Tensor:
    """What each sample uses, viewed so that it broadcasts against an input of rank `rank`.

    Args:
        table: (D, C), or (C,) for the same in every domain.
        rank: of the input.
        axis: the input's channel dimension.
        domain: (N,), or None.
    """
    if domain is None or table.dim() == 1:
        return layout.per_channel(table, rank, axis)
    rows = table.index_select(0, domain)  # (N, C)
    first = 1 if axis == 0 else 0
    shape = [1] * rank
    shape[first], shape[axis] = rows.shape
    return (rows.t() if axis == 0 else rows).reshape(shape)


def summed(values: Tensor, axis: int, domain: Tensor | None, domains: int) -> Tensor:
    """The sums over all values of each channel: (C,), or (D, C), of each domain's samples.

    Args:
        values: (N, C, *S), with the channels in dimension `axis`.
        axis: the channel dimension.
        domain: (N,), or None.
        domains: D.
    """
    if domain is None:
        return values.sum(layout.observed_dims(values.dim(), axis))
    of_samples = _of_samples(values, axis)
    # Not a product with ones and zeros: a sample of another domain may be inf.
    return of_samples.new_zeros(domains, of_samples.shape[1]).index_add(0, domain, of_samples)


def counted(x: Tensor, axis: int, domain: Tensor | None, domains: int) -> Tensor:
    """The number of values of each channel, () int64; of each domain's samples, (D,)."""
    n = layout.count(x.shape, axis)
    if domain is None:
        return torch.full((), n, device=x.device)
    of_each = math.prod(layout.observed_shape(x.shape, axis)[1:])
    ones = torch.ones_like(domain) * of_each
    return ones.new_zeros(domains).index_add(0, domain, ones)


def beside(count: Tensor, table: Tensor) -> Tensor:
    """A count so that it broadcasts against a table: one for each domain is one for each row."""
    return count.unsqueeze(-1) if 0 < count.dim() < table.dim() else count


def gradient_of(parameter: Tensor | None, sums: Tensor) -> Tensor:
    """The gradient of a parameter, in its dtype, from a table of sums: one that all domains share gets that of all."""
    if parameter is None:
        return sums
    return (sums.sum(0) if sums.dim() > parameter.dim() else sums).to(parameter.dtype)


def _of_samples(values: Tensor, axis: int) -> Tensor:
    """(N, C): each sample's sums."""
    first = 1 if axis == 0 else 0
    rest = tuple(dim for dim in range(values.dim()) if dim not in (first, axis))
    sums = values.sum(rest) if rest else values
    return sums.t() if axis == 0 else sums

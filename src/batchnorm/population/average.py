"""Method "average": the equal-weight mean of batches' statistics, as `torch.optim.swa_utils.update_bn` has it."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.errors import CountError
from batchnorm.population.context import Context, LayerCall, MethodResult
from batchnorm.population.layers import Layer
from batchnorm.population.pooled import by_batch_statistics
from batchnorm.population.result import Population


def average(context: Context) -> MethodResult:
    """Each layer's mean of means and mean of unbiased variances, over calls of one weight whatever their size.

    For comparison: this is neither the mean nor the variance of the data where batches differ in size, and leaves the
    variance between batches out.

    Raises:
        CountError: a call with one value for each channel.
    """
    # number of calls, count, sum of means, sum of unbiased variances
    totals = {layer: _zeros(layer) for layer in context.layers}

    def add(calls: list[LayerCall]) -> None:
        for layer, moments, batch in calls:
            if moments.count == 1:
                raise CountError(
                    f'layer "{layer.name}": got one value for each channel in batch {batch}; its unbiased variance '
                    f'does not exist. Use larger batches, or method="pooled"'
                )
            if moments.count > 0:
                new = (torch.ones_like(moments.count), moments.count, moments.mean, moments.var(correction=1))
                totals[layer] = [total + value for total, value in zip(totals[layer], new, strict=True)]

    by_batch_statistics(context, add)
    shares = context.gathered([t for total in totals.values() for t in total])
    populations = {}
    for i, layer in enumerate(context.layers):
        calls, count, mean, var = (sum(parts) for parts in zip(*(s[4 * i : 4 * i + 4] for s in shares), strict=True))
        if calls > 0:
            populations[layer] = Population(count.item(), mean / calls, var / calls)
    return MethodResult(populations)


def _zeros(layer: Layer) -> list[Tensor]:
    scalar = torch.zeros((), dtype=torch.int64, device=layer.mean.device)
    vector = torch.zeros(layer.num_channels, dtype=torch.float64, device=layer.mean.device)
    return [scalar, scalar, vector, vector]

"""Method "average": the equal-weight mean of batches' statistics, as `torch.optim.swa_utils.update_bn` has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import CountError
from batchnorm.moments import Moments
from batchnorm.population.job import Job, Outcome, check_finite
from batchnorm.population.layers import Layer, listening
from batchnorm.population.pooled import normalize_by
from batchnorm.population.result import Population


def average(job: Job) -> Outcome:
    """Each layer's mean of means and mean of unbiased variances, over calls of one weight whatever their size.

    For comparison: this is neither the mean nor the variance of the data where batches differ in size, and leaves the
    variance between batches out.

    Raises:
        CountError: a call with one value for each channel.
    """
    # calls, count, and the sums of means and of unbiased variances
    totals = {layer: _zeros(layer) for layer in job.layers}
    seen: list[tuple[Layer, Moments]] = []

    def receive(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = layer.moments(args, kwargs)
        if moments.count == 1:
            raise CountError(
                "got one value for each channel; its unbiased variance does not exist. Use larger batches, or "
                'method="pooled"'
            )
        normalize_by(layer, moments)
        seen.append((layer, moments))

    with listening(job.model, job.layers, receive, lambda: job.running) as calls:
        for batch in job.batches:
            seen.clear()
            job.run(batch, calls)
            check_finite((layer, moments, batch.index) for layer, moments in seen)
            for layer, moments in seen:
                if moments.count > 0:
                    new = (torch.ones(()), moments.count, moments.mean, moments.var(correction=1))
                    totals[layer] = [total + value for total, value in zip(totals[layer], new, strict=True)]
            job.progress.calls = job.progress.calls or len(seen)
            job.progress.advance(len(seen))
    shares = job.gathered([t for total in totals.values() for t in total])
    populations = {}
    for i, layer in enumerate(job.layers):
        number, count, mean, var = (sum(parts) for parts in zip(*(s[4 * i : 4 * i + 4] for s in shares), strict=True))
        if number > 0:
            populations[layer] = Population(count.item(), mean / number, var / number)
    return Outcome(populations)


def _zeros(layer: Layer) -> list[Tensor]:
    scalar = torch.zeros((), dtype=torch.int64, device=layer.mean.device)
    vector = torch.zeros(layer.num_channels, dtype=torch.float64, device=layer.mean.device)
    return [scalar, scalar, vector, vector]

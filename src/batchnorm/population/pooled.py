"""Method "pooled": one pass by batch statistics, and the moments of all batches joined."""

from __future__ import annotations

from typing import Any

import torch

from batchnorm.moments import Moments
from batchnorm.population.job import Job, Outcome, check_finite, population
from batchnorm.population.layers import Layer, listening


def normalize_by(layer: Layer, moments: Moments) -> None:
    """Have the layer normalise by these moments: the mean and the biased variance."""
    layer.write(moments.mean, moments.m2 / torch.where(moments.count > 0, moments.count, 1))


def pooled(job: Job) -> Outcome:
    """Each layer's moments over all calls of all batches, where layers upstream normalise by the batch.

    Layers may be called any number of times, in any order.
    """
    joined = {layer: Moments.empty(layer.num_channels, device=layer.mean.device) for layer in job.layers}
    seen: list[tuple[Layer, Moments]] = []

    def receive(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = layer.moments(args, kwargs)
        normalize_by(layer, moments)
        seen.append((layer, moments))

    with listening(job.model, job.layers, receive, lambda: job.running) as calls:
        for batch in job.batches:
            seen.clear()
            job.run(batch, calls)
            check_finite((layer, moments, batch.index) for layer, moments in seen)
            for layer, moments in seen:
                joined[layer] += moments
            job.progress.calls = job.progress.calls or len(seen)
            job.progress.advance(len(seen))
    shares = job.gathered([t for m in joined.values() for t in (m.count, m.mean, m.m2)])
    for i, layer in enumerate(job.layers):
        parts = [Moments(*share[3 * i : 3 * i + 3]) for share in shares]
        joined[layer] = sum(parts[1:], start=parts[0])
    return Outcome({layer: p for layer, moments in joined.items() if (p := population(layer, moments)) is not None})

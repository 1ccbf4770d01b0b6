"""Method "pooled": one pass by batch statistics, and the moments of all batches joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchnorm.moments import Moments
from batchnorm.population.checkpoint import Checkpoint
from batchnorm.population.context import Call, Job, Outcome, check_finite, population
from batchnorm.population.layers import Layer, listening


def by_batch_statistics(job: Job, take: Callable[[list[Call]], None]) -> None:
    """Run all batches, each normalised by its own mean and biased variance, in every call of a layer.

    Args:
        job: what to run.
        take: given the calls of each batch, in order.
    """
    seen: list[tuple[Layer, Moments]] = []

    def receive(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = layer.moments(args, kwargs)
        layer.write(moments.mean, moments.m2 / torch.where(moments.count > 0, moments.count, 1))
        seen.append((layer, moments))

    with listening(job.model, job.layers, receive, lambda: job.running) as calls:
        for batch in job.batches:
            seen.clear()
            job.run(batch, calls)
            made = [Call(layer, moments, batch.index) for layer, moments in seen]
            check_finite(made)
            job.progress.calls = job.progress.calls or len(made)
            job.progress.done += len(made)
            take(made)
            job.progress.tell()


def pooled(job: Job) -> Outcome:
    """Each layer's moments over all calls of all batches, where layers upstream normalise by the batch.

    Layers may be called any number of times, in any order.
    """
    joined = {layer: Moments.empty(layer.num_channels, device=layer.mean.device) for layer in job.layers}
    kept = None if job.checkpoint is None else Checkpoint(job.checkpoint, job)
    if kept is not None:
        joined = kept.load() or joined

    def take(made: list[Call]) -> None:
        for call in made:
            joined[call.layer] += call.moments
        if kept is not None:
            kept.save(joined)

    by_batch_statistics(job, take)
    if kept is not None:
        kept.save(joined, now=True)
    shares = job.gathered([t for m in joined.values() for t in (m.count, m.mean, m.m2)])
    for i, layer in enumerate(job.layers):
        parts = [Moments(*share[3 * i : 3 * i + 3]) for share in shares]
        joined[layer] = sum(parts[1:], start=parts[0])
    outcome = Outcome({layer: p for layer, moments in joined.items() if (p := population(layer, moments)) is not None})
    if kept is not None:
        kept.remove()
    return outcome

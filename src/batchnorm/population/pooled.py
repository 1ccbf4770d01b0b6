"""Method "pooled": one pass by batch statistics, and the moments of all batches joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchnorm.moments import Moments
from batchnorm.population.checkpoint import Checkpoint
from batchnorm.population.context import Context, LayerCall, MethodResult, check_finite, population
from batchnorm.population.layers import CallHooks, Layer


def by_batch_statistics(context: Context, collect: Callable[[list[LayerCall]], None]) -> None:
    """Run all batches, each normalised by its own mean and biased variance, in every call of a layer.

    Args:
        context: what to run.
        collect: given the calls of each batch, in order.
    """
    seen: list[tuple[Layer, Moments]] = []

    def receive(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = layer.moments(args, kwargs)
        layer.write(moments.mean, moments.m2 / torch.where(moments.count > 0, moments.count, 1))
        seen.append((layer, moments))

    hooks = CallHooks(receive, lambda: context.running)
    with hooks.on(context.model, context.layers):
        for batch in context.batches:
            seen.clear()
            context.run(batch, hooks)
            calls = [LayerCall(layer, moments, batch.index) for layer, moments in seen]
            check_finite(calls)
            context.progress.calls = context.progress.calls or len(calls)
            context.progress.done += len(calls)
            collect(calls)
            context.progress.tell()


def pooled(context: Context) -> MethodResult:
    """Each layer's moments over all calls of all batches, where layers upstream normalise by the batch.

    Layers may be called any number of times, in any order.
    """
    joined = {layer: Moments.empty(layer.num_channels, device=layer.mean.device) for layer in context.layers}
    checkpoint = None if context.checkpoint is None else Checkpoint(context.checkpoint, context)
    if checkpoint is not None:
        joined = checkpoint.load() or joined

    def add(calls: list[LayerCall]) -> None:
        for call in calls:
            joined[call.layer] += call.moments
        if checkpoint is not None:
            checkpoint.save(joined)

    by_batch_statistics(context, add)
    if checkpoint is not None:
        checkpoint.save(joined, now=True)
    shares = context.gathered([t for m in joined.values() for t in (m.count, m.mean, m.m2)])
    for i, layer in enumerate(context.layers):
        parts = [Moments(*share[3 * i : 3 * i + 3]) for share in shares]
        joined[layer] = sum(parts[1:], start=parts[0])
    result = MethodResult(
        {layer: p for layer, moments in joined.items() if (p := population(layer, moments)) is not None}
    )
    if checkpoint is not None:
        checkpoint.remove()
    return result

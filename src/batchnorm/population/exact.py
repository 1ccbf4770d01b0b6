"""Method "exact": every forward pass waits at each layer until all have come there, and goes on by all their moments.

So every layer sees what inference will show it, in one pass over the data.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import OrderError
from batchnorm.moments import Moments, pool
from batchnorm.population.available import default_limit
from batchnorm.population.batches import Batch, cut, device, nothing_to_learn_from, samples
from batchnorm.population.context import Call, Job, Outcome, check_finite, population
from batchnorm.population.layers import Layer, listening
from batchnorm.population.lockstep import Lockstep, Pass
from batchnorm.population.memory import Memory
from batchnorm.population.result import Population
from batchnorm.population.torch_state import TorchState

_END = "the end of the forward pass"


def exact(job: Job) -> Outcome:
    """Each layer's moments over all batches, where layers upstream normalise by their own.

    Raises:
        OrderError: a layer is called twice in a forward pass, or batches call layers in different orders.
    """
    named = {layer.name: layer for layer in job.layers}
    solved: dict[Layer, Population | None] = {}

    def receive(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one = steps.current
        assert one is not None
        if layer in one.called:
            raise _called_twice(one.batch)
        one.called.append(layer)
        if layer not in solved:  # otherwise the pass is being repeated
            one.at, one.moments = layer, layer.moments(args, kwargs)
            steps.wait()

    unread = iter(job.batches)
    batch = next(unread, None)
    if batch is not None:
        job.progress.calls = _look_ahead(job, batch)
    steps = Lockstep(lambda batch: job.run(batch, calls), job.devices)
    limit = default_limit(device(job.model)) if job.memory_limit is None else job.memory_limit
    memory = Memory(steps, job.model, limit)
    listener = listening(job.model, job.layers, receive, lambda: steps.current is not None)
    with listener as calls, memory, steps:
        while batch is not None:
            memory.proceed(steps.add(batch))
            with memory.guarding():
                batch = next(unread, None)
        job.progress.batches = len(steps.passes)
        while True:
            here = _where(steps.passes)
            place, shares = job.group.all_gather(here, _joined(steps.passes) if here in named else [])
            if place is None:
                raise nothing_to_learn_from(job.batches.read)
            if place == _END:
                break
            layer, parts = named[place], [Moments(*share) for share in shares if share]
            new = solved[layer] = population(layer, sum(parts[1:], start=parts[0]))
            if new is not None:
                layer.settle(new.mean, new.var)
            memory.next_round()
            for one in steps.passes:
                memory.proceed(one)
                job.progress.done += 1
                job.progress.tell()
    return Outcome({layer: new for layer, new in solved.items() if new is not None}, memory.use)


def _look_ahead(job: Job, first: Batch) -> int | None:
    """Run the first sample alone, to see which layers are called: what cannot work is refused before it costs anything.

    Returns:
        How many calls a forward pass makes; None where that cannot be seen.
    """
    if not samples(first.content):
        return None
    called: list[Layer] = []
    before = TorchState.here(job.devices)
    ended = False
    # A model may not take one sample; if it is wrong in another way, the batch itself will tell.
    with (
        contextlib.suppress(Exception),
        listening(job.model, job.layers, lambda layer, *_: called.append(layer), lambda: job.running) as calls,
    ):
        job.run(Batch(first.index, cut(first.content, 1)), calls)
        ended = True
    before.restore()
    for layer, times in Counter(called).items():
        if times > 1:
            raise _called_twice(first).within(f'layer "{layer.name}"')
    return len(called) if ended else None


def _called_twice(batch: Batch) -> OrderError:
    return OrderError(
        f"called twice in the forward pass of batch {batch.index}; what comes into the second call depends on the very "
        f'statistics that are computed from both, so that method "exact" has no answer in one pass. Use '
        f'method="pooled", which joins all calls, or a layer for each place'
    )


def _where(passes: Sequence[Pass]) -> str | None:
    """The name of the layer that all passes wait at, or their end; None without passes.

    Raises:
        OrderError: they are at different places.
    """
    places = Counter(_place(one) for one in passes)
    if len(places) > 1:
        usual = places.most_common(1)[0][0]
        odd = next(one for one in passes if _place(one) != usual)
        raise OrderError(
            f"got batch {odd.batch.index} at {_place(odd)} where {places[usual]} of {len(passes)} batches are at "
            f'{usual}; method "exact" needs batches that call the same layers in the same order. Use method="pooled", '
            f"which needs no order, or recalibrate with batches that take the same way"
        )
    return next(iter(places), None)


def _place(one: Pass) -> str:
    return _END if one.at is None else one.at.name


def _joined(passes: Sequence[Pass]) -> list[Tensor]:
    """Count, mean and m2 of all inputs to the layer that passes wait at.

    Raises:
        NonFiniteError: an input is not finite.
    """
    waiting = [Call(one.at, one.moments, one.batch.index) for one in passes if one.at and one.moments]
    inputs = [call.moments for call in waiting]
    counts, means, squares = (torch.stack([getattr(m, name) for m in inputs]) for name in ("count", "mean", "m2"))
    if not bool((means.isfinite() & squares.isfinite()).all()):  # one look for all batches: it waits for the device
        check_finite(waiting)
    whole = pool(counts, means, squares)
    return [whole.count, whole.mean, whole.m2]

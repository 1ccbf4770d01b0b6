"""Method "exact": every forward pass waits at each layer until all have come there, and goes on by all their moments.

So every layer sees what inference will show it, in one pass over the data.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import OrderError
from batchnorm.moments import Moments, pool
from batchnorm.population.batches import Batch, cut, nothing_to_learn_from, samples
from batchnorm.population.context import Context, LayerCall, MethodResult, check_finite, population
from batchnorm.population.interrupts import caller, closed
from batchnorm.population.layers import CallHooks, Layer
from batchnorm.population.locks import Locks
from batchnorm.population.lockstep import Lockstep, Pass
from batchnorm.population.memory import Memory
from batchnorm.population.result import Population
from batchnorm.population.torch_state import TorchState

_END = "the end of the forward pass"


class Exact:
    """Each layer's moments over all batches, where layers upstream normalise by their own.

    Args:
        context: what is recalibrated, by what; it is used up by one `run`.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._places: dict[str, list[Layer]] = {}  # the domains of a layer, or the layer alone
        for layer in context.layers:
            self._places.setdefault(layer.place, []).append(layer)
        self._solved: dict[Layer, Population | None] = {}  # None for a layer that was called with nothing
        self._hooks = CallHooks(self._receive, lambda: self._lockstep.current is not None)
        self._lockstep = Lockstep(lambda batch: context.run(batch, self._hooks), context.devices)
        self._memory = Memory(self._lockstep, context.model, context.memory_limit)
        self._last: Pass | None = None

    def run(self) -> MethodResult:
        """Compute the statistics, and write them to the layers on the way.

        Raises:
            OrderError: a layer is called twice in a forward pass, or batches call layers in different orders.
        """
        unread = iter(self._context.batches)
        first = next(unread, None)
        if first is not None:
            self._context.progress.calls = self._look_ahead(first)
        self._locks = Locks()
        # The memory first: what goes into the layer that a pass waits at is counted.
        with self._memory, self._hooks.on(self._context.model, self._context.layers), self._lockstep:
            self._begin_all(first, unread)
            while (arrived := self._gather()) is not None:
                for layer, moments in arrived:
                    self._solve(layer, moments)
                self._proceed_all()
        solved = {layer: new for layer, new in self._solved.items() if new is not None}
        return MethodResult(solved, self._memory.use)

    def _look_ahead(self, first: Batch) -> int | None:
        """Run the first sample alone, to see which layers are called: what cannot work is refused before it costs much.

        Returns:
            How many calls a forward pass makes; None where that cannot be seen.
        """
        if not samples(first.content):
            return None
        called: list[Layer] = []
        context, before = self._context, TorchState.here(self._context.devices)
        hooks = CallHooks(lambda layer, *_: called.append(layer), lambda: context.running)
        ended = False
        # A model may not take one sample; if it is wrong in another way, the batch itself will tell.
        with contextlib.suppress(Exception), hooks.on(context.model, context.layers):
            context.run(Batch(first.index, cut(first.content, 1), first.domain), hooks)
            ended = True
        before.restore()
        for layer, times in Counter(called).items():
            if times > 1:
                raise _called_twice(first).within(f'layer "{layer.name}"')
        return len(called) if ended else None

    def _begin_all(self, first: Batch | None, unread: Iterator[Batch]) -> None:
        """Run a pass for each batch up to its first layer."""
        batch = first
        while batch is not None:
            self._proceed(self._lockstep.add(batch))
            batch = next(unread, None)
        self._context.progress.batches = len(self._lockstep.passes)

    def _receive(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Inside a pass, where it comes to a layer: wait for the layer's statistics."""
        self._lockstep.check_stopping()
        batch_pass = self._lockstep.current
        assert batch_pass is not None
        if layer in batch_pass.called:
            raise _called_twice(batch_pass.batch)
        batch_pass.called.append(layer)
        if layer not in self._solved:  # otherwise the pass is being repeated
            batch_pass.at, batch_pass.moments = layer, self._moments(layer, batch_pass.batch, args, kwargs)
            with closed():
                self._lockstep.wait()
            self._context.choose(batch_pass.batch)  # others have run since

    def _moments(self, layer: Layer, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
        """The moments of a layer's input. For subclasses, too, which want to see more of it."""
        return layer.moments(args, kwargs)

    def _gather(self) -> list[tuple[Layer, Moments]] | None:
        """The layer that all passes of all processes wait at, each of its domains, and the moments; None at their end.

        Raises:
            CountError: no process has a pass.
        """
        passes = self._lockstep.passes
        here = _where(passes)
        tensors = [t for layer in self._places.get(here or "", ()) for t in self._pool(layer)]
        with caller():  # others may take long
            label, shares = self._context.group.all_gather(here, tensors)
        if label is None:
            raise nothing_to_learn_from(self._context.batches.read)
        if label == _END:
            return None
        arrived = []
        for number, layer in enumerate(self._places[label]):
            parts = [Moments(*share[3 * number : 3 * number + 3]) for share in shares if share]
            arrived.append((layer, sum(parts[1:], start=parts[0])))
        return arrived

    def _pool(self, layer: Layer) -> list[Tensor]:
        """Count, mean and m2 of all inputs to the layer that passes wait at."""
        inputs = [call.moments for call in self._waiting() if call.layer is layer]
        if not inputs:  # all are of other domains
            empty = Moments.empty(layer.num_channels, device=layer.mean.device)
            return [empty.count, empty.mean, empty.m2]
        if not bool(torch.stack([m.mean + m.m2 for m in inputs]).isfinite().all()):  # one look: it waits for the device
            self._refuse_non_finite(self._waiting())
            inputs = [call.moments for call in self._waiting() if call.layer is layer]
        counts, means, squares = (torch.stack([getattr(m, name) for m in inputs]) for name in ("count", "mean", "m2"))
        whole = pool(counts, means, squares)
        return [whole.count, whole.mean, whole.m2]

    def _waiting(self) -> list[LayerCall]:
        """The calls that passes wait in."""
        return [LayerCall(p.at, p.moments, p.batch.index) for p in self._lockstep.passes if p.at and p.moments]

    def _refuse_non_finite(self, calls: Sequence[LayerCall]) -> None:
        """Some calls' inputs are not finite. For subclasses, too, which can go on without these passes.

        Raises:
            NonFiniteError: naming the first.
        """
        check_finite(calls)

    def _solve(self, layer: Layer, moments: Moments) -> None:
        """Have a layer normalise by the moments of all its inputs from now on."""
        new = self._solved[layer] = population(layer, moments)
        if new is not None:
            layer.settle(new.mean, new.var)

    def _proceed_all(self) -> None:
        """Let every pass run on to its next layer."""
        for batch_pass in self._lockstep.passes:
            self._proceed(batch_pass)
            self._context.progress.done += 1
            self._context.progress.tell()

    def _proceed(self, batch_pass: Pass) -> None:
        """Let a pass run on, after one that holds no lock."""
        if self._last is not None and self._last is not batch_pass:
            self._check_locks(self._last)
        self._last = batch_pass
        self._memory.proceed(batch_pass)

    def _check_locks(self, waiting: Pass) -> None:
        """A pass that waits must not hold a lock. Whether it does shows when it is ended; then it begins again.

        Raises:
            OrderError: it holds one.
        """
        if waiting.at is None or not (held := self._locks.held()):
            return
        self._memory.end(waiting)
        if not self._locks.of_others(held):
            raise OrderError(
                f'layer "{waiting.at.name}": got a call inside a lock or semaphore, in the forward pass of batch '
                f'{waiting.batch.index}; method "exact" has to interrupt the pass there, and the next one would wait '
                f'for the lock for ever. Hold it around the whole of recalibrate, or use method="pooled"'
            )


def _called_twice(batch: Batch) -> OrderError:
    return OrderError(
        f"called twice in the forward pass of batch {batch.index}; what comes into the second call depends on the very "
        f'statistics that are computed from both, so that method "exact" has no answer in one pass. Use '
        f'method="pooled", which joins all calls, or a layer for each place'
    )


def _where(passes: Sequence[Pass]) -> str | None:
    """The name of the layer that all passes wait at, or their end; None without passes.

    Raises:
        OrderError: they are at different layers.
    """
    labels = Counter(_label(batch_pass) for batch_pass in passes)
    if len(labels) > 1:
        usual = labels.most_common(1)[0][0]
        odd = next(batch_pass for batch_pass in passes if _label(batch_pass) != usual)
        raise OrderError(
            f"got batch {odd.batch.index} at {_label(odd)} where {labels[usual]} of {len(passes)} batches are at "
            f'{usual}; method "exact" needs batches that call the same layers in the same order. Use method="pooled", '
            f"which needs no order, or recalibrate with batches that take the same path"
        )
    return next(iter(labels), None)


def _label(batch_pass: Pass) -> str:
    return _END if batch_pass.at is None else batch_pass.at.place

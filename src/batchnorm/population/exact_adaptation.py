"""Method "exact" for statistics that begin with a stored population."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchnorm import functional
from batchnorm.moments import Moments
from batchnorm.population.adapter import Adapter
from batchnorm.population.batches import Batch
from batchnorm.population.context import Context
from batchnorm.population.exact import Exact
from batchnorm.population.layers import Layer
from batchnorm.population.seen import Seen, samples_of


class ExactAdaptation(Exact):
    """Each layer's stored moments and those of all batches, where layers upstream normalise by such sums too.

    Args:
        context: as of `Exact`, of one process.
        adapters: of the context's layers; each is given what its layer has seen.
        prior: how many samples stored statistics weigh as much as.
    """

    def __init__(self, context: Context, adapters: Mapping[Layer, Adapter], prior: float) -> None:
        super().__init__(context)
        self._adapters = adapters
        self._prior = prior
        self._samples = dict.fromkeys(context.layers, 0.0)

    def _moments(self, layer: Layer, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
        call = layer.call(args, kwargs)
        self._samples[layer] += samples_of(call)  # once a pass: one that is repeated goes past solved layers
        return functional.batch_moments(call)

    def _solve(self, layer: Layer, moments: Moments) -> None:
        seen = Seen.of_batches([call.moments for call in self._waiting()], self._samples[layer])
        adapter = self._adapters[layer]
        super()._solve(layer, seen.joined_with(adapter.mean, adapter.var, self._prior))
        adapter.seen = seen

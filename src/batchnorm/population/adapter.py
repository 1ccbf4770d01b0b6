"""One layer's statistics while it is adapted: others stand in for its own, which come back untouched."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchnorm import functional
from batchnorm._torch import buffers_of, outside_graphs
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.kernels.reference import statistics_dtype
from batchnorm.modules import BatchNorm
from batchnorm.population.context import population
from batchnorm.population.layers import Layer
from batchnorm.population.seen import Seen, samples_of

# Which adapter a layer listens to: the innermost's, where contexts are nested.
_innermost: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()


class Adapter:
    """One layer.

    Args:
        layer: with the stored statistics.
        prior: how many samples they weigh as much as.
        decay: what the samples seen so far weigh after one more; None for 1.
        tell: called with this after each call that was joined.

    Attributes:
        layer: with the stored statistics.
        current: the same layer with those that it normalises by now.
        mean: (C,) float64, the stored mean.
        var: (C,) float64, the stored variance.
        seen: what it was called with so far.
    """

    def __init__(self, layer: Layer, prior: float, decay: float | None, tell: Callable[[Adapter], None]) -> None:
        self.layer = layer
        # Of these, every value stays as it is now, whatever is written to the layer's own meanwhile.
        wide = statistics_dtype(layer.mean.device)
        self.mean, self.var = (t.detach().to(wide, copy=True) for t in (layer.mean, layer.var))
        self.seen = Seen.nothing(layer.num_channels, layer.mean.device)
        self._prior = prior
        self._decay = decay
        self._tell = tell
        self._outer = _innermost.get(layer.module)
        self._place(replace(layer, mean=layer.mean.detach().clone(), var=layer.var.detach().clone()))
        _innermost[layer.module] = self

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook: join what the layer is called with, and have it normalise by that, this call included."""
        if _innermost.get(self.layer.module) is not self:
            return
        try:
            if module.training:
                raise OptionError(
                    "got a call in training mode; adapted statistics are what inference normalises by. Leave the model "
                    "in eval() inside adapt"
                )
            self._check_domain()
            with torch.inference_mode(False), torch.no_grad():
                self._join(args, kwargs)
        except BatchNormError as error:
            raise error.within(f'layer "{self.layer.name}"') from error
        self._tell(self)

    def _check_domain(self) -> None:
        module, row = self.layer.module, self.layer.row
        if isinstance(module, BatchNorm) and module._row != row:
            raise OptionError(
                f'got samples of other domains; adapted is the domain "{module.domains[row.number]}", which was chosen '
                f"when adapt began. Begin one adapt in each domain"
            )

    def _join(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.current.call(args, kwargs)
        seen = self.seen.join(functional.batch_moments(call), samples_of(call), self._decay)
        new = population(self.layer, seen.joined_with(self.mean, self.var, self._prior))
        if new is not None:
            # New tensors: a graph may have saved the others.
            now = self.current
            rounded = replace(now, mean=new.mean.to(now.mean.dtype), var=new.var.to(now.var.dtype))
            rounded.check_rounded(new.mean, new.var)
            self._place(rounded)
        self.seen = seen

    def _place(self, layer: Layer) -> None:
        """Have the layer normalise by these tensors."""
        buffers_of(layer.module).update({layer.row.mean: layer.mean, layer.row.var: layer.var})
        self.current = layer

    def keep(self) -> None:
        """Have the layer's own statistics become those that it normalises by now."""
        self.layer.write(self.current.mean, self.current.var)

    def leave(self) -> None:
        """Put the layer's own tensors back, on the device that it is on by now."""
        buffers = buffers_of(self.layer.module)
        for name, own in ((self.layer.row.mean, self.layer.mean), (self.layer.row.var, self.layer.var)):
            now = buffers.get(name)
            buffers[name] = own if now is None else own.to(now.device)
        if self._outer is None:
            _innermost.pop(self.layer.module, None)
        else:
            _innermost[self.layer.module] = self._outer

"""A layer's state as numbers that checks can compare, whatever device and dtype it is kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.diagnosis.subject import LayerState
from batchnorm.report.document import Table

# Variances below are what is left of an average to which zeros came alone, for hundreds of batches.
FADED = 1e-30
SHOWN = 8  # rows of a table: the worst are enough to see what is wrong


@dataclass(frozen=True)
class Channels:
    """(C,) each, float64 on the CPU; None where the layer has none, or none with values.

    Attributes:
        mean: running mean.
        var: running variance.
        gamma: weight.
        beta: bias.
    """

    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None

    @classmethod
    def of(cls, layer: LayerState) -> Channels:
        """What a layer has."""
        count = layer.num_channels
        return cls(*(_values(tensor, count) for tensor in (layer.mean, layer.var, layer.weight, layer.bias)))

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance, where there are both."""
        return None if self.mean is None or self.var is None else (self.mean, self.var)

    def table(self, caption: str, channels: Tensor) -> Table:
        """The state of some channels, in this order, as many as `SHOWN`."""
        named = {"running mean": self.mean, "running variance": self.var, "gamma": self.gamma, "beta": self.beta}
        columns = {name: values for name, values in named.items() if values is not None}
        rows = [
            [str(channel), *(f"{float(values[channel]):.3g}" for values in columns.values())]
            for channel in channels[:SHOWN].tolist()
        ]
        return Table(caption, ["channel", *columns], rows)


def _values(tensor: Tensor | None, count: int) -> Tensor | None:
    """Not of tensors without values, of those that are spread over processes, and of what is no vector of channels."""
    if tensor is None or torch.nn.parameter.is_lazy(tensor) or tensor.is_meta or hasattr(tensor, "device_mesh"):
        return None
    return tensor.detach().cpu().double().flatten() if tensor.numel() == count else None


def indices(chosen: Tensor, worst: Tensor | None = None) -> Tensor:
    """The channels that a (C,) mask chooses, those with the smallest `worst` first."""
    found = chosen.nonzero().flatten()
    return found if worst is None else found[worst[found].argsort(stable=True)]


def count_of(chosen: int, layer: LayerState) -> str:
    """How many channels of a layer, as messages say it."""
    return f"{chosen} of {layer.num_channels} channels"

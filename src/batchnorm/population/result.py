"""What a recalibration did: numbers to read, a table to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import deprecated

SHOWN = 10  # rows of the printed table


class SkippedLayer(NamedTuple):
    """A layer whose statistics stayed as they were, and why."""

    name: str
    reason: str


class MemoryUse(NamedTuple):
    """What the suspended forward passes of method "exact" took, in this process.

    Attributes:
        limit: bytes that were allowed in memory, or None.
        peak: the most bytes of suspended activations that were in memory at once.
        spilled: bytes written to a temporary file.
        replays: forward passes that were repeated from their beginning.
    """

    limit: int | None
    peak: int
    spilled: int
    replays: int


@dataclass(frozen=True, eq=False)
class Population:
    """A layer's statistics over the data: count, and (C,) float64 mean and variance."""

    count: int | float
    mean: Tensor
    var: Tensor


@dataclass(frozen=True, eq=False)
class RecalibratedLayer:
    """One layer before and after.

    Attributes:
        name: its first path in the model.
        count: the values of each channel that the new statistics are of; a float where a mask weighed them.
        old_mean: (C,) float64, on the CPU, as are the others.
        old_var: (C,).
        new_mean: (C,), before rounding to the layer's dtype.
        new_var: (C,), likewise.
        eps: the layer's.
    """

    name: str
    count: int | float
    old_mean: Tensor
    old_var: Tensor
    new_mean: Tensor
    new_var: Tensor
    eps: float

    @property
    def shift(self) -> Tensor:
        """(C,) how far the mean moved, in old standard deviations: (new_mean - old_mean) / sqrt(old_var + eps)."""
        return (self.new_mean - self.old_mean) / (self.old_var + self.eps).sqrt()

    @property
    def log_variance_ratio(self) -> Tensor:
        """(C,) log((new_var + eps) / (old_var + eps))."""
        return ((self.new_var + self.eps) / (self.old_var + self.eps)).log()

    @property
    def moved(self) -> float:
        """The largest of |shift| and |log_variance_ratio| over the channels; 0 without channels."""
        both = torch.cat([self.shift, self.log_variance_ratio]).abs()
        return float(both.max()) if both.numel() else 0.0


@dataclass(frozen=True, eq=False)
class Recalibration:
    """What `recalibrate` did. Prints as a table.

    Attributes:
        method: "exact", "pooled" or "average".
        batches: how many batches with samples were used, in all processes together.
        samples: how many samples they held; None where a batch has no tensor to count by.
        layers: the layers whose statistics are new, in the model's order.
        skipped: the others, with the reason.
        left_alone: the former name of `skipped`, deprecated.
        memory: what the suspended forward passes took; None for methods that suspend nothing.
    """

    method: str
    batches: int
    samples: int | None
    layers: tuple[RecalibratedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    memory: MemoryUse | None = None

    @property
    @deprecated("Recalibration.left_alone has become Recalibration.skipped; use that")
    def left_alone(self) -> tuple[SkippedLayer, ...]:
        """`skipped`, by its former name."""
        return self.skipped

    def __str__(self) -> str:
        data = _counted(self.batches, "batch", "batches")
        if self.samples is not None:
            data += f" with {_counted(self.samples, 'sample', 'samples')}"
        lines = [f"{self.method} statistics of {_counted(len(self.layers), 'layer', 'layers')} from {data}"]
        if self.layers:
            lines += _table(sorted(self.layers, key=lambda layer: -layer.moved)[:SHOWN])
        if (more := len(self.layers) - SHOWN) > 0:
            lines.append(f"and {_counted(more, 'layer', 'layers')} that moved less")
        lines += [f"skipped: {name} ({reason})" for name, reason in self.skipped]
        if self.memory is not None and (self.memory.spilled or self.memory.replays):
            repeated = _counted(self.memory.replays, "forward pass", "forward passes")
            lines.append(
                f"memory: {self.memory.peak:,} bytes held of {self.memory.limit:,} allowed, "
                f"{self.memory.spilled:,} written to a file, {repeated} repeated"
            )
        return "\n".join(lines)


def _counted(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _table(layers: list[RecalibratedLayer]) -> list[str]:
    """The largest shift and the largest log ratio of each layer, whatever their sign."""
    width = max(len("layer"), *(len(layer.name) for layer in layers))
    lines = [f"{'layer':<{width}}  {'count':>12}  {'shift of mean, std':>18}  {'log variance ratio':>18}"]
    for layer in layers:
        shift, ratio = (_extreme(values) for values in (layer.shift, layer.log_variance_ratio))
        lines.append(f"{layer.name:<{width}}  {layer.count:>12,}  {shift:>18.3g}  {ratio:>18.3g}")
    return lines


def _extreme(values: Tensor) -> float:
    return float(values[values.abs().argmax()]) if values.numel() else 0.0

"""What a model's layers were given by data: numbers, from forward passes in inference mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.population.result import SkippedLayer


class Input(NamedTuple):
    """What a layer's first input was like.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        channels_last: whether it lies so in memory.
        channel_dim: which dimension holds the channels, from 0.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    channel_dim: int


@dataclass(eq=False)
class ObservedLayer:
    """What came into one layer.

    Attributes:
        input: the first input.
        calls: the most calls in one forward pass.
        population: the moments of all that came in, with every layer upstream on its own: None where nothing came.
        batches: (B,) moments of each batch, in order; of all of its calls.
        by_call: where there are several calls, the moments of the first calls of all batches, of the second ones, ...
        sample_means: (N, K) float64: of each sample, the mean of each of `channels`; N samples in order of the batches.
        batch_of: (N,) int64: the index in `batches` of each sample.
        channels: (K,) int64: which channels those are: all, or some spread evenly where there are many.
        sample_values: how many values of a channel a sample has: n of its mean.
        padding: the share of positions that hold, in all channels, the same values as the last position of their
            sample, counted from the end, the last one left out; None for inputs without positions.
        exact: whether `population` is what inference would show the layer: not so where it is called several times, or
            where batches take different ways.
    """

    input: Input
    calls: int = 0
    population: Moments | None = None
    batches: list[Moments] = field(default_factory=list)
    by_call: list[Moments] = field(default_factory=list)
    sample_means: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    batch_of: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    channels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    sample_values: int = 0
    padding: float | None = None
    exact: bool = True

    @property
    def variance(self) -> Tensor:
        """(C,) the population's biased variance."""
        assert self.population is not None
        return self.population.var()


class NonFinite(NamedTuple):
    """Where inf or NaN came in first.

    Attributes:
        layer: the name of the first layer, in call order, whose input was not finite.
        batch: the index of the first batch in which that was so.
        channels: how many of the layer's channels.
    """

    layer: str
    batch: int
    channels: int


@dataclass(eq=False)
class Observation:
    """What one set of data showed.

    Attributes:
        layers: by name, those that were called, in the order of their first calls.
        batches: how many batches were used.
        samples: how many samples these held; None where they have no tensor to count by.
        passes: how many forward passes over all of the data it took; a pass over half of it is a half.
        non_finite: by layer's name, in call order.
        kept: some batches, as they came, for passes that compare.
        outputs: the model's outputs for `kept`, with every layer on its exact statistics.
        skipped: layers that could not be examined, and why.
    """

    layers: dict[str, ObservedLayer] = field(default_factory=dict)
    batches: int = 0
    samples: int | None = 0
    passes: float = 0.0
    non_finite: Mapping[str, NonFinite] = field(default_factory=dict)
    kept: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    skipped: Sequence[SkippedLayer] = ()

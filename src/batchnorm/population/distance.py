"""How far data are from the domains whose statistics a model has stored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.choosing import domain
from batchnorm.distributed import Group
from batchnorm.models.devices import device_types
from batchnorm.models.modes import set_training
from batchnorm.models.norm_layers import unwrapped
from batchnorm.modules import BatchNorm
from batchnorm.moments import Moments
from batchnorm.population.batches import Batch, Batches, Forward, default_forward, nothing_to_learn_from
from batchnorm.population.context import Context, LayerCall, Progress, check_finite
from batchnorm.population.layers import CallHooks, Layer, select_layers
from batchnorm.population.result import SkippedLayer
from batchnorm.population.transaction import transaction

STORED = "stored statistics"  # the one domain of a model without domains
_SHOWN = 10  # rows of the printed table


@dataclass(frozen=True, eq=False)
class LayerDistance:
    """One layer.

    Attributes:
        name: its first path in the model.
        count: how many values of each channel the data's moments are of; a float where a mask weighed them.
        channels: for each domain, (C,) float64: each channel's distance.
    """

    name: str
    count: int | float
    channels: dict[str, Tensor]

    @property
    def distances(self) -> dict[str, float]:
        """For each domain, the root mean square of the channels' distances."""
        return {name: _root_mean_square(values) for name, values in self.channels.items()}

    @property
    def by_chance(self) -> float:
        """What so many independent values of the domain itself would come to: sqrt(3 / (2 count)).

        Values that belong together (pixels of a picture) are fewer independent ones, and come to more.
        """
        return math.sqrt(1.5 / self.count) if self.count else math.inf


@dataclass(frozen=True, eq=False)
class DomainDistance:
    """How far data are from each domain. Prints as a table.

    Attributes:
        domains: their names, in the model's order.
        samples: how many samples the data have; None where a batch has no tensor to count by.
        layers: those that were called, in the model's order.
        skipped: the others, with the reason.
    """

    domains: tuple[str, ...]
    samples: int | None
    layers: tuple[LayerDistance, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def distances(self) -> dict[str, float]:
        """For each domain, the root mean square of the layers' distances."""
        of_layers = [layer.distances for layer in self.layers]
        return {
            name: _root_mean_square(torch.tensor([of_layer[name] for of_layer in of_layers], dtype=torch.float64))
            for name in self.domains
        }

    @property
    def nearest(self) -> str:
        """The domain with the smallest distance."""
        distances = self.distances
        return min(distances, key=distances.__getitem__)

    def __str__(self) -> str:
        distances = self.distances
        data = "data" if self.samples is None else f"{self.samples:,} samples"
        order = sorted(self.domains, key=distances.__getitem__)
        lines = [f"{data}: nearest {self.nearest}", *(f"{name}: {distances[name]:.3g}" for name in order)]
        if self.layers:
            rows = self.layers[:_SHOWN]
            width = max(len("layer"), *(len(layer.name) for layer in rows))
            columns = [max(len(name), 9) for name in self.domains]
            cells = zip(self.domains, columns, strict=True)
            lines.append(f"{'layer':<{width}}" + "".join(f"  {name:>{column}}" for name, column in cells))
            for layer in rows:
                cells = zip((f"{layer.distances[name]:.3g}" for name in self.domains), columns, strict=True)
                lines.append(f"{layer.name:<{width}}" + "".join(f"  {cell:>{column}}" for cell, column in cells))
        if (more := len(self.layers) - _SHOWN) > 0:
            lines.append(f"and {more:,} more layers")
        return "\n".join(lines + [f"skipped: {name} ({reason})" for name, reason in self.skipped])


def domain_distance(model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> DomainDistance:
    """How far data are from each domain that a model has statistics of, layer by layer; nothing is changed.

        W^2 = (mean - mean_d)^2 + (std - std_d)^2

    for each channel: the squared 2-Wasserstein distance of two normal distributions, of the data's moments and the
    stored ones of domain d. It is divided by the variance that is stored, the mean of the domains', plus eps, so that 1
    is a standard deviation. A layer's distance is the root mean square over its channels, a domain's that over the
    layers.

    For each domain the data pass through the model once, in inference mode, normalised by that domain's statistics: of
    data of that domain, every layer then sees what it has stored. A layer without domains has its stored statistics
    in each; a model without any has one domain, "stored statistics".

    Args:
        model: any module; of wrapped ones the inner one is looked at.
        batches: any iterable, read once, as `recalibrate` takes them. With several domains a mixture of them is near to
            none: ask for each source of data alone.
        forward: `forward(model, batch)` runs the model; by default as `recalibrate`.

    Returns:
        A `DomainDistance`: `nearest`, `distances`, and `layers`.

    Raises:
        CountError: no samples.
        NonFiniteError: inf or NaN came into a layer.
        Anything that `batches`, the model or `forward` raises.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(1, domains=("dark", "bright"))
        >>> _ = layer.statistics_of("bright").mean.fill_(3.0)
        >>> bn.domain_distance(layer, [torch.randn(100, 1) + 2.9]).nearest
        'bright'

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982. Between the
    statistics of batch-norm layers: Schneider et al., "Improving robustness against common corruptions by covariate
    shift adaptation", 2020.
    """
    inner = unwrapped(model)
    ours = [layer for layer in inner.modules() if isinstance(layer, BatchNorm)]
    domains = tuple(dict.fromkeys(name for layer in ours for name in layer.domains))
    source, devices = Batches(batches, None), device_types(inner)
    seen: dict[str, dict[str, Moments]] = {name: {} for name in domains or (STORED,)}
    stored: dict[str, dict[str, Layer]] = {}
    skipped: list[SkippedLayer] = []
    with transaction(inner, (), devices):
        for module in inner.modules():
            set_training(module, False)
        for name in seen:
            with _within(inner, name, domains):
                layers, skipped = select_layers(inner, frozen=True)
            stored[name] = {layer.place: layer for layer in layers}
        group, progress = Group.alone(), Progress(None, None)
        context = Context(inner, layers, source, forward or default_forward, group, progress, devices)
        for batch in source:
            for name, joined in seen.items():
                with _within(inner, name, domains):
                    _join(joined, context, batch, list(stored[name].values()))
        if not source.used:
            raise nothing_to_learn_from(source.read)
        found = []
        for layer in layers:
            moments = {name: joined[layer.place] for name, joined in seen.items() if layer.place in joined}
            if len(moments) == len(seen) and all(bool(m.count > 0) for m in moments.values()):
                found.append(_distance(layer, {name: stored[name][layer.place] for name in seen}, moments))
            else:
                skipped.append(SkippedLayer(layer.place, "never called with a value"))
    return DomainDistance(tuple(seen), source.samples, tuple(found), tuple(skipped))


def _join(joined: dict[str, Moments], context: Context, batch: Batch, layers: list[Layer]) -> None:
    """Add the moments of what comes into layers from one batch."""
    calls: list[LayerCall] = []

    def receive(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(layer, layer.moments(args, kwargs), batch.index))

    hooks = CallHooks(receive, lambda: context.running)
    with hooks.on(context.model, layers):
        context.run(batch, hooks)
    check_finite(calls)
    for layer, moments, _ in calls:
        joined[layer.place] = joined[layer.place] + moments if layer.place in joined else moments


def _within(model: nn.Module, name: str, domains: tuple[str, ...]) -> AbstractContextManager[None]:
    return domain(model, name) if domains else nullcontext()


def _distance(layer: Layer, stored: dict[str, Layer], seen: dict[str, Moments]) -> LayerDistance:
    own = {name: (of.mean.cpu().double(), of.var.cpu().double()) for name, of in stored.items()}
    unit = torch.stack([var for _, var in own.values()]).mean(0) + vars(layer.module)["eps"]
    channels = {}
    for name, moments in seen.items():
        mean, var = own[name]
        squared = (moments.mean.cpu() - mean).square() + (moments.std().cpu() - var.sqrt()).square()
        channels[name] = (squared / unit).sqrt()
    return LayerDistance(layer.place, next(iter(seen.values())).count.item(), channels)


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0

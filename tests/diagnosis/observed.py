"""Observations by plain hooks: one pass to set exact statistics, and one to look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.finding import Finding
from batchnorm.diagnosis.observation import Input, NonFinite, Observation, ObservedLayer
from batchnorm.diagnosis.subject import Subject, subject_of_model
from batchnorm.errors import BatchNormError
from batchnorm.models.hooks import forward_hooks
from batchnorm.models.modes import inference
from batchnorm.models.norm_layers import named_norm_layers
from batchnorm.moments import Moments
from batchnorm.population.batches import default_forward, samples
from batchnorm.surgery import scale_shift

Check = Callable[[Subject], Iterable[Finding]]


def observe(model: nn.Module, batches: Sequence[Any], *, recalibrated: bool = True) -> Observation:
    """What batches show of a copy of a model whose statistics are theirs, where they can be."""
    model = copy.deepcopy(model)
    if recalibrated:
        try:
            bn.recalibrate(model, batches)
        except BatchNormError:  # layers that are called twice, or get one value
            recalibrated = False
    names = {layer: name for name, layer in named_norm_layers(model)}
    layers: dict[str, ObservedLayer] = {}
    means: dict[str, list[Tensor]] = {}
    paddings: dict[str, list[Tensor]] = {}
    non_finite: dict[str, NonFinite] = {}
    now: dict[str, list[Moments]] = {}
    index = 0

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, name = (args[0] if args else kwargs["input"]).detach(), names[module]
        axis = scale_shift.channel_dim(module) % x.dim()
        last = x.dim() in (4, 5) and not x.is_contiguous()
        seen = layers.setdefault(name, ObservedLayer(Input(tuple(x.shape), x.dtype, last, axis)))
        values = x.double().movedim(axis, 1).reshape(len(x), x.shape[axis], -1)
        bad = ~values.isfinite().all(2).all(0)
        if bad.any():
            non_finite.setdefault(name, NonFinite(name, index, int(bad.sum())))
        now.setdefault(name, []).append(Moments.of(x, channel_dim=axis, mask=kwargs.get("mask")))
        if len(now[name]) == 1:
            means.setdefault(name, []).append(values.mean(2))
            seen.batch_of = torch.cat([seen.batch_of, torch.full((len(x),), index)])
            seen.sample_values = values.shape[2]
            if x.dim() > 2:
                alike = (values == values[..., -1:]).all(1).flip(1).long().cumprod(1)[:, 1:]
                paddings.setdefault(name, []).append(alike.double().flatten())

    with inference(model), forward_hooks(names, before=note):
        for batch in batches:
            now.clear()
            default_forward(model, batch)
            for name, calls in now.items():
                seen, none = layers[name], Moments.empty(len(calls[0].mean))
                seen.calls = max(seen.calls, len(calls))
                seen.batches.append(sum(calls, start=none))
                for i, moments in enumerate(calls):
                    seen.by_call[i : i + 1] = [seen.by_call[i] + moments] if i < len(seen.by_call) else [moments]
            index += 1
    for name, seen in layers.items():
        seen.population = sum(seen.batches, start=Moments.empty(len(seen.batches[0].mean)))
        seen.sample_means = torch.cat(means[name])
        seen.channels = torch.arange(seen.sample_means.shape[1])
        seen.padding = float(torch.cat(paddings[name]).mean()) if name in paddings else None
    counts = [samples(batch) or 0 for batch in batches]
    return Observation(layers, len(batches), sum(counts), 1.0, non_finite, list(batches[:2]), ())


def subject(model: nn.Module, batches: Sequence[Any] = (), second: Sequence[Any] = ()) -> Subject:
    """A model with what data show of it."""
    if not batches:
        return subject_of_model(model)
    data = observe(model, batches)
    other = observe(model, second) if second else None
    return subject_of_model(model, data=data, second=other, example=batches[0])


def found(check: Check, model: nn.Module, batches: Sequence[Any] = (), second: Sequence[Any] = ()) -> dict[str, str]:
    """The layers that a check names, with the severity."""
    return {finding.layer: finding.severity for finding in check(subject(model, batches, second))}


def batches_of(x: Tensor, size: int) -> list[Tensor]:
    """Rows in batches."""
    return list(x.split(size))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

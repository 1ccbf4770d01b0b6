"""A record's numbers, against the oracle's, on two steps of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.diagnosis.measuring import Packed
from batchnorm.diagnosis.records import LayerRecord, Spread
from batchnorm.models.norm_layers import named_norm_layers
from diagnosis.training import batch, loss, network, sgd
from support import oracle, tolerances
from support.comparison import close
from support.oracle import Array


def array(x: Tensor) -> Array:
    return x.detach().double().numpy()


def spread(values: Array) -> Sequence[float]:
    return [float(np.quantile(values, level)) for level in (0, 0.25, 0.5, 0.75, 1)]


@dataclass
class Expected:
    """What a step showed of a layer: its input, and its statistics after the forward pass."""

    x: Array
    mean: Array
    var: Array
    weight: Array
    bias: Array
    eps: float


def trained(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[LayerRecord], list[dict[str, Expected]]]:
    seen: list[dict[str, Expected]] = []

    def look(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            buffers = array(layer.running_mean.clone()), array(layer.running_var.clone())
            parameters = array(layer.weight.clone()), array(layer.bias.clone())
            seen[-1][name] = Expected(array(args[0].clone()), *buffers, *parameters, vars(layer)["eps"])

        return hook

    for name, layer in named_norm_layers(model):
        layer.register_forward_hook(look(name))
    optimizer = sgd(model, lr=0.1)
    with bn.Monitor(model, every=1) as monitor:
        for x in inputs:
            seen.append({})
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
    return monitor.records, seen


def test_the_numbers_are_the_oracles() -> None:
    model = network()
    records, seen = trained(model, [batch(0), batch(1)])
    for record in records:
        now = seen[record.step - 1][record.layer]
        count, mean, m2 = oracle.moments(now.x)
        var = m2 / count
        expected: dict[str, Any] = {
            "batch_mean": mean,
            "batch_var": var,
            "running_mean": now.mean,
            "running_var": now.var,
            "shift": (mean - now.mean) / np.sqrt(now.var + now.eps),
            "log_variance_ratio": np.log((m2 / (count - 1) + now.eps) / (now.var + now.eps)),
            "weight": now.weight,
            "bias": now.bias,
        }
        noise = None
        if record.step == 2:
            old = seen[0][record.layer]
            n, old_mean, old_m2 = oracle.moments(old.x)
            expected["drift"] = (now.mean - old.mean) / np.sqrt(old.var + old.eps)
            expected["log_variance_drift"] = np.log((now.var + now.eps) / (old.var + old.eps))
            noise = math.sqrt(np.mean((mean - old_mean) ** 2 / (var / count + old_m2 / n / n)))
        assert (record.count, record.channels, record.calls) == (count, len(mean), 1)
        for name in ("batch_mean", "batch_var", "running_mean", "running_var", "weight", "bias", "shift"):
            close(getattr(record, name), spread(expected[name]), tolerances.STATISTIC, name=name)
        for name in ("log_variance_ratio", "drift", "log_variance_drift"):
            values = getattr(record, name)
            close(values, spread(expected[name]) if name in expected else None, tolerances.STATISTIC, name=name)
        close(record.noise, noise, tolerances.STATISTIC)
        assert record.non_finite == 0
        assert record.skipped == (None if record.layer == "1" else 0)


def test_the_effective_learning_rate_is_of_the_weight_before() -> None:
    model = network()
    before = {name: float(model[int(name) - 1].weight.detach().double().norm()) for name in ("1", "4", "7")}
    records, _ = trained(model, [batch(0)])
    for record in records:
        close(record.effective_learning_rate, 0.1 / before[record.layer] ** 2, tolerances.STATISTIC)


def test_noise_is_1_where_values_are_independent_and_more_where_they_are_alike() -> None:
    torch.manual_seed(0)
    independent, alike = nn.BatchNorm2d(64), nn.BatchNorm2d(64)
    with bn.Monitor(independent, every=1) as one, bn.Monitor(alike, every=1) as other:
        for _ in range(2):
            independent(torch.randn(8, 64, 5, 5)).sum().backward()
            alike(torch.randn(8, 64, 1, 1).expand(8, 64, 5, 5)).sum().backward()
            for layer in (independent, alike):
                layer.zero_grad()
    assert one.records[1].noise is not None
    assert other.records[1].noise is not None
    assert 0.8 < one.records[1].noise < 1.2
    assert 4 < other.records[1].noise < 6, "25 positions are one value: 5 times the noise"


@pytest.mark.parametrize("inside", [False, True])
def test_dead_channels(inside: bool) -> None:
    """Of 4 channels one has gamma 0, one is behind a ReLU that it never passes, and one goes nowhere but is alive."""
    torch.manual_seed(0)
    norm = bn.BatchNorm2d(4, activation="relu") if inside else nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.Identity() if inside else nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        norm.weight[0], norm.bias[1] = 0, -50
        model[2].weight[:, 2] = 0
    records, _ = trained(model, [torch.randn(8, 4, 5, 5)])
    assert records[0].dead == 2 / 4


def test_dead_channels_without_gradients() -> None:
    layer = nn.BatchNorm1d(4)
    layer.weight.requires_grad_(False)[1] = 0
    layer.bias.requires_grad_(False)
    with bn.Monitor(layer, every=1) as monitor:
        layer(torch.randn(5, 4))
    assert monitor.records[0].dead == 1 / 4
    assert (monitor.records[0].weight_gradient, monitor.records[0].bias_gradient) == (None, None)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_what_a_layer_does_not_have(make: Any) -> None:
    model = nn.Sequential(make(3, affine=False), make(3, track_running_stats=False), nn.Linear(3, 1))
    with bn.Monitor(model, every=1) as monitor:
        for _ in range(2):
            model(torch.randn(5, 3)).sum().backward()
            model.zero_grad()
    plain, untracked = monitor.records[-2:]
    assert (plain.weight, plain.bias, plain.dead, plain.weight_gradient) == (None, None, None, None)
    assert plain.shift is not None
    assert (untracked.running_mean, untracked.shift, untracked.drift, untracked.skipped) == (None, None, None, None)
    assert untracked.noise is not None


@pytest.mark.parametrize("ours", [False, True])
def test_what_is_not_finite_is_counted_and_left_out(ours: bool) -> None:
    layer = (bn.BatchNorm1d if ours else nn.BatchNorm1d)(3)
    x = torch.randn(5, 3)
    x[2, 1] = math.inf
    with bn.Monitor(layer, every=1) as monitor:
        layer(x).sum().backward()
    record = monitor.records[0]
    assert record.non_finite == 1
    assert record.skipped == (1 if ours else None)
    assert record.batch_mean is not None
    close(record.batch_mean.max, float(x[:, [0, 2]].double().mean(0).max()), tolerances.STATISTIC)


def test_nothing_finite_is_none() -> None:
    layer = bn.BatchNorm1d(2)
    with bn.Monitor(layer, every=1) as monitor:
        layer(torch.full((4, 2), math.nan)).sum().backward()
    assert monitor.records[0].batch_mean is None
    assert monitor.records[0].running_mean == Spread(0, 0, 0, 0, 0)


def test_copies_are_of_the_moment() -> None:
    first, second = torch.ones(2), torch.arange(3)
    packed = Packed({(0, "a"): first, (1, "b"): second})
    first.zero_()
    assert {key: value.tolist() for key, value in packed.unpacked().items()} == {(0, "a"): [1, 1], (1, "b"): [0, 1, 2]}
    assert all(value.dtype == torch.float64 for value in packed.unpacked().values())

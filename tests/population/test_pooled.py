"""Method "pooled": all calls joined, where layers upstream normalise by the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.errors import CountError
from support import oracle, tolerances
from support.populations import Residual, images, layers, made

SIZES = (8, 3, 5)


def by_the_batch(model: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """What comes into each layer where all normalise by the batch, and nothing is dropped."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in layers(model)}
    for name, layer in layers(model).items():
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0].detach().double().transpose(0, 1).flatten(1).numpy())
        )
    model.train()
    model.drop.eval()
    for batch in batches:
        model(batch)
    return {name: np.concatenate(rows, axis=1).T for name, rows in seen.items()}


def test_the_moments_of_all_batches() -> None:
    model, batches = made("residual"), images(*SIZES)
    result = bn.recalibrate(model, batches, method="pooled")
    for name, rows in by_the_batch(made("residual"), batches).items():
        n, mean, m2 = oracle.moments(rows)
        layer = next(layer for layer in result.layers if layer.name == name)
        assert layer.count == n
        std = np.sqrt(m2 / n + layer.eps)
        assert (abs(layer.new_mean.numpy() - mean) / std).max() <= tolerances.POPULATION
        assert abs(np.log((layer.new_var.numpy() + layer.eps) / (m2 / n + layer.eps))).max() <= tolerances.POPULATION


def test_a_single_sample_in_a_batch_is_a_part_like_any_other() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    data = torch.randn(5, 2)
    bn.recalibrate(model, data.split(1), method="pooled")
    torch.testing.assert_close(model[0].running_mean, data.mean(0))
    torch.testing.assert_close(model[0].running_var, data.var(0, correction=0))
    with pytest.raises(CountError, match="got one value for each channel in all batches together"):
        bn.recalibrate(model, [data[:1]], method="pooled")


def test_nothing_is_suspended() -> None:
    order: list[int] = []
    model = Residual()
    model.register_forward_hook(lambda m, args, y: order.append(len(args[0])))
    result = bn.recalibrate(model, images(*SIZES), method="pooled")
    assert order == list(SIZES)
    assert result.memory is None

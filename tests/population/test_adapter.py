"""One layer's own statistics, and those that stand in for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import NonFiniteError, OptionError
from batchnorm.population.adapter import Adapter
from batchnorm.population.layers import select_layers


def adapter(module: Any, prior: float = 16.0, decay: float | None = None) -> Adapter:
    (layer,), _ = select_layers(module)
    return Adapter(layer, prior, decay, lambda _: None)


def test_its_own_tensors_come_back_whatever_became_of_the_others() -> None:
    layer = nn.BatchNorm1d(2).eval()
    own = layer.running_mean, layer.running_var
    version = own[0]._version
    one = adapter(layer)
    one(layer, (torch.randn(8, 2),), {})
    layer.running_mean += 1
    del layer.running_var
    one.leave()
    assert (layer.running_mean, layer.running_var) == own
    assert own[0]._version == version


def test_the_innermost_listens() -> None:
    layer = nn.BatchNorm1d(2).eval()
    outer = adapter(layer)
    inner = adapter(layer)
    for one in (outer, inner):
        one(layer, (torch.randn(8, 2),), {})
    assert (outer.seen.samples, inner.seen.samples) == (0, 8)
    inner.leave()
    for one in (outer, inner):
        one(layer, (torch.randn(4, 2),), {})
    assert (outer.seen.samples, inner.seen.samples) == (4, 8)
    outer.leave()
    outer(layer, (torch.randn(4, 2),), {})
    assert outer.seen.samples == 4
    assert layer.running_mean.tolist() == [0, 0]


def test_statistics_that_its_dtype_cannot_hold() -> None:
    layer = nn.BatchNorm1d(2).half().eval()
    one = adapter(layer, prior=0.0)
    with pytest.raises(NonFiniteError, match=r'layer "the model itself": .* cannot hold'):
        one(layer, (torch.randn(8, 2) * 1e6,), {})
    assert one.seen.batches == 0
    one.leave()


def test_other_buffers_than_its_own() -> None:
    layer = bn.BatchNorm1d(2).eval()
    one = adapter(layer)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(OptionError, match="other buffers"):
        torch.func.functional_call(
            nn.Sequential(Calling(one, layer)), {f"0.layer.{k}": v for k, v in buffers.items()}, (torch.randn(3, 2),)
        )
    one.leave()


class Calling(nn.Module):
    def __init__(self, one: Adapter, layer: nn.Module) -> None:
        super().__init__()
        self.one, self.layer = one, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.one(self.layer, (x,), {})
        return x

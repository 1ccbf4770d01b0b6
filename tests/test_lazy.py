"""Lazy layers, beside torch's."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import OptionError, ShapeError
from support.comparison import close

KINDS = [
    (bn.LazyBatchNorm1d, nn.LazyBatchNorm1d, bn.BatchNorm1d, (6, 4)),
    (bn.LazyBatchNorm2d, nn.LazyBatchNorm2d, bn.BatchNorm2d, (6, 4, 3, 2)),
    (bn.LazyBatchNorm3d, nn.LazyBatchNorm3d, bn.BatchNorm3d, (6, 4, 3, 2, 2)),
]


@pytest.mark.parametrize(("ours", "torchs", "becomes", "shape"), KINDS)
def test_the_first_input_makes_it_an_ordinary_layer(
    ours: Any, torchs: Any, becomes: Any, shape: tuple[int, ...]
) -> None:
    layer, expected = ours(eps=1e-3, momentum=0.2), torchs(eps=1e-3, momentum=0.2)
    assert isinstance(layer, torchs)
    layer = pickle.loads(pickle.dumps(layer))
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(shape)
        close(layer(x).detach(), expected(x).detach())
    assert type(layer) is becomes
    assert layer.num_features == 4
    for actual, wanted in zip(layer.state_dict().values(), expected.state_dict().values(), strict=True):
        close(actual, wanted)


def test_options_stay() -> None:
    x = torch.randn(4, 3, 2, 5)
    layer = bn.LazyBatchNorm2d(activation="relu", channel_dim=-1, bias=False, dtype=torch.bfloat16, inplace=True)
    y = layer(x.bfloat16())
    expected = bn.BatchNorm2d(5, activation="relu", channel_dim=-1, bias=False, dtype=torch.bfloat16, inplace=True)
    assert torch.equal(y, expected(x.bfloat16()))
    assert layer.options() == expected.options()
    assert layer.bias is None
    assert layer.running_var.dtype == torch.float32
    assert bn.LazyBatchNorm1d(virtual_batch_size=2).virtual_batch_size == 2


def test_a_checkpoint_fills_it() -> None:
    source = nn.Sequential(nn.BatchNorm1d(4))
    source(torch.randn(6, 4))
    lazy = nn.Sequential(bn.LazyBatchNorm1d())
    lazy.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    close(lazy.eval()(x).detach(), source.eval()(x).detach())
    assert lazy[0].num_features == 4


def test_wrong_options_and_inputs_are_refused() -> None:
    with pytest.raises(OptionError, match="virtual_batch_size"):
        bn.LazyBatchNorm1d(virtual_batch_size=0)
    with pytest.raises(OptionError, match="renorm"):
        bn.LazyBatchNorm1d(renorm=bn.Renorm(), track_running_stats=False)
    with pytest.raises(ShapeError):
        bn.LazyBatchNorm2d()(torch.randn(3, 4))

"""A layer's state as numbers: of any dtype, and nothing of what has no values."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.diagnosis.channels import SHOWN, Channels, count_of, indices
from batchnorm.diagnosis.subject import LayerState, subject_of_model


def only_layer(model: nn.Module) -> LayerState:
    (layer,) = subject_of_model(model).layers
    return layer


def test_values_are_float64_copies_on_the_cpu() -> None:
    layer = only_layer(nn.BatchNorm1d(3).to(torch.bfloat16))
    state = Channels.of(layer)
    for values, expected in zip((state.mean, state.var, state.gamma, state.beta), (0, 1, 1, 0), strict=True):
        assert values is not None
        assert values.dtype == torch.float64
        assert not values.requires_grad
        assert values.tolist() == [expected] * 3
    assert state.statistics() == (state.mean, state.var)


def test_what_has_no_values_is_none() -> None:
    assert Channels.of(only_layer(nn.BatchNorm2d(3, device="meta"))) == Channels(None, None, None, None)
    assert Channels.of(only_layer(nn.LazyBatchNorm2d())) == Channels(None, None, None, None)
    state = Channels.of(only_layer(nn.BatchNorm2d(3, affine=False, track_running_stats=False)))
    assert state == Channels(None, None, None, None)
    assert state.statistics() is None


def test_what_is_no_vector_of_the_channels_is_none() -> None:
    layer = only_layer(nn.BatchNorm2d(3))
    layer.weight = torch.ones(4)
    assert Channels.of(layer).gamma is None
    assert Channels.of(layer).mean is not None


def test_a_table_shows_what_there_is_of_the_first_channels() -> None:
    model = nn.BatchNorm1d(20, affine=False)
    model.running_mean.copy_(torch.arange(20))
    table = Channels.of(only_layer(model)).table("some", torch.arange(19, -1, -1))
    assert table.columns == ["channel", "running mean", "running variance"]
    assert len(table.rows) == SHOWN
    assert table.rows[0] == ["19", "19", "1"]


def test_indices_and_counts() -> None:
    chosen = torch.tensor([True, False, True, True])
    assert indices(chosen).tolist() == [0, 2, 3]
    assert indices(chosen, torch.tensor([2.0, 0.0, 1.0, 3.0])).tolist() == [2, 0, 3]
    assert count_of(3, only_layer(nn.BatchNorm1d(4))) == "3 of 4 channels"

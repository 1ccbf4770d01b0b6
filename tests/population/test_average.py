"""Method "average" is torch's update_bn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm.errors import CountError
from support.comparison import close
from support.populations import images, layers, made


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 3, 5, 2), (6,)])
def test_it_is_update_bn(sizes: tuple[int, ...]) -> None:
    """Dropout and its random numbers included."""
    model = made("residual").eval()
    torch_model = copy.deepcopy(model)
    torch.manual_seed(3)
    bn.recalibrate(model, images(*sizes), method="average")
    torch.manual_seed(3)
    update_bn(images(*sizes), torch_model)
    for name, layer in layers(model).items():
        for statistic in ("running_mean", "running_var"):
            close(getattr(layer, statistic), getattr(layers(torch_model)[name], statistic))


def test_a_layer_that_is_called_twice() -> None:
    layer = nn.BatchNorm1d(3)
    model, batches = nn.Sequential(layer, nn.Linear(3, 3), layer), [torch.randn(n, 3) for n in (4, 7)]
    torch_model = copy.deepcopy(model)
    bn.recalibrate(model, batches, method="average")
    update_bn(batches, torch_model)
    close(layer.running_mean, torch_model[0].running_mean)
    close(layer.running_var, torch_model[0].running_var)


def test_batches_have_one_weight_whatever_their_size() -> None:
    layer = nn.BatchNorm1d(1)
    result = bn.recalibrate(layer, [torch.zeros(64, 1), torch.full((2, 1), 10.0)], method="average")
    assert layer.running_mean.item() == 5
    assert layer.running_var.item() == 0
    assert result.layers[0].count == 66


def test_one_value_for_each_channel_is_an_error() -> None:
    with pytest.raises(CountError, match=r'layer "the model itself": got one value for each channel in batch 1;'):
        bn.recalibrate(nn.BatchNorm1d(2), [torch.randn(3, 2), torch.randn(1, 2)], method="average")


def test_what_a_mask_leaves_empty_does_not_count() -> None:
    layer, x = bn.BatchNorm1d(2), torch.randn(4, 2)
    batches = [{"input": x, "mask": torch.tensor(mask)} for mask in ([True] * 4, [False] * 4)]
    bn.recalibrate(layer, batches, method="average")
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))

"""timm's split layers as layers with domains; made up here, under its name, and, in the long tests, timm's own."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from support import tolerances
from support.comparison import close
from support.tools import make_importable


class Split(nn.BatchNorm2d):
    """As timm's, for two parts."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_splits = 2
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(channels)])

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        first, second = input.chunk(2)
        return torch.cat([super().forward(first), self.aux_bn[0](second)])


Split.__name__ = Split.__qualname__ = "SplitBatchNorm2d"
Split.__module__ = "timm.layers.split_batchnorm"


@pytest.fixture
def under_timms_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("timm.layers.split_batchnorm")
    vars(module)["SplitBatchNorm2d"] = Split
    monkeypatch.setitem(sys.modules, "timm.layers.split_batchnorm", module)


def other_values(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return net


def images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1


def split(samples: int, parts: int) -> Tensor:
    """What timm does: equal parts, one after the other."""
    return torch.arange(samples) * parts // samples


def same_step(net: nn.Module, ours: nn.Module, parts: int) -> None:
    """Outputs and statistics of training, and of inference by the main layer."""
    x = images(4 * parts)
    expected = net.train()(x)
    with bn.domain(ours.train(), split(len(x), parts)):
        close(ours(x).detach(), expected.detach(), tolerances.OUTPUT * 20)
    with bn.domain(ours.eval(), 0):
        close(ours(x).detach(), net.eval()(x).detach(), tolerances.OUTPUT * 20)


@pytest.mark.usefixtures("under_timms_name")
def test_its_auxiliary_layers_become_domains() -> None:
    torch.manual_seed(0)
    net, ours = (other_values(nn.Sequential(Split(3))) for _ in range(2))
    parameters, buffers = list(ours.parameters()), list(ours.buffers())
    bn.convert(ours)
    assert type(ours[0]) is bn.BatchNorm2d
    assert ours[0].domains == ("main", "aux_0")
    assert ours[0].own_affine
    assert {id(p) for p in ours.parameters()} == {id(p) for p in parameters}  # an optimizer has them
    assert {id(b) for b in ours.buffers()} == {id(b) for b in buffers}
    for _ in range(2):
        same_step(net, ours, 2)
    close(ours[0].statistics_of("aux_0").mean, net[0].aux_bn[0].running_mean, tolerances.STATISTIC)
    bn.revert(ours, domain="main")
    assert type(ours[0]) is nn.BatchNorm2d
    assert not list(ours[0].children())


@pytest.mark.usefixtures("under_timms_name")
def test_its_parts_may_have_names() -> None:
    net = bn.convert(nn.Sequential(Split(3)), domains=("clean", "adversarial"))
    assert net[0].domains == ("clean", "adversarial")
    with pytest.warns(UserWarning, match="of 2 parts for 3 domains"):
        bn.convert(nn.Sequential(Split(3)), domains=("a", "b", "c"))


@pytest.mark.long
@pytest.mark.parametrize(("name", "parts"), [("resnet18", 2), ("tf_efficientnet_lite0", 3)])
def test_timms_models(name: str, parts: int) -> None:
    """An efficientnet has activations inside: they stay where they are."""
    make_importable()
    timm: Any = importlib.import_module("timm")
    layers: Any = importlib.import_module("timm.layers")

    def model() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=5).double()
        return layers.convert_splitbn_model(made, parts).double()

    net, ours = model(), bn.convert(model())
    x = images(4 * parts).repeat(1, 1, 4, 4).double()
    expected = net.train()(x)
    with bn.domain(ours.train(), split(len(x), parts)):
        torch.testing.assert_close(ours(x), expected)
    with bn.domain(ours.eval(), 0):
        torch.testing.assert_close(ours(x), net.eval()(x))
    bn.revert(ours, domain=0)
    torch.testing.assert_close(ours(x), net(x))
    assert not any(isinstance(module, bn.BatchNorm) for module in ours.modules())

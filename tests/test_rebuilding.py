"""Tools that make other layers from ours: what they read is the truth, or raises."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.errors import OptionError, TransformError
from support.comparison import close
from support.networks import used

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # these use torch.jit when they are imported
    from torch.fx.experimental import optimization
    from torch.utils import mkldnn

OPTIONS = [
    {"activation": "relu"},
    {"virtual_batch_size": 2},
    {"renorm": bn.Renorm()},
    {"channel_dim": -1},
]


def rebuilt_as_frozen(layer: nn.Module) -> nn.Module:
    """A layer of constants, as detection networks have them."""
    frozen: Any = nn.BatchNorm2d(layer.num_features)
    frozen.load_state_dict(layer.state_dict())
    return frozen.eval()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_a_layer_that_would_lose_an_option_cannot_be_rebuilt(options: dict[str, Any]) -> None:
    layer = bn.BatchNorm2d(4, **options)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    with pytest.raises(OptionError, match=f"without {next(iter(options))}"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(OptionError, match="num_features"):
        rebuilt_as_frozen(layer)
    assert model[1] is layer
    assert vars(layer)["num_features"] == 4
    assert next(iter(options)) in repr(layer)
    assert type(pickle.loads(pickle.dumps(layer))) is type(copy.deepcopy(layer)) is bn.BatchNorm2d


def test_a_frozen_layer_cannot_be_rebuilt_as_one_that_moves() -> None:
    model = bn.freeze(nn.Sequential(bn.BatchNorm2d(4)))
    with pytest.raises(OptionError, match="without frozen"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_what_folds_a_layer_into_a_convolution_is_right_or_raises() -> None:
    x, conv = torch.randn(2, 3, 5, 5), nn.Conv2d(3, 4, 1).eval()
    for options in ({}, {"virtual_batch_size": 2}, {"renorm": bn.Renorm()}):
        layer = bn.BatchNorm2d(4, **options)
        layer(torch.randn(6, 4, 5, 5) * 3 + 1)
        layer.eval()
        close(fuse_conv_bn_eval(conv, layer)(x).detach(), layer(conv(x)).detach())
    with pytest.raises(OptionError, match="eps"):
        fuse_conv_bn_eval(conv, bn.BatchNorm2d(4, activation="relu").eval())


@pytest.mark.parametrize("sync", [False, True])
def test_a_plain_layer_is_rebuilt_as_torchs_would_be(sync: bool) -> None:
    layer, torchs = bn.BatchNorm2d(4, eps=1e-3, momentum=0.2, sync=sync), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
    for one in (layer, torchs):
        torch.manual_seed(0)
        nn.init.normal_(one.weight)
        one(torch.randn(6, 4, 5, 5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0]
    expected = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(torchs))[0]
    assert repr(converted) == repr(expected)
    for actual, wanted in zip(converted.state_dict().values(), expected.state_dict().values(), strict=True):
        close(actual, wanted)
    x = torch.randn(2, 4, 5, 5)
    close(rebuilt_as_frozen(nn.Sequential(layer)[0])(x).detach(), rebuilt_as_frozen(torchs)(x).detach())


def test_mkldnns_layers_are_made_from_plain_ones_only() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no MKLDNN")
    x = torch.randn(2, 4, 5, 5)
    plain = bn.BatchNorm2d(4)
    plain(x * 2)
    y: Tensor = mkldnn.to_mkldnn(nn.Sequential(plain).eval())(x.to_mkldnn()).to_dense()
    close(y, plain(x).detach())
    with pytest.raises(OptionError, match="activation"):
        mkldnn.to_mkldnn(nn.Sequential(bn.BatchNorm2d(4, activation="silu")).eval())


def test_torch_fxs_rewriters_drop_nothing_that_a_call_was_given() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), bn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x), residual=x, activation="relu")
            return self.norm(self.conv(y))

    net, x = used(Block()), torch.randn(2, 4, 5, 5)
    expected = net(x).detach()
    close(fx.symbolic_trace(net)(x).detach(), expected)
    close(optimization.fuse(copy.deepcopy(net))(x).detach(), expected)
    close(copy.deepcopy(fx.symbolic_trace(net))(x).detach(), expected)


def test_what_looks_up_the_exact_class_finds_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("opacus.validators.module_validator")
    module.ModuleValidator = types.SimpleNamespace(
        VALIDATORS={nn.BatchNorm1d: "refused", nn.BatchNorm2d: "refused too"},
        FIXERS={nn.BatchNorm1d: "replaced", nn.BatchNorm2d: "replaced too"},
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    bn.BatchNorm(4)
    bn.convert(nn.Sequential(nn.BatchNorm2d(4)))
    assert module.ModuleValidator.VALIDATORS[bn.BatchNorm] == "refused"
    assert module.ModuleValidator.VALIDATORS[bn.BatchNorm2d] == "refused too"
    assert module.ModuleValidator.FIXERS[bn.BatchNorm2d] == "replaced too"


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5)[()]], ids=lambda n: str(type(n)))
def test_numpys_numbers_become_pythons(number: float) -> None:
    layer = bn.BatchNorm1d(3, eps=number, momentum=number)
    converted = bn.convert(nn.BatchNorm1d(3, eps=number, momentum=number))
    later = bn.BatchNorm1d(3)
    later.eps = later.momentum = number
    x = torch.randn(5, 3)
    expected = nn.BatchNorm1d(3, eps=0.5, momentum=0.5)
    wanted = expected(x).detach()
    for one in (layer, converted, later):
        assert type(one.eps) is type(one.momentum) is float
        close(torch.compile(one, backend="eager", fullgraph=True)(x).detach(), wanted)
        close(one.running_mean, expected.running_mean)


def test_scripting_says_what_to_do() -> None:
    with pytest.raises(TransformError, match=r"batchnorm\.revert\(model\) or batchnorm\.fold"):
        torch.jit.script(nn.Sequential(bn.BatchNorm1d(3)).eval())

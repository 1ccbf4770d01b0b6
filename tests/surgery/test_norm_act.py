"""timm's layer as one of ours, beside itself; made up here, under its name, since timm is not what the tests need."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import batchnorm as bn
from batchnorm import activations
from batchnorm.errors import OptionError
from batchnorm.surgery import norm_act
from support import tolerances
from support.comparison import close
from support.networks import used


@pytest.fixture(scope="module")
def timm_class() -> Any:
    """What timm's BatchNormAct2d does, under its name, in a module of timm's name while the tests run."""
    module = types.ModuleType("timm.layers.norm_act")

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, num_features: int, act: nn.Module, drop: nn.Module | None = None) -> None:
            super().__init__(num_features)
            self.drop, self.act = drop or nn.Identity(), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(x)))

    BatchNormAct2d.__module__, BatchNormAct2d.__qualname__ = module.__name__, "BatchNormAct2d"
    module.BatchNormAct2d = BatchNormAct2d
    # A tool of timm's: it looks for the class, reads the number, and hands the two modules on.
    tool = "def rebuild(layer, made):\n    made.num_features, made.eps = layer.num_features, layer.eps\n    return made"
    exec(tool, vars(module))
    names = ("timm", "timm.layers", "timm.layers.norm_act")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules |= dict(zip(names, (types.ModuleType("timm"), types.ModuleType("timm.layers"), module), strict=True))
    yield BatchNormAct2d
    for name, old in before.items():
        if old is None:
            del sys.modules[name]
        else:
            sys.modules[name] = old


ACTS = [
    (nn.ReLU(inplace=True), None, "relu"),
    (nn.Identity(), None, None),
    (nn.SiLU(), None, "silu"),
    (nn.LeakyReLU(), None, "leaky_relu"),
    (nn.GELU(), None, "gelu"),
    (nn.Hardswish(), None, "hardswish"),
    (nn.ELU(), None, "elu"),
    (nn.ELU(alpha=0.5), None, "ELU"),
    (nn.Softplus(), None, "Softplus"),
    (nn.ReLU(), nn.Hardtanh(), "Hardtanh"),
]


@pytest.mark.parametrize(("act", "drop", "inside"), ACTS, ids=str)
def test_it_computes_what_timms_does(timm_class: Any, act: nn.Module, drop: nn.Module | None, inside: str) -> None:
    layer, x = used(timm_class(4, act, drop)), torch.randn(6, 4, 5, 3) * 2 + 1
    expected, state, attributes = copy.deepcopy(layer), copy.deepcopy(layer.state_dict()), {**vars(layer)}
    assert bn.convert(layer) is layer
    assert isinstance(layer, bn.BatchNorm2d)
    assert isinstance(layer, timm_class)
    assert norm_act.inside(layer) == inside
    assert layer.activation == (inside if inside in activations.ACTIVATIONS else None)
    relative, absolute = tolerances.AGAINST_TORCH[torch.float32]
    traced = fx.symbolic_trace(nn.Sequential(copy.deepcopy(layer)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.compiler.reset()  # it gives up on code that it has compiled for eight classes
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), traced, compiled):
        beside = copy.deepcopy(expected)
        for training in (True, False):
            beside.train(training), copied.train(training)
            torch.testing.assert_close(copied(x), beside(x), rtol=relative, atol=absolute)
    assert type(bn.revert(layer)) is timm_class
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert vars(layer) == attributes


def test_what_is_exchanged_or_hooked_later_is_heeded(timm_class: Any) -> None:
    layer, x = bn.convert(timm_class(4, nn.ReLU())), torch.randn(6, 4, 5, 3)
    normalised = F.batch_norm(x, None, None, training=True)
    close(layer(x).detach(), normalised.relu())
    layer.act = nn.Softplus()
    close(layer(x).detach(), F.softplus(normalised))
    layer.act, seen = nn.ReLU(), []
    handle = layer.act.register_forward_hook(lambda module, args, output: seen.append(args[0]) or output + 1)
    close(layer(x).detach(), normalised.relu() + 1)
    close(seen[0].detach(), normalised)
    handle.remove()
    layer.drop = nn.Hardtanh()
    close(layer(x).detach(), normalised.clamp(-1, 1).relu())
    with pytest.raises(OptionError, match="which calls Hardtanh after the normalisation"):
        layer(x, residual=x)
    with pytest.raises(OptionError, match=r"Set layer\.act"):
        layer.activation = None


def test_timms_own_tools_may_rebuild_it_and_others_may_not(timm_class: Any) -> None:
    layer = bn.convert(timm_class(4, nn.ReLU()))
    rebuild = sys.modules["timm.layers.norm_act"].rebuild
    assert vars(rebuild(layer, types.SimpleNamespace())) == {"num_features": 4, "eps": 1e-5}
    with pytest.raises(OptionError, match="without activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    ghosts = bn.convert(timm_class(4, nn.ReLU()), virtual_batch_size=2)
    with pytest.raises(OptionError, match="without virtual_batch_size"):
        rebuild(ghosts, types.SimpleNamespace())
    called = bn.convert(timm_class(4, nn.Softplus()))
    assert rebuild(called, types.SimpleNamespace()).num_features == 4
    with pytest.raises(OptionError, match="without act"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(called))


def test_surgery_knows_it(timm_class: Any) -> None:
    x = torch.randn(4, 3, 6, 6)
    net = used(
        nn.Sequential(nn.Conv2d(3, 4, 3), timm_class(4, nn.Softplus()), nn.Conv2d(4, 4, 1), timm_class(4, nn.ReLU()))
    )
    expected = copy.deepcopy(net)(x)
    fused = bn.fuse(copy.deepcopy(net))
    close(fused(x).detach(), expected.detach())
    assert "it has an activation inside, Softplus" in str(fused.report)
    folded = bn.fold(bn.convert(copy.deepcopy(net)), x)
    close(folded(x).detach(), expected.detach())
    assert str(folded.report).startswith("2 of 2 folded")


def test_the_addition_behind_one_without_activation_is_fused(timm_class: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = timm_class(4, nn.Identity()), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(x) + x)

    net, x = used(Block()), torch.randn(4, 4, 5, 5)
    expected = copy.deepcopy(net)(x)
    assert str(bn.fuse(net).report).startswith("1 of 1 fused")
    close(net(x).detach(), expected.detach())
    net.norm.act = nn.Tanh()
    close(net(x).detach(), (net.norm(x) + x).relu().detach())


def test_timm_is_not_imported_by_us() -> None:
    assert not hasattr(sys.modules.get("timm"), "create_model")

"""Models that `fold` gets in other states: compiled, with computed weights, with nothing to be verified on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn
from batchnorm.surgery.fold import fold
from support.networks import Calls, draw, used


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "part"])
def test_a_compiled_model_folds(inner: bool) -> None:
    net = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).double().eval()
    x = draw(2, 3, 4, 4)
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    folded = fold(nn.Sequential(compiled) if inner else compiled, x)
    assert list(folded.report.done.values()) == [f"part of {'0.' if inner else ''}0"]
    torch.testing.assert_close(folded(x), net(x))


def test_inputs_that_verify_nothing_are_refused() -> None:
    net = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    with pytest.raises(bn.BatchNormError, match="of which nothing comes out"):
        fold(net, torch.randn(0, 3, 4, 4))
    with pytest.raises(bn.BatchNormError, match="not finite"):
        fold(net, torch.full((2, 3, 4, 4), float("nan")))


def test_a_scale_and_shift_is_counted_apart() -> None:
    net = used(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    head = str(fold(net, torch.randn(2, 3, 4, 4)).report).splitlines()[0]
    assert head.startswith("1 of 2 folded, 1 as a scale and shift, outputs differ by at most")


def test_the_activation_of_a_call_folds() -> None:
    net = Calls(lambda m, x: m.norm(m.conv(x), activation="silu"), conv=nn.Conv2d(3, 3, 1), norm=bn.BatchNorm2d(3))
    net, x = used(net).double().eval(), draw(2, 3, 4, 4)
    folded = fold(net, x)
    assert folded.report.done == {"norm": "part of conv"}
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", ["pruned", "normed"])
def test_weights_that_a_hook_computed_with_gradients(how: str) -> None:
    net, x = used(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).double(), draw(2, 3, 4, 4)
    if how == "pruned":
        prune.random_unstructured(net[0], "weight", 0.5)
    else:
        nn.utils.weight_norm(net[0])
    net(x).sum().backward()
    folded = fold(net, x)
    torch.testing.assert_close(folded(x), net.eval()(x))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Sharded(nn.Sequential):
        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("FSDP does not support deepcopy")

    with pytest.raises(bn.BatchNormError, match="cannot be copied: FSDP does not support deepcopy"):
        fold(Sharded(nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4))

"""What people write instead of torch's convolutions folds by what it calls; what computes its weights does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.fold import fold
from batchnorm.surgery.scale_shift import ScaleShift
from support import tolerances
from support.networks import Calls, Untraceable, draw, used


class PaddedBySize(nn.Conv2d):
    """As TensorFlow pads, by the size of the input: nothing that torch.fx can trace."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [max(-(-size // 2) * 2 + 1 - size, 0) for size in map(int, x.shape[-2:])]
        return F.conv2d(F.pad(x, (0, missing[1], 0, missing[0])), self.weight, self.bias, self.stride)


class PaddedByAModule(nn.Conv2d):
    """As EfficientNet-lite pads, by a module inside."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.padded = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padded(x), self.weight, self.bias, self.stride, groups=self.groups)


class Product(nn.Module):
    """No subclass of anything, with names of its own."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(out, into)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.vector)


class Standardized(nn.Conv2d):
    """As timm's StdConv2d and ScaledStdConv2d: another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class WithoutBias(nn.Conv2d):
    """Has a place for a bias and does not look there."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Rounded(nn.Conv2d):
    """Its input depends on its weight: what the function gives is not linear in it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * self.weight.detach().abs().mean(), self.weight, self.bias)


def checked(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Fold a used model in float64, and compare it with the original, which is as before."""
    used(model).double()
    state = copy.deepcopy(model.state_dict())
    folded = fold(model, inputs)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    relative, absolute = tolerances.AGAINST_TORCH[torch.float64]
    torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=relative, atol=absolute)
    return folded


FOLDED: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "padded by size": (PaddedBySize(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "padded by a module": (PaddedByAModule(4, 4, 2, groups=2), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "a product": (Product(3, 4), nn.BatchNorm1d(4), (5, 3)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_computes_a_linear_map_folds(name: str) -> None:
    layer, norm, shape = copy.deepcopy(FOLDED[name])
    folded = checked(nn.Sequential(layer, norm, nn.ReLU()), draw(*shape))
    assert folded.report.done == {"1": "part of 0"}
    assert type(folded[0]) is type(layer)
    assert type(folded[1]) is nn.Identity


ALONE: dict[str, tuple[list[nn.Module], str]] = {
    "standardized": (
        [Standardized(3, 4, 1), nn.BatchNorm2d(4)],
        "no linear layer stands directly before it: 0 computes the weight or bias that it uses",
    ),
    "a bias that is not added": ([WithoutBias(3, 4, 1, bias=False), nn.BatchNorm2d(4)], "as part of 0 it is off by "),
    "an input that depends on the weight": ([Rounded(3, 4, 1), nn.BatchNorm2d(4)], "as part of 0 it is off by "),
    "padding behind": (
        [nn.BatchNorm2d(3), PaddedByAModule(3, 4, 2)],
        "not into 1 either: it does something with its input before",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_computes_something_else_stays(name: str) -> None:
    layers, reason = copy.deepcopy(ALONE[name])
    folded = checked(nn.Sequential(nn.ReLU(), nn.Sequential(*layers)), draw(2, 3, 5, 5))
    (entry,) = folded.report
    assert entry.what.startswith("a scale and shift, because ")
    assert reason.replace("0 ", "1.0 ", 1).replace("into 1", "into 1.1") in entry.what
    assert any(isinstance(module, ScaleShift) for module in folded.modules())
    assert str(folded.report).startswith("0 of 1 folded, 1 as a scale and shift, ")


def test_all_that_a_linear_layer_is_called_with_counts() -> None:
    model = Calls(
        lambda m, x: m.norm(m.up(input=m.conv(input=x), output_size=[10, 10])),
        conv=nn.Conv2d(3, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(4),
    )
    assert checked(model, draw(2, 3, 5, 5)).report.done == {"norm": "part of up"}


def test_what_is_called_with_more_takes_in_no_layer_before_it() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, *, bias: bool = True) -> Tensor:
            return F.linear(x, self.weight, self.bias if bias else None)

    model = Calls(lambda m, x: m.linear(m.norm(x), bias=True), norm=nn.BatchNorm1d(3), linear=Scaled(3, 4))
    reason = checked(model, draw(5, 3)).report.done["norm"]
    assert reason.endswith("not into linear either: it is called with more than its input")


def test_dead_biases_go_only_before_torchs_own_classes() -> None:
    """Another class may do something else in training, and nothing was run in training."""
    model = nn.Sequential(PaddedBySize(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    bn.remove_dead_biases(model, torch.randn(2, 3, 6, 6))
    assert model.report.done == {"3": "the bias of 2 is part of the running mean"}
    assert model.report.left == {"1": "0 is a PaddedBySize, which may do something else in training"}


def test_a_part_that_cannot_be_traced_around_such_a_layer() -> None:
    part = nn.Sequential(PaddedByAModule(3, 3, 2), nn.BatchNorm2d(3))
    folded = checked(Untraceable(part), draw(2, 3, 5, 5))
    assert folded.report.done == {"parts.0.1": "part of parts.0.0"}

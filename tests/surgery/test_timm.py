"""Surgery on timm's networks: padding by size, standardized weights, and its own merging of branches afterwards."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import tolerances
from support.networks import used
from support.tools import make_importable

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # timm's own, at import

# In float64: networks of fifty layers that nobody trained enlarge roundings of float32 to more than a wrong fold makes.
RELATIVE, ABSOLUTE = tolerances.AGAINST_TORCH[torch.float64]


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    """Whatever is made, by timm too, is in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def timm(module: str = "timm") -> Any:
    make_importable()
    return importlib.import_module(module)


def normed(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """In inference, with outputs of order 1 in every layer: statistics are the data's own."""
    bn.recalibrate(used(model), [x])
    return model


def agree(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Two outputs are the same up to rounding, on the scale of the outputs."""
    expected = expected.detach()
    torch.testing.assert_close(actual.detach(), expected, rtol=RELATIVE, atol=ABSOLUTE * float(expected.abs().max()))


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "layers"), [("tf_efficientnet_lite0", 49), ("tf_mobilenetv3_small_075", 34)])
def test_convolutions_that_pad_by_size_fold(name: str, layers: int) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 64, 64)
    model = normed(timm().create_model(name, pretrained=False), x)
    padded = [m for m in model.modules() if type(m).__name__ == "Conv2dSame"]
    assert len(padded) == 5
    folded = bn.fold(model, x)
    assert str(folded.report).startswith(f"{layers} of {layers} folded, outputs differ")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for inputs in (x, images(2, 3, 63, 49)):  # of a size that is padded otherwise
        agree(folded(inputs), model(inputs))


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_standardized_weights_stay_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 9, 9)
    convolution = getattr(timm("timm.layers"), name)(3, 8, kernel_size=3, stride=2)
    model = normed(nn.Sequential(convolution, nn.BatchNorm2d(8)), x)
    folded = bn.fold(model, x)
    assert folded.report.done["1"].endswith("0 computes the weight or bias that it uses")
    agree(folded(x), model(x))


def test_an_efficientnet_fuses_what_is_left_beside_its_activations() -> None:
    """33 of its 49 layers have an activation inside already, timm's own; 9 are added to a shortcut."""
    torch.manual_seed(0)
    model = timm().create_model("tf_efficientnet_lite0", pretrained=False)
    fused = bn.fuse(copy.deepcopy(model))
    done, left = fused.report.done, list(fused.report.left.values())
    assert sum(what.startswith("with the addition, in ") for what in done.values()) == len(done) == 9
    assert left.count("it has an activation inside, relu6") == 33
    x = images(4, 3, 64, 64)
    agree(fused.train()(x), model.train()(x))


@pytest.mark.parametrize("change", [bn.convert, bn.fuse])
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050"])
def test_branches_are_merged_by_timm_afterwards(name: str, change: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    x = images(2, 3, 96, 96)
    model = normed(timm().create_model(name, pretrained=False), x)
    expected, before = model(x).detach(), sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    merged = timm("timm.utils").reparameterize_model(change(model))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in merged.modules()) < before
    agree(merged(x), expected)
    agree(bn.fold(merged, x)(x), expected)

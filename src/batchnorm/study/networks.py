"""The networks that the experiments train, of our layers or of torch.nn's.

Equal generators give equal linear maps, whatever is normalised: pairs differ in the normalisation and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from batchnorm.modules import BatchNorm1d, BatchNorm2d

# Where batch normalization stands: before the activation, after it, or nowhere.
Placement = Literal["before", "after", "none"]
KERNEL = 3
GRID = 4  # what a residual network's images are averaged down to, each way, before the last layer


@dataclass(frozen=True)
class Layers:
    """Whose batch normalization the networks are made of.

    Attributes:
        name: as `--layers` has it.
        vectors: the layer for (N, C).
        images: the layer for (N, C, H, W).
    """

    name: str
    vectors: type[nn.Module]
    images: type[nn.Module]

    def norm(self, features: int, *, images: bool = False, **options: bool | float) -> nn.Module:
        """A layer of batch normalization for so many features, alone."""
        return (self.images if images else self.vectors)(features, **options)


OURS = Layers("ours", BatchNorm1d, BatchNorm2d)
TORCH = Layers("torch", nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = {layers.name: layers for layers in (OURS, TORCH)}


class Unit(nn.Module):
    """What follows a linear map: batch normalization, where there is any, and ReLU, in the order of the placement.

    Attributes:
        norm: the layer of batch normalization, None for "none". With ours and "before", it does the addition and the
            ReLU as well, in one operation.

    Shapes:
        input, residual, output: (N, C, *S).
    """

    def __init__(self, features: int, placement: Placement, layers: Layers, *, images: bool = False) -> None:
        super().__init__()
        self.placement = placement
        self.norm = None if placement == "none" else layers.norm(features, images=images)
        self._fused = placement == "before" and isinstance(self.norm, BatchNorm1d | BatchNorm2d)
        if self._fused:
            assert isinstance(self.norm, BatchNorm1d | BatchNorm2d)
            self.norm.activation = "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`relu(norm(x) + residual)`, `norm(relu(x + residual))` or `relu(x + residual)`."""
        if self._fused:
            assert self.norm is not None
            return self.norm(x, residual=residual)  # type: ignore[no-any-return]  # modules are called through Any
        if self.placement == "before" and self.norm is not None:
            x = self.norm(x)
        x = torch.relu(x if residual is None else x + residual)
        return self.norm(x) if self.placement == "after" and self.norm is not None else x


def perceptron(
    inputs: int,
    hidden: Sequence[int],
    classes: int,
    *,
    placement: Placement,
    layers: Layers,
    generator: torch.Generator,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A multilayer perceptron with ReLU.

    Weights are He's (variance 2 / fan-in), which keep deep ReLU networks trainable without normalisation; biases are 0.
    Before a normalisation there is no bias: the mean would remove it.

    Args:
        inputs: numbers in a sample.
        hidden: features of each hidden layer.
        classes: features of the output.
        placement: where batch normalization stands in the hidden layers.
        layers: whose it is.
        generator: the source of the weights.
        dropout: the probability with which each hidden feature is dropped, at the end of its layer; 0 for no dropout.

    Returns:
        `Flatten`, then for each hidden layer `Linear`, `Unit` and, with dropout, `Dropout`; then `Linear`.

    Shapes:
        input (N, *shape) of `inputs` numbers, output (N, classes).
    """
    modules: list[nn.Module] = [nn.Flatten()]
    for features in hidden:
        modules.append(_linear(inputs, features, bias=placement != "before", gain="relu", generator=generator))
        modules.append(Unit(features, placement, layers))
        if dropout:
            modules.append(nn.Dropout(dropout))
        inputs = features
    modules.append(_linear(inputs, classes, bias=True, gain="linear", generator=generator))
    return nn.Sequential(*modules)


def residual(
    shape: Sequence[int],
    width: int,
    blocks: int,
    classes: int,
    *,
    placement: Placement,
    layers: Layers,
    generator: torch.Generator,
) -> nn.Sequential:
    """A small residual network: of 3x3 convolutions for images, of linear layers for vectors.

    Weights and biases are as in `perceptron`.

    Args:
        shape: of one sample, (C, H, W) or (features,).
        width: channels, or features, throughout.
        blocks: how many, of two linear maps each.
        classes: features of the output.
        placement: where batch normalization stands, in the first layer and in the blocks.
        layers: whose it is.
        generator: the source of the weights.

    Shapes:
        input (N, *shape), output (N, classes).
    """
    images = len(shape) == 3
    modules: list[nn.Module] = [
        _map(shape[0], width, images, placement, generator),
        Unit(width, placement, layers, images=images),
        *(Block(width, images, placement, layers, generator) for _ in range(blocks)),
    ]
    if images:
        modules += [nn.AdaptiveAvgPool2d(GRID), nn.Flatten()]
    features = width * GRID**2 if images else width
    modules.append(_linear(features, classes, bias=True, gain="linear", generator=generator))
    return nn.Sequential(*modules)


class Block(nn.Module):
    """`unit2(map2(unit1(map1(x))), residual=x)`: two linear maps, and a way past them."""

    def __init__(
        self, width: int, images: bool, placement: Placement, layers: Layers, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.map1 = _map(width, width, images, placement, generator)
        self.unit1 = Unit(width, placement, layers, images=images)
        self.map2 = _map(width, width, images, placement, generator)
        self.unit2 = Unit(width, placement, layers, images=images)

    def forward(self, x: Tensor) -> Tensor:
        """The output has the input's shape."""
        return self.unit2(self.map2(self.unit1(self.map1(x))), residual=x)  # type: ignore[no-any-return]


def _map(inputs: int, outputs: int, images: bool, placement: Placement, generator: torch.Generator) -> nn.Module:
    bias = placement != "before"
    if not images:
        return _linear(inputs, outputs, bias=bias, gain="relu", generator=generator)
    convolution = nn.Conv2d(inputs, outputs, KERNEL, padding=KERNEL // 2, bias=bias, device="meta")
    return _initialised(convolution, "relu", generator)


def _linear(
    inputs: int, outputs: int, *, bias: bool, gain: Literal["relu", "linear"], generator: torch.Generator
) -> nn.Module:
    return _initialised(nn.Linear(inputs, outputs, bias=bias, device="meta"), gain, generator)


def _initialised(
    module: nn.Linear | nn.Conv2d, gain: Literal["relu", "linear"], generator: torch.Generator
) -> nn.Module:
    # Made without storage, so that torch's own initialisation does not draw from the global generator.
    module = module.to_empty(device="cpu")
    nn.init.kaiming_normal_(module.weight, nonlinearity=gain, generator=generator)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module

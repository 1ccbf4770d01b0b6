"""Layers that are linear in each position, and what a scale and shift of channels beside them does to them.

With y = W x + b, in float64:

    (W x + b) s + t = (s W) x + (b s + t)            after it: per output channel
    W (x s + t) + b = (W s) x + (W t + b)            before it: per input channel, where every position sees all of W
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from batchnorm._torch import parameters_of

TORCH_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Affine(NamedTuple):
    """A scale and shift of channels, (C,) each, float64."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """A linear layer's weight, in its shape, and bias, float64."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LinearLayer:
    """A module whose output is a convolution, a transposed one or a product with a matrix: W g(x) + b, whatever g is.

    Attributes:
        module: which one.
        weight: the name of its parameter W, which has two dimensions if it is a product.
        bias: the name of its parameter b, which may be None.
        transposed: whether it is a transposed convolution.
        groups: of the convolution.
        why_not_before: why a shift of x is no constant in the output; None where it is.
    """

    module: nn.Module
    weight: str
    bias: str
    transposed: bool
    groups: int
    why_not_before: str | None

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias."""
        own = parameters_of(self.module)
        weight = own[self.weight]
        assert weight is not None
        return weight, own[self.bias]

    def changed(self, module: nn.Module, weights: Weights) -> None:
        """Give a module of the same kind these, rounded to the dtype that the weight has."""
        weight = self.parameters()[0]
        for name, tensor in zip((self.weight, self.bias), weights, strict=True):
            parameters_of(module)[name] = nn.Parameter(tensor.to(weight.dtype), requires_grad=weight.requires_grad)


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module is exactly a convolution, its transpose or Linear: a subclass may do more."""
    return type(module) in TORCH_LAYERS


def of_torch(module: nn.Module) -> LinearLayer:
    """What one of torch's layers is, from its class alone."""
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    groups = 1 if isinstance(module, nn.Linear) else vars(module)["groups"]
    return LinearLayer(module, "weight", "bias", transposed, groups, "what comes into it has not been seen")


def weights(layer: LinearLayer) -> Weights:
    """What a layer has, in float64."""
    parameter, added = layer.parameters()
    weight = parameter.detach().double()
    outputs = weight.shape[1] * layer.groups if layer.transposed else weight.shape[0]
    return Weights(weight, weight.new_zeros(outputs) if added is None else added.detach().double())


def channel_axis(layer: LinearLayer, rank: int) -> int | None:
    """The channel dimension of the layer's input and output of a rank; None where it has no samples."""
    dims = layer.parameters()[0].dim()
    if dims == 2:
        return rank - 1
    return 1 if rank == dims else None


def after(layer: LinearLayer, w: Weights, affine: Affine) -> Weights:
    """The weights that include a scale and shift of the outputs."""
    grouped, out, _ = _grouped(layer, w.weight)
    scale = affine.scale.view(grouped.shape[0], -1)
    shape = [grouped.shape[0], 1, 1, 1]
    shape[out] = -1
    return Weights((grouped * scale.view(shape)).reshape(w.weight.shape), w.bias * affine.scale + affine.shift)


def before(layer: LinearLayer, w: Weights, affine: Affine) -> Weights:
    """The weights that include a scale and shift of the inputs, if nothing says `why_not_before`."""
    grouped, _, into = _grouped(layer, w.weight)
    shape = [grouped.shape[0], 1, 1, 1]
    shape[into] = -1
    scale, shift = (t.view(grouped.shape[0], -1).view(shape) for t in affine)
    shifted = (grouped * shift).sum(dim=(into, 3)).reshape(-1)
    return Weights((grouped * scale).reshape(w.weight.shape), w.bias + shifted)


def _grouped(layer: LinearLayer, weight: Tensor) -> tuple[Tensor, int, int]:
    """The weight as (groups, channels, channels, positions), and which of the two are a group's outputs and inputs."""
    positions = weight.shape[2:].numel()
    grouped = weight.reshape(layer.groups, -1, weight.shape[1], positions)
    # (in, out / groups, *kernel) or (out, in / groups, *kernel)
    return (grouped, 2, 1) if layer.transposed else (grouped, 1, 2)

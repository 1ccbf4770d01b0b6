"""Layers that are linear in each position, and what a scale and shift of channels beside them does to them.

With y = W x + b, in float64:

    (W x + b) s + t = (s W) x + (b s + t)            after it: per output channel
    W (x s + t) + b = (W s) x + (W t + b)            before it: per input channel, where every position sees all of W
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing_extensions import TypeIs

LinearLayer = nn.Linear | _ConvNd
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


class Affine(NamedTuple):
    """A scale and shift of channels, (C,) each, float64."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """A linear layer's weight, in its shape, and bias, float64."""

    weight: Tensor
    bias: Tensor


def is_linear(module: nn.Module) -> TypeIs[LinearLayer]:
    """Whether a module is exactly a convolution, its transpose or Linear: a subclass may do anything."""
    return type(module) in _LINEAR


def weights(layer: LinearLayer) -> Weights:
    """What a layer has, in float64."""
    weight = layer.weight.detach().double()
    outputs = weight.shape[1] * _groups(layer) if type(layer) in _TRANSPOSED else weight.shape[0]
    bias = weight.new_zeros(outputs) if layer.bias is None else layer.bias.detach().double()
    return Weights(weight, bias)


def channel_axis(layer: LinearLayer, rank: int) -> int | None:
    """The channel dimension of the layer's input and output of a rank; None where it has no samples."""
    if type(layer) is nn.Linear:
        return rank - 1
    return 1 if rank == layer.weight.dim() else None


def after(layer: LinearLayer, w: Weights, affine: Affine) -> Weights:
    """The weights that include a scale and shift of the outputs."""
    grouped, out, _ = _grouped(layer, w.weight)
    scale = affine.scale.view(grouped.shape[0], -1)
    shape = [grouped.shape[0], 1, 1, 1]
    shape[out] = -1
    return Weights((grouped * scale.view(shape)).reshape(w.weight.shape), w.bias * affine.scale + affine.shift)


def before(layer: LinearLayer, w: Weights, affine: Affine) -> Weights:
    """The weights that include a scale and shift of the inputs; see `why_not_before`."""
    grouped, _, into = _grouped(layer, w.weight)
    shape = [grouped.shape[0], 1, 1, 1]
    shape[into] = -1
    scale, shift = (t.view(grouped.shape[0], -1).view(shape) for t in affine)
    shifted = (grouped * shift).sum(dim=(into, 3)).reshape(-1)
    return Weights((grouped * scale).reshape(w.weight.shape), w.bias + shifted)


def why_not_before(layer: LinearLayer) -> str | None:
    """Why a shift of the inputs is no constant in the outputs; None where it is."""
    if type(layer) in _TRANSPOSED:
        return "the outputs of a transposed convolution see different parts of its weight"
    if isinstance(layer, _ConvNd) and layer.padding_mode == "zeros" and any(_padding(layer)):
        return "the convolution pads with zeros, which are not shifted"
    return None


def _padding(layer: _ConvNd) -> tuple[int, ...]:
    if isinstance(layer.padding, str):  # "same" or "valid"
        widths = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple(widths) if layer.padding == "same" else ()
    return tuple(layer.padding)


def _groups(layer: LinearLayer) -> int:
    return layer.groups if isinstance(layer, _ConvNd) else 1


def _grouped(layer: LinearLayer, weight: Tensor) -> tuple[Tensor, int, int]:
    """The weight as (groups, channels, channels, positions), and which of the two are a group's outputs and inputs."""
    positions = weight.shape[2:].numel()
    if type(layer) in _TRANSPOSED:  # (in, out / groups, *kernel)
        return weight.reshape(_groups(layer), -1, weight.shape[1], positions), 2, 1
    return weight.reshape(_groups(layer), -1, weight.shape[1], positions), 1, 2  # (out, in / groups, *kernel)

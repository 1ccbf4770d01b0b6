"""What batch normalization is in inference: a scale and a shift of channels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # public by its documentation

from batchnorm import activations
from batchnorm.models.norm_layers import NormLayer
from batchnorm.modules import BatchNorm
from batchnorm.surgery.linear import Affine
from batchnorm.surgery.norm_act import NormAct, has_our_forward, is_timm_norm_act

_TORCH_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ScaleShift(nn.Module):
    """A batch-norm layer in inference: y = activation(x * scale + shift + residual).

    Args:
        scale: (C,), weight / sqrt(var + eps); None for 1.
        shift: (C,), bias - mean * scale; None for 0.
        channel_dim: the dimension of the channels.
        activation: None for none.

    Shapes:
        input, residual, output: (N, C, *S), or with the channels in `channel_dim`. Scale and shift are kept in float32
        at least; the output has the input's dtype.
    """

    if TYPE_CHECKING:  # torch.jit.script reads annotations of attributes, and knows no such types
        scale: Tensor | None
        shift: Tensor | None
        zero: Tensor | None
        one: Tensor | None
        activation: nn.Module | None

    def __init__(
        self,
        scale: Tensor | None,
        shift: Tensor | None,
        *,
        channel_dim: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        # torch's kernel does it in one pass, in mixed dtypes too, if there is nothing to normalise.
        self.register_buffer("zero", None if scale is None else torch.zeros_like(scale), persistent=False)
        self.register_buffer("one", None if scale is None else torch.ones_like(scale), persistent=False)
        self.channel_dim = channel_dim
        self.activation = activation

    def forward(
        self,
        input: Tensor,  # torch.jit.script takes no arguments with defaults that are for keywords only
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Apply it; a mask has no effect in inference, `activation` is for a call of a layer that has none.

        In a script of torch.jit a call with an `activation` is an error.
        """
        y = input
        if self.scale is not None:
            y = input.movedim(self.channel_dim, 1)
            # torch 2.10 refuses an eps of 0; 1 + this one is 1 in every dtype.
            y = F.batch_norm(y, self.zero, self.one, self.scale, self.shift, eps=1e-30).movedim(1, self.channel_dim)
        if residual is not None:
            y = y + residual
        if self.activation is not None:
            y = self.activation(y)
        if activation is not None:
            if is_scripting():
                raise ValueError("got an activation for one call in a script; give the layer one before scripting")
            y = activations.ACTIVATIONS[activation].formula(y)
        return y


def known(layer: NormLayer) -> bool:
    """Whether a layer does what torch's or ours do, and not something of a subclass."""
    others = (type(layer) in _TORCH_LAYERS or is_timm_norm_act(layer)) and "forward" not in vars(layer)
    return others or has_our_forward(layer)


def why_not(layer: NormLayer) -> str | None:
    """Why a batch-norm layer is no scale and shift in inference; None where it is."""
    if not known(layer):
        return f"{type(layer).__qualname__} may do anything"
    if layer.running_mean is None or layer.running_var is None:
        return "it has no running statistics, so inference depends on the batch"
    return None


def affine(layer: NormLayer) -> Affine:
    """The scale and shift of a layer in inference."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = layer.running_mean.detach().double(), layer.running_var.detach().double()
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
    scale = weight / (var + vars(layer)["eps"]).sqrt()  # where it is: tools that read `layer.eps` may be refused
    return Affine(scale, bias - mean * scale)


def activation(layer: NormLayer) -> nn.Module | None:
    """What comes after the scale and shift inside a layer; None for nothing."""
    if isinstance(layer, BatchNorm) and not isinstance(layer, NormAct):
        return None if layer.activation is None else activations.ACTIVATIONS[layer.activation].module()
    if not isinstance(layer, NormAct) and not is_timm_norm_act(layer):
        return None
    inside = [module for name in ("drop", "act") if type(module := layer.get_submodule(name)) is not nn.Identity]
    return nn.Sequential(*inside) if inside else None


def channel_dim(layer: NormLayer) -> int:
    """The dimension of a layer's channels."""
    return layer.channel_dim if isinstance(layer, BatchNorm) else 1


def standing_in(layer: NormLayer) -> ScaleShift:
    """A layer as its scale and shift, and what is inside behind them."""
    assert layer.running_mean is not None
    dtype = torch.promote_types(torch.float32, layer.running_mean.dtype)
    scale, shift = (t.to(dtype) for t in affine(layer))
    return ScaleShift(scale, shift, channel_dim=channel_dim(layer), activation=activation(layer)).eval()

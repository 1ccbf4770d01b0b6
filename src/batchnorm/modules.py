"""Layers that replace torch's: the same state, the same `isinstance`, the same results within rounding.

A forward pass in training mode *proposes* the batch's moments; a *commit* blends them into the running statistics.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from batchnorm import functional, layout
from batchnorm.errors import BatchNormError, ShapeError
from batchnorm.moments import Moments


class BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    r"""Batch normalization of an input of any rank >= 2, with an optional residual and activation inside.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and (biased) var are the batch's, and the running statistics move towards them (their variance
    unbiased, as in torch); in inference they are the running statistics.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of a batch in the running statistics; None for the equal-weight average of all batches.
        affine: whether there are a learnable weight (gamma, initially 1) and bias (beta, initially 0).
        track_running_stats: whether there are running statistics; without them, inference uses the batch's too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with affine, whether there is a beta.
        activation: "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu" (torch's default parameters) or None.
        channel_dim: the dimension of the channels; -1 for channels last.
        inplace: in inference without gradients, write the output over the input; no effect otherwise.

    Shapes:
        input, residual, output: (N, C, *S), or with the channels in `channel_dim`.

    Raises:
        OptionError: an unknown activation, when the layer is made.
        ShapeError, DTypeError, CountError, OptionError: when it is called, as `functional.batch_norm`; the layer
            stays as it was, `num_batches_tracked` included.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    ranks: ClassVar[tuple[int, ...]] = ()
    activation: str | None
    channel_dim: int
    inplace: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
    ) -> None:
        functional.check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.channel_dim = channel_dim
        self.inplace = inplace

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Normalise `input`; in training mode, move the running statistics."""
        recipe = functional.Recipe(self.weight, self.bias, residual, self.eps, self.channel_dim, self.activation)
        try:
            self._check_input_dim(input)
            if not self.training:
                mean, var = self.running_mean, self.running_var
                if mean is not None and var is not None:
                    return functional.normalize_by(input, mean, var, recipe, inplace=self.inplace)
            output, proposal = functional.normalize_by_batch(input, recipe)
        except BatchNormError as error:
            raise error.within(f"{type(self).__name__}({self.num_features})") from None
        if self.training and self.track_running_stats and proposal is not None:
            self._commit(proposal)
        return output

    def _commit(self, proposal: Moments) -> None:
        """Blend proposed moments into the running statistics, and count one batch."""
        buffers = self._buffers  # a third of the time of three attributes, which small inputs feel
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean is not None and var is not None:
            functional.commit(proposal, mean, var, buffers["num_batches_tracked"], self.momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        if self.ranks and input.dim() not in self.ranks:
            expected = " or ".join(f"{rank}D" for rank in self.ranks)
            raise ShapeError(
                f"expected {expected} input (got {input.dim()}D input of shape {tuple(input.shape)}). "
                f"Reshape it, or use batchnorm.BatchNorm, which takes any rank"
            )
        axis = layout.channel_axis(input.dim(), self.channel_dim)
        if input.shape[axis] != self.num_features:
            raise ShapeError(
                f"got {input.shape[axis]} channels in dimension {axis} of an input of shape {tuple(input.shape)}; "
                f"this layer was made for {self.num_features}. Check num_features and channel_dim={self.channel_dim}"
            )

    def extra_repr(self) -> str:
        """torch's, and what differs from its defaults."""
        ours = {
            "activation": (self.activation, None),
            "channel_dim": (self.channel_dim, 1),
            "inplace": (self.inplace, False),
        }
        torchs: str = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's has no annotation
        return torchs + "".join(f", {name}={value}" for name, (value, default) in ours.items() if value != default)


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """`BatchNorm` for inputs (N, C) and (N, C, L); stands in for `torch.nn.BatchNorm1d`."""

    ranks = (2, 3)


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """`BatchNorm` for inputs (N, C, H, W); stands in for `torch.nn.BatchNorm2d`."""

    ranks = (4,)


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """`BatchNorm` for inputs (N, C, D, H, W); stands in for `torch.nn.BatchNorm3d`."""

    ranks = (5,)

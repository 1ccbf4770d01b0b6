"""Layers that take the number of channels from their first input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm import layout
from batchnorm.errors import OptionError
from batchnorm.modules import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.renorm import Renorm


class _Lazy(BatchNorm):
    """`BatchNorm` without num_features; it becomes an ordinary layer of ours at the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        sync: bool = False,
        process_group: Any | None = None,  # noqa: ANN401 - as `BatchNorm`
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        domains: Any | None = None,  # noqa: ANN401 - refused
        own_affine: bool = False,
    ) -> None:
        if domains is not None or own_affine:
            raise OptionError(
                f"got domains for {type(self).__name__}, whose tensors have no sizes yet to be kept for each domain. "
                f"Run one batch through the model, then call batchnorm.convert(model, domains=...)"
            )
        # torch's, which goes on to `BatchNorm.__init__` without our options.
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        if not bias:
            self.register_parameter("bias", None)
        self._set_options(activation, channel_dim, sync, process_group, virtual_batch_size, renorm, inplace)

    # Without the question of `Rebuilding`: torch's own initialization reads it, and there is nothing to rebuild yet.
    num_features = property(
        lambda self: self._num_features,
        lambda self, value: vars(self).update(num_features=value, _num_features=value),
    )

    def initialize_parameters(self, input: torch.Tensor) -> None:
        """Take the number of channels from an input; parameters and buffers get their initial values."""
        axis = layout.channel_axis(input.dim(), self.channel_dim)
        without_bias = self.bias is None and isinstance(self.weight, nn.UninitializedParameter)
        if without_bias:  # torch 2.10 knows no layer with a weight alone: for it, there is a bias for a moment
            self.register_parameter("bias", nn.UninitializedParameter())  # type: ignore[arg-type]  # torch's stub
        super().initialize_parameters(input.movedim(axis, 1))  # type: ignore[misc]  # torch's
        if without_bias:
            self.register_parameter("bias", None)
        self.num_features = input.shape[axis]  # of parameters that were loaded torch says nothing
        self._widen_statistics()


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d, BatchNorm1d):
    """`BatchNorm1d` that takes num_features from its first input; stands in for `torch.nn.LazyBatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d, BatchNorm2d):
    """`BatchNorm2d` that takes num_features from its first input; stands in for `torch.nn.LazyBatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d, BatchNorm3d):
    """`BatchNorm3d` that takes num_features from its first input; stands in for `torch.nn.LazyBatchNorm3d`."""

    cls_to_become = BatchNorm3d

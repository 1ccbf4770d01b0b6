"""How tensors lie in memory: an input as (outer, channels, inner), and everything else in the input's order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.kernels.triton.plan import Plan, plan_for

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Arrangement:
    """An input without gaps, in one of torch's two orders: itself, or one copy.

    Attributes:
        x: the input.
        memory_format: its order.
        axis: the dimension of its channels.
        sizes: outer, channels, inner.
        plan: how it is gone through.
    """

    x: Tensor
    memory_format: torch.memory_format
    axis: int
    sizes: tuple[int, int, int]
    plan: Plan

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of x's shape in x's order: itself, or one copy."""
        return tensor.contiguous(memory_format=self.memory_format)

    def new(self) -> Tensor:
        """Room for a result of x's shape and dtype, in x's order, with the strides of torch's results."""
        return torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.memory_format)

    def positions(self, mask: Tensor | None) -> Tensor | None:
        """A mask, of x's shape without the channels, in the order of x's positions."""
        if mask is None:
            return None
        if self.memory_format is not torch.contiguous_format and self.axis != 1:
            order = [dim - (dim > self.axis) for dim in (0, *range(2, self.x.dim()), 1) if dim != self.axis]
            mask = mask.permute(order)
        mask = mask.contiguous()
        return mask.view(torch.uint8) if mask.dtype == torch.bool else mask

    def channel_values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Room for a value for each channel."""
        return torch.empty(self.sizes[1], dtype=dtype, device=self.x.device)


def arrange(x: Tensor, channel_dim: int) -> Arrangement:
    """An input as the kernels go through it."""
    rank = x.dim()
    axis = channel_dim % rank
    memory_format = torch.contiguous_format
    if not x.is_contiguous():
        last = _CHANNELS_LAST.get(rank)
        if last is None or not x.is_contiguous(memory_format=last):
            x = layout.laid_out(x, x)
        if last is not None and not x.is_contiguous():
            memory_format = last
    order = list(range(rank)) if memory_format is torch.contiguous_format else [0, *range(2, rank), 1]
    shape, at = [x.shape[dim] for dim in order], order.index(axis)
    outer, channels, inner = math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])
    if channels == 1:
        outer, inner = 1, outer * inner
    return Arrangement(x, memory_format, axis, (outer, channels, inner), plan_for(outer, channels, inner))

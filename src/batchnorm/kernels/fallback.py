"""The operations where there are no kernels of ours: torch's batch norm, and the moments that it normalised by.

They move what torch's own layers move, through memory and through autograd, and are as accurate as these: moments are
float32, of float64 inputs float64. What torch has no operator for is the reference's, a few channels at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.kernels import aten, slices
from batchnorm.kernels.reference import statistics_dtype


def operation(name: str) -> Callable[..., Any]:
    """The operation of this name. Autograd sees through `forward` and `normalize`."""
    torchs: dict[str, Callable[..., Any]] = {"forward": forward, "normalize": normalize, "normalize_": normalize_}
    return torchs.get(name) or slices.operation(name)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.forward`; without a mask by torch's operator."""
    if mask is not None:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = slices.operation("forward")(
            x, weight, bias, residual, eps, channel_dim, activation, mask
        )
        return result
    axis = channel_dim % x.dim()
    n = layout.count(x.shape, axis)
    # With a momentum of 1, torch's running statistics are those of the batch: what else it returns differs by device.
    wide = statistics_dtype(x.device)
    # Torch's operator takes them as wide as this and no wider.
    mean = torch.zeros(x.shape[axis], dtype=wide if x.dtype == wide else torch.float32, device=x.device)
    var = torch.ones_like(mean)
    y = aten.batch_norm(x, (mean, var), weight, bias, eps, channel_dim, 1.0)
    y = layout.laid_out(aten.finished(y, residual, activation), x)
    return y, torch.full((), n, device=x.device), mean.to(wide), var.to(wide) * (n - 1)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
) -> Tensor:
    """`reference.normalize`, by torch's operator."""
    if torch.promote_types(mean.dtype, var.dtype) == torch.float64 != x.dtype:  # which torch's operator would round
        result: Tensor = slices.operation("normalize")(
            x, mean, var, weight, bias, residual, eps, channel_dim, activation
        )
        return result
    y = aten.normalize(x, mean, var, weight, bias, residual, eps, channel_dim, activation)
    return layout.laid_out(y, x)


def normalize_(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
) -> None:
    """`reference.normalize_`."""
    x.copy_(normalize(x, mean, var, weight, bias, residual, eps, channel_dim, activation))

"""The operations in torch's own operators: for graphs that are read where this package is not.

Exporters and quantizers look for torch's batch norm in a graph: to switch it to inference, to fold it, to write ONNX's
BatchNormalization. What torch's operator cannot express is refused in training: a tool that switches the graph to
inference could not know what it was.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.errors import TransformError

_Normalized = tuple[Tensor, Tensor, Tensor, Tensor]


def refuse(what: str) -> NoReturn:
    """What an exported graph cannot hold.

    Raises:
        TransformError: always.
    """
    raise TransformError(
        f"got {what} in training while the model is exported or traced: torch's batch norm, which such a graph is made "
        f"of, has nothing like it. Export in inference, after model.eval(), or leave it out"
    )


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
    """`reference.normalize`."""
    y = batch_norm(x, (mean, var), weight, bias, eps, channel_dim, None)
    return finished(y, residual, activation)


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


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None = None,
) -> _Normalized:
    """`reference.forward` without its moments, which nothing in such a graph reads: y stands in their places."""
    if mask is not None:
        refuse("a mask")
    y = finished(batch_norm(x, None, weight, bias, eps, channel_dim, 0.0), residual, activation)
    return y, y, y, y


def forward_commit(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    momentum: float | None,
) -> _Normalized:
    """`forward`, and the commit as torch's layers do it: a channel that is not finite is not skipped."""
    if mask is not None:
        refuse("a mask")
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    # No `momentum or 0.0`: a tracer that knows momentum only by name cannot say whether it is 0.
    momentum = 0.0 if momentum is None else momentum
    statistics = None if running_mean is None or running_var is None else (running_mean, running_var)
    y = finished(batch_norm(x, statistics, weight, bias, eps, channel_dim, momentum), residual, activation)
    return y, y, y, y


def batch_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> NoReturn:
    """Refused."""
    refuse("statistics that are not what the layer normalises by")


def commit(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    momentum: float | None,
) -> None:
    """Refused."""
    refuse("a commit of statistics by itself")


def batch_norm(
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_dim: int,
    momentum: float | None,
) -> Tensor:
    """Torch's operator; in training where there is a momentum."""
    axis, training = channel_dim % x.dim(), momentum is not None
    mean, var = statistics or (None, None)
    # Torch wants one dtype of all, or float32 for everything but a half-precision input.
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtype = (
        torch.float32 if half and any(t is not None and t.dtype != x.dtype for t in (mean, weight, bias)) else x.dtype
    )
    weight, bias = _as(weight, dtype), _as(bias, dtype)
    if not training:
        mean, var = _as(mean, dtype), _as(var, dtype)
    rate = 0.0 if momentum is None else momentum
    y = F.batch_norm(x if axis == 1 else x.movedim(axis, 1), mean, var, weight, bias, training, rate, eps)
    return y if axis == 1 else y.movedim(1, axis)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def finished(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """What follows the normalisation."""
    z = y if residual is None else y + residual
    return z if activation is None else ACTIVATIONS[activation].formula(z)

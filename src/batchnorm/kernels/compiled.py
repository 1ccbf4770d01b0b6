"""The operations for graphs that a compiler is given: sums by kernels, what is done to each value in plain torch.

A compiler joins plain torch to what stands around it, a ReLU, a sum, a cast, and does all of it in one sweep. A
kernel's operator is closed to it, so that its input is written and its output read once more; but sums it does worse
than kernels. So in inference all of a value's way is plain torch; in training that of a layer without an activation,
which then stands somewhere else in the graph. With an activation inside, both passes stay kernels, which read a block
of channels a second time while it is in the cache.

Values are float32, of a float64 input float64. A mean that is wider is taken off as two float32 numbers: rounded to
one, it would be wrong by 6e-8 of itself, which is 6e-4 standard deviations where |mean| / std is 1e4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.tables import gradient_of

Kernels = Callable[[str], Callable[..., Any]]
FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def operation(name: str, kernels: Kernels) -> Callable[..., Any]:
    """The operation of this name, with its arguments by position.

    Args:
        name: as in `kernels.reference`.
        kernels: from a name to the kernels' operator.
    """
    function = _WRITTEN.get(name)
    if function is None:
        return kernels(name)

    def written(*args: Any) -> Any:  # noqa: ANN401 - of the operation
        return function(kernels, *args)

    return written


def _normalize(
    kernels: Kernels,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    domain: Tensor | None = None,
) -> Tensor:
    """`reference.normalize`."""
    if domain is not None:
        normalize: Callable[..., Tensor] = kernels("normalize")
        return normalize(x, mean, var, weight, bias, residual, eps, channel_dim, activation, domain)
    z = _preactivation(x, mean, var, weight, bias, residual, eps, channel_dim)
    y = z if activation is None else ACTIVATIONS[activation].formula(z)
    return layout.laid_out(y.to(x.dtype), x)


def _forward(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None = None,
    domain: Tensor | None = None,
    domains: int = 1,
) -> FourTensors:
    """`reference.forward`."""
    arguments = weight, bias, residual, eps, channel_dim, activation
    if activation is not None or mask is not None or domain is not None:
        forward: Callable[..., FourTensors] = kernels("forward")
        return forward(x, *arguments, mask, domain, domains)
    count, mean, m2 = kernels("batch_moments")(x, channel_dim)
    return _normalize(kernels, x, mean, m2 * _reciprocal_count(x, channel_dim), *arguments), count, mean, m2


def _backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None = None,
    domain: Tensor | None = None,
) -> FourTensors:
    """`reference.backward`."""
    arguments = weight, bias, residual, eps, channel_dim, activation
    if activation is not None or mask is not None or domain is not None:
        backward: Callable[..., FourTensors] = kernels("backward")
        return backward(dy, x, count, mean, m2, *arguments, mask, domain)
    of_one = _reciprocal_count(x, channel_dim)
    var = m2 * of_one
    sum_dz, sum_dz_xhat = kernels("backward_sums")(dy, x, mean, var, *arguments)
    means = sum_dz * of_one, sum_dz_xhat * of_one
    dx, dresidual = _backward_input(kernels, dy, x, mean, var, *arguments, *means)
    return dx, gradient_of(weight, sum_dz_xhat), gradient_of(bias, sum_dz), dresidual


def _backward_input(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
    mask: Tensor | None = None,
    domain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.backward_input`."""
    arguments = weight, bias, residual, eps, channel_dim, activation
    if mask is not None or domain is not None:
        backward_input: Callable[..., tuple[Tensor, Tensor]] = kernels("backward_input")
        return backward_input(dy, x, mean, var, *arguments, mean_dz, mean_dz_xhat, mask, domain)
    dtype, axis, rank = _values_dtype(x), channel_dim % x.dim(), x.dim()

    def spread(of_channels: Tensor) -> Tensor:
        return layout.per_channel(of_channels.to(dtype), rank, axis)

    dz = dy.to(dtype)
    if activation is not None:
        z = _preactivation(x, mean, var, weight, bias, residual, eps, channel_dim)
        dz = ACTIVATIONS[activation].gradient(dz, z)
    inner = dz
    if mean_dz is not None and mean_dz_xhat is not None:
        x_hat = _preactivation(x, mean, var, None, None, None, eps, channel_dim)
        inner = dz - (spread(mean_dz) + x_hat * spread(mean_dz_xhat))
    dx = layout.laid_out((inner * spread(_scale(var, weight, eps, dtype))).to(x.dtype), x)
    dresidual = dx.new_empty(0) if residual is None or activation is None else layout.laid_out(dz.to(x.dtype), x)
    return dx, dresidual


_WRITTEN: dict[str, Callable[..., Any]] = {
    "normalize": _normalize,
    "forward": _forward,
    "backward": _backward,
    "backward_input": _backward_input,
}


def _values_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reciprocal_count(x: Tensor, channel_dim: int) -> float:
    # A number where one will do: in a sweep, a division of each value by a tensor's would be one more.
    return 1.0 / layout.count(x.shape, channel_dim % x.dim())


def _scale(var: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The scale, weight / sqrt(var + eps), with the root and the product in the values' dtype."""
    scale = (var.to(torch.promote_types(var.dtype, dtype)) + eps).to(dtype).rsqrt()
    return scale if weight is None else scale * weight.to(dtype)


def _preactivation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
) -> Tensor:
    """The preactivation z, in the values' dtype."""
    dtype, axis, rank = _values_dtype(x), channel_dim % x.dim(), x.dim()
    nearest = mean.to(dtype)
    z = x.to(dtype) - layout.per_channel(nearest, rank, axis)
    if mean.dtype == torch.float64 and dtype != mean.dtype:
        z = z - layout.per_channel((mean - nearest.to(mean.dtype)).to(dtype), rank, axis)
    z = z * layout.per_channel(_scale(var, weight, eps, dtype), rank, axis)
    if bias is not None:
        z = z + layout.per_channel(bias.to(dtype), rank, axis)
    return z if residual is None else z + residual.to(dtype)

r"""The operations in plain, differentiable torch: the meaning of every kernel, on any device, for any dtype.

Every operation is about the same transformation of an input x, per channel:

    z = (x - mean) / sqrt(var + eps) * weight + bias + residual,    y = activation(z)

Shapes: x, residual, y and dy (N, C, *S) with the channels in dimension `channel_dim`, of one dtype; mean, var, weight,
bias (C,). `weight`, `bias` and `residual` may be None: 1, 0 and 0. Statistics and sums are float64 (float32 where a
device has nothing wider), and a value in x's dtype is rounded once, at the end. In memory, y and dx lie as torch lays
out the result of its own layers: channels_last where x's strides look so, contiguous otherwise.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and the equations of section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.running_statistics import check_both, check_commit


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def batch_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Count, mean and m2 as `Moments` has them; zeros when x has no values, or none that counts.

        count = \sum w,    mean = \sum w x / count,    m2 = \sum w (x - mean)^2,    w = 1 without a mask

    In two passes over x. What the mask leaves out may be anything, NaN included.

    Args:
        x: as everywhere.
        channel_dim: the dimension of the channels.
        mask: w: bool or floating, >= 0, of x's shape without the channels; or of x's rank, where it may differ between
            channels. It then gives a count for each channel, (C,).
    """
    axis, rank = channel_dim % x.dim(), x.dim()
    dims = layout.observed_dims(rank, axis)
    values = x.to(statistics_dtype(x.device))
    if mask is None:
        n = layout.count(x.shape, axis)
        mean = values.mean(dims) if n else values.sum(dims)
        m2 = (values - layout.per_channel(mean, rank, axis)).square().sum(dims)
        return torch.full((), n, device=x.device), mean, m2
    w = _with_rank(mask, x, axis).to(values.dtype)
    values = torch.where(w > 0, values, 0)
    total = w.sum() if w.shape[axis] == 1 else w.sum(dims)
    mean = (w * values).sum(dims) / torch.where(total > 0, total, 1)
    m2 = (w * (values - layout.per_channel(mean, rank, axis)).square()).sum(dims)
    return total.to(torch.int64) if mask.dtype == torch.bool else total, mean, m2


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
    """The output y, for given statistics."""
    y = _activated(x, mean, var, weight, bias, residual, eps, channel_dim, activation)
    return layout.laid_out(y.to(x.dtype), x)


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
    """`normalize`, with y written over x."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output y, by the statistics of x itself, and these moments: `batch_moments`, then `normalize`.

    A mask decides what the moments are taken from; y is there for all of x.
    """
    wide = x.to(statistics_dtype(x.device))  # once, so that a gradient through it is rounded once
    count, mean, m2 = batch_moments(wide, channel_dim, mask)
    y = _activated(wide, mean, biased_variance(count, m2), weight, bias, residual, eps, channel_dim, activation)
    return layout.laid_out(y.to(x.dtype), x), count, mean, m2


def backward_sums(
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
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""What the gradients need from all observations: \sum dz and \sum dz x_hat, (C,) each.

    dz = dy activation'(z) and x_hat = (x - mean) / sqrt(var + eps). The two are d loss / d bias and
    d loss / d weight. They are sums over all of x, with a mask as well: y depends on both parameters everywhere. But
    with one, x may be anything where dy is 0, NaN included.
    """
    dims = layout.observed_dims(x.dim(), channel_dim % x.dim())
    x = _without_unused(dy, x, mean, channel_dim, mask)
    dz = _preactivation_grad(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation)
    x_hat = _preactivation(x, mean, var, None, None, None, eps, channel_dim)
    return dz.sum(dims), (dz * x_hat).sum(dims)


def backward_input(
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
) -> tuple[Tensor, Tensor]:
    r"""The gradients that have the input's shape.

        dx = weight / sqrt(var + eps) * (dz - w (mean_dz + x_hat mean_dz_xhat)),    dresidual = dz

    mean_dz and mean_dz_xhat, (C,), are the results of `backward_sums` over the count; None where the statistics are
    constants. w is the mask, 1 without one: how much each position counted in the statistics.

    Returns:
        dx, and dresidual. The latter is empty, (0,), unless there are a residual and an activation: without a
        residual nobody needs it, and without an activation it is dy.
    """
    axis = channel_dim % x.dim()
    used = _without_unused(dy, x, mean, channel_dim, mask)
    dz = _preactivation_grad(dy, used, mean, var, weight, bias, residual, eps, channel_dim, activation)
    inner = dz
    if mean_dz is not None and mean_dz_xhat is not None:
        x_hat = _preactivation(x, mean, var, None, None, None, eps, channel_dim)
        through = layout.per_channel(mean_dz, x.dim(), axis) + x_hat * layout.per_channel(mean_dz_xhat, x.dim(), axis)
        if mask is not None:
            w = _with_rank(mask, x, axis)
            through = torch.where(w > 0, through * w, 0)
        inner = dz - through
    scale = (var.to(dz.dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    dx = layout.laid_out((layout.per_channel(scale, x.dim(), axis) * inner).to(x.dtype), x)
    dresidual = dx.new_empty(0) if residual is None or activation is None else layout.laid_out(dz.to(x.dtype), x)
    return dx, dresidual


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`'s gradients from the moments that it returned: `backward_sums`, then `backward_input`.

    Returns:
        dx, dweight, dbias and dresidual, each of the dtype of what it is the gradient of; dweight and dbias float64
        where there is no weight or bias, dresidual as `backward_input`'s.
    """
    common = (dy, x, mean, biased_variance(count, m2), weight, bias, residual, eps, channel_dim, activation)
    sum_dz, sum_dz_xhat = backward_sums(*common, mask)
    n = torch.where(count > 0, count, 1).to(m2.dtype)
    dx, dresidual = backward_input(*common, sum_dz / n, sum_dz_xhat / n, mask)
    dweight = sum_dz_xhat if weight is None else sum_dz_xhat.to(weight.dtype)
    dbias = sum_dz if bias is None else sum_dz.to(bias.dtype)
    return dx, dweight, dbias, dresidual


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
    """Blend moments into running statistics and count one batch, in place.

        running = (1 - momentum) * running + momentum * new

    The new variance is the unbiased one, m2 / (count - 1), as in torch. Computed in float64 and rounded once. A channel
    where that is not finite after rounding, a count of 1 included, keeps its old statistics and is counted in
    num_batches_skipped. A count of 0 changes nothing. All is checked before anything is changed.

    running_mean and running_var are (C,) of any floating dtype, num_batches_tracked is one number of any integer or
    floating dtype or None, num_batches_skipped (C,) int64 or None. A momentum of None is 1 / num_batches_tracked, after
    counting: the equal-weight average of all batches. Statistics that are not the initial 0 and 1 while that counter is
    0 were loaded without it, and weigh as one batch.
    """
    check_commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, count, mean, m2, momentum)
    any_counted = count > 0
    factor: float | Tensor | None = momentum
    batches = None
    if num_batches_tracked is not None:
        batches = num_batches_tracked + any_counted.to(num_batches_tracked.dtype)
        if momentum is None:
            initial = (running_mean == 0).all() & (running_var == 1).all()
            batches = batches + (any_counted & (num_batches_tracked == 0) & ~initial).to(batches.dtype)
            factor = batches.to(m2.dtype).reciprocal()
    if factor is None:
        return
    news = mean, m2 / (count - 1)
    runnings = running_mean, running_var
    blended = [
        ((1 - factor) * old.to(new.dtype) + factor * new).to(old.dtype) for old, new in zip(runnings, news, strict=True)
    ]
    finite = count > 1
    for values in (*news, *blended):
        finite = finite & values.isfinite()
    for running, values in zip(runnings, blended, strict=True):
        running.copy_(torch.where(finite, values, running))
    if num_batches_skipped is not None:
        num_batches_skipped.add_((~finite & any_counted).to(torch.int64))
    if num_batches_tracked is not None and batches is not None:
        num_batches_tracked.copy_(batches)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`, and `commit` of its moments: one call where small inputs would feel two.

    Without running_mean and running_var nothing is committed.
    """
    check_both(running_mean, running_var)
    y, count, mean, m2 = forward(x, weight, bias, residual, eps, channel_dim, activation, mask)
    if running_mean is not None and running_var is not None:
        commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, count, mean, m2, momentum)
    return y, count, mean, m2


def _with_rank(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """The mask with x's rank: one that lacks the channel dimension gets it."""
    return mask.unsqueeze(axis) if mask.dim() < x.dim() else mask


def _without_unused(dy: Tensor, x: Tensor, mean: Tensor, channel_dim: int, mask: Tensor | None) -> Tensor:
    """x, but the mean where the mask may have left it out and dy is 0: the gradient there would be 0 times anything."""
    if mask is None:
        return x
    return torch.where(dy != 0, x, layout.per_channel(mean, x.dim(), channel_dim % x.dim()).to(x.dtype))


def biased_variance(count: Tensor, m2: Tensor) -> Tensor:
    """The biased variance; 0 of nothing."""
    return m2 / torch.where(count > 0, count, 1).to(m2.dtype)


def _activated(
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
    """The output y, in the statistics' dtype."""
    z = _preactivation(x, mean, var, weight, bias, residual, eps, channel_dim)
    return z if activation is None else ACTIVATIONS[activation].formula(z)


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
    """The preactivation z, in the statistics' dtype."""
    dtype, axis = statistics_dtype(x.device), channel_dim % x.dim()
    scale = (var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    # The mean goes first: shifting a large value by a large amount afterwards would round twice.
    z = (x.to(dtype) - layout.per_channel(mean.to(dtype), x.dim(), axis)) * layout.per_channel(scale, x.dim(), axis)
    if bias is not None:
        z = z + layout.per_channel(bias, x.dim(), axis)
    return z if residual is None else z + residual


def _preactivation_grad(
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
) -> Tensor:
    """The gradient dz, in the statistics' dtype."""
    wide = dy.to(statistics_dtype(x.device))
    if activation is None:
        return wide
    z = _preactivation(x, mean, var, weight, bias, residual, eps, channel_dim)
    return ACTIVATIONS[activation].gradient(wide, z)

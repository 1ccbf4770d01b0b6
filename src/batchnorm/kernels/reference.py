r"""The operations in plain, differentiable torch: the meaning of every kernel, on any device, for any dtype.

Every operation is about the same transformation of an input x, per channel:

    z = (x - mean) / sqrt(var + eps) * weight + bias + residual,    y = activation(z)

Shapes: x, residual, y and dy (N, C, *S) with the channels in dimension `channel_dim`, of one dtype; mean, var, weight,
bias (C,). With `domain`, (N,) int64, each sample is of one of D domains: mean, var, m2 and sums are tables, (D, C), a
count is (D,), weight and bias are (D, C) or, for all domains, (C,). `weight`, `bias` and `residual` may be None: 1, 0
and 0. Statistics and sums are float64 (float32 where a device has nothing wider), and a value in x's dtype is rounded
once, at the end. In memory, y and dx lie as torch lays out the result of its own layers: channels_last where x's
strides look so, contiguous otherwise.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and the equations of section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.running_statistics import check_both, check_commit
from batchnorm.kernels.tables import beside, counted, gradient_of, spread, summed


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def batch_moments(
    x: Tensor, channel_dim: int, mask: Tensor | None = None, domain: Tensor | None = None, domains: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Count, mean and m2 as `Moments` has them; zeros when x has no values, or none that counts.

        count = \sum w,    mean = \sum w x / count,    m2 = \sum w (x - mean)^2,    w = 1 without a mask

    In two passes over x. What the mask leaves out may be anything, NaN included.

    Args:
        x: as everywhere.
        channel_dim: the dimension of the channels.
        mask: w: bool or floating, >= 0, of x's shape without the channels; or of x's rank, where it may differ between
            channels. It then gives a count for each channel, (C,).
        domain: as everywhere; not with a mask that may differ between channels.
        domains: D.
    """
    axis, rank = channel_dim % x.dim(), x.dim()
    values = x.to(statistics_dtype(x.device))
    if mask is None:
        n = counted(x, axis, domain, domains)
        sums = summed(values, axis, domain, domains)
        # Of one population by a number: a DTensor is divided by no other tensor.
        of_each = max(1, layout.count(x.shape, axis)) if domain is None else beside(n.clamp(min=1), sums)
        mean = sums / of_each
        m2 = summed((values - spread(mean, rank, axis, domain)).square(), axis, domain, domains)
        return n, mean, m2
    w = _with_rank(mask, x, axis).to(values.dtype)
    values = torch.where(w > 0, values, 0)
    total = summed(w, axis, domain, domains)
    total = total.squeeze(-1) if w.shape[axis] == 1 else total
    sums = summed(w * values, axis, domain, domains)
    mean = sums / beside(torch.where(total > 0, total, 1), sums)
    m2 = summed(w * (values - spread(mean, rank, axis, domain)).square(), axis, domain, domains)
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
    domain: Tensor | None = None,
) -> Tensor:
    """The output y, for given statistics."""
    y = _activated(x, mean, var, weight, bias, residual, eps, channel_dim, activation, domain)
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
    domain: Tensor | None = None,
    domains: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output y, by the statistics of x itself, and these moments: `batch_moments`, then `normalize`.

    A mask decides what the moments are taken from; y is there for all of x.
    """
    wide = x.to(statistics_dtype(x.device))  # once, so that a gradient through it is rounded once
    count, mean, m2 = batch_moments(wide, channel_dim, mask, domain, domains)
    y = _activated(wide, mean, biased_variance(count, m2), weight, bias, residual, eps, channel_dim, activation, domain)
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
    domain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""What the gradients need from all observations: \sum dz and \sum dz x_hat, (C,) each.

    dz = dy activation'(z) and x_hat = (x - mean) / sqrt(var + eps). The two are d loss / d bias and
    d loss / d weight. They are sums over all of x, with a mask as well: y depends on both parameters everywhere. But
    with one, x may be anything where dy is 0, NaN included.
    """
    axis, domains = channel_dim % x.dim(), mean.shape[0]
    x = _without_unused(dy, x, mean, channel_dim, mask, domain)
    dz = _preactivation_grad(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation, domain)
    x_hat = _preactivation(x, mean, var, None, None, None, eps, channel_dim, domain)
    return summed(dz, axis, domain, domains), summed(dz * x_hat, axis, domain, domains)


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
    domain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The gradients that have the input's shape.

        dx = weight / sqrt(var + eps) * (dz - w (mean_dz + x_hat mean_dz_xhat)),    dresidual = dz

    mean_dz and mean_dz_xhat, (C,), are the results of `backward_sums` over the count; None where the statistics are
    constants. w is the mask, 1 without one: how much each position counted in the statistics.

    Returns:
        dx, and dresidual. The latter is empty, (0,), unless there are a residual and an activation: without a
        residual nobody needs it, and without an activation it is dy.
    """
    axis, rank = channel_dim % x.dim(), x.dim()
    used = _without_unused(dy, x, mean, channel_dim, mask, domain)
    dz = _preactivation_grad(dy, used, mean, var, weight, bias, residual, eps, channel_dim, activation, domain)
    inner = dz
    if mean_dz is not None and mean_dz_xhat is not None:
        x_hat = _preactivation(x, mean, var, None, None, None, eps, channel_dim, domain)
        through = spread(mean_dz, rank, axis, domain) + x_hat * spread(mean_dz_xhat, rank, axis, domain)
        if mask is not None:
            w = _with_rank(mask, x, axis)
            through = torch.where(w > 0, through * w, 0)
        inner = dz - through
    scale = (var.to(dz.dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    dx = layout.laid_out((spread(scale, rank, axis, domain) * inner).to(x.dtype), x)
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
    domain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`'s gradients from the moments that it returned: `backward_sums`, then `backward_input`.

    Returns:
        dx, dweight, dbias and dresidual, each of the dtype and shape of what it is the gradient of; dweight and dbias
        float64, of the sums' shape, where there is no weight or bias, dresidual as `backward_input`'s.
    """
    common = (dy, x, mean, biased_variance(count, m2), weight, bias, residual, eps, channel_dim, activation)
    sum_dz, sum_dz_xhat = backward_sums(*common, mask, domain)
    n = beside(torch.where(count > 0, count, 1).to(m2.dtype), m2)
    dx, dresidual = backward_input(*common, sum_dz / n, sum_dz_xhat / n, mask, domain)
    return dx, gradient_of(weight, sum_dz_xhat), gradient_of(bias, sum_dz), dresidual


def commit(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    momentum: float | None,
    domain: int | None = None,
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

    With `domain` the moments are of several, and it says which are meant.
    """
    if domain is not None:
        count, mean, m2 = (moment[domain] for moment in (count, mean, m2))
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


def _without_unused(
    dy: Tensor, x: Tensor, mean: Tensor, channel_dim: int, mask: Tensor | None, domain: Tensor | None
) -> Tensor:
    """x, but the mean where the mask may have left it out and dy is 0: the gradient there would be 0 times anything."""
    if mask is None:
        return x
    return torch.where(dy != 0, x, spread(mean, x.dim(), channel_dim % x.dim(), domain).to(x.dtype))


def biased_variance(count: Tensor, m2: Tensor) -> Tensor:
    """The biased variance; 0 of nothing."""
    return m2 / beside(torch.where(count > 0, count, 1).to(m2.dtype), m2)


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
    domain: Tensor | None,
) -> Tensor:
    """The output y, in the statistics' dtype."""
    z = _preactivation(x, mean, var, weight, bias, residual, eps, channel_dim, domain)
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
    domain: Tensor | None,
) -> Tensor:
    """The preactivation z, in the statistics' dtype."""
    dtype, axis, rank = statistics_dtype(x.device), channel_dim % x.dim(), x.dim()
    scale = (var.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    # The mean goes first: shifting a large value by a large amount afterwards would round twice.
    z = (x.to(dtype) - spread(mean.to(dtype), rank, axis, domain)) * spread(scale, rank, axis, domain)
    if bias is not None:
        z = z + spread(bias, rank, axis, domain)
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
    domain: Tensor | None,
) -> Tensor:
    """The gradient dz, in the statistics' dtype."""
    wide = dy.to(statistics_dtype(x.device))
    if activation is None:
        return wide
    z = _preactivation(x, mean, var, weight, bias, residual, eps, channel_dim, domain)
    return ACTIVATIONS[activation].gradient(wide, z)

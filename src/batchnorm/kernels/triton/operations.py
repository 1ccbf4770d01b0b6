"""The operations: which kernels are started, with what. What each means is written in `kernels.reference`.

Nothing here looks at a value, so nothing waits for the device, and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.running_statistics import check_both, check_commit
from batchnorm.kernels.triton.arrangement import arrange
from batchnorm.kernels.triton.passes import (
    MaybeSums,
    Running,
    commit_moments,
    finish_moments,
    finish_sums,
    forward_by_batch,
    input_gradients,
    moment_parts,
    new_moments,
    normalize_by,
    options_of,
    sum_parts,
    whole_backward,
    without_gaps,
    write_back,
)


def batch_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.batch_moments`: two launches."""
    a = arrange(x, channel_dim)
    moments = new_moments(a, mask)
    finish_moments(a, moment_parts(a, mask), moments, Running(), 0.0)
    return moments


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
    """`reference.normalize`: one launch."""
    a = arrange(x, channel_dim)
    y = a.new()
    statistics = None, mean.contiguous(), var.contiguous()
    normalize_by(a, y, options_of(a, weight, bias, residual, eps, activation), None, statistics, Running(), 0.0)
    return y


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
    """`reference.normalize_`: one launch, and a copy where x has gaps."""
    a = arrange(x, channel_dim)
    if residual is not None and residual.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        residual = residual.clone()  # it may be part of what is written over
    statistics = None, mean.contiguous(), var.contiguous()
    normalize_by(a, a.x, options_of(a, weight, bias, residual, eps, activation), None, statistics, Running(), 0.0)
    if a.x.data_ptr() != x.data_ptr():
        x.copy_(a.x)


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
    """`reference.forward`: as many launches as the plan's table says."""
    a = arrange(x, channel_dim)
    moments = new_moments(a, mask)
    y = forward_by_batch(a, options_of(a, weight, bias, residual, eps, activation), mask, moments, Running(), 0.0)
    return y, *moments


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
    """`reference.forward_commit`: no launch more than `forward`; one more where momentum is None."""
    check_both(running_mean, running_var)
    if running_mean is None or running_var is None:
        return forward(x, weight, bias, residual, eps, channel_dim, activation, mask)
    a = arrange(x, channel_dim)
    moments = new_moments(a, mask)
    check_commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, *moments, momentum)
    options = options_of(a, weight, bias, residual, eps, activation)
    given = Running(running_mean, running_var, num_batches_tracked, num_batches_skipped)
    if momentum is None:
        y = forward_by_batch(a, options, mask, moments, Running(), 0.0)
        commit_moments(given, moments, None)
        return y, *moments
    running = without_gaps(given)
    y = forward_by_batch(a, options, mask, moments, running, momentum)
    write_back(running, given)
    return y, *moments


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
    """`reference.backward_sums`: two launches."""
    a = arrange(x, channel_dim)
    options = options_of(a, weight, bias, residual, eps, activation)
    part = sum_parts(a, a.like(dy), options, mask is not None, (None, mean.contiguous(), var.contiguous()))
    sums = a.channel_values(), a.channel_values()
    finish_sums(a, part, None, sums, (None, None))
    return sums


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
    """`reference.backward_input`: one launch."""
    a = arrange(x, channel_dim)
    options = options_of(a, weight, bias, residual, eps, activation)
    means: MaybeSums = (None, None)
    if mean_dz is not None and mean_dz_xhat is not None:
        means = mean_dz.contiguous(), mean_dz_xhat.contiguous()
    statistics = None, mean.contiguous(), var.contiguous()
    return input_gradients(a, a.like(dy), options, mask, None, (None, None), statistics, means)


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
    """`reference.backward`: as many launches as the plan's table says."""
    a = arrange(x, channel_dim)
    options, dy, masked = options_of(a, weight, bias, residual, eps, activation), a.like(dy), mask is not None
    dweight = a.channel_values(torch.float64 if weight is None else weight.dtype)
    dbias = a.channel_values(torch.float64 if bias is None else bias.dtype)
    sums, statistics = (dbias, dweight), (count, mean.contiguous(), m2.contiguous())
    if a.plan.whole:
        dx, dresidual = whole_backward(a, dy, options, mask, sums, statistics)
    else:
        part = sum_parts(a, dy, options, masked, statistics)
        if a.plan.last:
            means = a.channel_values(), a.channel_values()
            finish_sums(a, part, count, sums, means)
            dx, dresidual = input_gradients(a, dy, options, mask, None, (None, None), statistics, means)
        else:
            dx, dresidual = input_gradients(a, dy, options, mask, part, sums, statistics, (None, None))
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
    """`reference.commit`: one launch of one program."""
    check_commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, count, mean, m2, momentum)
    running = Running(running_mean, running_var, num_batches_tracked, num_batches_skipped)
    commit_moments(running, (count, mean.contiguous(), m2.contiguous()), momentum)

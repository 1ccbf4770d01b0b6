"""The operations: which kernels are started, with what. What each means is written in `kernels.reference`.

Nothing here looks at a value, so nothing waits for the device, and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.kernels.running_statistics import check_commit
from batchnorm.kernels.triton import plan as table
from batchnorm.kernels.triton.arrangement import Arrangement, arrange
from batchnorm.kernels.triton.device import backward as backward_kernels
from batchnorm.kernels.triton.device import forward as forward_kernels
from batchnorm.kernels.triton.launch import launch


class _Running(NamedTuple):
    """Running statistics that a kernel changes, without gaps; all None where there is nothing to commit to."""

    mean: Tensor | None = None
    var: Tensor | None = None
    tracked: Tensor | None = None
    skipped: Tensor | None = None


class _Options(NamedTuple):
    """What normalises, besides statistics; weight and bias without gaps, the residual in x's order."""

    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    activation: str | None


def batch_moments(x: Tensor, channel_dim: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.batch_moments`: two launches."""
    a = arrange(x, channel_dim)
    moments = _new_moments(a, mask)
    _finish_moments(a, _parts(a, mask), moments, _Running(), 0.0)
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
    _normalize(a, y, _options(a, weight, bias, residual, eps, activation), None, statistics, _Running(), 0.0)
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
    _normalize(a, a.x, _options(a, weight, bias, residual, eps, activation), None, statistics, _Running(), 0.0)
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
    moments = _new_moments(a, mask)
    y = _forward(a, _options(a, weight, bias, residual, eps, activation), mask, moments, _Running(), 0.0)
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
    if (running_mean is None) != (running_var is None):
        raise OptionError("got running_mean without running_var, or the other way round; give both, or None for both")
    if running_mean is None or running_var is None:
        return forward(x, weight, bias, residual, eps, channel_dim, activation, mask)
    a = arrange(x, channel_dim)
    moments = _new_moments(a, mask)
    check_commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, *moments, momentum)
    options = _options(a, weight, bias, residual, eps, activation)
    given = _Running(running_mean, running_var, num_batches_tracked, num_batches_skipped)
    if momentum is None:
        y = _forward(a, options, mask, moments, _Running(), 0.0)
        _commit(given, moments, None)
        return y, *moments
    running = _without_gaps(given)
    y = _forward(a, options, mask, moments, running, momentum)
    _write_back(running, given)
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
    options = _options(a, weight, bias, residual, eps, activation)
    part = _sum_parts(a, a.like(dy), options, mask is not None, (None, mean.contiguous(), var.contiguous()))
    sums = a.channel_values(), a.channel_values()
    _finish_sums(a, part, None, sums, (None, None))
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
    options = _options(a, weight, bias, residual, eps, activation)
    means: _MaybeSums = (None, None)
    if mean_dz is not None and mean_dz_xhat is not None:
        means = mean_dz.contiguous(), mean_dz_xhat.contiguous()
    statistics = None, mean.contiguous(), var.contiguous()
    return _input(a, a.like(dy), options, mask, None, (None, None), statistics, means)


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
    options, dy, masked = _options(a, weight, bias, residual, eps, activation), a.like(dy), mask is not None
    dweight = a.channel_values(torch.float64 if weight is None else weight.dtype)
    dbias = a.channel_values(torch.float64 if bias is None else bias.dtype)
    sums, statistics = (dbias, dweight), (count, mean.contiguous(), m2.contiguous())
    if a.plan.whole:
        dx, dresidual = _whole_backward(a, dy, options, mask, sums, statistics)
    else:
        part = _sum_parts(a, dy, options, masked, statistics)
        if a.plan.last:
            means = a.channel_values(), a.channel_values()
            _finish_sums(a, part, count, sums, means)
            dx, dresidual = _input(a, dy, options, mask, None, (None, None), statistics, means)
        else:
            dx, dresidual = _input(a, dy, options, mask, part, sums, statistics, (None, None))
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
    running = _Running(running_mean, running_var, num_batches_tracked, num_batches_skipped)
    _commit(running, (count, mean.contiguous(), m2.contiguous()), momentum)


# --- launches --------------------------------------------------------------------------------------------------------

_Statistics = tuple[Tensor | None, Tensor, Tensor]  # count, mean and m2; or None, mean and variance
_Moments = tuple[Tensor, Tensor, Tensor]
_Sums = tuple[Tensor, Tensor]  # of dz and of dz x_hat
_MaybeSums = _Sums | tuple[None, None]


def _options(
    a: Arrangement,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> _Options:
    return _Options(
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else a.like(residual),
        float(eps),
        activation,
    )


def _tile(a: Arrangement) -> tuple[int, int, bool]:
    return a.plan.rows, a.plan.columns, a.plan.last


def _walk(a: Arrangement) -> tuple[int, ...]:
    """What every kernel over tiles is told: the sizes, and how they are split."""
    return *a.sizes, a.plan.tiles_inner, a.plan.tiles, a.plan.per_split, a.plan.splits


def _chunk(a: Arrangement) -> int:
    return min(table.power_of_two(a.plan.splits), table.CHUNK)


def _new_moments(a: Arrangement, mask: Tensor | None) -> _Moments:
    whole_numbers = mask is None or mask.dtype == torch.bool
    count = torch.empty((), dtype=torch.int64 if whole_numbers else torch.float64, device=a.x.device)
    return count, a.channel_values(), a.channel_values()


def _forward(
    a: Arrangement, options: _Options, mask: Tensor | None, moments: _Moments, running: _Running, momentum: float
) -> Tensor:
    y = a.new()
    weight, bias, residual, eps, activation = options
    if a.plan.whole:
        launch(
            forward_kernels.whole_forward_kernel,
            (a.plan.blocks,),
            (a.x, a.positions(mask), residual, y, *moments, weight, bias, *running, eps, momentum, *a.sizes),
            (activation, *_tile(a)),
            a.plan.warps,
            a.x.device,
        )
        return y
    part = _parts(a, mask)
    if a.plan.last:
        _finish_moments(a, part, moments, running, momentum)
        _normalize(a, y, options, None, moments, _Running(), 0.0)
    else:
        _normalize(a, y, options, part, moments, running, momentum)
    return y


def _parts(a: Arrangement, mask: Tensor | None) -> Tensor:
    """The moments of each split."""
    part = torch.empty(3, a.plan.splits, a.sizes[1], dtype=torch.float64, device=a.x.device)
    launch(
        forward_kernels.moments_kernel,
        (a.plan.blocks, a.plan.splits),
        (a.x, a.positions(mask), part, *_walk(a)),
        _tile(a),
        a.plan.warps,
        a.x.device,
    )
    return part


def _finish_moments(a: Arrangement, part: Tensor, moments: _Moments, running: _Running, momentum: float) -> None:
    launch(
        forward_kernels.finish_moments_kernel,
        (table.ceil_div(a.sizes[1], table.FINISH_WIDTH),),
        (part, *moments, *running, momentum, a.sizes[1], a.plan.splits),
        (_chunk(a), table.FINISH_WIDTH),
        table.FINISH_WARPS,
        a.x.device,
    )


def _normalize(
    a: Arrangement,
    y: Tensor,
    options: _Options,
    part: Tensor | None,
    statistics: _Statistics,
    running: _Running,
    momentum: float,
) -> None:
    weight, bias, residual, eps, activation = options
    launch(
        forward_kernels.normalize_kernel,
        (a.plan.blocks, a.plan.splits),
        (a.x, residual, y, part, *statistics, weight, bias, *running, eps, momentum, *_walk(a)),
        (activation, *_tile(a), _chunk(a)),
        a.plan.warps,
        a.x.device,
    )


def _sum_parts(a: Arrangement, dy: Tensor, options: _Options, masked: bool, statistics: _Statistics) -> Tensor:
    """The sums of each split."""
    weight, bias, _, eps, activation = options
    part = torch.empty(2, a.plan.splits, a.sizes[1], dtype=torch.float64, device=a.x.device)
    launch(
        backward_kernels.sums_kernel,
        (a.plan.blocks, a.plan.splits),
        (dy, a.x, _read(options), part, *statistics, weight, bias, eps, *_walk(a)),
        (masked, activation, *_tile(a)),
        a.plan.warps,
        a.x.device,
    )
    return part


def _finish_sums(a: Arrangement, part: Tensor, count: Tensor | None, sums: _Sums, means: _MaybeSums) -> None:
    launch(
        backward_kernels.finish_sums_kernel,
        (table.ceil_div(a.sizes[1], table.FINISH_WIDTH),),
        (part, count, *sums, *means, a.sizes[1], a.plan.splits),
        (_chunk(a), table.FINISH_WIDTH),
        table.FINISH_WARPS,
        a.x.device,
    )


def _input(
    a: Arrangement,
    dy: Tensor,
    options: _Options,
    mask: Tensor | None,
    part: Tensor | None,
    sums: _MaybeSums,
    statistics: _Statistics,
    means: _MaybeSums,
) -> tuple[Tensor, Tensor]:
    weight, bias, _, eps, activation = options
    dx, dresidual = a.new(), _new_dresidual(a, options)
    launch(
        backward_kernels.input_kernel,
        (a.plan.blocks, a.plan.splits),
        (
            *(dy, a.x, _read(options), a.positions(mask), dx, dresidual, part, *sums, *statistics, *means),
            *(weight, bias, eps, *_walk(a)),
        ),
        (mask is not None, activation, *_tile(a), _chunk(a)),
        a.plan.warps,
        a.x.device,
    )
    return dx, dx.new_empty(0) if dresidual is None else dresidual


def _whole_backward(
    a: Arrangement, dy: Tensor, options: _Options, mask: Tensor | None, sums: _Sums, statistics: _Statistics
) -> tuple[Tensor, Tensor]:
    weight, bias, _, eps, activation = options
    dx, dresidual = a.new(), _new_dresidual(a, options)
    launch(
        backward_kernels.whole_backward_kernel,
        (a.plan.blocks,),
        (
            *(dy, a.x, _read(options), a.positions(mask), dx, dresidual, *sums, *statistics),
            *(weight, bias, eps, *a.sizes),
        ),
        (mask is not None, activation, *_tile(a)),
        a.plan.warps,
        a.x.device,
    )
    return dx, dx.new_empty(0) if dresidual is None else dresidual


def _read(options: _Options) -> Tensor | None:
    """The residual where a gradient depends on its value."""
    return None if options.activation is None else options.residual


def _new_dresidual(a: Arrangement, options: _Options) -> Tensor | None:
    return None if options.residual is None or options.activation is None else a.new()


# --- commits ---------------------------------------------------------------------------------------------------------


def _commit(given: _Running, moments: _Moments, momentum: float | None) -> None:
    if momentum is None and given.tracked is None:
        return
    running = _without_gaps(given)
    channels = moments[1].numel()
    launch(
        forward_kernels.commit_kernel,
        (1,),
        (*running, *moments, 0.0 if momentum is None else float(momentum), channels),
        (momentum is None, min(table.power_of_two(channels), table.COMMIT_WIDTH)),
        table.COMMIT_WARPS,
        moments[1].device,
    )
    _write_back(running, given)


def _without_gaps(running: _Running) -> _Running:
    return _Running(*(None if t is None else t.contiguous() for t in running))


def _write_back(running: _Running, given: _Running) -> None:
    """What was changed in copies, to where it belongs."""
    for changed, tensor in zip(running, given, strict=True):
        if changed is not None and tensor is not None and changed is not tensor:
            tensor.copy_(changed)

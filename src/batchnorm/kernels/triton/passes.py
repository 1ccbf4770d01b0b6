"""The launches that operations are made of: which kernel is started, with what."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.triton import plan as table
from batchnorm.kernels.triton.arrangement import Arrangement
from batchnorm.kernels.triton.device import backward as backward_kernels
from batchnorm.kernels.triton.device import forward as forward_kernels
from batchnorm.kernels.triton.launch import launch


class Running(NamedTuple):
    """Running statistics that a kernel changes, without gaps; all None where there is nothing to commit to."""

    mean: Tensor | None = None
    var: Tensor | None = None
    tracked: Tensor | None = None
    skipped: Tensor | None = None


class Options(NamedTuple):
    """What normalises, besides statistics; weight and bias without gaps, the residual in x's order."""

    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    activation: str | None


Statistics = tuple[Tensor | None, Tensor, Tensor]  # count, mean and m2; or None, mean and variance
BatchMoments = tuple[Tensor, Tensor, Tensor]
Sums = tuple[Tensor, Tensor]  # of dz and of dz x_hat
MaybeSums = Sums | tuple[None, None]


def options_of(
    a: Arrangement,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> Options:
    """Options as the kernels read them: one copy of each that has gaps or lies in another order."""
    return Options(
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


def new_moments(a: Arrangement, mask: Tensor | None) -> BatchMoments:
    """Room for count, mean and m2."""
    whole_numbers = mask is None or mask.dtype == torch.bool
    count = torch.empty((), dtype=torch.int64 if whole_numbers else torch.float64, device=a.x.device)
    return count, a.channel_values(), a.channel_values()


def forward_by_batch(
    a: Arrangement, options: Options, mask: Tensor | None, moments: BatchMoments, running: Running, momentum: float
) -> Tensor:
    """The output y by the moments of the batch, which are written and committed."""
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
    part = moment_parts(a, mask)
    if a.plan.last:
        finish_moments(a, part, moments, running, momentum)
        normalize_by(a, y, options, None, moments, Running(), 0.0)
    else:
        normalize_by(a, y, options, part, moments, running, momentum)
    return y


def moment_parts(a: Arrangement, mask: Tensor | None) -> Tensor:
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


def finish_moments(a: Arrangement, part: Tensor, moments: BatchMoments, running: Running, momentum: float) -> None:
    """The moments of all splits from those of each, and their commit."""
    launch(
        forward_kernels.finish_moments_kernel,
        (table.ceil_div(a.sizes[1], table.FINISH_WIDTH),),
        (part, *moments, *running, momentum, a.sizes[1], a.plan.splits),
        (_chunk(a), table.FINISH_WIDTH),
        table.FINISH_WARPS,
        a.x.device,
    )


def normalize_by(
    a: Arrangement,
    y: Tensor,
    options: Options,
    part: Tensor | None,
    statistics: Statistics,
    running: Running,
    momentum: float,
) -> None:
    """Write y: by the splits' moments in part, which are then written to the statistics, or by the statistics."""
    weight, bias, residual, eps, activation = options
    launch(
        forward_kernels.normalize_kernel,
        (a.plan.blocks, a.plan.splits),
        (a.x, residual, y, part, *statistics, weight, bias, *running, eps, momentum, *_walk(a)),
        (activation, *_tile(a), _chunk(a)),
        a.plan.warps,
        a.x.device,
    )


def sum_parts(a: Arrangement, dy: Tensor, options: Options, masked: bool, statistics: Statistics) -> Tensor:
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


def finish_sums(a: Arrangement, part: Tensor, count: Tensor | None, sums: Sums, means: MaybeSums) -> None:
    """The sums of all splits from those of each; with a count, their means, too."""
    launch(
        backward_kernels.finish_sums_kernel,
        (table.ceil_div(a.sizes[1], table.FINISH_WIDTH),),
        (part, count, *sums, *means, a.sizes[1], a.plan.splits),
        (_chunk(a), table.FINISH_WIDTH),
        table.FINISH_WARPS,
        a.x.device,
    )


def input_gradients(
    a: Arrangement,
    dy: Tensor,
    options: Options,
    mask: Tensor | None,
    part: Tensor | None,
    sums: MaybeSums,
    statistics: Statistics,
    means: MaybeSums,
) -> tuple[Tensor, Tensor]:
    """The gradients dx and dresidual, from the splits' sums in part, or from means that are given."""
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


def whole_backward(
    a: Arrangement, dy: Tensor, options: Options, mask: Tensor | None, sums: Sums, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """All gradients in one launch; the sums are written."""
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


def _read(options: Options) -> Tensor | None:
    """The residual where a gradient depends on its value."""
    return None if options.activation is None else options.residual


def _new_dresidual(a: Arrangement, options: Options) -> Tensor | None:
    return None if options.residual is None or options.activation is None else a.new()


# --- commits ---------------------------------------------------------------------------------------------------------


def commit_moments(given: Running, moments: BatchMoments, momentum: float | None) -> None:
    """`reference.commit` of what was checked."""
    if momentum is None and given.tracked is None:
        return
    running = without_gaps(given)
    channels = moments[1].numel()
    launch(
        forward_kernels.commit_kernel,
        (1,),
        (*running, *moments, 0.0 if momentum is None else float(momentum), channels),
        (momentum is None, min(table.power_of_two(channels), table.COMMIT_WIDTH)),
        table.COMMIT_WARPS,
        moments[1].device,
    )
    write_back(running, given)


def without_gaps(running: Running) -> Running:
    """What kernels can change: one copy of each that has gaps."""
    return Running(*(None if t is None else t.contiguous() for t in running))


def write_back(running: Running, given: Running) -> None:
    """What was changed in copies, to where it belongs."""
    for changed, tensor in zip(running, given, strict=True):
        if changed is not None and tensor is not None and changed is not tensor:
            tensor.copy_(changed)

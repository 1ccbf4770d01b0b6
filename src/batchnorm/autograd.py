"""The package's only `torch.autograd.Function` in Python: the operations with their derivatives, of every order.

`kernels/cpu/autograd/` has the commonest case again, in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import _torch, ops
from batchnorm.call import Arguments, Call, Options
from batchnorm.distributed import Group
from batchnorm.errors import TransformError
from batchnorm.kernels import reference
from batchnorm.kernels.backend import Operations
from batchnorm.kernels.reference import biased_variance
from batchnorm.moments import Moments
from batchnorm.statistics import RunningStatistics


class Synced(NamedTuple):
    """What a batch that several processes have a part of is normalised by.

    Attributes:
        moments: of all of it.
        group: the processes.
        label: the layer, in words.
    """

    moments: Moments
    group: Group
    label: str


class _BatchNorm(torch.autograd.Function):
    """All modes: by given mean and variance, by the moments of a batch that processes share, or by the batch's own.

    The batch's own moments are returned as count, mean and m2; or, with running statistics to commit them to, not.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        options: Options,  # torch looks for tensors among the arguments alone, not in what they hold
        operations: Operations,
        statistics: RunningStatistics | Synced | None,
        commits: bool,  # whether x is normalised by its own moments, and these are committed to the statistics, if any
    ) -> Any:  # noqa: ANN401 - y, and the batch's moments
        _, _, activation = options
        ctx.operations, ctx.options, ctx.group = operations, options, None
        # Without an activation the residual's value has no part in any gradient.
        saved_residual = None if activation is None else residual
        if commits:
            running = statistics if isinstance(statistics, RunningStatistics) else (None,) * 5
            y, count, mean, m2 = operations.forward_commit(x, weight, bias, residual, *options, mask, *running)
            ctx.save_for_backward(x, count, mean, m2, weight, bias, saved_residual, mask)
            return y
        ctx.set_materialize_grads(False)
        if isinstance(statistics, RunningStatistics):
            mean, var = statistics.mean, statistics.var
            ctx.save_for_backward(x, None, mean, var, weight, bias, saved_residual, None)
            return operations.normalize(x, mean, var, weight, bias, residual, *options)
        if statistics is not None:
            moments, ctx.group, ctx.label = statistics
            count, mean, m2 = moments.count, moments.mean, moments.m2
            ctx.save_for_backward(x, count, mean, m2, weight, bias, saved_residual, mask)
            return operations.normalize(x, mean, biased_variance(count, m2), weight, bias, residual, *options)
        y, count, mean, m2 = operations.forward(x, weight, bias, residual, *options, mask)
        ctx.mark_non_differentiable(count, mean, m2)
        ctx.save_for_backward(x, count, mean, m2, weight, bias, saved_residual, mask)
        return y, count, mean, m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - the context
        if dy is None:
            return (None,) * 9
        x, count, mean, m2_or_var, weight, bias, residual, mask = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        arguments: Arguments = (weight, bias, residual, *ctx.options)
        operations: Operations = ctx.operations
        if torch.is_grad_enabled():
            if ctx.group is not None:
                raise TransformError(
                    "got create_graph=True for statistics that processes share: derivatives of a higher order would "
                    "have to pass through all of them, and are not there. Differentiate once, or use sync=False"
                )
            statistics = (mean, m2_or_var) if count is None else None
            needs = (needs_x, needs_weight, needs_bias, needs_residual)
            dx, dweight, dbias, dresidual = _differentiable_gradients(dy, x, statistics, arguments, mask, needs)
        elif count is not None and ctx.group is None and (needs_x or needs_residual):
            dx, dweight, dbias, dresidual = operations.backward(dy, x, count, mean, m2_or_var, *arguments, mask)
        else:
            var = m2_or_var if count is None else biased_variance(count, m2_or_var)
            dx = dresidual = sums = mean_dz = mean_dz_xhat = None
            if needs_weight or needs_bias or ctx.group is not None:
                sums = operations.backward_sums(dy, x, mean, var, *arguments, mask)
            if ctx.group is not None and sums is not None:
                n = torch.where(count > 0, count, 1)
                totals = ctx.group.all_reduce(sums, f"the backward pass of {ctx.label}")
                mean_dz, mean_dz_xhat = (total / n for total in totals)
            if needs_x or needs_residual:
                dx, dresidual = operations.backward_input(dy, x, mean, var, *arguments, mean_dz, mean_dz_xhat, mask)
            # Of a parameter, this process's part, as of any other in data-parallel training.
            dbias, dweight = (None, None) if sums is None else sums
            dweight = dweight if weight is None or dweight is None else dweight.to(weight.dtype)
            dbias = dbias if bias is None or dbias is None else dbias.to(bias.dtype)
        if residual is None:
            dresidual = dy
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dresidual if needs_residual else None,
            *(None,) * 5,
        )


# For eager operations only; `functional.normalize_and_commit` calls it itself, because small inputs feel every call.
plain_apply = _torch.plain_apply(_BatchNorm)


def apply(call: Call, operations: Operations, statistics: RunningStatistics | Synced | None = None) -> Any:  # noqa: ANN401 - y, and the batch's moments
    """The output y by given statistics; without any, y, count, mean and m2 of the batch."""
    function = plain_apply if operations.eager else _BatchNorm.apply
    options = (call.eps, call.channel_dim, call.activation)
    return function(call.x, call.weight, call.bias, call.residual, call.mask, options, operations, statistics, False)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    arguments: Arguments,
    mask: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of x, weight, bias and residual as a differentiable function of everything: for any higher order.

    The kernels' gradients treat the saved statistics as numbers, and a second derivative must not: so the forward pass
    is written down again in plain torch, and differentiated by torch.
    """
    # Views, because one input may be computed from another: each gradient is the partial one.
    weight, bias, residual, eps, channel_dim, activation = arguments
    if not any(needed and t is not None for t, needed in zip((x, weight, bias, residual), needs, strict=True)):
        return None, None, None, None
    weight, bias, residual = (None if t is None else t.view_as(t) for t in (weight, bias, residual))
    x = x.view_as(x)
    if mask is not None:  # what nobody uses may be anything
        sample_weight = mask if mask.dim() == x.dim() else mask.unsqueeze(channel_dim)
        x = torch.where((sample_weight > 0) | (dy != 0), x, 0)
    if statistics is None:
        y, *_ = reference.forward(x, weight, bias, residual, eps, channel_dim, activation, mask)
    else:
        y = reference.normalize(x, *statistics, weight, bias, residual, eps, channel_dim, activation)
    inputs = (x, weight, bias, residual)
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
    partial = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    dx, dweight, dbias, dresidual = (
        next(partial) if needed and t is not None else None for t, needed in zip(inputs, needs, strict=True)
    )
    return dx, dweight, dbias, dresidual


def _train_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    mask: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """What `_BatchNorm.backward` does with create_graph=True, for the graph of `train`: the gradients that are needed.

    Without an activation the residual is not among the arguments, and its gradient is dy.
    """
    arguments: Arguments = (weight, bias, residual, eps, channel_dim, activation)
    *found, dresidual = _differentiable_gradients(dy, x, None, arguments, mask, needs)
    found.append(dy if residual is None else dresidual)
    return [t for t, needed in zip(found, needs, strict=True) if needed and t is not None]


ops.define_train_gradients(_train_gradients)

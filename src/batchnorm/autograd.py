"""The package's `torch.autograd.Function`s in Python: the operations with their derivatives, of every order.

`kernels/cpu/autograd/` has the commonest cases again, in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import _torch, ops
from batchnorm.call import Arguments, Call, Options
from batchnorm.distributed import Group
from batchnorm.errors import OptionError, TransformError
from batchnorm.kernels import reference
from batchnorm.kernels.backend import Operations
from batchnorm.kernels.reference import biased_variance
from batchnorm.kernels.tables import beside, gradient_of
from batchnorm.moments import Moments
from batchnorm.recording import RECORDERS
from batchnorm.statistics import DomainStatistics, RunningStatistics


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
        statistics: RunningStatistics | DomainStatistics | Synced | None,
        commits: bool,  # whether x is normalised by its own moments, and these are committed to the statistics, if any
        domain: Tensor | None,  # of each sample
        domains: int,
    ) -> Any:  # noqa: ANN401 - y, and the batch's moments
        _, _, activation = options
        ctx.operations, ctx.options, ctx.group = operations, options, None
        # Without an activation the residual's value has no part in any gradient.
        saved_residual = None if activation is None else residual
        count: Tensor | None
        given = () if domain is None else (domain,)  # the last argument of an operation
        table = () if domain is None else (domain, domains)
        if commits and domain is None:
            running = statistics if isinstance(statistics, RunningStatistics) else (None,) * 5
            y, count, mean, m2_or_var = operations.forward_commit(x, weight, bias, residual, *options, mask, *running)
        elif isinstance(statistics, RunningStatistics):
            count, mean, m2_or_var, mask = None, statistics.mean, statistics.var, None
            y = operations.normalize(x, mean, m2_or_var, weight, bias, residual, *options, *given)
        elif isinstance(statistics, Synced):
            moments, ctx.group, ctx.label = statistics
            count, mean, m2_or_var = moments.count, moments.mean, moments.m2
            y = operations.normalize(
                x, mean, biased_variance(count, m2_or_var), weight, bias, residual, *options, *given
            )
        else:
            y, count, mean, m2_or_var = operations.forward(x, weight, bias, residual, *options, mask, *table)
            of_each = statistics.of_each if isinstance(statistics, DomainStatistics) else ()
            for number, (mean_, var, tracked, skipped, momentum) in enumerate(of_each):
                operations.commit(mean_, var, tracked, skipped, count, mean, m2_or_var, momentum, number)
        ctx.save_for_backward(x, count, mean, m2_or_var, weight, bias, saved_residual, mask, domain)
        if operations.eager and RECORDERS:  # for `record`, which gets the context as the output's history
            ctx.statistics = count, mean, m2_or_var
        ctx.set_materialize_grads(commits)  # there is y alone
        if commits or statistics is not None:
            return y
        ctx.mark_non_differentiable(count, mean, m2_or_var)
        return y, count, mean, m2_or_var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - the context
        if dy is None:
            return (None,) * 11
        x, count, mean, m2_or_var, weight, bias, residual, mask, domain = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        arguments: Arguments = (weight, bias, residual, *ctx.options)
        operations: Operations = ctx.operations
        given = () if domain is None else (domain,)
        if torch.is_grad_enabled():
            if ctx.group is not None:
                raise TransformError(
                    "got create_graph=True for statistics that processes share: derivatives of a higher order would "
                    "have to pass through all of them, and are not there. Differentiate once, or use sync=False"
                )
            statistics = (mean, m2_or_var) if count is None else None
            needs = (needs_x, needs_weight, needs_bias, needs_residual)
            dx, dweight, dbias, dresidual = _differentiable_gradients(
                dy, x, statistics, arguments, mask, needs, domain, len(mean)
            )
        elif count is not None and ctx.group is None and (needs_x or needs_residual):
            dx, dweight, dbias, dresidual = operations.backward(dy, x, count, mean, m2_or_var, *arguments, mask, *given)
        else:
            var = m2_or_var if count is None else biased_variance(count, m2_or_var)
            dx = dresidual = sums = mean_dz = mean_dz_xhat = None
            if needs_weight or needs_bias or ctx.group is not None:
                sums = operations.backward_sums(dy, x, mean, var, *arguments, mask, *given)
            if ctx.group is not None and sums is not None:
                n = beside(torch.where(count > 0, count, 1), mean)
                totals = ctx.group.all_reduce(sums, f"the backward pass of {ctx.label}")
                mean_dz, mean_dz_xhat = (total / n for total in totals)
            if needs_x or needs_residual:
                means = (mean_dz, mean_dz_xhat)
                dx, dresidual = operations.backward_input(dy, x, mean, var, *arguments, *means, mask, *given)
            # Of a parameter, this process's part, as of any other in data-parallel training.
            dbias, dweight = (None, None) if sums is None else sums
            dweight = None if dweight is None else gradient_of(weight, dweight)
            dbias = None if dbias is None else gradient_of(bias, dbias)
        if residual is None:
            dresidual = dy
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dresidual if needs_residual else None,
            *(None,) * 7,
        )


class _Marked(torch.autograd.Function):
    """An output, with a mark among the saved tensors: activation checkpointing compares shapes of what it repeats."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mark: int) -> Tensor:  # noqa: ANN401 - the context
        ctx.mark = mark
        ctx.save_for_backward(y.new_empty(0, mark))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - the context
        (saved,) = ctx.saved_tensors
        if saved.shape != (0, ctx.mark):  # any other tensor, where not as many are saved for those domains
            raise OptionError(
                "got a forward pass repeated for other domains than it was made for: the backward pass runs inside "
                "another batchnorm.domain. Call backward inside the same one, or give checkpoint "
                "context_fn=lambda: (batchnorm.domain(model, which), batchnorm.domain(model, which))"
            )
        return dy, None


def marked(y: Tensor, mark: int) -> Tensor:
    """The same y. Where its forward pass is repeated in a backward pass, another mark raises."""
    output: Tensor = _Marked.apply(y, mark)  # type: ignore[no-untyped-call]  # torch's
    return output


# For eager operations only; `functional.normalize_and_commit` calls it itself, because small inputs feel every call.
plain_apply = _torch.plain_apply(_BatchNorm)


def apply(call: Call, operations: Operations, statistics: RunningStatistics | Synced | None = None) -> Any:  # noqa: ANN401 - y, and the batch's moments
    """The output y by given statistics; without any, y, count, mean and m2 of the batch."""
    function = plain_apply if operations.eager else _BatchNorm.apply
    options = (call.eps, call.channel_dim, call.activation)
    domain, domains = (None, 1) if call.assignment is None else (call.assignment.domain, len(call.assignment.samples))
    tensors = (call.x, call.weight, call.bias, call.residual, call.mask)
    result = function(*tensors, options, operations, statistics, False, domain, domains)
    if operations.eager and RECORDERS:
        record(result if isinstance(result, Tensor) else result[0], call, operations)
    return result


def record(y: Tensor, call: Call, operations: Operations, owner: Tensor | None = None) -> None:
    """Tell this thread's recorder of an output, if it has a gradient.

    Args:
        y: the output.
        call: what it is the output of.
        operations: what has computed it.
        owner: what to know the layer by if it has no parameters.
    """
    recorder, history = RECORDERS.get(get_ident()), y.grad_fn
    statistics = getattr(history, "statistics", None)
    if recorder is None or statistics is None:
        return
    del history.statistics  # type: ignore[union-attr]  # the context of our function, on which it was set
    count, mean, m2_or_var = statistics
    x, residual, options = call.x, call.residual, (call.eps, call.channel_dim, call.activation)
    # In a batch without a mask something is counted: without the question whether it is, which takes ten microseconds.
    counted = count is not None and count.dim() == 0 and call.mask is None and call.assignment is None

    def make() -> Callable[..., Tensor]:
        # Copies: the parameters' memory may be taken back before the backward pass, and their values may change.
        weight, bias = (None if t is None else t.detach().clone() for t in (call.weight, call.bias))
        given = () if call.assignment is None else (call.assignment.domain,)

        def again(x: Tensor, residual: Tensor | None = None) -> Tensor:
            # The second half of the forward operation, which gives the same bits.
            var = m2_or_var
            if count is not None:
                var = m2_or_var / count if counted else biased_variance(count, m2_or_var)
            return operations.normalize(x, mean, var, weight, bias, residual, *options, *given)

        return again

    # Weights of several domains are stacked for the call, and known to nobody.
    known = (call.weight, call.bias, owner) if call.assignment is None else (owner, call.weight, call.bias)
    owner = next((t for t in known if t is not None), None)
    recorder.record(y, (x,) if residual is None else (x, residual), make, owner)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    arguments: Arguments,
    mask: Tensor | None,
    needs: Sequence[bool],
    domain: Tensor | None,
    domains: int,
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
        y, *_ = reference.forward(x, weight, bias, residual, eps, channel_dim, activation, mask, domain, domains)
    else:
        y = reference.normalize(x, *statistics, weight, bias, residual, eps, channel_dim, activation, domain)
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
    domain: Tensor | None,
    domains: int,
) -> list[Tensor]:
    """What `_BatchNorm.backward` does with create_graph=True, for graphs made in C++: the gradients that are needed.

    Without an activation the residual is not among the arguments, and its gradient is dy.
    """
    arguments: Arguments = (weight, bias, residual, eps, channel_dim, activation)
    *found, dresidual = _differentiable_gradients(dy, x, None, arguments, mask, needs, domain, domains)
    found.append(dy if residual is None else dresidual)
    return [t for t, needed in zip(found, needs, strict=True) if needed and t is not None]


ops.define_train_gradients(_train_gradients)

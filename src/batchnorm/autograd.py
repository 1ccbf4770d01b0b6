"""The package's only `torch.autograd.Function`: the operations with their derivatives, of every order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import ops
from batchnorm.distributed import Group
from batchnorm.errors import TransformError
from batchnorm.kernels import reference
from batchnorm.moments import Moments
from batchnorm.recipe import Recipe, Running


class Shared(NamedTuple):
    """What a batch that several processes have a part of is normalised by.

    Attributes:
        moments: of all of it.
        group: the processes.
        place: the layer, in words.
    """

    moments: Moments
    group: Group
    place: str


def _implementation(x: Tensor, mask: Tensor | None) -> Any:  # noqa: ANN401 - operators, or a module
    """The kernels take no mask with a weight for every value, and no empty input."""
    plain = (mask is not None and mask.dim() == x.dim()) or x.numel() == 0
    return reference if plain else ops.implementation(x)


class _BatchNorm(torch.autograd.Function):
    """Both modes. Without given statistics they are the batch's: committed, or returned as count, mean and m2.

    Where the batch is shared, its moments are given, and the gradients need sums over the processes.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        options: tuple[float, int, str | None],  # the rest of a Recipe: torch looks for tensors among arguments alone
        running: Running | None = None,
        shared: Shared | None = None,
    ) -> Any:  # noqa: ANN401 - y, and by the batch its moments
        implementation = _implementation(x, mask)
        ctx.shared = None if shared is None else shared[1:]
        ctx.set_materialize_grads(False)
        ctx.options = options
        # Without an activation the residual's value has no part in any gradient.
        kept = None if options[2] is None else residual
        if mean is not None and var is not None:
            ctx.save_for_backward(x, None, mean, var, weight, bias, kept, None)
            return implementation.normalize(x, mean, var, weight, bias, residual, *options)
        if shared is not None:
            count, mean, m2 = shared.moments.count, shared.moments.mean, shared.moments.m2
            ctx.save_for_backward(x, count, mean, m2, weight, bias, kept, mask)
            return implementation.normalize(x, mean, _variance(count, m2), weight, bias, residual, *options)
        if running is not None:
            y, count, mean, m2 = implementation.forward_commit(x, weight, bias, residual, *options, mask, *running)
            ctx.save_for_backward(x, count, mean, m2, weight, bias, kept, mask)
            return y
        y, count, mean, m2 = implementation.forward(x, weight, bias, residual, *options, mask)
        ctx.mark_non_differentiable(count, mean, m2)
        ctx.save_for_backward(x, count, mean, m2, weight, bias, kept, mask)
        return y, count, mean, m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - the context
        if dy is None:
            return (None,) * 10
        x, count, mean, spread, weight, bias, residual, mask = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        by_batch = count is not None
        if ctx.shared is not None:
            dx, dweight, dbias, dresidual = _shared_gradients(
                dy, x, count, mean, spread, Recipe(weight, bias, residual, *ctx.options), mask, *ctx.shared
            )
        elif by_batch and (needs_x or needs_residual) and not torch.is_grad_enabled():
            dx, dweight, dbias, dresidual = _implementation(x, mask).backward(
                dy, x, count, mean, spread, weight, bias, residual, *ctx.options, mask
            )
        else:
            recipe = Recipe(weight, bias, residual, *ctx.options)
            if torch.is_grad_enabled():
                statistics = None if by_batch else (mean, spread)
                wanted = (needs_x, needs_weight, needs_bias, needs_residual)
                dx, dweight, dbias, dresidual = _differentiable_gradients(dy, x, statistics, recipe, mask, wanted)
            else:
                var = _variance(count, spread) if by_batch else spread
                needs = (needs_x or needs_residual, needs_weight or needs_bias)
                dx, dweight, dbias, dresidual = _separate_gradients(dy, x, mean, var, recipe, mask, *needs)
        if residual is None:
            dresidual = dy
        return (
            dx if needs_x else None,
            None,
            None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dresidual if needs_residual else None,
            None,
            None,
            None,
            None,
        )


# Function.apply without its preparations for transforms, which do not come here: 2 microseconds of 50 for small inputs.
_base_apply = super(torch.autograd.Function, _BatchNorm).apply


def apply(*arguments: Any) -> Any:  # noqa: ANN401 - `_BatchNorm.forward`'s
    """`_BatchNorm.apply`. Not for what is `transformed`."""
    if torch.compiler.is_compiling():
        return _BatchNorm.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's
    return _base_apply(*arguments)  # type: ignore[no-untyped-call]  # torch's


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _variance(count: Tensor, m2: Tensor) -> Tensor:
    """The biased variance; 0 of nothing."""
    return m2 / torch.where(count > 0, count, 1)


def _shared_gradients(
    dy: Tensor,
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    recipe: Recipe,
    mask: Tensor | None,
    group: Group,
    place: str,
) -> Gradients:
    """The gradients of x, weight, bias and residual where other processes have parts of the batch.

    Of the loss summed over the processes: x's statistics are everyone's. weight's and bias' are this process's part of
    theirs, as of any parameter in data-parallel training.

    Raises:
        TransformError: derivatives of a higher order are asked for.
    """
    if torch.is_grad_enabled():
        raise TransformError(
            "got create_graph=True for statistics that processes share: derivatives of a higher order would have to "
            "pass through all of them, and are not there. Differentiate once, or use sync=False"
        )
    implementation, var = _implementation(x, mask), _variance(count, m2)
    sums = implementation.backward_sums(dy, x, mean, var, *recipe, mask)
    n = torch.where(count > 0, count, 1)
    means = [total / n for total in group.all_reduce(sums, f"the backward pass of {place}")]
    dx, dresidual = implementation.backward_input(dy, x, mean, var, *recipe, *means, mask)
    dbias, dweight = sums
    dweight = None if recipe.weight is None else dweight.to(recipe.weight.dtype)
    dbias = None if recipe.bias is None else dbias.to(recipe.bias.dtype)
    return dx, dweight, dbias, dresidual


def _separate_gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    recipe: Recipe,
    mask: Tensor | None,
    needs_inputs: bool,
    needs_parameters: bool,
) -> Gradients:
    """The gradients of x, weight, bias and residual where the statistics are constants, or x's is not asked for."""
    implementation = _implementation(x, mask)
    dx = dweight = dbias = dresidual = None
    if needs_inputs:
        dx, dresidual = implementation.backward_input(dy, x, mean, var, *recipe, None, None, mask)
    if needs_parameters:
        dbias, dweight = implementation.backward_sums(dy, x, mean, var, *recipe, mask)
        dweight = None if recipe.weight is None else dweight.to(recipe.weight.dtype)
        dbias = None if recipe.bias is None else dbias.to(recipe.bias.dtype)
    return dx, dweight, dbias, dresidual


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    recipe: Recipe,
    mask: Tensor | None,
    needs: tuple[bool, ...],
) -> Gradients:
    """The gradients as a differentiable function of everything, for derivatives of any higher order.

    The kernels' gradients treat the saved statistics as numbers, and a second derivative must not: so the forward pass
    is written down again in plain torch, and differentiated by torch.
    """

    # Views, because one input may be computed from another: each gradient is the partial one.
    def alias(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.view_as(t)

    x = x.view_as(x)
    if mask is not None:  # what nobody uses may be anything
        weights = mask if mask.dim() == x.dim() else mask.unsqueeze(recipe.channel_dim % x.dim())
        x = torch.where((weights > 0) | (dy != 0), x, 0)
    recipe = recipe._replace(weight=alias(recipe.weight), bias=alias(recipe.bias), residual=alias(recipe.residual))
    if statistics is None:
        y, *_ = reference.forward(x, *recipe, mask)
    else:
        mean, var = statistics
        y = reference.normalize(x, mean, var, *recipe)
    inputs = (x, recipe.weight, recipe.bias, recipe.residual)
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
    partial = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    dx, dweight, dbias, dresidual = (
        next(partial) if needed and t is not None else None for t, needed in zip(inputs, needs, strict=True)
    )
    return dx, dweight, dbias, dresidual


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work: they need plain torch."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0

"""Batch normalization as functions, and the package's only `torch.autograd.Function`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import layout, ops
from batchnorm.errors import CountError, DTypeError, OptionError, ShapeError
from batchnorm.kernels import reference
from batchnorm.moments import Moments


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_dim: int = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Batch normalization, `torch.nn.functional.batch_norm` with a residual and an activation inside.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and (biased) var are those of `input` over all dimensions but the channels', gradients flow
    through them, and the running statistics, where given, become (1 - momentum) * running + momentum * new, with the
    unbiased variance. Otherwise mean and var are the running statistics.

    Args:
        input: (N, C, *S), floating, channels in dimension `channel_dim`. An empty input gives an empty output, zero
            gradients and no update.
        running_mean: (C,) or None; changed in place in training.
        running_var: (C,) or None, likewise.
        weight: (C,) gamma; None is 1.
        bias: (C,) beta; None is 0.
        training: normalise by the batch.
        momentum: the weight of the new value in the running statistics.
        eps: added to the variance; > 0 in training, >= 0 in inference.
        channel_dim: the dimension of the channels; -1 for channels last.
        residual: of input's shape and dtype, added before the activation.
        activation: "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu" (torch's default parameters) or None.
        inplace: in inference without gradients, write the output over the input and return the input. Where autograd
            records, and in training, it has no effect: gradients are computed from the input.

    Returns:
        A tensor of input's shape, dtype and memory format.

    Raises:
        ShapeError: a rank, a number of channels or the residual's shape does not fit, or inference has no statistics.
        DTypeError: an input that is not floating, or a residual of another dtype.
        CountError: training with one value for each channel.
        OptionError: eps or activation outside what they may be.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", 2015, algorithms 1 and 2.
    """
    recipe = Recipe(weight, bias, residual, eps, channel_dim, activation)
    if training:
        for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
            if input.dim() >= 2:
                layout.check_vector(buffer, name, input.shape[layout.channel_axis(input.dim(), channel_dim)])
        output, moments = normalize_by_batch(input, recipe)
        if moments is not None and running_mean is not None and running_var is not None:
            commit(moments, running_mean, running_var, None, momentum)
        return output
    if running_mean is None or running_var is None:
        raise ShapeError(
            "got no running statistics; inference normalises by running_mean and running_var. "
            "Pass both, or training=True to normalise by the batch"
        )
    return normalize_by(input, running_mean, running_var, recipe, inplace=inplace)


class Recipe(NamedTuple):
    """What becomes of a normalised input: everything that the operations take besides the input and its statistics."""

    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    channel_dim: int
    activation: str | None


def normalize_by_batch(x: Tensor, recipe: Recipe) -> tuple[Tensor, Moments | None]:
    """`batch_norm` in training mode, with the batch's moments as a value: what a layer proposes.

    Returns:
        The output, and the moments of `x`, or None where x is empty.

    Raises: as `batch_norm`.
    """
    if not recipe.eps > 0:
        raise OptionError(f"got eps={recipe.eps}; eps must be positive in training. torch's default is 1e-5")
    num_channels = _check(x, recipe)
    numel = x.numel()
    if numel == 0:
        return _empty_output(x, recipe), None
    if numel == num_channels:
        raise CountError(
            f"got an input of shape {tuple(x.shape)}: one value for each channel; expected more than 1 value per "
            f"channel when training, because the variance of one value is 0. Use a larger batch, switch to "
            f"inference with .eval(), or drop the last incomplete batch (DataLoader(drop_last=True))"
        )
    if _transformed():
        y, count, mean, m2 = reference.forward(x, *recipe)
        return y, Moments(count, mean.detach(), m2.detach())
    y, count, mean, m2 = _apply(x, None, None, *recipe[:3], recipe[3:])
    return y, Moments(count, mean, m2)


def normalize_by(x: Tensor, mean: Tensor, var: Tensor, recipe: Recipe, *, inplace: bool = False) -> Tensor:
    """`batch_norm` in inference mode: by given statistics, which are constants to the gradient.

    Raises: as `batch_norm`.
    """
    if not recipe.eps >= 0:
        raise OptionError(f"got eps={recipe.eps}; eps must be non-negative. torch's default is 1e-5")
    _check(x, recipe)
    if x.numel() == 0:
        return _empty_output(x, recipe)
    for name, statistic in (("running_mean", mean), ("running_var", var)):
        layout.check_vector(statistic, name, x.shape[recipe.channel_dim])
    if not torch.is_grad_enabled() and not _transformed():
        if inplace:
            ops.implementation(x).normalize_(x, mean, var, *recipe)
            torch.autograd.graph.increment_version(x)  # a graph that saved the input's old values will say so
            return x
        inferred: Tensor = ops.implementation(x).normalize(x, mean, var, *recipe)  # no function of autograd's around it
        return inferred
    # Copies: a training pass before the backward pass would change what the gradient is computed from.
    mean, var = mean.detach().clone(), var.detach().clone()
    if _transformed():
        return reference.normalize(x, mean, var, *recipe)
    y: Tensor = _apply(x, mean, var, *recipe[:3], recipe[3:])
    return y


def commit(
    moments: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Blend moments into running statistics, in place: `kernels.reference.commit`."""
    implementation = reference if _transformed() else ops.implementation(running_mean)
    implementation.commit(
        running_mean, running_var, num_batches_tracked, moments.count, moments.mean, moments.m2, momentum
    )


class _BatchNorm(torch.autograd.Function):
    """Both modes. Without given statistics they are the batch's, and come back as count, mean and m2."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[float, int, str | None],  # the rest of a Recipe: torch looks for tensors among arguments alone
    ) -> Any:  # noqa: ANN401 - y, and by the batch its moments
        implementation = ops.implementation(x)
        ctx.set_materialize_grads(False)
        ctx.options = options
        # Without an activation the residual's value has no part in any gradient.
        kept = None if options[2] is None else residual
        if mean is not None and var is not None:
            ctx.save_for_backward(x, None, mean, var, weight, bias, kept)
            return implementation.normalize(x, mean, var, weight, bias, residual, *options)
        y, count, mean, m2 = implementation.forward(x, weight, bias, residual, *options)
        ctx.mark_non_differentiable(count, mean, m2)
        ctx.save_for_backward(x, count, mean, m2, weight, bias, kept)
        return y, count, mean, m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
        if dy is None:
            return (None,) * 7
        x, count, mean, spread, weight, bias, residual = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
        by_batch = count is not None
        if by_batch and (needs_x or needs_residual) and not torch.is_grad_enabled():
            dx, dweight, dbias, dresidual = ops.implementation(x).backward(
                dy, x, count, mean, spread, weight, bias, residual, *ctx.options
            )
        else:
            recipe = Recipe(weight, bias, residual, *ctx.options)
            if torch.is_grad_enabled():
                statistics = None if by_batch else (mean, spread)
                wanted = (needs_x, needs_weight, needs_bias, needs_residual)
                dx, dweight, dbias, dresidual = _differentiable_gradients(dy, x, statistics, recipe, wanted)
            else:
                var = spread / count if by_batch else spread
                needs = (needs_x or needs_residual, needs_weight or needs_bias)
                dx, dweight, dbias, dresidual = _separate_gradients(dy, x, mean, var, recipe, *needs)
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
        )


# Function.apply without its preparations for transforms, which do not come here: 2 microseconds of 50 for small inputs.
_base_apply = super(torch.autograd.Function, _BatchNorm).apply


def _apply(*arguments: Any) -> Any:  # noqa: ANN401 - `_BatchNorm.forward`'s
    if torch.compiler.is_compiling():
        return _BatchNorm.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's
    return _base_apply(*arguments)  # type: ignore[no-untyped-call]  # torch's


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _separate_gradients(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, recipe: Recipe, needs_inputs: bool, needs_parameters: bool
) -> Gradients:
    """The gradients of x, weight, bias and residual where the statistics are constants, or x's is not asked for."""
    implementation = ops.implementation(x)
    dx = dweight = dbias = dresidual = None
    if needs_inputs:
        dx, dresidual = implementation.backward_input(dy, x, mean, var, *recipe, None, None)
    if needs_parameters:
        dbias, dweight = implementation.backward_sums(dy, x, mean, var, *recipe)
        dweight = None if recipe.weight is None else dweight.to(recipe.weight.dtype)
        dbias = None if recipe.bias is None else dbias.to(recipe.bias.dtype)
    return dx, dweight, dbias, dresidual


def _differentiable_gradients(
    dy: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor] | None, recipe: Recipe, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients as a differentiable function of everything, for derivatives of any higher order.

    The kernels' gradients treat the saved statistics as numbers, and a second derivative must not: so the forward pass
    is written down again in plain torch, and differentiated by torch.
    """

    # Views, because one input may be computed from another: each gradient is the partial one.
    def alias(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.view_as(t)

    x = x.view_as(x)
    recipe = recipe._replace(weight=alias(recipe.weight), bias=alias(recipe.bias), residual=alias(recipe.residual))
    if statistics is None:
        y, *_ = reference.forward(x, *recipe)
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


def _transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work: they need plain torch."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _empty_output(x: Tensor, recipe: Recipe) -> Tensor:
    """Nothing, with the input's shape, tied to every operand so that their gradients are zeros instead of None."""
    y = x.clone()
    for operand in (recipe.weight, recipe.bias, recipe.residual):
        if operand is not None:
            y = y + (operand.sum() * 0).to(x.dtype)
    return y


def _check(x: Tensor, recipe: Recipe) -> int:
    """The number of channels, of an input and a recipe that fit each other."""
    if not x.dtype.is_floating_point:
        raise DTypeError(
            f"got an input of dtype {x.dtype}; batch normalization needs a floating dtype. Convert it with x.float()"
        )
    check_activation(recipe.activation)
    rank = x.dim()
    if rank < 2 and x.numel() == 0:
        return 0  # torch takes an empty tensor of any rank; there is nothing to check it against
    num_channels = x.shape[layout.channel_axis(rank, recipe.channel_dim)]
    layout.check_vector(recipe.weight, "weight", num_channels)
    layout.check_vector(recipe.bias, "bias", num_channels)
    if recipe.residual is not None:
        layout.check_same_shape(recipe.residual, "residual", x)
        if recipe.residual.dtype != x.dtype:
            raise DTypeError(
                f"got a residual of dtype {recipe.residual.dtype} for an input of dtype {x.dtype}; both must be equal. "
                f"Convert one of them with .to()"
            )
    return num_channels


def check_activation(activation: str | None) -> None:
    """One of the activations' names, or None.

    Raises:
        OptionError: it is neither.
    """
    if activation is not None and activation not in reference.ACTIVATIONS:
        known = ", ".join(f'"{name}"' for name in reference.ACTIVATIONS)
        raise OptionError(f"got activation={activation!r}; it must be one of {known} or None")

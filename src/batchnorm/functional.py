"""Batch normalization as functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import ghost, layout, ops
from batchnorm.autograd import apply, transformed
from batchnorm.distributed import Group
from batchnorm.errors import CountError, OptionError, ShapeError, TransformError
from batchnorm.kernels import reference
from batchnorm.moments import Moments, check_weights, joined, statistics_dtype
from batchnorm.recipe import Recipe, Running, check, check_sharing, check_virtual_batch_size


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
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    process_group: dist.ProcessGroup | None = None,
    virtual_batch_size: int | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Batch normalization, `torch.nn.functional.batch_norm` with a residual and an activation inside.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and (biased) var are those of `input` over all dimensions but the channels', gradients flow
    through them, and the running statistics, where given, become (1 - momentum) * running + momentum * new, with the
    unbiased variance; a channel whose new ones are not finite keeps its old ones, and a pass that activation
    checkpointing repeats moves nothing. Otherwise mean and var are the running statistics.

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
        mask: in training, which positions the statistics are taken from: bool, or weights >= 0. Of input's shape
            without the channel dimension (a size of 1 broadcasts), or (N,): one value for each sample. The output is
            there for all positions. A mask is a constant to the gradient, and has no effect in inference.
        residual: of input's shape and dtype, added before the activation.
        activation: "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu" (torch's default parameters) or None.
        process_group: in training, the batch is what all processes of this group have together, in equal or unequal
            parts; `torch.distributed.group.WORLD` for all there are. See `BatchNorm`'s `sync`.
        virtual_batch_size: in training, normalise every so many samples by their own statistics; a single sample that
            is left over joins the last of these ghost batches. The running statistics see the joined moments.
        inplace: in inference without gradients, write the output over the input and return the input. Where autograd
            records, and in training, it has no effect: gradients are computed from the input.

    Returns:
        A tensor of input's shape, dtype and memory format.

    Raises:
        ShapeError: a rank, a number of channels, the residual's or the mask's shape does not fit, or inference has no
            statistics.
        DTypeError: an input that is not floating, or a residual of another dtype.
        CountError: training with one value for each channel.
        OptionError: eps, activation, virtual_batch_size or a weight of the mask outside what they may be.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", 2015, algorithms 1 and 2.
    """
    recipe = Recipe(weight, bias, residual, eps, channel_dim, activation)
    if training:
        for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
            if input.dim() >= 2:
                layout.check_vector(buffer, name, input.shape[layout.channel_axis(input.dim(), channel_dim)])
        running = None
        if running_mean is not None and running_var is not None and not replayed():
            running = Running(running_mean, running_var, None, None, momentum)
        group = None if process_group is None else Group(process_group)
        output, moments = normalize_by_batch(
            input, recipe, mask=mask, virtual_batch_size=virtual_batch_size, running=running, group=group
        )
        if moments is not None and running is not None:
            commit(moments, running)
        return output
    if running_mean is None or running_var is None:
        raise ShapeError(
            "got no running statistics; inference normalises by running_mean and running_var. "
            "Pass both, or training=True to normalise by the batch"
        )
    return normalize_by(input, running_mean, running_var, recipe, inplace=inplace)


def normalize_by_batch(
    x: Tensor,
    recipe: Recipe,
    *,
    mask: Tensor | None = None,
    virtual_batch_size: int | None = None,
    correct: Callable[[Moments], tuple[Tensor, Tensor]] | None = None,
    running: Running | None = None,
    group: Group | None = None,
    place: str = "batch_norm",
) -> tuple[Tensor, Moments | None]:
    """`batch_norm` in training mode, with the batch's moments as a value: what a layer proposes.

    Args:
        x: as `batch_norm`'s input.
        recipe: the rest.
        mask: as `batch_norm`'s.
        virtual_batch_size: as `batch_norm`'s.
        correct: from the batch's moments to r and d of batch renormalization, (C,) each: what is normalised becomes
            normalised * r + d.
        running: where the moments are committed on the way, if one operation can do both: no moments come back then.
        group: the processes that have parts of the batch; None for this one alone.
        place: the layer, in words, for errors of processes that are at different ones.

    Returns:
        The output, and the moments of the batch, all processes' parts of it included, or None where it is empty or they
        are committed.

    Raises: as `batch_norm`.
    """
    if not recipe.eps > 0:
        raise OptionError(f"got eps={recipe.eps}; eps must be positive in training. torch's default is 1e-5")
    num_channels = check(x, recipe)
    numel = x.numel()
    if group is not None and group.size > 1:
        from batchnorm import sharing  # not before it is needed: it imports torch's compiler

        check_sharing(True, None, virtual_batch_size)
        mask = _positions(x, recipe, mask)
        shared = sharing.normalized(x, recipe, mask, _moments(x, recipe, mask), correct, group, place)
        return (_empty_output(x, recipe), None) if shared is None else shared
    if numel == 0:
        return _empty_output(x, recipe), None
    cut = None if virtual_batch_size is None else _ghost_batches(x, recipe, virtual_batch_size)
    if (numel if cut is None else numel * cut // _samples(x, recipe)) == num_channels:
        raise CountError(
            f"got an input of shape {tuple(x.shape)}{'' if cut is None else f' in ghost batches of {cut}'}: one value "
            f"for each channel; expected more than 1 value per channel when training, because the variance of one "
            f"value is 0. Use a larger batch, switch to inference with .eval(), or drop the last incomplete batch "
            f"(DataLoader(drop_last=True))"
        )
    mask = _positions(x, recipe, mask)
    if cut is not None:
        return _by_ghost_batches(x, recipe, mask, cut)
    if correct is not None:
        recipe = recipe.corrected(*correct(_moments(x, recipe, mask)))
    # A compiled graph wants to see what changes.
    if running is not None and not (torch.compiler.is_compiling() or transformed()):
        return apply(x, None, None, *recipe[:3], mask, recipe[3:], running), None
    return _by_batch(x, recipe, mask)


def batch_moments(
    x: Tensor, recipe: Recipe, mask: Tensor | None, group: Group | None = None, place: str = "batch_norm"
) -> Moments | None:
    """The moments of x, for a layer that normalises by others but proposes these; None where x is empty."""
    mask = _positions(x, recipe, mask)
    if group is not None and group.size > 1:
        from batchnorm import sharing  # not before it is needed: it imports torch's compiler

        moments: Moments | None = sharing.joined(x, recipe, _moments(x, recipe, mask), group, place)
        return moments
    return _moments(x, recipe, mask) if x.numel() else None


def _moments(x: Tensor, recipe: Recipe, mask: Tensor | None) -> Moments:
    if x.numel() == 0:
        return Moments.empty(x.shape[layout.channel_axis(x.dim(), recipe.channel_dim)], device=x.device)
    implementation = reference if transformed() else ops.implementation(x)
    return Moments(*implementation.batch_moments(x.detach(), recipe.channel_dim, mask))


def _positions(x: Tensor, recipe: Recipe, mask: Tensor | None) -> Tensor | None:
    """The mask with one value for each position."""
    if mask is None:
        return None
    if not (transformed() or torch.compiler.is_compiling()):
        check_weights(mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.to(statistics_dtype(mask.device))
    return layout.positions(mask, x.shape, recipe.channel_dim % x.dim())


def _samples(x: Tensor, recipe: Recipe) -> int:
    """N: the size of the first dimension that is not the channels'."""
    return x.shape[1 if recipe.channel_dim % x.dim() == 0 else 0]


def _ghost_batches(x: Tensor, recipe: Recipe, virtual_batch_size: int) -> int | None:
    """The size of ghost batches, or None where there is one."""
    check_virtual_batch_size(virtual_batch_size)
    return virtual_batch_size if virtual_batch_size < _samples(x, recipe) else None


def _by_batch(x: Tensor, recipe: Recipe, mask: Tensor | None) -> tuple[Tensor, Moments]:
    """All of x by the moments of all of x, or of what the mask leaves."""
    if transformed():
        y, count, mean, m2 = reference.forward(x, *recipe, mask)
        return y, Moments(count.detach(), mean.detach(), m2.detach())
    y, count, mean, m2 = apply(x, None, None, *recipe[:3], mask, recipe[3:])
    return y, Moments(count, mean, m2)


def _by_ghost_batches(x: Tensor, recipe: Recipe, mask: Tensor | None, size: int) -> tuple[Tensor, Moments]:
    """Every `size` samples of x by their own moments; the moments of all."""
    axis = recipe.channel_dim % x.dim()
    samples_first = x.movedim(axis, 1)
    residual = None if recipe.residual is None else recipe.residual.movedim(axis, 1)
    channels = samples_first.shape[1]
    outputs, proposals = [], []
    for first, ghosts, samples in ghost.parts(len(samples_first), size):
        part = slice(first, first + ghosts * samples)
        wide = recipe._replace(
            weight=None if recipe.weight is None else recipe.weight.repeat(ghosts),
            bias=None if recipe.bias is None else recipe.bias.repeat(ghosts),
            residual=None if residual is None else ghost.widen(residual[part], ghosts),
            channel_dim=1,
        )
        batches = ghost.widen(samples_first[part], ghosts)
        if mask is None or ghosts == 1:
            y, moments = _by_batch(batches, wide, None if mask is None else mask[part])
            count = moments.count.expand(ghosts)
        else:  # a weight for every value, because the ghost batches' masks differ: in plain torch
            y, moments = _by_batch(batches, wide, ghost.widen_mask(mask[part], ghosts, channels))
            count = moments.count[::channels]
        outputs.append(ghost.narrow(y, ghosts))
        proposals.append(joined(count, moments.mean.view(ghosts, -1), moments.m2.view(ghosts, -1)))
    y = torch.cat(outputs).movedim(1, axis)
    if y.stride() != x.stride():
        y = torch.empty_like(x).copy_(y)
    return y, sum(proposals[1:], start=proposals[0])


def normalize_by(x: Tensor, mean: Tensor, var: Tensor, recipe: Recipe, *, inplace: bool = False) -> Tensor:
    """`batch_norm` in inference mode: by given statistics, which are constants to the gradient.

    Raises: as `batch_norm`.
    """
    if not recipe.eps >= 0:
        raise OptionError(f"got eps={recipe.eps}; eps must be non-negative. torch's default is 1e-5")
    check(x, recipe)
    if x.numel() == 0:
        return _empty_output(x, recipe)
    for name, statistic in (("running_mean", mean), ("running_var", var)):
        layout.check_vector(statistic, name, x.shape[recipe.channel_dim])
    if not torch.is_grad_enabled() and not transformed():
        if inplace:
            ops.implementation(x).normalize_(x, mean, var, *recipe)
            torch.autograd.graph.increment_version(x)  # a graph that saved the input's old values will say so
            return x
        inferred: Tensor = ops.implementation(x).normalize(x, mean, var, *recipe)  # no function of autograd's around it
        return inferred
    # Copies: a training pass before the backward pass would change what the gradient is computed from.
    mean, var = mean.detach().clone(), var.detach().clone()
    if transformed():
        return reference.normalize(x, mean, var, *recipe)
    y: Tensor = apply(x, mean, var, *recipe[:3], None, recipe[3:])
    return y


_current_graph_task = torch._C._current_graph_task_id  # -1 outside of a backward pass


def replayed() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing repeats it, for gradients alone.

    Its statistics were committed the first time.
    """
    return not torch.compiler.is_compiling() and _current_graph_task() != -1


def commit(moments: Moments, running: Running) -> None:
    """Blend moments into running statistics, in place: `kernels.reference.commit`."""
    values = moments.count, moments.mean, moments.m2
    if not transformed():
        ops.implementation(running.mean).commit(*running[:4], *values, running.momentum)
        return
    try:
        # Without the counter: it is not among torch's buffers, so that callers may not have given it to the transform.
        reference.commit(*running[:3], None, *values, running.momentum)
    except RuntimeError as error:
        raise TransformError(
            "got running statistics that this transform of torch.func may not change in place. Make them arguments of "
            "the transformed function (torch.func.functional_call), stacked for vmap (torch.func.stack_module_state), "
            "or take the moments as values from batchnorm.functional.normalize_by_batch"
        ) from error


def _empty_output(x: Tensor, recipe: Recipe) -> Tensor:
    """Nothing, with the input's shape, tied to every operand so that their gradients are zeros instead of None."""
    y = x.clone()
    for operand in (recipe.weight, recipe.bias, recipe.residual):
        if operand is not None:
            y = y + (operand.sum() * 0).to(x.dtype)
    return y

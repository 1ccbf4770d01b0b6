"""Batch normalization as functions."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import _torch, autograd, ghost, layout, ops, sync
from batchnorm.call import Call, check_sync, check_virtual_batch_size, empty_output, wrong_eps
from batchnorm.distributed import Group
from batchnorm.errors import CountError, OptionError, ShapeError, TransformError
from batchnorm.kernels import aten
from batchnorm.kernels.running_statistics import check_running
from batchnorm.moments import Moments, pool
from batchnorm.recording import RECORDERS
from batchnorm.statistics import BatchStatistics, RunningStatistics, SyncStatistics

_BATCH = BatchStatistics()
_NOTHING = (None,) * 5  # in place of running statistics


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
        mask: in training, which positions the statistics are taken from: bool, or sample weights >= 0. Of input's shape
            without the channel dimension (a size of 1 broadcasts), or (N,): one value for each sample. The output is
            there for all positions. A mask is a constant to the gradient, and has no effect in inference.
        residual: of input's shape and dtype, added before the activation.
        activation: "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu", "relu6", "mish", "sigmoid" or "tanh", with
            torch's default parameters; or None.
        process_group: in training, the batch is what all processes of this group have together, in equal or unequal
            parts; `torch.distributed.group.WORLD` for all there are. See `BatchNorm`'s `sync`.
        virtual_batch_size: in training, normalise every so many samples by their own statistics; a single sample that
            is left over joins the last of these ghost batches. The running statistics see the joined moments.
        inplace: in inference without gradients, write the output over the input and return the input. Where autograd
            records, and in training, it has no effect: gradients are computed from the input.

    Returns:
        A tensor of input's shape and dtype, which lies in memory as torch's: channels_last where input does, else
        contiguous.

    Raises:
        ShapeError: a rank, a number of channels, the residual's or the mask's shape does not fit, or inference has no
            statistics.
        DTypeError: an input that is not floating, or a residual of another dtype.
        CountError: training with one value for each channel.
        OptionError: eps, activation, virtual_batch_size or a value of the mask outside what they may be.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift", 2015, algorithms 1 and 2.
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ShapeError(
                "got no running statistics; inference normalises by running_mean and running_var. "
                "Pass both, or training=True to normalise by the batch"
            )
        call = Call(input, weight, bias, residual, None, eps, channel_dim, activation)
        return normalize_by_running(call, running_mean, running_var, inplace=inplace)
    call = Call(input, weight, bias, residual, mask, eps, channel_dim, activation)
    running = None
    if (running_mean is None) is not (running_var is None):
        raise ShapeError(
            f"got running_{'var' if running_mean is None else 'mean'} without the other; running statistics are both "
            f"or none. Pass both, or None for both"
        )
    if running_mean is not None and running_var is not None and call.num_channels:
        running = RunningStatistics(running_mean, running_var, None, None, momentum)
        check_running(running_mean, running_var, None, momentum, call.num_channels, input.device)
    if running is not None and process_group is None and virtual_batch_size is None:
        return normalize_and_commit(call, running)
    statistics: BatchStatistics | SyncStatistics = BatchStatistics(virtual_batch_size)
    if process_group is not None and (group := Group(process_group)).size > 1:
        check_sync(True, None, virtual_batch_size)
        statistics = SyncStatistics(group, "batch_norm")
    output, moments = normalize(call, statistics)
    if running is not None and not _torch.in_backward_recompute():
        commit(moments, running)
    return output


def normalize(call: Call, statistics: BatchStatistics | SyncStatistics) -> tuple[Tensor, Moments]:
    """`batch_norm` in training mode, with the moments that it normalised by as a value: what a layer proposes.

    Returns:
        The output, and the moments of the batch, all processes' parts of it included; empty ones of an empty batch.

    Raises: as `batch_norm`.
    """
    if not 0 < call.eps < math.inf:
        raise wrong_eps(call.eps)
    if statistics != _BATCH and ops.select(call.x) is ops.ATEN:
        aten.refuse("statistics of ghost batches, of several processes or with a correction")
    if isinstance(statistics, SyncStatistics):
        return sync.normalize(call, statistics)
    if call.x.numel() == 0:
        return empty_output(call), Moments.empty(call.num_channels, device=call.x.device)
    size = statistics.virtual_batch_size
    check_virtual_batch_size(size)
    if size is not None and size < call.num_samples:
        return _normalize_ghost_batches(call, size)
    if call.count == 1:
        raise _one_value(call)
    if statistics.correction is not None:
        call = call.corrected(*statistics.correction(batch_moments(call)))
    return _normalize(call)


def normalize_and_commit(call: Call, running: RunningStatistics) -> Tensor:
    """`normalize` by the batch, and `commit` of its moments, unless activation checkpointing repeats this pass.

    One operator does both where it can: two take 5 microseconds more, of 50 for a small input. The statistics have been
    checked.
    """
    if not 0 < call.eps < math.inf:
        raise wrong_eps(call.eps)
    x, channel_dim = call.x, call.channel_dim
    numel = x.numel()
    if numel == call.num_channels or numel == 0:
        if numel == 0:
            return empty_output(call)
        raise _one_value(call)
    operations = ops.select(x, call.mask, call.activation)
    if operations is ops.ATEN:
        return operations.forward_commit(x, *call.arguments, call.mask, *running)[0]
    if operations.eager:
        # A pass that is repeated commits nothing, by the same operator: selective checkpointing wants to see it again.
        target = running if _torch.current_backward() == -1 else None
        tensors, options = (x, call.weight, call.bias, call.residual), (call.eps, channel_dim, call.activation)
        # In C++, but where somebody records how outputs come about, and for a frozen input, of which only the sums are
        # needed.
        recorded = x.requires_grad or (call.residual is not None and call.residual.requires_grad)
        plain = type(x) is Tensor and not RECORDERS and (recorded or not torch.is_grad_enabled())
        if plain and operations.train is not None:
            return operations.train(*tensors, *options, call.mask, *(target or _NOTHING))
        y: Tensor = autograd.plain_apply(*tensors, call.mask, options, operations, target, True, None, 1)
        if RECORDERS:
            autograd.record(y, call, operations, running.mean)
        return y
    y, moments = _normalize(call)
    if not _torch.in_backward_recompute():
        commit(moments, running)
    return y


def normalize_by_running(call: Call, mean: Tensor, var: Tensor, *, inplace: bool = False) -> Tensor:
    """`batch_norm` in inference mode: by given statistics, (C,) each; a gradient reaches those that require one.

    Raises: as `batch_norm`.
    """
    if not 0 <= call.eps < math.inf:
        raise OptionError(f"got eps={call.eps}; eps must be finite and not negative. torch's default is 1e-5")
    x = call.x
    if x.numel() == 0:
        return empty_output(call)
    num_channels = call.num_channels
    if mean.dim() != 1 or mean.shape[0] != num_channels:
        layout.check_vector(mean, "running_mean", num_channels)
    if var.dim() != 1 or var.shape[0] != num_channels:
        layout.check_vector(var, "running_var", num_channels)
    device = x.device
    if mean.device != device:
        layout.check_device(mean, "running_mean", device)
    if var.device != device:
        layout.check_device(var, "running_var", device)
    operations = ops.select(x, None, call.activation)
    grad = torch.is_grad_enabled()
    if operations is ops.ATEN:
        return operations.normalize(x, mean, var, *call.arguments)
    if grad and (mean.requires_grad or var.requires_grad):
        operations = ops.DIFFERENTIABLE
    # Copies, here and below: a training pass before the backward pass would change what the gradient is computed from.
    if operations is ops.DIFFERENTIABLE or (grad and operations.differentiable):
        return operations.normalize(x, mean.clone(), var.clone(), *call.arguments)
    if not grad:  # no function of autograd's around it
        if inplace:
            if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
                raise OptionError(
                    f"got inplace=True for an input of shape {tuple(x.shape)} and strides {x.stride()}, several of "
                    f"whose values share one place in memory. Pass x.clone(), or inplace=False"
                )
            operations.normalize_(x, mean, var, *call.arguments)
            torch.autograd.graph.increment_version(x)  # a graph that saved the input's old values will say so
            return x
        return operations.normalize(x, mean, var, *call.arguments)
    statistics = RunningStatistics(mean.detach().clone(), var.detach().clone())
    y: Tensor = autograd.apply(call, operations, statistics)
    return y


def batch_moments(call: Call, statistics: BatchStatistics | SyncStatistics = _BATCH) -> Moments:
    """The moments of the batch alone, for a layer that normalises by others but proposes these."""
    if isinstance(statistics, SyncStatistics):
        return sync.batch_moments(call, statistics)
    x = call.x.detach()
    if x.numel() == 0:
        return Moments.empty(call.num_channels, device=x.device)
    return Moments(*ops.select(x, call.mask).batch_moments(x, call.channel_dim, call.mask))


def commit(moments: Moments, running: RunningStatistics, domain: int | None = None) -> None:
    """Blend moments into running statistics, in place: `kernels.reference.commit`. Empty ones change nothing.

    `domain` says which of the moments are meant, where they are of several: count (D,), mean and m2 (D, C).
    """
    operations = ops.select(running.mean)
    mean, var, num_batches_tracked, num_batches_skipped, momentum = running
    check_running(mean, var, num_batches_tracked, momentum, moments.mean.shape[-1], moments.mean.device)
    count = moments.count
    if torch.compiler.is_dynamo_compiling():
        count = ops.unless_repeated(count, mean)
    values = count, moments.mean, moments.m2
    which = () if domain is None else (domain,)
    if not _torch.in_functorch():
        operations.commit(mean, var, num_batches_tracked, num_batches_skipped, *values, momentum, *which)
        return
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in (mean, var)):
        raise TransformError(
            "got running statistics with a tangent in training, where they are changed in place and no derivative goes "
            "through the change. Differentiate in inference, or without running statistics"
        )
    try:
        # Without the counter: it is not among torch's buffers, so that callers may not have given it to the transform.
        operations.commit(mean, var, num_batches_tracked, None, *values, momentum, *which)
    except RuntimeError as error:
        raise TransformError(
            "got running statistics that this transform of torch.func may not change in place. Make them arguments of "
            "the transformed function (torch.func.functional_call), stacked for vmap (torch.func.stack_module_state), "
            "or take the moments as values from batchnorm.functional.normalize"
        ) from error


def _normalize(call: Call) -> tuple[Tensor, Moments]:
    """All of x by the moments of all of x, or of what the mask leaves."""
    operations = ops.select(call.x, call.mask, call.activation)
    if operations.differentiable:
        y, *moments = operations.forward(call.x, *call.arguments, call.mask)
        return y, Moments(*(t.detach() for t in moments))
    y, *moments = autograd.apply(call, operations)
    return y, Moments(*moments)


def _normalize_ghost_batches(call: Call, size: int) -> tuple[Tensor, Moments]:
    """Every `size` samples of x by their own moments; the moments of all."""
    axis, channels, samples = call.channel_dim, call.num_channels, call.num_samples
    if call.count * size // samples == 1:
        raise _one_value(call, f" in ghost batches of {size}")
    x = call.x.movedim(axis, 1)
    residual = None if call.residual is None else call.residual.movedim(axis, 1)
    outputs, proposals = [], []
    for first, ghosts, samples_of_each in ghost.parts(samples, size):
        part = slice(first, first + ghosts * samples_of_each)
        mask = None if call.mask is None else call.mask[part]
        # A value for every value of x where the ghost batches' masks differ: in plain torch.
        differs = mask is not None and ghosts > 1
        wide = call.replace(
            x=ghost.widen(x[part], ghosts),
            weight=None if call.weight is None else call.weight.repeat(ghosts),
            bias=None if call.bias is None else call.bias.repeat(ghosts),
            residual=None if residual is None else ghost.widen(residual[part], ghosts),
            mask=ghost.widen_mask(mask, ghosts, channels) if mask is not None and differs else mask,
            channel_dim=1,
            num_channels=ghosts * channels,
        )
        y, moments = _normalize(wide)
        count = moments.count[::channels] if differs else moments.count.expand(ghosts)
        outputs.append(ghost.narrow(y, ghosts))
        proposals.append(pool(count, moments.mean.view(ghosts, -1), moments.m2.view(ghosts, -1)))
    y = torch.cat(outputs).movedim(1, axis)
    return layout.laid_out(y, call.x), sum(proposals[1:], start=proposals[0])


def _one_value(call: Call, how: str = "") -> CountError:
    return CountError(
        f"got an input of shape {tuple(call.x.shape)}{how}: one value for each channel; expected more than 1 value per "
        f"channel when training, because the variance of one value is 0. Use a larger batch, switch to inference with "
        f".eval(), or drop the last incomplete batch (DataLoader(drop_last=True))"
    )

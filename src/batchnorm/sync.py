"""One batch, of which several processes have a part each."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import _torch, autograd, layout, ops
from batchnorm.autograd import Synced
from batchnorm.call import Call, empty_output
from batchnorm.errors import CountError, TransformError
from batchnorm.moments import Moments
from batchnorm.statistics import SyncStatistics


# Not in a compiled graph: what is done depends on what the others have.
@_torch.outside_graphs
def normalize(call: Call, statistics: SyncStatistics) -> tuple[Tensor, Moments]:
    """This process's part of a batch, by the moments of all of it: `functional.normalize`.

    Args:
        call: with the part; it may be empty.
        statistics: the processes.

    Returns:
        The output, and the moments of all parts.

    Raises:
        CountError: one value for each channel together; the same error in all processes.
        TransformError: inside a transform of torch.func.
    """
    group, label, correction = statistics
    if _torch.in_functorch():
        raise TransformError(
            f"got a transform of torch.func around {label}, whose statistics {group.size} processes share; processes "
            f"cannot meet inside one. Use sync=False there"
        )
    operations = ops.select(call.x, call.mask, call.activation, domains=call.assignment is not None)
    moments, total = group.all_reduce_moments(_own_moments(call), _positions(call), label)
    # Who has two values of a channel knows enough, and need not wait for the device.
    if call.assignment is not None:
        if not bool(total.any()):
            return empty_output(call), moments
        if alone := (total == 1).nonzero().flatten().tolist():
            raise CountError(
                f"got inputs of {group.size} processes with one value for each channel together in domain {alone[0]}; "
                f"expected more than 1 value per channel when training, because the variance of one value is 0. Use "
                f"larger batches, or leave that domain out of this one"
            )
    elif call.count < 2 and (n := int(total.item())) < 2:
        if n == 0:
            return empty_output(call), moments
        raise CountError(
            f"got inputs of {group.size} processes, here of shape {tuple(call.x.shape)}, with one value for each "
            f"channel together; expected more than 1 value per channel when training, because the variance of one "
            f"value is 0. Use larger batches, switch to inference with .eval(), or drop the last incomplete batch "
            f"(DataLoader(drop_last=True))"
        )
    if correction is not None:
        call = call.corrected(*correction(moments))
    y: Tensor = autograd.apply(call, operations, Synced(moments, group, label))
    return y, moments


@_torch.outside_graphs
def batch_moments(call: Call, statistics: SyncStatistics) -> Moments:
    """The moments of all parts, for a layer that normalises by others."""
    moments, _ = statistics.group.all_reduce_moments(_own_moments(call), _positions(call), statistics.label)
    return moments


def _own_moments(call: Call) -> Moments:
    layout.channel_axis(call.x.dim(), call.channel_dim)  # empty inputs of other ranks have no channels to compare
    x, assignment = call.x.detach(), call.assignment
    if assignment is None:
        return Moments(*ops.select(x, call.mask).batch_moments(x, call.channel_dim, call.mask))
    operations = ops.select(x, call.mask, domains=True)
    return Moments(
        *operations.batch_moments(x, call.channel_dim, call.mask, assignment.domain, len(assignment.samples))
    )


def _positions(call: Call) -> int | Tensor:
    """How many values of each channel there are; in each domain."""
    if call.assignment is None:
        return call.count
    of_sample = call.count // max(1, call.num_samples)
    return torch.tensor(call.assignment.samples, device=call.x.device) * of_sample

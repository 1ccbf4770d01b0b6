"""What an input is normalised by: the batch's own moments, a batch's that processes share, or running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.distributed import Group
from batchnorm.errors import DTypeError, OptionError, ShapeError
from batchnorm.moments import Moments

# From the batch's moments to r and d of batch renormalization, (C,) each.
Correction = Callable[[Moments], tuple[Tensor, Tensor]]


class BatchStatistics(NamedTuple):
    """The moments of the batch.

    Attributes:
        virtual_batch_size: normalise every so many samples by their own moments; None for all by those of all.
        correction: of batch renormalization: what is normalised becomes normalised * r + d.
    """

    virtual_batch_size: int | None = None
    correction: Correction | None = None


class SyncStatistics(NamedTuple):
    """The moments of a batch of which several processes have a part each.

    Attributes:
        group: the processes.
        label: the layer, in words, for errors of processes that are at different ones.
        correction: as in `BatchStatistics`.
    """

    group: Group
    label: str
    correction: Correction | None = None


class RunningStatistics(NamedTuple):
    """Running statistics, and how much new ones weigh: what `kernels.reference.commit` takes besides the moments."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None = None
    num_batches_skipped: Tensor | None = None
    momentum: float | None = None

    def check(self, num_channels: int, device: torch.device) -> None:
        """Everything that a commit needs, before anything is written.

        Raises:
            ShapeError: statistics that are not (C,), or a counter of more than one number.
            DTypeError: statistics that are not floating, or a counter that is no real number.
            OptionError: a tensor on another device than the input, statistics that require a gradient, or a momentum
                that is not finite.
        """
        mean, var, batches, _, momentum = self
        for name, statistic in (("running_mean", mean), ("running_var", var)):
            if statistic.dim() != 1 or statistic.shape[0] != num_channels:
                layout.check_vector(statistic, name, num_channels)
            if statistic.device != device:
                layout.check_device(statistic, name, device)
            if not statistic.dtype.is_floating_point:
                raise DTypeError(
                    f"got {name} of dtype {statistic.dtype}; running statistics are averages, of a floating dtype. "
                    f"Convert it with .float()"
                )
            if statistic.requires_grad:
                raise OptionError(
                    f"got {name} with requires_grad=True in training, where it is changed in place and no gradient "
                    f"goes through the change. Detach it, or normalise by it in inference"
                )
        if batches is not None:
            if batches.dtype.is_complex or batches.dtype == torch.bool:
                raise DTypeError(
                    f"got num_batches_tracked of dtype {batches.dtype}; it counts batches. Make it torch.int64"
                )
            if batches.numel() != 1:
                raise ShapeError(
                    f"got num_batches_tracked of shape {tuple(batches.shape)}; it is one number, of shape (). "
                    f"Make it torch.tensor(0)"
                )
            if batches.is_meta and device.type != "meta":
                layout.check_device(batches, "num_batches_tracked", device)
        if momentum is not None and not -math.inf < momentum < math.inf:
            raise OptionError(f"got momentum={momentum}; it must be finite, or None for the average of all batches")

    @property
    def counts_in_int64(self) -> bool:
        """Whether the counter is as kernels take it; one that was averaged or converted may be of another dtype."""
        batches = self.num_batches_tracked
        return batches is None or (
            batches.dtype == torch.int64 and batches.device == self.mean.device and batches.dim() == 0
        )

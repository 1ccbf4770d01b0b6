"""What an input is normalised by: the batch's own moments, a batch's that processes share, or running statistics.

And what of a layer stands still meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from batchnorm.distributed import Group
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


class DomainStatistics(NamedTuple):
    """The running statistics of each domain."""

    of_each: tuple[RunningStatistics, ...]


class Frozen(NamedTuple):
    """Which of a layer's parts stand still, in training mode too.

    Attributes:
        normalization: normalise by the running statistics, as in inference.
        statistics: the running statistics do not move.
        affine: gamma and beta do not learn.
    """

    normalization: bool = False
    statistics: bool = False
    affine: bool = False

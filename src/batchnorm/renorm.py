"""Batch renormalization: training normalises by nearly the statistics that inference will use.

    y = ((x - mean_B) / std_B * r + d) * weight + bias,
    r = std_B / std clipped to [1 / rmax, rmax],    d = (mean_B - mean) / std clipped to [-dmax, dmax]

with mean_B and std_B of the batch, mean and std the running ones, std = sqrt(var + eps); r and d are constants to the
gradient. With rmax = 1 and dmax = 0 this is batch normalization.

Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.moments import Moments

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Renorm:
    """How far batch renormalization may correct.

    Attributes:
        rmax: >= 1, a number, or a function of the step, which is the layer's number of batches so far.
        dmax: >= 0, likewise. (A function of the step has to read the step, which waits for the device.)

    Raises:
        OptionError: a number outside its range; from a function, when it is called.
    """

    rmax: float | Schedule = 3.0
    dmax: float | Schedule = 5.0

    def __post_init__(self) -> None:
        """Refuse numbers that are wrong whatever the step."""
        _checked(
            self.rmax if isinstance(self.rmax, int | float) else 1.0,
            self.dmax if isinstance(self.dmax, int | float) else 0.0,
        )

    def limits(self, num_batches_tracked: Tensor | None) -> tuple[float, float]:
        """The limits rmax and dmax at this step."""
        if isinstance(self.rmax, int | float) and isinstance(self.dmax, int | float):
            return self.rmax, self.dmax
        step = 0 if num_batches_tracked is None else int(num_batches_tracked.item())
        rmax, dmax = (limit if isinstance(limit, int | float) else limit(step) for limit in (self.rmax, self.dmax))
        return _checked(rmax, dmax)


def _checked(rmax: float, dmax: float) -> tuple[float, float]:
    if not (rmax >= 1 and dmax >= 0):
        raise OptionError(
            f"got rmax={rmax} and dmax={dmax} for batch renormalization; rmax must be >= 1 and dmax >= 0. "
            f"The paper goes from 1 and 0 to 3 and 5"
        )
    return rmax, dmax


def check_renorm(renorm: object, virtual_batch_size: int | None, track_running_stats: bool) -> None:
    """A layer's `renorm`, and what it excludes.

    Raises:
        OptionError: it is neither None nor a `Renorm`, or the layer has no one running average to correct towards.
    """
    if renorm is None:
        return
    if not isinstance(renorm, Renorm):
        raise OptionError(f"got renorm={renorm!r}; it must be None or batchnorm.Renorm(rmax=3.0, dmax=5.0)")
    if virtual_batch_size is not None or not track_running_stats:
        raise OptionError(
            "got renorm with virtual_batch_size or without running statistics; batch renormalization corrects a "
            "whole batch towards the running statistics. Leave one of the two out"
        )


def corrections(
    moments: Moments, running_mean: Tensor, running_var: Tensor, eps: float, rmax: float, dmax: float
) -> tuple[Tensor, Tensor]:
    """The corrections r and d, (C,) each, constants to the gradient."""
    count = torch.where(moments.count > 0, moments.count, 1)
    std_batch = (moments.m2 / count + eps).sqrt()
    std = (running_var.to(std_batch.dtype) + eps).sqrt()
    r = (std_batch / std).clamp(1 / rmax, rmax)
    d = ((moments.mean - running_mean) / std).clamp(-dmax, dmax)
    return r.detach(), d.detach()

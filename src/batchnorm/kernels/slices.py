"""The reference a few channels at a time: no float64 copy of a whole input, and what is copied stays in a cache.

Channels have nothing to do with each other, so that every operation on some of them is the operation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.kernels import reference
from batchnorm.kernels.running_statistics import check_both

VALUES = 2**20  # of a slice: 8 MiB for each float64 tensor that the reference makes of it

_OF_X = ("x", "dy", "residual")  # of the input's shape
_OF_A_CHANNEL = ("mean", "var", "m2", "weight", "bias", "mean_dz", "mean_dz_xhat")


@functools.cache
def operation(name: str) -> Callable[..., Any]:
    """The operation of this name: `kernels.reference`'s, with its arguments by position."""
    function: Callable[..., Any] = getattr(reference, name)
    parameters = tuple(inspect.signature(function).parameters)
    if name == "forward_commit":
        return forward_commit
    if "x" not in parameters:
        return function

    def in_slices(*args: Any) -> Any:  # noqa: ANN401 - of the operation
        given = dict(zip(parameters, args, strict=False))  # without those at the end that have their defaults
        x: Tensor = given["x"]
        axis = given["channel_dim"] % x.dim()
        channels = x.shape[axis]
        width = max(1, VALUES * channels // max(x.numel(), 1))
        if width >= channels or given.get("domain") is not None:  # tables would have to be told from inputs
            return function(*args)
        joined = _Joined(x, axis, _is_of_values(given.get("mask"), x, axis))
        for start in range(0, channels, width):
            part = {key: _part(key, value, x, axis, start, width) for key, value in given.items()}
            joined.add(function(**part), start)
        return joined.result()

    return in_slices


def forward_commit(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - of the operation
    """`reference.forward_commit`, whose commit is one for all channels: it counts a batch."""
    *of_forward, running_mean, running_var, num_batches_tracked, num_batches_skipped, momentum = args
    check_both(running_mean, running_var)
    y, count, mean, m2 = operation("forward")(*of_forward)
    if running_mean is not None:
        reference.commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, count, mean, m2, momentum)
    return y, count, mean, m2


def _is_of_values(mask: Tensor | None, x: Tensor, axis: int) -> bool:
    """Whether a mask may differ between channels, so that each channel has a count."""
    return mask is not None and mask.dim() == x.dim() and mask.shape[axis] > 1


def _part(key: str, value: Any, x: Tensor, axis: int, start: int, width: int) -> Any:  # noqa: ANN401 - any argument
    """The part of one argument that belongs to `width` channels from start."""
    if not isinstance(value, Tensor):
        return value
    per_value = key in _OF_X or (key == "mask" and _is_of_values(value, x, axis))
    if not per_value and key not in _OF_A_CHANNEL and not (key == "count" and value.dim()):
        return value
    dim = axis if per_value else 0
    return value.narrow(dim, start, min(width, value.shape[dim] - start))


class _Joined:
    """What an operation returns, from what it returns for the parts."""

    def __init__(self, x: Tensor, axis: int, counts: bool) -> None:
        self._x, self._axis, self._counts = x, axis, counts
        self._results: list[list[Tensor]] = []
        self._alone = False

    def add(self, results: Tensor | tuple[Tensor, ...] | None, start: int) -> None:
        """The next part's results; what is of the input's shape is written where it belongs, and not kept."""
        self._alone = not isinstance(results, tuple)
        some = () if results is None else (results,) if isinstance(results, Tensor) else results
        if start == 0:
            self._results = [[layout.empty_laid_out(self._x)] if r.dim() == self._x.dim() else [] for r in some]
        for kept, result in zip(self._results, some, strict=True):
            if result.dim() == self._x.dim():
                kept[0].narrow(self._axis, start, result.shape[self._axis]).copy_(result)
            else:  # of a single channel, the reference takes its count for that of all
                kept.append(result.reshape(-1) if self._counts else result)

    def result(self) -> Any:  # noqa: ANN401 - of the operation
        """All of them."""
        # The moments' count is one for all channels; the residual's gradient may be empty.
        whole = [kept[0] if kept[0].dim() != 1 or not kept[0].numel() else torch.cat(kept) for kept in self._results]
        return (whole[0] if whole else None) if self._alone else tuple(whole)

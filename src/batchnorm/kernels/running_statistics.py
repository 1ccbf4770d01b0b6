"""What running statistics must be like before moments are committed to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import DTypeError, OptionError, ShapeError


def check_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    num_channels: int,
    device: torch.device,
) -> None:
    """Running statistics and their counter fit what is to be committed.

    Raises:
        ShapeError: statistics that are not (num_channels,), or a counter of more than one number.
        DTypeError: statistics that are not floating, or a counter that is no real number.
        OptionError: one lies on another device or requires a gradient, or the momentum is not finite.
    """
    # Small inputs feel every call: what is wrong is looked at again, and told, elsewhere.
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic.dim() != 1 or statistic.shape[0] != num_channels:
            layout.check_vector(statistic, name, num_channels)
        if statistic.device != device:
            layout.check_device(statistic, name, device)
        if not statistic.dtype.is_floating_point:
            _check_floating(statistic, name)
        if statistic.requires_grad:
            raise OptionError(
                f"got {name} with requires_grad=True in training, where it is changed in place and no gradient goes "
                f"through the change. Detach it, or normalise by it in inference"
            )
    if momentum is not None and not -math.inf < momentum < math.inf:
        raise OptionError(f"got momentum={momentum}; it must be finite, or None for the average of all batches")
    if num_batches_tracked is not None:
        if num_batches_tracked.device != device:
            layout.check_device(num_batches_tracked, "num_batches_tracked", device)
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.dim() != 0:
            _check_number(num_batches_tracked, "num_batches_tracked")


def check_both(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """There are two running statistics to commit to, or none.

    Raises:
        OptionError: there is one.
    """
    if (running_mean is None) != (running_var is None):
        raise OptionError("got running_mean without running_var, or the other way round; give both, or None for both")


def check_commit(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    momentum: float | None,
) -> None:
    """What `commit` changes fits the moments.

    Raises:
        ShapeError: a tensor has another shape than its channels, or its one number, give it.
        DTypeError: statistics that are not floating, or a counter that is no number.
        OptionError: one lies on another device than the moments, or in memory that cannot be written.
    """
    channels = mean.numel()
    for name, vector in (("mean", mean), ("m2", m2)):
        layout.check_vector(vector, name, channels)
        _check_floating(vector, name)
    check_running(running_mean, running_var, num_batches_tracked, momentum, channels, mean.device)
    layout.check_vector(num_batches_skipped, "num_batches_skipped", channels)
    if num_batches_skipped is not None and num_batches_skipped.dtype != torch.int64:
        raise DTypeError(f"got num_batches_skipped of dtype {num_batches_skipped.dtype}; it must be torch.int64")
    if num_batches_skipped is not None:
        layout.check_device(num_batches_skipped, "num_batches_skipped", mean.device)
    _check_number(count, "count")
    written = {
        "running_mean": running_mean,
        "running_var": running_var,
        "num_batches_tracked": num_batches_tracked,
        "num_batches_skipped": num_batches_skipped,
    }
    for name, tensor in ((name, tensor) for name, tensor in written.items() if tensor is not None):
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise OptionError(
                f"got {name} in which several elements share one place in memory, as in what expand() returns; it is "
                f"written in place. Use .clone() first"
            )


def _check_floating(tensor: Tensor, name: str) -> None:
    if not tensor.dtype.is_floating_point:
        raise DTypeError(f"got {name} of dtype {tensor.dtype}; it must be of a floating dtype. Use .float()")


def _check_number(number: Tensor, name: str) -> None:
    if number.numel() != 1:
        raise ShapeError(f"got {name} of shape {tuple(number.shape)}; it must be one number, of shape ()")
    if number.dtype == torch.bool or number.dtype.is_complex:
        raise DTypeError(f"got {name} of dtype {number.dtype}; it must be a number, as torch.int64")

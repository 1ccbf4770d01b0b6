"""What running statistics must be like before moments are committed to them."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.errors import DTypeError, OptionError, ShapeError


def check_commit(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
) -> None:
    """What `commit` changes fits the moments.

    Raises:
        ShapeError: a tensor has another shape than its channels, or its one number, give it.
        DTypeError: statistics that are not floating, or a counter that is no number.
        OptionError: one lies on another device than the moments, or in memory that cannot be written.
    """
    channels = mean.numel()
    vectors = {"running_mean": running_mean, "running_var": running_var, "mean": mean, "m2": m2}
    for name, vector in vectors.items():
        layout.check_vector(vector, name, channels)
        if not vector.is_floating_point():
            raise DTypeError(f"got {name} of dtype {vector.dtype}; it must be floating. Convert it with .float()")
    layout.check_vector(num_batches_skipped, "num_batches_skipped", channels)
    if num_batches_skipped is not None and num_batches_skipped.dtype != torch.int64:
        raise DTypeError(f"got num_batches_skipped of dtype {num_batches_skipped.dtype}; it must be torch.int64")
    _check_number(count, "count")
    if num_batches_tracked is not None:
        _check_number(num_batches_tracked, "num_batches_tracked")
    written = {
        "running_mean": running_mean,
        "running_var": running_var,
        "num_batches_tracked": num_batches_tracked,
        "num_batches_skipped": num_batches_skipped,
    }
    for name, tensor in ((name, tensor) for name, tensor in written.items() if tensor is not None):
        if tensor.device != mean.device:
            raise OptionError(
                f"got {name} on {tensor.device} and moments on {mean.device}; all must be on one device. Move the "
                f"layer with .to(...)"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise OptionError(
                f"got {name} in which several elements share one place in memory, as in what expand() returns; it is "
                f"written in place. Use .clone() first"
            )


def _check_number(number: Tensor, name: str) -> None:
    if number.numel() != 1:
        raise ShapeError(f"got {name} of shape {tuple(number.shape)}; it must be one number, of shape ()")
    if number.dtype == torch.bool or number.dtype.is_complex:
        raise DTypeError(f"got {name} of dtype {number.dtype}; it must be a number, as torch.int64")

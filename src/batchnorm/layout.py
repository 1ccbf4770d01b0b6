"""The law of shapes: an input is (N, C, *S), one dimension holds the channels, all others are observations.

Everything that depends on which dimension that is stands here, and how results lie in memory; how inputs may lie is the
kernels' concern.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from batchnorm.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


def channel_axis(ndim: int, channel_dim: int) -> int:
    """The channel dimension as an index from 0.

    Args:
        ndim: rank of the input, at least 2.
        channel_dim: 0 <= channel_dim < ndim, or negative to count from the end.

    Raises:
        ShapeError: the rank is below 2, or there is no such dimension.
    """
    if ndim < 2:
        raise ShapeError(
            f"got an input of rank {ndim}; batch normalization needs at least 2 dimensions, (N, C) or (N, C, *S). "
            f"Add the missing one, for example with x.unsqueeze(0)"
        )
    if not -ndim <= channel_dim < ndim:
        raise ShapeError(
            f"got channel_dim={channel_dim} for an input of rank {ndim}; it must lie in [{-ndim}, {ndim - 1}]. "
            f"Use 1 for channels first, -1 for channels last"
        )
    return channel_dim % ndim


def observed_dims(ndim: int, axis: int) -> tuple[int, ...]:
    """The dimensions that statistics reduce over: all but the channels'."""
    return tuple(dim for dim in range(ndim) if dim != axis)


def observed_shape(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The input's shape without the channel dimension."""
    return (*shape[:axis], *shape[axis + 1 :])


def count(shape: Sequence[int], axis: int) -> int:
    """n, the number of values of each channel."""
    return math.prod(observed_shape(shape, axis))


def per_channel(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """A (C,) vector viewed so that it broadcasts against an input of rank `ndim`."""
    return vector.view(tuple(-1 if dim == axis else 1 for dim in range(ndim)))


def check_vector(vector: Tensor | None, name: str, num_channels: int) -> None:
    """One value for each channel, or nothing.

    Raises:
        ShapeError: `vector` is not of shape (num_channels,).
    """
    if vector is not None and (vector.dim() != 1 or vector.shape[0] != num_channels):
        raise ShapeError(
            f"got {name} of shape {tuple(vector.shape)} for an input with {num_channels} channels; "
            f"it must have shape ({num_channels},). Check num_features and channel_dim"
        )


def check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    """A tensor is where the input is.

    Raises:
        OptionError: it is elsewhere.
    """
    if tensor.device != device:
        remedy = (
            "It has no values yet: load them with load_state_dict(..., assign=True), or make room with .to_empty()"
            if tensor.device.type == "meta"
            else "Move the layer or the input with .to()"
        )
        raise OptionError(
            f"got {name} on device {tensor.device} for an input on device {device}; all must be on one. {remedy}"
        )


def expand_mask(mask: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """`mask` with one value for each position: the input's shape without the channel dimension.

    Args:
        mask: of that shape, with 1 where it broadcasts, or (N,): one value for each sample.
        shape: the input's.
        axis: the channel dimension.

    Raises:
        ShapeError: the mask does not fit.
    """
    wanted = observed_shape(shape, axis)
    if mask.dim() == 1 and mask.shape[0] == wanted[0]:
        mask = mask.view(-1, *[1] * (len(wanted) - 1))
    # Two comparisons: to the compiler, `m in (1, s)` is false of sizes that are symbols.
    if mask.dim() != len(wanted) or any(m != 1 and m != s for m, s in zip(mask.shape, wanted, strict=True)):
        raise ShapeError(
            f"got a mask of shape {tuple(mask.shape)} for an input of shape {tuple(shape)}; it must be "
            f"{wanted}, the input's shape without its channels, with 1 where it broadcasts, or ({wanted[0]},)"
        )
    return mask.expand(wanted)


def check_mask_values(mask: Tensor) -> None:
    """A mask's values are booleans or finite numbers >= 0; looking at numbers waits for the device.

    Raises:
        OptionError: a value that is negative or not finite.
    """
    if mask.dtype == torch.bool or mask.numel() == 0:
        return
    least, most = mask.aminmax()  # in one sweep; NaN comes out of it as both
    if not (least.item() >= 0 and most.item() < float("inf")):
        raise OptionError(
            "got a mask with negative values or values that are not finite; sample weights must be >= 0. Use 0 for "
            "what is not to count"
        )


def check_same_shape(other: Tensor, name: str, x: Tensor) -> None:
    """`other` is added to the normalised input, so it must have the input's shape.

    Raises:
        ShapeError: it has another.
    """
    if other.shape != x.shape:
        raise ShapeError(
            f"got {name} of shape {tuple(other.shape)} for an input of shape {tuple(x.shape)}; "
            f"both must be equal. Expand or crop the {name} first"
        )


def _looks_channels_last(x: Tensor) -> bool:
    """Torch's own rule: what is packed in one of the two orders has it, contiguous first, where sizes of 1 fit both.

    Of others its `suggest_memory_format` decides: whether the strides grow from the channels over *S to N.
    """
    rank, sizes, strides = x.dim(), x.shape, x.stride()
    if rank not in (4, 5) or _is_packed(x, range(rank - 1, -1, -1)):
        return False
    if _is_packed(x, (1, *range(rank - 1, 1, -1), 0)):
        return True
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, *range(rank - 1, 1, -1), 0):
        # In the last dimension: of one value for each sample, both orders are the same, and it counts as contiguous.
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * sizes[dim]
    return True


def _is_packed(x: Tensor, dims: Iterable[int]) -> bool:
    """Whether the values lie without gaps in this order of dimensions, the one that changes fastest first."""
    stride = 1
    for dim in dims:
        if x.shape[dim] != 1:
            if x.stride(dim) != stride:
                return False
            stride *= x.shape[dim]
    return True


def laid_out(result: Tensor, x: Tensor) -> Tensor:
    """`result`, of x's shape, with the strides that torch gives the result of an operation on x."""
    if _looks_channels_last(x):  # written with permutations, which transforms of torch.func know
        return _packed(result.movedim(1, -1)).movedim(-1, 1)
    return _packed(result)


def empty_laid_out(x: Tensor) -> Tensor:
    """Room for such a result, of x's dtype."""
    memory_format = torch.contiguous_format
    if _looks_channels_last(x):
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _packed(tensor: Tensor) -> Tensor:
    """Contiguous, with the strides of a new tensor: a dimension of size 1 may have any in one that is contiguous."""
    packed = tensor.contiguous()
    # Not always: a DTensor in uneven parts cannot be flattened.
    return packed.flatten().view(tensor.shape) if 1 in tensor.shape else packed

"""What becomes of a normalised input, and what it has to fit."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from batchnorm import layout
from batchnorm.errors import DTypeError, OptionError
from batchnorm.kernels import reference


class Recipe(NamedTuple):
    """What becomes of a normalised input: everything that the operations take besides the input and its statistics."""

    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    channel_dim: int
    activation: str | None

    def corrected(self, r: Tensor, d: Tensor) -> Recipe:
        """The recipe for what is normalised, times r, plus d, (C,) each: batch renormalization."""
        weight, bias = self.weight, self.bias
        shift = d if weight is None else weight * d
        return self._replace(weight=r if weight is None else weight * r, bias=shift if bias is None else bias + shift)


class Running(NamedTuple):
    """Running statistics, and how much new ones weigh: what `kernels.reference.commit` takes besides the moments."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    num_batches_skipped: Tensor | None
    momentum: float | None


def check(x: Tensor, recipe: Recipe) -> int:
    """An input and a recipe fit each other.

    Returns:
        The number of channels; 0 for an empty input below rank 2.

    Raises:
        ShapeError: a rank, a number of channels or the residual's shape does not fit.
        DTypeError: an input that is not floating, or a residual of another dtype.
        OptionError: an unknown activation.
    """
    if not x.dtype.is_floating_point:
        raise DTypeError(
            f"got an input of dtype {x.dtype}; batch normalization needs a floating dtype. Convert it with x.float()"
        )
    check_activation(recipe.activation)
    rank = x.dim()
    if rank < 2 and x.numel() == 0:
        return 0  # torch takes an empty tensor of any rank; there is nothing to check it against
    num_channels = x.shape[layout.channel_axis(rank, recipe.channel_dim)]
    layout.check_vector(recipe.weight, "weight", num_channels)
    layout.check_vector(recipe.bias, "bias", num_channels)
    if recipe.residual is not None:
        layout.check_same_shape(recipe.residual, "residual", x)
        if recipe.residual.dtype != x.dtype:
            raise DTypeError(
                f"got a residual of dtype {recipe.residual.dtype} for an input of dtype {x.dtype}; both must be equal. "
                f"Convert one of them with .to()"
            )
    return num_channels


def check_activation(activation: str | None) -> None:
    """One of the activations' names, or None.

    Raises:
        OptionError: it is neither.
    """
    if activation is not None and activation not in reference.ACTIVATIONS:
        known = ", ".join(f'"{name}"' for name in reference.ACTIVATIONS)
        raise OptionError(f"got activation={activation!r}; it must be one of {known} or None")


def check_virtual_batch_size(size: int | None) -> None:
    """A positive number of samples, or None.

    Raises:
        OptionError: it is neither.
    """
    if size is not None and not (isinstance(size, int) and size >= 1):
        raise OptionError(f"got virtual_batch_size={size}; it must be a positive number of samples, or None")


def check_sharing(sync: bool, process_group: object, virtual_batch_size: int | None) -> None:
    """What a layer is told about other processes fits together.

    Raises:
        OptionError: a group without sync, or sync with ghost batches.
    """
    if process_group is not None and not sync:
        raise OptionError(
            "got a process_group without sync=True; a group is for sharing statistics. Pass both, or none"
        )
    if sync and virtual_batch_size is not None:
        raise OptionError(
            f"got virtual_batch_size={virtual_batch_size} with statistics that processes share; ghost batches make a "
            f"batch smaller, sharing makes it larger. Leave one of the two out"
        )

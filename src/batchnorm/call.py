"""A call of batch normalization, validated once: its tensors by name, its options beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from batchnorm import layout
from batchnorm._torch import in_functorch, is_traced
from batchnorm.activations import ACTIVATIONS, check_activation
from batchnorm.errors import DTypeError, OptionError, ShapeError
from batchnorm.kernels.reference import statistics_dtype

_KNOWN = {None, *ACTIVATIONS}

_ATTRIBUTES = (
    "x",
    "weight",
    "bias",
    "residual",
    "mask",
    "eps",
    "channel_dim",
    "activation",
    "num_channels",
    "assignment",
)

# eps, channel_dim, activation: what the operators take between the tensors.
Options = tuple[float, int, str | None]
# weight, bias and residual, then the options: what the operators take after the input and its statistics.
Arguments = tuple[Tensor | None, Tensor | None, Tensor | None, float, int, str | None]


class Assignment(NamedTuple):
    """Which of several domains each sample is of.

    Attributes:
        domain: (N,) int64, from 0 to D - 1.
        samples: how many samples each of the D domains has.
        mark: a number >= 0 that tells it from others, where somebody asks: `autograd.marked`.
    """

    domain: Tensor
    samples: tuple[int, ...]
    mark: int = 0

    def to(self, device: torch.device) -> Assignment:
        """The same on another device."""
        return self._replace(domain=self.domain.to(device))


class Call:
    """What is normalised, and what becomes of it: y = activation(normalised * weight + bias + residual).

    Args:
        x: (N, C, *S) floating; an empty one may have any rank.
        weight: (C,) gamma; None for 1.
        bias: (C,) beta; None for 0.
        residual: of x's shape and dtype, or None.
        mask: which positions count in the batch's moments: bool, or sample weights >= 0; of x's shape without the
            channels, with 1 where it broadcasts, or (N,). Not looked at where x is empty.
        eps: added to the variance.
        channel_dim: the dimension of the channels; kept as an index from 0.
        activation: a name of `activations.ACTIVATIONS`, or None.
        assignment: of samples of several domains; statistics then are tables, (D, C), weight and bias (D, C) or (C,).

    Attributes:
        num_channels: C; 0 for an empty input below rank 2.

    Raises:
        ShapeError: a rank, a number of channels, the residual's or the mask's shape does not fit.
        DTypeError: an input that is not floating, or a residual of another dtype.
        OptionError: an unknown activation, a sample weight that is negative or not finite, or a tensor on another
            device than x.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        eps: float = 1e-5,
        channel_dim: int = 1,
        activation: str | None = None,
        assignment: Assignment | None = None,
    ) -> None:
        # One function: small inputs feel every call. What is wrong is looked at again, and told, elsewhere.
        if not x.dtype.is_floating_point:
            how = (
                "Normalise the two channels of torch.view_as_real(x), or the absolute value"
                if x.dtype.is_complex
                else "Convert it with x.float()"
            )
            raise DTypeError(f"got an input of dtype {x.dtype}; batch normalization needs a floating dtype. {how}")
        if activation not in _KNOWN:
            check_activation(activation)
        rank = x.dim()
        if rank >= 2 and -rank <= channel_dim < rank:
            channel_dim %= rank
            num_channels = x.shape[channel_dim]
            if weight is not None and (weight.dim() != 1 or weight.shape[0] != num_channels):
                _check_parameter(weight, "weight", num_channels, assignment)
            if bias is not None and (bias.dim() != 1 or bias.shape[0] != num_channels):
                _check_parameter(bias, "bias", num_channels, assignment)
            if mask is not None:
                mask = None if x.numel() == 0 else checked_mask(mask, x, channel_dim)
        elif rank < 2 and x.numel() == 0:  # torch takes an empty tensor of any rank; there is nothing to check
            num_channels, mask = 0, None
        else:
            layout.channel_axis(rank, channel_dim)
        if residual is not None:
            layout.check_same_shape(residual, "residual", x)
            if residual.dtype != x.dtype:
                raise DTypeError(
                    f"got a residual of dtype {residual.dtype} for an input of dtype {x.dtype}; both must be equal. "
                    f"Convert one of them with .to()"
                )
        device = x.device
        if weight is not None and weight.device != device:
            layout.check_device(weight, "weight", device)
        if bias is not None and bias.device != device:
            layout.check_device(bias, "bias", device)
        if residual is not None and residual.device != device:
            layout.check_device(residual, "residual", device)
        self.x = x
        self.weight = weight
        self.bias = bias
        self.residual = residual
        self.mask = mask
        self.eps = eps
        self.channel_dim = channel_dim
        self.activation = activation
        self.num_channels = num_channels
        self.assignment = assignment
        if assignment is not None:
            _check_assignment(assignment, x, channel_dim)

    @property
    def arguments(self) -> Arguments:
        """What the operators take after the input and its statistics."""
        return self.weight, self.bias, self.residual, self.eps, self.channel_dim, self.activation

    @property
    def count(self) -> int:
        """The number of values of each channel."""
        return layout.count(self.x.shape, self.channel_dim)

    @property
    def num_samples(self) -> int:
        """N: the size of the first dimension that is not the channels'."""
        return self.x.shape[1 if self.channel_dim == 0 else 0]

    def replace(self, **changes: Tensor | int | Assignment | None) -> Self:
        """The same with other attributes, which are not validated."""
        # Not copy.copy, where the graph breaks in torch.compile of torch 2.10.
        changed = object.__new__(type(self))
        for name in _ATTRIBUTES:
            setattr(changed, name, changes[name] if name in changes else getattr(self, name))
        return changed

    def corrected(self, r: Tensor, d: Tensor) -> Self:
        """The call for what is normalised, times r, plus d, (C,) each: batch renormalization."""
        weight, bias = self.weight, self.bias
        shift = d if weight is None else weight * d
        return self.replace(weight=r if weight is None else weight * r, bias=shift if bias is None else bias + shift)


def empty_output(call: Call) -> Tensor:
    """Nothing, with the input's shape, tied to every operand so that their gradients are zeros instead of None."""
    y = call.x.clone()
    for operand in (call.weight, call.bias, call.residual):
        if operand is not None:
            y = y + (operand.sum() * 0).to(y.dtype)
    return y


def checked_mask(mask: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The mask with one value for each position, bool or floating."""
    layout.check_device(mask, "mask", x.device)
    if not (
        in_functorch() or torch.compiler.is_compiling() or is_traced() or x.is_meta
    ):  # values cannot be looked at there
        layout.check_mask_values(mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.to(statistics_dtype(mask.device))
    return layout.expand_mask(mask, x.shape, channel_dim)


def _check_parameter(parameter: Tensor, name: str, num_channels: int, assignment: Assignment | None) -> None:
    """Raises ShapeError unless it has one value for each channel, or for each domain and channel."""
    if assignment is None or parameter.shape != (len(assignment.samples), num_channels):
        layout.check_vector(parameter, name, num_channels)


def _check_assignment(assignment: Assignment, x: Tensor, channel_dim: int) -> None:
    """Raises ShapeError unless there is a domain for each sample, OptionError where they are on another device."""
    samples = x.shape[1 if channel_dim == 0 else 0] if x.dim() >= 2 else 0
    if assignment.domain.shape[0] != samples:
        raise ShapeError(
            f"got the domains of {assignment.domain.shape[0]} samples for an input of shape {tuple(x.shape)} with "
            f"{samples}; each sample needs one. Give one domain for all, or change the domains where samples are "
            f"split, repeated or reshaped"
        )
    layout.check_device(assignment.domain, "domain", x.device)


def check_virtual_batch_size(size: int | None) -> None:
    """A positive number of samples, or None.

    Raises:
        OptionError: it is neither.
    """
    if size is not None and not (isinstance(size, int) and size >= 1):
        raise OptionError(f"got virtual_batch_size={size}; it must be a positive number of samples, or None")


def check_sync(sync: bool, process_group: object, virtual_batch_size: int | None) -> None:
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


def wrong_eps(eps: float) -> OptionError:
    """The error for an eps that training cannot have."""
    return OptionError(f"got eps={eps}; eps must be positive and finite in training. torch's default is 1e-5")

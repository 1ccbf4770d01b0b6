"""What the kernels move in a step, counted without a device: launches on meta tensors are recorded, not started.

A kernel goes through each tensor of the input's shape that it is given exactly once, which a test holds by counting
loads and stores; so what it is given says what it moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.kernels.triton import operations, passes
from batchnorm.kernels.triton.launch import Argument, Grid


@dataclass(frozen=True)
class Traffic:
    """Launches, and the bytes that they read and write; parts of one add up to the whole.

    Attributes:
        launches: how many kernels are started.
        bytes: of tensors of the input's shape. Values of channels, partial sums and masks are left out: less than a
            hundredth for inputs that are large enough for bytes to matter.
    """

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.launches + other.launches, self.bytes + other.bytes)


def of_step(x: Tensor, channel_dim: int, activation: str | None, *, residual: bool) -> dict[str, Traffic]:
    """What our kernels move for a layer with weight, bias and running statistics.

    Args:
        x: the input, or a meta tensor like it, without gaps. Nothing is computed, and nothing is read of it.
        channel_dim: of x.
        activation: of the layer.
        residual: whether one is added.

    Returns:
        By phase: "forward" and "backward" of a training step, "both", and "inference".
    """
    x = torch.empty_like(x, device="meta")
    weight, bias, mean, var = (torch.empty(x.shape[channel_dim], device="meta") for _ in range(4))
    batches, skipped = torch.empty((), dtype=torch.int64, device="meta"), torch.empty_like(mean, dtype=torch.int64)
    arguments = (weight, bias, torch.empty_like(x) if residual else None, 1e-5, channel_dim, activation)
    with _recorded(x.shape) as forward:
        _, *moments = operations.forward_commit(x, *arguments, None, mean, var, batches, skipped, 0.1)
    with _recorded(x.shape) as backward:
        count, batch_mean, m2 = moments
        operations.backward(torch.empty_like(x), x, count, batch_mean, m2, *arguments)
    with _recorded(x.shape) as inference:
        operations.normalize(x, mean, var, *arguments)
    parts = {"forward": sum(forward, Traffic()), "backward": sum(backward, Traffic())}
    return {**parts, "both": parts["forward"] + parts["backward"], "inference": sum(inference, Traffic())}


@contextmanager
def _recorded(shape: torch.Size) -> Iterator[list[Traffic]]:
    """Launches inside are not started, and what each would move is in the list."""
    found: list[Traffic] = []

    def record(kernel: object, grid: Grid, arguments: tuple[Argument, ...], *_: object) -> None:
        tensors = [t for t in arguments if isinstance(t, Tensor) and t.shape == shape]
        found.append(Traffic(1, sum(t.numel() * t.element_size() for t in tensors)))

    names = vars(passes)
    launch, names["launch"] = names["launch"], record
    try:
        yield found
    finally:
        names["launch"] = launch

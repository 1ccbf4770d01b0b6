"""What torch's own operators move in a step of BN + ReLU, counted on meta tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moved(NamedTuple):
    kernels: int
    bytes: float  # for each value of the input


class Count(TorchDispatchMode):
    """Counts operators as one kernel each, which reads every tensor of the input's shape once and writes its results.

    A batch norm has to know its sums before it can write anything: it goes through its inputs once more, in `reads`
    kernels, unless it finds them in a cache.
    """

    def __init__(self, shape: torch.Size, reads: int) -> None:
        super().__init__()
        self.moved, self._shape, self._reads = Moved(0, 0.0), shape, reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if function.is_view:
            return results
        read, written = (self._values(tensors) for tensors in ((args, kwargs), results))
        if "batch_norm" in function.__name__:
            read, kernels = read * self._reads, self._reads
        else:
            kernels = 1
        if read + written:
            self.moved = Moved(self.moved.kernels + kernels, self.moved.bytes + read + written)
        return results

    def _values(self, tensors: Any) -> int:
        """Bytes for each value."""
        return sum(t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.shape == self._shape)


def moved_by_torch(x: Tensor, *, residual: bool, reads: int) -> list[Moved]:
    """Forward and backward, for x on the meta device."""
    x = x.detach().requires_grad_()
    weight, bias = (torch.ones(x.shape[1], device="meta").requires_grad_() for _ in range(2))
    mean, var = (torch.ones(x.shape[1], device="meta") for _ in range(2))
    inputs = [x, weight, bias] + [torch.empty_like(x).requires_grad_()] * residual
    dy = torch.empty_like(x)
    with Count(x.shape, reads) as forward:
        y = F.batch_norm(x, mean, var, weight, bias, training=True)
        if residual:
            y = y + inputs[-1]
        y = F.relu(y)
    with Count(x.shape, reads) as backward:
        torch.autograd.grad(y, inputs, dy)
    return [forward.moved, backward.moved]

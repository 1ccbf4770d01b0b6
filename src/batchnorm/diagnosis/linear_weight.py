"""Which weight a tensor was computed with, read from autograd's graph."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import Node

# Where a linear layer's node has its weight among its inputs.
_WEIGHT = {"ConvolutionBackward0": 1, "AddmmBackward0": 2, "MmBackward0": 1}
# What changes shape, layout or precision alone.
_TRANSPARENT = frozenset(
    f"{name}Backward0" for name in ("View", "UnsafeView", "T", "Transpose", "Permute", "ToCopy", "Clone")
)


def linear_weight(x: Tensor) -> Tensor | None:
    """The weight of the linear layer that x is the output of; None where something else, or nothing, made it.

    A weight that is computed from parameters, or learns nothing, is None too.
    """
    node = _past_views(x.grad_fn)
    if node is None or node.name() not in _WEIGHT:
        return None
    leaf = _past_views(node.next_functions[_WEIGHT[node.name()]][0])
    weight = getattr(leaf, "variable", None)  # of nodes that accumulate a gradient
    return weight if isinstance(weight, Tensor) else None


def _past_views(node: Node | None) -> Node | None:
    while node is not None and node.name() in _TRANSPARENT:
        node = node.next_functions[0][0]
    return node

"""Operations between the layers whose results can be computed again: how, from what, by the history of the result.

The results of activations, concatenations, products and views are; those of everything else are kept: of dropout
because its numbers are drawn, of padding because torch does not tell the value, of sums and convolutions because what
they are computed from is not there, of max pooling because torch's takes long. The places of its
maxima are kept in fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import _torch
from batchnorm.memory.values import Value

Find = Callable[[int], Value | None]  # the value of an operation's input, by its number


class Recipe(NamedTuple):
    """How to compute a result again.

    Attributes:
        again: from the inputs' values.
        inputs: what it is computed from.
        copied: how many bytes are kept for this alone.
    """

    again: Callable[..., Tensor]
    inputs: tuple[Value, ...]
    copied: int = 0


def _elementwise(function: Callable[..., Tensor], *parameters: str) -> Callable[..., Recipe | None]:
    """The rule of an activation; its parameters are those that its node has kept."""

    def rule(node: Any, result: Tensor, find: Find) -> Recipe | None:  # noqa: ANN401 - torch's nodes have no type
        z = find(0)
        if z is None or z.shape != result.shape or z.dtype != result.dtype:
            return None
        given = [_torch.saved_by(node, name) for name in parameters]
        return Recipe(lambda z: function(z, *given), (z,))

    return rule


def places(saved: Tensor, shape: torch.Size, dimensions: int) -> Recipe:
    """The places of a max pooling's maxima, from a copy in the smallest integers that hold them.

    Args:
        saved: the places in int64, as torch counts them: in each channel of each sample from 0 on.
        shape: of the pooling's input.
        dimensions: how many of its last dimensions are pooled.
    """
    positions = shape[-dimensions:].numel()
    dtype = torch.uint8 if positions <= 2**8 else torch.uint16 if positions <= 2**16 else torch.int32
    own = Value(saved.to(dtype))
    return Recipe(lambda small: small.to(torch.int64), (own,), own.bytes)


def _concatenation(node: Any, result: Tensor, find: Find) -> Recipe | None:  # noqa: ANN401 - torch's nodes have no type
    """From its parts; one part that nobody knows is kept, as a copy."""
    dim, rank, shape = int(_torch.saved_by(node, "dim")), result.dim(), result.shape
    dim = (dim - 2**64 if dim >= 2**63 else dim) % rank  # negative ones are kept as unsigned numbers
    known = [find(i) for i in range(len(node.next_functions))]
    for part in known:
        if part is not None and (
            len(part.shape) != rank
            or part.dtype != result.dtype
            or any(part.shape[d] != shape[d] for d in range(rank) if d != dim)
        ):
            return None
    unknown = [i for i, part in enumerate(known) if part is None]
    sizes = [0 if part is None else part.shape[dim] for part in known]
    rest = shape[dim] - sum(sizes)
    if len(unknown) > 1 or rest < 0 or (not unknown and rest) or 2 * rest > shape[dim]:
        return None
    parts, copied = list(known), 0
    if unknown:
        (place,) = unknown
        with torch.no_grad():
            copy = result.detach().narrow(dim, sum(sizes[:place]), rest).clone()
        parts[place] = own = Value(copy)
        copied = own.bytes
    return Recipe(lambda *parts: torch.cat(parts, dim), tuple(part for part in parts if part is not None), copied)


def _product(node: Any, result: Tensor, find: Find) -> Recipe | None:  # noqa: ANN401 - torch's nodes have no type
    a, b = find(0), find(1)
    if a is None or b is None or a.dtype != result.dtype or b.dtype != result.dtype:
        return None
    return Recipe(torch.mul, (a, b))


# By the names that torch gives to the nodes of its graph.
ACTIVATIONS: dict[str, Callable[[Any, Tensor, Find], Recipe | None]] = {
    "ReluBackward0": _elementwise(torch.relu),
    "SiluBackward0": _elementwise(F.silu),
    "MishBackward0": _elementwise(F.mish),
    "HardswishBackward0": _elementwise(F.hardswish),
    "HardsigmoidBackward0": _elementwise(F.hardsigmoid),
    "SigmoidBackward0": _elementwise(torch.sigmoid),
    "TanhBackward0": _elementwise(torch.tanh),
    "HardtanhBackward0": _elementwise(F.hardtanh, "min_val", "max_val"),
    "LeakyReluBackward0": _elementwise(F.leaky_relu, "negative_slope"),
    "GeluBackward0": _elementwise(lambda z, approximate: F.gelu(z, approximate=approximate), "approximate"),
}
MAX_POOLS = {"MaxPool2DWithIndicesBackward0": 2, "MaxPool3DWithIndicesBackward0": 3}  # dimensions
RULES = {
    "CatBackward0": _concatenation,
    "MulBackward0": _product,
    **ACTIVATIONS,
}

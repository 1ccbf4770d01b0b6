"""Training steps recorded in C++ and in Python, which have to give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm import ops
from support.operations import assert_the_same_bits

NODE, FUNCTION = "CppNode", "_BatchNormBackward"


@contextmanager
def way(python: bool) -> Iterator[None]:
    """Inside, training steps are recorded in Python, or as the package does."""
    native = ops.select(torch.zeros(2, 3))
    kept = native.train, native.train_domains
    assert None not in kept
    native.train, native.train_domains = (None, None) if python else kept
    try:
        yield
    finally:
        native.train, native.train_domains = kept


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What it gives in C++ and in Python, from the same random numbers."""
    results = []
    for python in (False, True):
        torch.manual_seed(0)
        with way(python):
            results.append(run())
    return results[0], results[1]


def assert_equal_both_ways(run: Callable[[], list[Tensor | None]]) -> None:
    actual, expected = both(run)
    assert [t is None for t in actual] == [t is None for t in expected]
    assert_the_same_bits([t for t in actual if t is not None], [t for t in expected if t is not None])


def step(
    shape: tuple[int, ...] = (6, 3, 5),
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    residual: bool = False,
    mask: bool = False,
    requires: tuple[bool, bool] = (True, True),
    node: str = NODE,
    domain: list[int] | None = None,
    **options: Any,
) -> list[Tensor | None]:
    """y, all gradients and all statistics of a step; checks whose node is in the graph."""
    names = None if domain is None else ("a", "b", "c")
    layer = bn.BatchNorm(shape[1], activation=activation, domains=names, **options)
    x, r = (torch.randn(shape, dtype=dtype).requires_grad_(needs) for needs in requires)
    m = torch.rand(shape[0], *shape[2:]) > 0.3 if mask else None
    with nullcontext() if domain is None else bn.domain(layer, domain):
        y = layer(x, residual=r if residual else None, mask=m)
    native = ops.select(x).train is not None
    if y.requires_grad:
        assert (node if native else FUNCTION) in y.grad_fn.name()
        y.backward(torch.randn_like(y))
    return [
        y.detach(),
        x.grad,
        r.grad,
        *(p.grad for p in layer.parameters()),
        *layer.buffers(),
        layer.num_batches_skipped,
    ]


class Seen(TorchDispatchMode):
    """The operators that a dispatch mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

"""The kernels in Triton, for CUDA and ROCm: whether they can be had, and what they are for.

Triton itself takes a third of a second to import, so `operations`, which needs it, is imported when the first tensor
comes. `plan` has the table that decides how a shape is gone through, `arrangement` how tensors lie, `launch` starts
kernels, `device` has them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ACTIVATIONS", "AVAILABLE", "DTYPES", "UNAVAILABLE_REASON", "failure", "operation"]

AVAILABLE = importlib.util.find_spec("triton") is not None
UNAVAILABLE_REASON = "" if AVAILABLE else "the package triton is not installed; torch's builds for GPUs bring it"

# float64 has the reference: a value and its sums would have to be wider than float64 for what ours promise of float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What `device.activations` has; None is no activation.
ACTIVATIONS: frozenset[str | None] = frozenset(
    {None, "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu", "relu6", "mish", "sigmoid", "tanh"}
)


def operation(name: str) -> Callable[..., Any]:
    """The operation of this name, which imports Triton when it is called first."""

    @functools.cache
    def found() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module("batchnorm.kernels.triton.operations"), name)
        return function

    return lambda *args: found()(*args)


@functools.cache
def failure(device: torch.device) -> str:
    """Why kernels do not run on a device, where the package is: its compiler, say, finds none for C; "" if they do.

    The smallest input there is tells, once for each device.
    """
    x = torch.tensor([[1.0], [3.0]], device=device)
    try:
        operation("forward")(x, None, None, None, 1e-5, 1, None)
    except Exception as error:  # whatever a compiler raises: it is told, and there is another way
        return f"{type(error).__name__}: {error}"
    return ""

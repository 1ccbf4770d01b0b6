"""The kernels in C++: their shared library, its instruction sets, and the memory of its outputs.

The library registers the operators' implementations for the CPU by itself, under the names of `kernels.reference`,
whether the schemas are defined before it is loaded or after. What it is asked and told besides goes through operators
too: `loops/` has what is compiled once for each instruction set, `host/` the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["ACTIVATIONS", "AVAILABLE", "UNAVAILABLE_REASON", "level", "levels", "resizable_outputs", "use_level"]


def _load() -> str:
    """Load the shared library. Returns why it cannot be used, and nothing ("") where it can."""
    spec = importlib.util.find_spec("batchnorm._native")
    if spec is None or spec.origin is None:
        return "this installation has no native extension; a wheel for this platform brings one"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the native extension does not load: {error}"
    return ""


UNAVAILABLE_REASON = _load()
AVAILABLE = not UNAVAILABLE_REASON

_operators = torch.ops.batchnorm
# What there are kernels for; None is no activation.
ACTIVATIONS: frozenset[str | None] = frozenset({None, *_operators._cpu_activations().split()} if AVAILABLE else ())


def levels() -> tuple[str, ...]:
    """The instruction sets that the kernels are compiled for and this machine has, the best last."""
    return tuple(_operators._cpu_levels().split()) if AVAILABLE else ()


def level() -> str:
    """The instruction set in use; "" where the library is not available."""
    return str(_operators._cpu_level()) if AVAILABLE else ""


def use_level(name: str) -> None:
    """Have the kernels use one of `levels()`. The best is chosen when the package is imported.

    Raises:
        ValueError: this machine has no such level.
    """
    if not AVAILABLE or not _operators._use_cpu_level(name):
        raise ValueError(f"got level {name!r}; this machine has {levels()}")


@contextmanager
def resizable_outputs() -> Iterator[None]:
    """Inside, in all threads, outputs lie in torch's own memory, whose storages can be resized.

    Memory that is kept from one output for the next cannot.
    """
    if not AVAILABLE:
        yield
        return
    before = _operators._cpu_output_pool()
    _operators._use_cpu_output_pool(False)
    try:
        yield
    finally:
        _operators._use_cpu_output_pool(before)

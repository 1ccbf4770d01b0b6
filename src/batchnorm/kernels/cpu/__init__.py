"""The kernels in C++: their shared library, its instruction sets, and the memory of its outputs.

The library registers the operators' implementations for the CPU by itself, under the names of `kernels.reference`,
whether the schemas are defined before it is loaded or after. What it is asked and told besides goes through operators
too: `loops/` has what is compiled once for each instruction set, `host/` the rest. `autograd/` is a library of its own,
with the operators `train` and `train_domains`, for the torch that it was compiled with.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = [
    "ACTIVATIONS",
    "AUTOGRAD",
    "AVAILABLE",
    "UNAVAILABLE_REASON",
    "level",
    "levels",
    "resizable_outputs",
    "use_level",
]


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


def _load_autograd(folder: Path) -> str:
    """Load the library that was compiled with exactly this torch. Returns the file's name, "" where there is none."""
    version, commit = torch.__version__.partition("+")[0], str(torch.version.git_version)[:8]
    library = folder / f"_autograd-{version}-{commit}.so"
    if not library.is_file():
        return ""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(
            f"the library for training steps without Python does not load, small inputs take longer: {error}",
            UserWarning,
            stacklevel=2,
        )
        return ""
    return library.name


UNAVAILABLE_REASON = _load()
AVAILABLE = not UNAVAILABLE_REASON
_found = importlib.util.find_spec("batchnorm._native") if AVAILABLE else None
# The file whose `train` is in use, "" where there is none for this torch.
AUTOGRAD = "" if _found is None or _found.origin is None else _load_autograd(Path(_found.origin).parent)

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


def _limit_pool(wanted: str | None) -> None:
    """How much memory of outputs may lie idle: what BATCHNORM_POOL_MIB says."""
    if wanted is None or not AVAILABLE:
        return
    if not (wanted.isascii() and wanted.isdigit() and len(wanted) < 20):
        warnings.warn(
            f"got BATCHNORM_POOL_MIB={wanted!r}; it must be a whole number of MiB, 0 for no pool. An eighth of the "
            f"memory is the limit, as without it",
            UserWarning,
            stacklevel=3,
        )
        return
    _operators._cpu_set_output_pool_limit(min(int(wanted), 2**42) * 2**20)


_limit_pool(os.environ.get("BATCHNORM_POOL_MIB"))


@contextmanager
def resizable_outputs() -> Iterator[None]:
    """Inside, in all threads, outputs lie in torch's own memory, whose storages can be resized.

    Memory that is kept from one output for the next cannot.
    """
    if not AVAILABLE:
        yield
        return
    # A number of its own, so that threads may come and go in any order.
    number = _operators._cpu_new_number()
    _operators._cpu_set_outputs_elsewhere(number, True)
    try:
        yield
    finally:
        _operators._cpu_set_outputs_elsewhere(number, False)

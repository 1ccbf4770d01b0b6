"""Stand-in until the merge."""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

spec = importlib.util.find_spec("batchnorm._native")
UNAVAILABLE_REASON = (
    "" if spec and spec.origin else "this installation has no native extension; a wheel for this platform brings one"
)
AVAILABLE = not UNAVAILABLE_REASON
ACTIVATIONS: frozenset[str | None] = frozenset({None, "relu", "leaky_relu", "silu", "gelu", "hardswish", "elu"})
if AVAILABLE:
    torch.ops.load_library(spec.origin)
    _native = ctypes.CDLL(spec.origin)
    _native.batchnorm_levels.restype = ctypes.c_char_p
    _native.batchnorm_level.restype = ctypes.c_char_p
    _native.batchnorm_use_pool.argtypes, _native.batchnorm_use_pool.restype = (ctypes.c_bool,), ctypes.c_bool


def levels():
    return tuple(_native.batchnorm_levels().decode().split()) if AVAILABLE else ()


def level():
    return _native.batchnorm_level().decode() if AVAILABLE else ""


def use_level(name):
    if not AVAILABLE or not _native.batchnorm_use_level(name.encode()):
        raise ValueError(f"got level {name!r}; this machine has {levels()}")


@contextmanager
def resizable_outputs() -> Iterator[None]:
    before = _native.batchnorm_use_pool(False)
    try:
        yield
    finally:
        _native.batchnorm_use_pool(before)

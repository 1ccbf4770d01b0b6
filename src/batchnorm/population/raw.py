"""Memory as bytes."""

from __future__ import annotations

import ctypes


def raw(pointer: int, size: int) -> memoryview:
    """The bytes at an address, not a copy; whose they are has to live as long."""
    return memoryview((ctypes.c_ubyte * size).from_address(pointer)).cast("B")

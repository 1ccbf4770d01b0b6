"""Triton's interpreter, made to compute as devices do."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bfloat16_as_devices_do() -> None:
    """Round float32 to the nearest bfloat16, ties to even: the interpreter cuts off."""
    convert = interpreter._convert_float

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return np.where(np.isnan(data), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (data.astype(np.uint32) << np.uint32(16)).reshape(data.shape)
        return convert(data, source, target, mode)

    interpreter._convert_float = rounding


def take_numbers_for_float64() -> None:
    """Pass Python's floats on as float64, which kernels ask for: the interpreter has them float32.

    What is compiled follows the annotations; the tests of that see that every kernel has them.
    """
    convert = interpreter._implicit_cvt

    def wide(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument]), tl.float64), tl.float64)
        return convert(argument)

    interpreter._implicit_cvt = wide

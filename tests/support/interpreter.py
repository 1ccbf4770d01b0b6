"""Triton's interpreter, made to round as devices do."""

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

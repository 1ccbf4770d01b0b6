"""One way to say that numbers are those expected."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from support import tolerances
from support.oracle import Array

Values = Tensor | ArrayLike


def close(
    actual: Values | None,
    expected: Values | None,
    tolerance: float | None = None,
    *,
    relative: float | None = None,
    absolute: float | Array | None = None,
    rounded: bool = False,
    name: str = "",
) -> None:
    """Assert that two results are the same but for rounding:

        |actual - expected| <= tolerance * (1 + |expected|) + relative * |expected| + absolute

    A NaN is close to nothing, an infinity to itself. Two tensors must have one dtype and one device; an array or a
    number stands for exact values, and `actual` may then be of any dtype. None is close to None.

    Args:
        actual: what was computed.
        expected: what it should be, of the same shape.
        tolerance: of values of order 1 and above relative, of smaller ones absolute.
        relative: of the expected value.
        absolute: for all values, or an array of `expected`'s shape (or one that broadcasts to it).
        rounded: allow, besides, one rounding to `actual`'s dtype.
        name: what is compared, for the message.

    Without any of these bounds, a floating tensor may be what another computation in its dtype gives
    (`tolerances.AGAINST_TORCH`), and everything else has to be equal.
    """
    prefix = f"{name}: " * bool(name)
    if actual is None or expected is None:
        assert actual is expected, f"{prefix}got {actual} where {expected} is expected"
        return
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        got, wanted = (actual.dtype, actual.device), (expected.dtype, expected.device)
        assert got == wanted, f"{prefix}got {got} where {wanted} is expected"
    if tolerance is relative is absolute is None and not rounded and isinstance(actual, Tensor):
        relative, absolute = tolerances.AGAINST_TORCH.get(actual.dtype, (0.0, 0.0))
    a, e = _array(actual), _array(expected)
    assert a.shape == e.shape, f"{prefix}got shape {a.shape} where {e.shape} is expected"
    size = np.abs(e)
    with np.errstate(invalid="ignore"):  # 0 of infinity, and infinity less infinity
        bound = (tolerance or 0.0) * (1 + size) + (relative or 0.0) * size + (0.0 if absolute is None else absolute)
        if rounded:
            assert isinstance(actual, Tensor), f"{prefix}rounded=True is for tensors"
            rounding = tolerances.ONE_ROUNDING[actual.dtype]
            bound = bound + rounding[0] * size + rounding[1]
        error = np.abs(a - e)
        right = (a == e) | (np.isfinite(error) & (error <= bound))
    if not right.all():
        bound = np.broadcast_to(bound, a.shape)
        with np.errstate(all="ignore"):
            excess = np.where(right, -np.inf, np.nan_to_num(error / bound, nan=np.inf))
        at = tuple(map(int, np.unravel_index(np.argmax(excess), a.shape)))
        raise AssertionError(
            f"{prefix}{(~right).sum()} of {right.size} values differ, most at {at}: got {a[at]} where {e[at]} is "
            f"expected, off by {error[at]:.3g} with a bound of {bound[at]:.3g}"
        )


def _array(values: Values) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)

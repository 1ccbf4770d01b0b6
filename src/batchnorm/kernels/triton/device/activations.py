"""The activations and their derivatives in float32: `batchnorm.activations` has what each means.

`tl.where` instead of `tl.maximum` and `tl.minimum`, which drop NaN on the device. A division and `exp` are good to a
few units in the last place there.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    # Near 0 by its series: 1 - 2 / (...) would keep few digits there.
    s = z * z
    series = z * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0)))
    return tl.where(s < 0.01, series, 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def _expm1(z):
    # Near 0 by its series, likewise.
    series = z * (1.0 + z * (0.5 + z * (1.0 / 6.0 + z * (1.0 / 24.0))))
    return tl.where(tl.abs(z) < 0.05, series, tl.exp(z) - 1.0)


@triton.jit
def _tanh_softplus(z):
    # With e = exp(z): (e^2 + 2e) / (e^2 + 2e + 2). At 20 it is 1, and beyond exp would overflow.
    e = tl.exp(tl.where(z > 20.0, 20.0, z))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The output y of z."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0.0, z, 0.01 * z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        c = z + 3.0
        z = z * tl.where(c < 0.0, 0.0, tl.where(c > 6.0, 6.0, c)) / 6.0
    elif ACTIVATION == "elu":
        z = tl.where(z > 0.0, z, _expm1(z))
    elif ACTIVATION == "mish":
        z = z * _tanh_softplus(z)
    elif ACTIVATION == "sigmoid":
        z = _sigmoid(z)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    else:
        tl.static_assert(ACTIVATION is None, "an activation without a kernel")
    return z


@triton.jit
def gradient(dy, z, ACTIVATION: tl.constexpr):
    """The gradient dz = dy y'(z); at a kink, what torch takes."""
    if ACTIVATION == "relu":
        dy = tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0.0, dy, 0.01 * dy)
    elif ACTIVATION == "relu6":
        dy = tl.where((z > 0.0) & (z < 6.0), dy, 0.0)
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "gelu":
        distribution = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dy = dy * (distribution + z * density)
    elif ACTIVATION == "hardswish":
        dy = tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, dy * (z / 3.0 + 0.5), dy))
    elif ACTIVATION == "elu":
        dy = tl.where(z > 0.0, dy, dy * tl.exp(z))
    elif ACTIVATION == "mish":
        t = _tanh_softplus(z)
        dy = dy * (t + z * _sigmoid(z) * (1.0 - t * t))
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(z)
        dy = dy * s * (1.0 - s)
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        dy = dy * (1.0 - t * t)
    else:
        tl.static_assert(ACTIVATION is None, "an activation without a kernel")
    return dy

"""Batch normalization in float64 NumPy, written from the paper's formulas. It shares no code with the package.

Arrays are (N, C, *S) with the channels in dimension `axis`; statistics are (C,).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _dims(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.ndim) if d != axis % x.ndim)


def _spread(v: Array, x: Array, axis: int) -> Array:
    shape = [1] * x.ndim
    shape[axis] = -1
    return v.reshape(shape)


def moments(x: Array, axis: int = 1, weights: Array | None = None) -> tuple[float, Array, Array]:
    """Count, mean and sum of squared deviations; weights have x's shape without the channels."""
    flat = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    w = np.ones(flat.shape[1]) if weights is None else weights.reshape(-1)
    flat, w = flat[:, w > 0], w[w > 0]
    n = math.fsum(w)
    mean = np.array([math.fsum(row * w) / n if n else 0.0 for row in flat])
    m2 = np.array([math.fsum(w * (row - m) ** 2) for row, m in zip(flat, mean, strict=True)])
    return n, mean, m2


def _erf(z: Array) -> Array:
    return np.vectorize(math.erf, otypes=[float])(z)


def activate(z: Array, name: str | None) -> Array:
    match name:
        case None:
            return z
        case "relu":
            return np.maximum(z, 0)
        case "relu6":
            return np.clip(z, 0, 6)
        case "leaky_relu":
            return np.where(z > 0, z, 0.01 * z)
        case "silu":
            return z / (1 + np.exp(-z))
        case "gelu":
            return z * 0.5 * (1 + _erf(z / math.sqrt(2)))
        case "hardswish":
            return z * np.clip(z + 3, 0, 6) / 6
        case "elu":
            return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))
        case "mish":
            return z * np.tanh(np.logaddexp(0, z))
        case "sigmoid":
            return 1 / (1 + np.exp(-z))
        case "tanh":
            return np.tanh(z)
    raise AssertionError(name)


def activate_grad(z: Array, name: str | None) -> Array:
    match name:
        case None:
            return np.ones_like(z)
        case "relu":
            return (z > 0).astype(float)
        case "relu6":
            return ((z > 0) & (z < 6)).astype(float)
        case "leaky_relu":
            return np.where(z > 0, 1.0, 0.01)
        case "silu":
            s = 1 / (1 + np.exp(-z))
            return s * (1 + z * (1 - s))
        case "gelu":
            return 0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        case "hardswish":
            return np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, (2 * z + 3) / 6))
        case "elu":
            return np.where(z > 0, 1.0, np.exp(np.minimum(z, 0)))
        case "mish":
            t = np.tanh(np.logaddexp(0, z))
            return t + z * (1 - t * t) / (1 + np.exp(-z))
        case "sigmoid":
            s = 1 / (1 + np.exp(-z))
            return s * (1 - s)
        case "tanh":
            return 1 / np.cosh(z) ** 2
    raise AssertionError(name)


def preactivation(
    x: Array, mean: Array, var: Array, weight: Array, bias: Array, residual: Array | None, eps: float, axis: int = 1
) -> Array:
    x_hat = (x - _spread(mean, x, axis)) / np.sqrt(_spread(var, x, axis) + eps)
    z = x_hat * _spread(weight, x, axis) + _spread(bias, x, axis)
    return z if residual is None else z + residual


def forward(
    x: Array,
    weight: Array,
    bias: Array,
    residual: Array | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    *,
    weights: Array | None = None,
) -> tuple[Array, Array, Array]:
    n, mean, m2 = moments(x, axis, weights)
    z = preactivation(x, mean, m2 / (n or 1), weight, bias, residual, eps, axis)
    return activate(z, activation), mean, m2


def backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array,
    bias: Array,
    residual: Array | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    *,
    constants: bool = False,
    weights: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """dx, dz (the residual's gradient), d weight, d bias. With `constants`, mean and var do not depend on x; otherwise
    by as much as each position weighs."""
    dims = _dims(x, axis)
    z = preactivation(x, mean, var, weight, bias, residual, eps, axis)
    dz = dy * activate_grad(z, activation)
    std = np.sqrt(_spread(var, x, axis) + eps)
    x_hat = (x - _spread(mean, x, axis)) / std
    d_xhat = dz * _spread(weight, x, axis)
    if constants:
        dx = d_xhat / std
    else:
        w = np.ones_like(x) if weights is None else np.broadcast_to(np.expand_dims(weights, axis), x.shape)
        n = w.sum(dims, keepdims=True) + (w.sum(dims, keepdims=True) == 0)
        through = d_xhat.sum(dims, keepdims=True) / n + x_hat * (d_xhat * x_hat).sum(dims, keepdims=True) / n
        dx = (d_xhat - w * through) / std
    return dx, dz, (dz * x_hat).sum(dims), dz.sum(dims)


def commit(running: tuple[Array, Array], n: float, mean: Array, m2: Array, momentum: float) -> tuple[Array, Array]:
    """Running mean and variance after one update by moments of n values."""
    old_mean, old_var = running
    return (1 - momentum) * old_mean + momentum * mean, (1 - momentum) * old_var + momentum * m2 / (n - 1)

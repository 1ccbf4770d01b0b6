"""The kernels of the backward pass."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.activations import gradient
from batchnorm.kernels.triton.device.statistics import centred, coefficients, variance_of
from batchnorm.kernels.triton.device.tiles import (
    channels_of,
    load,
    load_wide,
    over_lanes,
    parts_at,
    per_lane,
    store,
    tile,
)


@triton.jit
def _given(count, mean_in, second_in, c, there):
    """Count, mean and variance, from mean and m2 with a count, from mean and variance without; no count is 1."""
    mean = load_wide(mean_in, c, there)
    var = load_wide(second_in, c, there)
    n = tl.full([], 1.0, tl.float64)
    if count is not None:
        n = tl.load(count).to(tl.float64)
        var = variance_of(n, var)
        n = tl.where(n > 0, n, 1.0)
    return n, mean, var


@triton.jit
def _gradient_of(
    dy,
    x,
    residual,
    offset,
    inside,
    hi,
    unit,
    factor,
    shift,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
):
    """A tile's dz, and x unit - hi. With MASKED, x may be anything where dy is 0: there it is taken for the mean."""
    g = load(dy, offset, inside)
    d = centred(load(x, offset, inside), hi, unit, LAST)
    if MASKED:
        used = tl.where(g != 0.0, d, 0.0)
    else:
        used = d
    if ACTIVATION is not None:
        z = used * per_lane(factor, LAST) + per_lane(shift, LAST)
        if residual is not None:
            z += load(residual, offset, inside)
        g = gradient(g, z, ACTIVATION)
    return g, used, d


@triton.jit
def _input_coefficients(unit, factor, rstd, rest, mean_dz, mean_dz_xhat):
    """A, B and D in dx = A dz + w (B (x unit - hi) + D), with the mean's rounding in D."""
    a = factor * unit
    b = -factor.to(tl.float64) * rstd * mean_dz_xhat
    d = -a.to(tl.float64) * (mean_dz - rstd * rest * mean_dz_xhat)
    return a, b.to(tl.float32), d.to(tl.float32)


@triton.jit
def _sum_dz_xhat(sum_dz, sum_dz_d, unit, rstd, rest):
    r"""The sum \sum dz x_hat from \sum dz and \sum dz (x unit - hi)."""
    return (sum_dz_d / unit - sum_dz * rest) * rstd


@triton.jit
def _sum_of_splits(part, c, there, channels, splits, CHUNK: tl.constexpr, LAST: tl.constexpr):
    total = tl.where(there, 0.0, 0.0).to(tl.float64)
    for start in range(0, splits, CHUNK):
        at, inside = parts_at(start, c, there, channels, splits, CHUNK, LAST)
        total += tl.sum(tl.load(part + at, mask=inside, other=0.0), 0)
    return total


@triton.jit
def sums_kernel(
    dy,
    x,
    residual,
    part,
    count,
    mean_in,
    second_in,
    weight,
    bias,
    eps: "fp64",
    outer,
    channels,
    inner,
    tiles_inner,
    tiles,
    per_split,
    splits,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Each split's sums of dz and of dz x_hat into part, (2, splits, channels)."""
    block, split = tl.program_id(0), tl.program_id(1)
    c, there = channels_of(block, channels, COLUMNS, LAST)
    _n, mean, var = _given(count, mean_in, second_in, c, there)
    hi, unit, factor, shift, rstd, rest = coefficients(c, there, mean, var, weight, bias, eps)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    sx = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = split * per_split
    for t in range(first, tl.minimum(first + per_split, tiles)):
        offset, inside, _position, _there, _positions = tile(
            t, block, outer, channels, inner, tiles_inner, ROWS, COLUMNS, LAST
        )
        dz, used, _d = _gradient_of(dy, x, residual, offset, inside, hi, unit, factor, shift, MASKED, ACTIVATION, LAST)
        s += tl.where(inside, dz, 0.0)
        sx += tl.where(inside, dz * used, 0.0)
    a = over_lanes(s.to(tl.float64), LAST)
    b = over_lanes(sx.to(tl.float64), LAST)
    at = split.to(tl.int64) * channels + c
    store(part, at, a, there)
    store(part, tl.cast(splits, tl.int64) * channels + at, _sum_dz_xhat(a, b, unit, rstd, rest), there)


@triton.jit
def finish_sums_kernel(
    part,
    count,
    sum_dz,
    sum_dz_xhat,
    mean_dz,
    mean_dz_xhat,
    channels,
    splits,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of all splits; with a count, these over it, too."""
    c, there = channels_of(tl.program_id(0), channels, COLUMNS, True)
    a = _sum_of_splits(part, c, there, channels, splits, CHUNK, True)
    b = _sum_of_splits(part + tl.cast(splits, tl.int64) * channels, c, there, channels, splits, CHUNK, True)
    store(sum_dz, c, a, there)
    store(sum_dz_xhat, c, b, there)
    if count is not None:
        n = tl.load(count).to(tl.float64)
        n = tl.where(n > 0, n, 1.0)
        store(mean_dz, c, a / n, there)
        store(mean_dz_xhat, c, b / n, there)


@triton.jit
def _write_input_gradient(
    dx, dresidual, offset, inside, dz, d, mask, position, position_there, a, b, shift, LAST: tl.constexpr
):
    """The gradients dx = a dz + w (b (x - hi) + shift), and dresidual. Without b, the statistics are constants."""
    gradient_of_x = per_lane(a, LAST) * dz
    if b is not None:
        through = per_lane(b, LAST) * d + per_lane(shift, LAST)
        if mask is not None:
            w = load(mask, position, position_there)
            through = tl.where(w > 0.0, through * w, 0.0)
        gradient_of_x += through
    store(dx, offset, gradient_of_x, inside)
    if dresidual is not None:
        store(dresidual, offset, dz, inside)


@triton.jit
def input_kernel(
    dy,
    x,
    residual,
    mask,
    dx,
    dresidual,
    part,
    sum_dz,
    sum_dz_xhat,
    count,
    mean_in,
    second_in,
    mean_dz,
    mean_dz_xhat,
    weight,
    bias,
    eps: "fp64",
    outer,
    channels,
    inner,
    tiles_inner,
    tiles,
    per_split,
    splits,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The gradients dx and dresidual.

    With part, from the sums of all splits, which every program joins and the first of a channel writes. Without, from
    the means that are given; without these, too, the statistics are constants.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    c, there = channels_of(block, channels, COLUMNS, LAST)
    n, mean, var = _given(count, mean_in, second_in, c, there)
    hi, unit, factor, shift, rstd, rest = coefficients(c, there, mean, var, weight, bias, eps)
    a = factor * unit
    b = None
    through = None
    if part is not None:
        s = _sum_of_splits(part, c, there, channels, splits, CHUNK, LAST)
        sx = _sum_of_splits(part + tl.cast(splits, tl.int64) * channels, c, there, channels, splits, CHUNK, LAST)
        if split == 0:
            store(sum_dz, c, s, there)
            store(sum_dz_xhat, c, sx, there)
        a, b, through = _input_coefficients(unit, factor, rstd, rest, s / n, sx / n)
    elif mean_dz is not None:
        given = load_wide(mean_dz, c, there)
        given_xhat = load_wide(mean_dz_xhat, c, there)
        a, b, through = _input_coefficients(unit, factor, rstd, rest, given, given_xhat)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    for i in range(first, last):
        t = first + last - 1 - i  # backwards: what the sums read last is still in the cache
        offset, inside, position, position_there, _positions = tile(
            t, block, outer, channels, inner, tiles_inner, ROWS, COLUMNS, LAST
        )
        dz, _used, d = _gradient_of(dy, x, residual, offset, inside, hi, unit, factor, shift, MASKED, ACTIVATION, LAST)
        _write_input_gradient(dx, dresidual, offset, inside, dz, d, mask, position, position_there, a, b, through, LAST)


@triton.jit
def whole_backward_kernel(
    dy,
    x,
    residual,
    mask,
    dx,
    dresidual,
    sum_dz,
    sum_dz_xhat,
    count,
    mean_in,
    m2_in,
    weight,
    bias,
    eps: "fp64",
    outer,
    channels,
    inner,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    """All gradients where a tile holds all of a channel; x and dy are read once."""
    block = tl.program_id(0)
    c, there = channels_of(block, channels, COLUMNS, LAST)
    n, mean, var = _given(count, mean_in, m2_in, c, there)
    hi, unit, factor, shift, rstd, rest = coefficients(c, there, mean, var, weight, bias, eps)
    offset, inside, position, position_there, _positions = tile(
        0, block, outer, channels, inner, 1, ROWS, COLUMNS, LAST
    )
    dz, used, d = _gradient_of(dy, x, residual, offset, inside, hi, unit, factor, shift, MASKED, ACTIVATION, LAST)
    s = over_lanes(tl.where(inside, dz, 0.0).to(tl.float64), LAST)
    sx = over_lanes(tl.where(inside, dz * used, 0.0).to(tl.float64), LAST)
    sx = _sum_dz_xhat(s, sx, unit, rstd, rest)
    store(sum_dz, c, s, there)
    store(sum_dz_xhat, c, sx, there)
    a, b, through = _input_coefficients(unit, factor, rstd, rest, s / n, sx / n)
    _write_input_gradient(dx, dresidual, offset, inside, dz, d, mask, position, position_there, a, b, through, LAST)

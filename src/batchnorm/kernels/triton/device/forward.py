"""The kernels of the forward pass."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.activations import activate
from batchnorm.kernels.triton.device.statistics import (
    blend,
    centred,
    coefficients,
    count_of,
    join,
    join_lanes,
    lost_squares,
    moments_about,
    range_of,
    shift_of,
    sums_of_tiles,
    unit_of_range,
    variance_of,
    write_moments,
)
from batchnorm.kernels.triton.device.tiles import (
    channels_of,
    load,
    load_wide,
    over_block,
    per_lane,
    store,
    tile,
)


@triton.jit
def moments_kernel(
    x,
    mask,
    part,
    outer,
    channels,
    inner,
    tiles_inner,
    tiles,
    per_split,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Each split's count, mean and m2 into part, (3, splits, channels)."""
    block, split = tl.program_id(0), tl.program_id(1)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    n, k, a, b = sums_of_tiles(
        x, mask, block, first, last, outer, channels, inner, tiles_inner, None, None, ROWS, COLUMNS, LAST
    )
    mean, m2 = moments_about(n, k, a, b, None)
    c, there = channels_of(block, channels, COLUMNS, LAST)
    at = split.to(tl.int64) * channels + c
    size = tl.cast(splits, tl.int64) * channels
    lost, unit = lost_squares(b)
    store(part, at, n, there)
    store(part, size + at, mean, there & (lost == 0))
    store(part, 2 * size + at, m2, there & (lost == 0))
    if over_block(lost.to(tl.int32), LAST) > 0:  # not for all of them: no channel depends on its neighbours
        n, k, a, b = sums_of_tiles(
            x, mask, block, first, last, outer, channels, inner, tiles_inner, k, unit, ROWS, COLUMNS, LAST
        )
        mean, m2 = moments_about(n, k, a, b, unit)
        store(part, size + at, mean, there & lost)
        store(part, 2 * size + at, m2, there & lost)


@triton.jit
def finish_moments_kernel(
    part,
    count_out,
    mean_out,
    m2_out,
    running_mean,
    running_var,
    tracked,
    skipped,
    momentum: "fp64",
    channels,
    splits,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The moments of all splits, and their commit where there are running statistics."""
    c, there = channels_of(tl.program_id(0), channels, COLUMNS, True)
    n, mean, m2 = join(part, c, there, channels, splits, CHUNK, True)
    write_moments(
        c, there, n, mean, m2, count_out, mean_out, m2_out, running_mean, running_var, tracked, skipped, momentum
    )


@triton.jit
def _output(v, residual, offset, inside, hi, unit, factor, shift, ACTIVATION: tl.constexpr, LAST: tl.constexpr):
    """The output y of a tile of values."""
    z = centred(v, hi, unit, LAST) * per_lane(factor, LAST) + per_lane(shift, LAST)
    if residual is not None:
        z += load(residual, offset, inside)
    return activate(z, ACTIVATION)


@triton.jit
def normalize_kernel(
    x,
    residual,
    y,
    part,
    count,
    mean_in_out,
    second_in_out,
    weight,
    bias,
    running_mean,
    running_var,
    tracked,
    skipped,
    eps: "fp64",
    momentum: "fp64",
    outer,
    channels,
    inner,
    tiles_inner,
    tiles,
    per_split,
    splits,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The output y.

    With part, by the moments of all splits, which every program joins; the first of a channel writes them and commits
    them. Without, by what is given: mean and m2 with a count, mean and variance without.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    c, there = channels_of(block, channels, COLUMNS, LAST)
    if part is not None:
        n, mean, m2 = join(part, c, there, channels, splits, CHUNK, LAST)
        var = variance_of(n, m2)
        if split == 0:
            write_moments(
                c,
                there,
                n,
                mean,
                m2,
                count,
                mean_in_out,
                second_in_out,
                running_mean,
                running_var,
                tracked,
                skipped,
                momentum,
            )
    else:
        mean = load_wide(mean_in_out, c, there)
        var = load_wide(second_in_out, c, there)
        if count is not None:
            var = variance_of(tl.load(count).to(tl.float64), var)
    hi, unit, factor, shift, _rstd, _rest = coefficients(c, there, mean, var, weight, bias, eps)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    for i in range(first, last):
        t = first + last - 1 - i  # backwards: what the moments read last is still in the cache
        offset, inside, _position, _there, _positions = tile(
            t, block, outer, channels, inner, tiles_inner, ROWS, COLUMNS, LAST
        )
        v = load(x, offset, inside)
        store(y, offset, _output(v, residual, offset, inside, hi, unit, factor, shift, ACTIVATION, LAST), inside)


@triton.jit
def whole_forward_kernel(
    x,
    mask,
    residual,
    y,
    count_out,
    mean_out,
    m2_out,
    weight,
    bias,
    running_mean,
    running_var,
    tracked,
    skipped,
    eps: "fp64",
    momentum: "fp64",
    outer,
    channels,
    inner,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    """All of it where a tile holds all of a channel: moments, output and commit, and x is read once."""
    block = tl.program_id(0)
    c, there = channels_of(block, channels, COLUMNS, LAST)
    offset, inside, position, position_there, positions = tile(0, block, outer, channels, inner, 1, ROWS, COLUMNS, LAST)
    v = load(x, offset, inside)
    counted = inside
    if mask is not None:
        w = load(mask, position, position_there)
        counted = inside & (w > 0.0)
    least, largest = range_of(v, counted, LAST)
    k, _counted = shift_of(v, counted, least, largest, LAST)
    unit = unit_of_range(least, largest)
    d = tl.where(counted, centred(v, k * unit, unit, LAST), 0.0)
    if mask is not None:
        n = count_of(w)
        a, b = join_lanes(w * d, w * d * d, LAST)
    else:
        n = positions.to(tl.float64)
        a, b = join_lanes(d, d * d, LAST)
    mean, m2 = moments_about(n, k, a, b, unit)
    write_moments(
        c, there, n, mean, m2, count_out, mean_out, m2_out, running_mean, running_var, tracked, skipped, momentum
    )
    hi, unit, factor, shift, _rstd, _rest = coefficients(c, there, mean, variance_of(n, m2), weight, bias, eps)
    store(y, offset, _output(v, residual, offset, inside, hi, unit, factor, shift, ACTIVATION, LAST), inside)


@triton.jit
def commit_kernel(
    running_mean,
    running_var,
    tracked,
    skipped,
    count,
    mean_in,
    m2_in,
    momentum: "fp64",
    channels,
    AVERAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`commit` of given moments by one program: with AVERAGE, all channels have to be seen before any is changed."""
    n = tl.load(count).to(tl.float64)
    lanes = tl.arange(0, COLUMNS)
    factor = momentum
    if tracked is not None:
        before = tl.load(tracked)
        batches = before + tl.where(n > 0, 1, 0).to(before.dtype)
        if AVERAGE:
            changed = 0
            for start in range(0, channels, COLUMNS):
                c = start + lanes
                there = c < channels
                initial = (load_wide(running_mean, c, there) == 0) & (load_wide(running_var, c, there) == 1)
                changed += tl.sum(tl.where(there & (initial == 0), 1, 0), 0)
            # Statistics that were loaded with a counter of 0 weigh as one batch.
            loaded = (n > 0) & (before == 0) & (changed > 0)
            batches = batches + tl.where(loaded, 1, 0).to(before.dtype)
            factor = 1.0 / batches.to(tl.float64)
        tl.debug_barrier()  # nothing is changed before everybody has read it
        tl.store(tracked, batches)
    for start in range(0, channels, COLUMNS):
        c = start + lanes
        there = c < channels
        mean = load_wide(mean_in, c, there)
        m2 = load_wide(m2_in, c, there)
        blend(c, there, n, mean, m2, running_mean, running_var, skipped, factor)

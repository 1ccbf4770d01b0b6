"""Moments: of a run of tiles, of all of them together, and as running statistics.

A lane of a tile sums x - k and its square in float32, k being next to the mean; lanes, and after them the parts that
programs took, are joined in float64, always in the same order.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.tiles import load, load_wide, over_lanes, per_lane, rounded, store, tile


@triton.jit
def _finite(values):
    return values - values == 0.0


@triton.jit
def shift_of(values, counted, LAST: tl.constexpr):
    """k, the mean of a tile's values that count, and how many these are; k is 0 where it would not be finite."""
    n = over_lanes(tl.where(counted, 1.0, 0.0), LAST)
    k = over_lanes(tl.where(counted, values, 0.0), LAST) / tl.where(n > 0.0, n, 1.0)
    # Between the least and the largest: of equal values, exactly these.
    least = tl.min(tl.where(counted, values, float("inf")), 0)
    largest = tl.max(tl.where(counted, values, float("-inf")), 0)
    if not LAST:
        least = tl.min(least, 0)
        largest = tl.max(largest, 0)
    k = tl.where(k < least, least, tl.where(k > largest, largest, k))
    return tl.where(_finite(k), k, 0.0), n


@triton.jit
def join_lanes(n, k, s1, s2, LAST: tl.constexpr):
    r"""Mean and m2 from lanes' sums about k, s1 = \sum w (x - k) and s2 = \sum w (x - k)^2, of n = \sum w."""
    a = over_lanes(s1.to(tl.float64), LAST)
    b = over_lanes(s2.to(tl.float64), LAST)
    mean = a / tl.where(n > 0, n, 1.0)
    m2 = b - a * mean
    return tl.where(n > 0, k.to(tl.float64) + mean, 0.0), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def weights_at(mask, position, there, inside):
    """What each value of a tile counts; 0 where nothing is."""
    return tl.where(inside, load(mask, position, there), 0.0)


@triton.jit
def moments_of_tiles(
    x,
    mask,
    block,
    first,
    last,
    outer,
    channels,
    inner,
    tiles_inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Count, mean and m2 of the tiles from first to last, which it leaves out; in float64, one for each channel."""
    s1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    s2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    sw = s1
    k = over_lanes(s1, LAST)
    seen = 0.0
    n = tl.full([], 0, tl.int64)
    for t in range(first, last):
        offset, inside, position, there, positions = tile(
            t, block, outer, channels, inner, tiles_inner, ROWS, COLUMNS, LAST
        )
        v = load(x, offset, inside)
        counted = inside
        if mask is not None:
            w = weights_at(mask, position, there, inside)
            counted = w > 0.0
        if seen == 0.0:  # no tile before had values that count
            k, in_tile = shift_of(v, counted, LAST)
            if LAST:
                in_tile = tl.max(in_tile, 0)
            seen = in_tile
        d = tl.where(counted, v - per_lane(k, LAST), 0.0)
        if mask is not None:
            s1 += w * d
            s2 += w * d * d
            sw += w
        else:
            s1 += d
            s2 += d * d
            n += positions
    if mask is not None:
        count = over_lanes(sw.to(tl.float64), LAST)
    else:
        count = n.to(tl.float64)
    mean, m2 = join_lanes(count, k, s1, s2, LAST)
    return count, mean, m2


@triton.jit
def join(part, c, there, channels, splits, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """Count, mean and m2 of all splits. part is (3, splits, channels), c a channel or, with LAST, [COLUMNS] of them."""
    size = tl.cast(splits, tl.int64) * channels
    zero = tl.where(there, 0.0, 0.0).to(tl.float64)
    count = zero
    mean = zero
    m2 = zero
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        if LAST:
            at = split.to(tl.int64)[:, None] * channels + c[None, :]
            inside = (split < splits)[:, None] & there[None, :]
        else:
            at = split.to(tl.int64) * channels + c
            inside = (split < splits) & there
        ns = tl.load(part + at, mask=inside, other=0.0)
        means = tl.load(part + size + at, mask=inside, other=0.0)
        m2s = tl.load(part + 2 * size + at, mask=inside, other=0.0)
        n = tl.sum(ns, 0)
        safe = tl.where(n > 0, n, 1.0)
        # About one of the means, so that equal ones join to exactly themselves.
        k = tl.max(tl.where(ns > 0, means, float("-inf")), 0)
        k = tl.where(_finite(k), k, 0.0)
        new = tl.where(n > 0, k + tl.sum(ns * (means - per_lane(k, LAST)), 0) / safe, 0.0)
        d = means - per_lane(new, LAST)
        m2s = tl.sum(m2s + ns * d * d, 0)
        # And now this chunk with those before.
        total = tl.where(count + n > 0, count + n, 1.0)
        between = new - mean
        joined = mean + between * (n / total)
        # One infinity is the mean; less itself it would be NaN.
        mean = tl.where(_finite(joined), joined, (count * mean + n * new) / total)
        m2 = m2 + m2s + between * between * (count * n / total)
        count = count + n
    return count, mean, m2


@triton.jit
def variance_of(n, m2):
    """The biased variance; 0 of nothing."""
    return m2 / tl.where(n > 0, n, 1.0)


@triton.jit
def write_moments(c, there, n, mean, m2, count_out, mean_out, m2_out):
    """Write what a call returns; the count once, by whoever has channel 0."""
    store(count_out, c * 0, n, c == 0)
    store(mean_out, c, mean, there)
    store(m2_out, c, m2, there)


@triton.jit
def count_batch(c, n, tracked):
    """Count one batch, where any value counted; by whoever has channel 0."""
    before = tl.load(tracked + c * 0, mask=c == 0, other=0)
    store(tracked, c * 0, before + tl.where(n > 0, 1, 0).to(before.dtype), c == 0)


@triton.jit
def blend(c, there, n, mean, m2, running_mean, running_var, skipped, factor):
    """`commit` of channels, without the counter of batches: by a factor that is known."""
    n = tl.where(there, n, 0.0)  # one for each channel, as everything else
    var = m2 / (n - 1.0)
    old_mean = tl.load(running_mean + c, mask=there, other=0.0)
    old_var = tl.load(running_var + c, mask=there, other=0.0)
    new_mean = rounded((1.0 - factor) * old_mean.to(tl.float64) + factor * mean, old_mean.dtype)
    new_var = rounded((1.0 - factor) * old_var.to(tl.float64) + factor * var, old_var.dtype)
    # After rounding: what a half cannot hold is not finite.
    finite = _finite(new_mean.to(tl.float64)) & _finite(new_var.to(tl.float64)) & _finite(mean) & _finite(var)
    finite = finite & (n > 1.0)
    tl.store(running_mean + c, new_mean, mask=there & finite)
    tl.store(running_var + c, new_var, mask=there & finite)
    if skipped is not None:
        before = tl.load(skipped + c, mask=there, other=0)
        tl.store(skipped + c, before + 1, mask=there & (n > 0) & (finite == 0))


@triton.jit
def coefficients(c, there, mean, var, weight, bias, eps):
    """What a value is normalised by, in float32: z = (x - hi) scale + shift; and 1 / sqrt(var + eps) in float64.

    hi is the float32 next to the mean. What it leaves is in the shift, so that nothing is lost.
    """
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if weight is not None:
        scale = rstd * load_wide(weight, c, there)
    hi = mean.to(tl.float32)
    shift = -remainder(mean, hi) * scale
    if bias is not None:
        shift += load_wide(bias, c, there)
    return hi, scale.to(tl.float32), shift.to(tl.float32), rstd


@triton.jit
def remainder(mean, hi):
    """The difference mean - hi in float64; 0 where both are the same infinity."""
    wide = hi.to(tl.float64)
    return tl.where(mean == wide, 0.0, mean - wide)

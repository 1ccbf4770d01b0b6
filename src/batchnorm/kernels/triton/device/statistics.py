"""Moments: of a run of tiles, of all of them together, and as running statistics.

A lane of a tile sums x - k and its square in float32, k being next to the mean; lanes, and after them the parts that
programs took, are joined in float64, always in the same order. A part with squares that float32 does not hold is
gone through once more, in another unit.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.device.tiles import (
    load,
    load_wide,
    over_block,
    over_lanes,
    parts_at,
    per_lane,
    rounded,
    store,
    tile,
)


@triton.jit
def _finite(values):
    return values - values == 0.0


@triton.jit
def _exponent(values):
    """The bits of a float32 that are its exponent."""
    return values.to(tl.int32, bitcast=True) & 0x7F800000


@triton.jit
def _power_of_two(exponent):
    """The float32 of these bits; at least the least normal number, at most the largest whose inverse is one."""
    power = exponent.to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, 1.1754943508222875e-38), 8.507059173023462e37)


@triton.jit
def range_of(values, counted, LAST: tl.constexpr):
    """The least and the largest of a tile's values that count; infinities where none does."""
    least = tl.min(tl.where(counted, values, float("inf")), 0)
    largest = tl.max(tl.where(counted, values, float("-inf")), 0)
    if not LAST:
        least = tl.min(least, 0)
        largest = tl.max(largest, 0)
    return least, largest


@triton.jit
def shift_of(values, counted, least, largest, LAST: tl.constexpr):
    """k, the mean of a tile's values that count, and how many these are; k is 0 where it would not be finite."""
    n = over_lanes(tl.where(counted, 1.0, 0.0), LAST)
    k = over_lanes(tl.where(counted, values, 0.0), LAST) / tl.where(n > 0.0, n, 1.0)
    # Between the least and the largest: of equal values, exactly these.
    k = tl.where(k < least, least, tl.where(k > largest, largest, k))
    return tl.where(_finite(k), k, 0.0), n


@triton.jit
def unit_of_range(least, largest):
    """A power of two by which values, and differences between them, are of order 1.

    By it no square of a difference overflows, nor underflows: differences that are not 0 are at least 2^-25 of the
    largest value.
    """
    return _power_of_two(0x7F000000 - _exponent(tl.maximum(-least, largest)))


@triton.jit
def join_lanes(s1, s2, LAST: tl.constexpr):
    r"""The sums \sum w (x - k) and \sum w (x - k)^2 of all lanes."""
    return over_lanes(s1.to(tl.float64), LAST), over_lanes(s2.to(tl.float64), LAST)


@triton.jit
def moments_about(n, k, a, b, unit):
    r"""Mean and m2 from a = \sum w (x - k) and b = \sum w (x - k)^2 in units of 1 / unit, and n = \sum w."""
    if unit is not None:
        wide = unit.to(tl.float64)
        a = a / wide
        b = b / (wide * wide)
    mean = a / tl.where(n > 0, n, 1.0)
    m2 = b - a * mean
    return tl.where(n > 0, k.to(tl.float64) + mean, 0.0), tl.where(m2 < 0, 0.0, m2)


@triton.jit
def count_of(weights):
    """The count of positions that weigh this much, each of which is here once: with LAST, [ROWS, 1]."""
    return tl.sum(tl.sum(weights.to(tl.float64), 0), 0)


@triton.jit
def centred(v, hi, unit, LAST: tl.constexpr):
    """The differences x unit - hi of a tile, of which the product is exact."""
    return v * per_lane(unit, LAST) - per_lane(hi, LAST)


@triton.jit
def sums_of_tiles(
    x,
    mask,
    block,
    first,
    last,
    outer,
    channels,
    inner,
    tiles_inner,
    k,
    unit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    r"""The sums of the tiles from first to last, which it leaves out, one for each channel.

    Without a unit, which is then 1, k is chosen here, from the first tile with values that count.

    Returns:
        In float64 the count \sum w; k; and in float64 \sum w (x - k) and \sum w (x - k)^2, in units.
    """
    s1 = tl.zeros([ROWS, COLUMNS], tl.float32)
    s2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    if LAST:
        sw = tl.zeros([ROWS, 1], tl.float32)
    else:
        sw = s1
    if unit is None:
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
            w = load(mask, position, there)
            counted = inside & (w > 0.0)
        if unit is None:
            if seen == 0.0:
                least, largest = range_of(v, counted, LAST)
                k, in_tile = shift_of(v, counted, least, largest, LAST)
                seen = over_block(in_tile, LAST)
            d = v - per_lane(k, LAST)
        else:
            d = centred(v, k * unit, unit, LAST)
        d = tl.where(counted, d, 0.0)
        if mask is not None:
            s1 += w * d
            s2 += w * d * d
            sw += w
        else:
            s1 += d
            s2 += d * d
            n += positions
    if mask is not None:
        count = count_of(sw)
    else:
        count = n.to(tl.float64)
    # A lane whose squares all became 0 shows by its first sum. 0 of all lanes are equal values, and right.
    s2 = tl.where((s2 == 0.0) & (s1 != 0.0), 1.2e-38, s2)
    a, b = join_lanes(s1, s2, LAST)
    return count, k, a, b


@triton.jit
def lost_squares(b):
    """Where float32 did not hold the squares that b is the sum of, and a unit in which it does.

    One overflowed: then some |x - k| is at least 2^50, and at most 2^129. Or all are so small that underflows may
    weigh: none is larger than 2^-43, and those that are not 0 are at least 2^-149.
    """
    overflowed = _finite(b) == 0
    return overflowed | ((b > 0.0) & (b < 1e-26)), tl.where(overflowed, 8.271806125530277e-25, 1.2379400392853803e27)


@triton.jit
def join(part, c, there, channels, splits, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """Count, mean and m2 of all splits. part is (3, splits, channels), c a channel or, with LAST, [COLUMNS] of them."""
    size = tl.cast(splits, tl.int64) * channels
    zero = tl.where(there, 0.0, 0.0).to(tl.float64)
    count = zero
    mean = zero
    m2 = zero
    for start in range(0, splits, CHUNK):
        at, inside = parts_at(start, c, there, channels, splits, CHUNK, LAST)
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
def write_moments(
    c, there, n, mean, m2, count_out, mean_out, m2_out, running_mean, running_var, tracked, skipped, momentum
):
    """Write what a call returns, and commit it where there are running statistics.

    What there is one of, the count and the counter of batches, is written by whoever has channel 0.
    """
    store(count_out, c * 0, n, c == 0)
    store(mean_out, c, mean, there)
    store(m2_out, c, m2, there)
    if running_mean is not None:
        blend(c, there, n, mean, m2, running_mean, running_var, skipped, momentum)
        if tracked is not None:
            before = tl.load(tracked + c * 0, mask=c == 0, other=0)
            store(tracked, c * 0, before + tl.where(n > 0, 1, 0).to(before.dtype), c == 0)


@triton.jit
def _unit_of(rstd, hi):
    """A power of two next to rstd, in which values are measured so that float32 holds them; 1 of ordinary rstd."""
    near = rstd.to(tl.float32)
    unit = tl.where((near > 1e-6) & (near < 1e6), 1.0, _power_of_two(_exponent(near)))
    return tl.where(_finite(hi * unit), unit, 1.0)


@triton.jit
def coefficients(c, there, mean, var, weight, bias, eps):
    """What a value is normalised by: z = (x unit - hi) factor + shift.

    hi is the float32 next to the mean, in units. What it leaves is in the shift, so that nothing is lost.

    Returns:
        In float32 hi, unit, factor and shift; in float64 rstd = 1 / sqrt(var + eps), and in float32 what hi leaves of
        the mean.
    """
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if weight is not None:
        scale = rstd * load_wide(weight, c, there)
    hi = mean.to(tl.float32)
    rest = remainder(mean, hi)
    shift = -rest * scale
    if bias is not None:
        shift += load_wide(bias, c, there)
    unit = _unit_of(rstd, hi)
    return hi * unit, unit, (scale / unit).to(tl.float32), shift.to(tl.float32), rstd, rest.to(tl.float32)


@triton.jit
def remainder(mean, hi):
    """The difference mean - hi in float64; 0 where both are the same infinity."""
    wide = hi.to(tl.float64)
    return tl.where(mean == wide, 0.0, mean - wide)

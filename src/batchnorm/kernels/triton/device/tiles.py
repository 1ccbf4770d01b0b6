"""Tiles of the input: where they lie, and sums over them.

In memory an input is (outer, channels, inner), without gaps. A tile is [ROWS, COLUMNS]:

- Channels first: rows are outer, columns inner, of one channel. A block is a channel.
- LAST, where inner is 1: rows are outer, columns channels. A block is COLUMNS channels.
"""

import triton
import triton.language as tl


@triton.jit
def tile(
    t,
    block,
    outer,
    channels,
    inner,
    tiles_inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Tile t of a block.

    Returns:
        The values' offsets and which of them are there; the positions, that is, their offsets in a mask, and which of
        these are there, each [ROWS, COLUMNS] or, with LAST, [ROWS, 1]; and how many positions there are.
    """
    if LAST:
        first = tl.cast(t, tl.int64) * ROWS
        row = first + tl.arange(0, ROWS)
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        position = row[:, None]
        there = (row < outer)[:, None]
        offset = position * channels + column[None, :]
        inside = there & (column < channels)[None, :]
        positions = tl.minimum(outer - first, ROWS)
    else:
        first_row = tl.cast(t // tiles_inner, tl.int64) * ROWS
        first_column = tl.cast(t % tiles_inner, tl.int64) * COLUMNS
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        position = row[:, None] * inner + column[None, :]
        there = (row < outer)[:, None] & (column < inner)[None, :]
        offset = (row[:, None] * channels + block) * inner + column[None, :]
        inside = there
        positions = tl.minimum(outer - first_row, ROWS) * tl.minimum(inner - first_column, COLUMNS)
    return offset, inside, position, there, positions


@triton.jit
def channels_of(block, channels, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """A block's channels, a number or [COLUMNS], and which of them are there."""
    if LAST:
        c = block * COLUMNS + tl.arange(0, COLUMNS)
    else:
        c = block
    return c, c < channels


@triton.jit
def parts_at(start, c, there, channels, splits, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """Where the parts of CHUNK splits lie in (splits, channels), and which are there: [CHUNK], with LAST times c's."""
    split = start + tl.arange(0, CHUNK)
    at = split.to(tl.int64)
    inside = split < splits
    if LAST:
        at = at[:, None] * channels + c[None, :]
        inside = inside[:, None] & there[None, :]
    else:
        at = at * channels + c
        inside = inside & there
    return at, inside


@triton.jit
def over_lanes(values, LAST: tl.constexpr):
    """The sums over a tile, of each channel."""
    sums = tl.sum(values, 0)
    if not LAST:
        sums = tl.sum(sums, 0)
    return sums


@triton.jit
def over_block(values, LAST: tl.constexpr):
    """The largest of values for each channel of a block."""
    if LAST:
        values = tl.max(values, 0)
    return values


@triton.jit
def per_lane(values, LAST: tl.constexpr):
    """A value for each channel so that it broadcasts against a tile."""
    if LAST:
        values = values[None, :]
    return values


@triton.jit
def load(pointer, offset, inside):
    """A tile in float32; 0 where nothing is."""
    return tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_wide(pointer, c, there):
    """Values of channels in float64; 0 where nothing is."""
    return tl.load(pointer + c, mask=there, other=0.0).to(tl.float64)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Values in another dtype; to half precision by way of float32, as torch does."""
    if DTYPE.primitive_bitwidth == 16:
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def store(pointer, offset, values, inside):
    """Write values, rounded to what the memory holds."""
    tl.store(pointer + offset, rounded(values, pointer.dtype.element_ty), mask=inside)

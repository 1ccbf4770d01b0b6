"""How a shape is gone through: the one table from (outer, channels, inner) to tiles, programs and launches.

| input | launches each way | grid |
|---|---|---|
| a channel fits one tile (`WHOLE` values) | 1: everything, and the input is read once | blocks |
| channels first, larger | 2: parts of the sums; then every program joins those of its channel | blocks, splits |
| channels last, larger | 3: parts of the sums; joining them; the rest | blocks, splits |

It depends on the shape alone, never on the device: so does the order of every sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

TILE = 2048  # values of a tile; 16 for each thread, in as few loads as 16 bytes wide
WHOLE = 8192  # values of the largest tile that holds all of a channel
PROGRAMS = 1024  # of a launch, about: 6 to 9 for each multiprocessor of a large GPU
LEAST_TILES = 4  # of a program, so that what it does once does not weigh
WIDTH = 128  # channels of a tile, channels last
LEAST_WIDTH = 8  # ... of one that holds all of a channel: a sector of memory, of float32
WHOLE_WIDTH = 32  # ... at most
FINISH_WIDTH = 16  # channels of a program that joins parts
CHUNK = 256  # parts that are joined at once
COMMIT_WIDTH = 1024  # channels that are committed at once
FINISH_WARPS = COMMIT_WARPS = 8


@dataclass(frozen=True)
class Plan:
    """What the launches for one shape are.

    Attributes:
        whole: whether a tile holds all of a channel.
        last: whether channels lie next to each other.
        rows, columns: of a tile.
        blocks: channels, or groups of them.
        tiles_inner: tiles beside each other, channels first.
        tiles: of a block.
        per_split: tiles of a program.
        splits: programs of a block.
        warps: of a program.
    """

    whole: bool
    last: bool
    rows: int
    columns: int
    blocks: int
    tiles_inner: int
    tiles: int
    per_split: int
    splits: int
    warps: int


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def plan_for(outer: int, channels: int, inner: int) -> Plan:
    """The plan for an input that lies as (outer, channels, inner)."""
    last = inner == 1 and channels > 1
    rows, width = power_of_two(outer), power_of_two(channels)
    if last:
        whole = rows * min(width, LEAST_WIDTH) <= WHOLE
        columns = min(width, WHOLE_WIDTH, WHOLE // rows) if whole else min(width, WIDTH, TILE)
    else:
        whole = rows * power_of_two(inner) <= WHOLE
        columns = power_of_two(inner) if whole else min(power_of_two(inner), TILE)
    if not whole:
        rows = min(rows, TILE // columns)
    blocks = ceil_div(channels, columns) if last else channels
    tiles_inner = 1 if last else ceil_div(inner, columns)
    tiles = tiles_inner * ceil_div(outer, rows)
    per_split = max(LEAST_TILES, ceil_div(tiles * blocks, PROGRAMS))
    warps = min(max(rows * columns // 512, 1), 16)
    return Plan(whole, last, rows, columns, blocks, tiles_inner, tiles, per_split, ceil_div(tiles, per_split), warps)

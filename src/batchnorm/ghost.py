"""Ghost batches as channels: what turns statistics of many small batches into one operation on a wider input.

G ghost batches of k samples, (G k, C, *S), are k samples of G C channels, (k, G C, *S): every ghost batch normalises
its own copy of the channels. All inputs here have the samples first and the channels second.

Source: Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017.
"""

from __future__ import annotations

from torch import Tensor


def parts(samples: int, size: int) -> list[tuple[int, int, int]]:
    """How a batch is cut: at most two runs of equal ghost batches, as (first sample, ghost batches, samples of each).

    A remainder of at least 2 samples is a ghost batch of its own; a single one joins the last.
    """
    ghosts, rest = samples // size, samples % size  # the compiler, whose sizes may be symbols, knows no divmod of them
    if ghosts == 0:
        return [(0, 1, samples)]
    if rest == 0:
        return [(0, ghosts, size)]
    if rest == 1:
        last = (size * (ghosts - 1), 1, size + 1)
        return [last] if ghosts == 1 else [(0, ghosts - 1, size), last]
    return [(0, ghosts, size), (ghosts * size, 1, rest)]


def widen(x: Tensor, ghosts: int) -> Tensor:
    """(G k, C, *S) as (k, G C, *S)."""
    if ghosts == 1:
        return x
    wide: Tensor = x.unflatten(0, (ghosts, -1)).transpose(0, 1).flatten(1, 2)
    return wide


def narrow(y: Tensor, ghosts: int) -> Tensor:
    """(k, G C, *S) as (G k, C, *S)."""
    if ghosts == 1:
        return y
    narrow: Tensor = y.unflatten(1, (ghosts, -1)).transpose(0, 1).flatten(0, 1)
    return narrow


def widen_mask(mask: Tensor, ghosts: int, channels: int) -> Tensor:
    """(G k, *S) as (k, G C, *S): the weight of every value."""
    wide: Tensor = mask.unflatten(0, (ghosts, -1)).transpose(0, 1)
    return wide.repeat_interleave(channels, dim=1)

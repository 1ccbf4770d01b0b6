"""What a mask costs: forward and backward through a layer with one and without, in turn, as a Markdown table.

    python benchmarks/masks.py

The mask is boolean with a value for each position, three quarters of them true; the time includes its checks. A number
is the median of the turns, in memory as fresh as it comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import batchnorm
from batchnorm import layout
from batchnorm.bench.suites import cases

SECONDS, FEWEST, MOST = 1.0, 7, 301


def medians(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + SECONDS
    while len(times["plain"]) < FEWEST or (time.perf_counter() < end and len(times["plain"]) < MOST):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def step(layer: torch.nn.Module, x: Tensor, dy: Tensor, mask: Tensor | None) -> object:
    """Forward and backward."""
    return torch.autograd.grad(layer(x, mask=mask), [x, *layer.parameters()], dy)


def main() -> None:
    """Print the table."""
    print("| shape | layout | dtype | plain, ms | masked, ms | ratio |\n|---|---|---|---|---|---|")
    for case in cases("all"):
        x, dy, _, _ = case.tensors()
        layer = batchnorm.BatchNorm(case.channels, activation="relu", channel_dim=case.channel_dim)
        axis = case.channel_dim % x.dim()
        mask = torch.rand(layout.observed_shape(x.shape, axis)) < 0.75
        work = partial(step, layer, x.requires_grad_(), dy)
        seconds = medians({"plain": partial(work, None), "masked": partial(work, mask)})
        print(
            f"| {case.shape} | {case.layout} | {case.dtype} | {1e3 * seconds['plain']:.3f} "
            f"| {1e3 * seconds['masked']:.3f} | {seconds['masked'] / seconds['plain']:.2f} |"
        )


if __name__ == "__main__":
    main()

"""What two domains in a batch cost: forward and backward through a layer with them and without, in turn, as a table.

    python benchmarks/domains.py

The samples are half of one domain and half of the other, one after the other ("sorted") or in random order, there also
with a weight and a bias of each domain's own; the choice is made before. The time is a median of the turns, the others
are ratios to it. What the mixed passes give is compared with a pass for each domain before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from masks import medians
from torch import Tensor

import batchnorm as bn

# shape, memory order, dtype
CASES: tuple[tuple[tuple[int, ...], str, torch.dtype], ...] = (
    ((128, 256), "contiguous", torch.float32),
    ((256, 64), "contiguous", torch.float32),
    ((4096, 512), "contiguous", torch.float32),
    ((4096, 16), "contiguous", torch.float32),
    ((65536, 3), "contiguous", torch.float32),
    ((32, 64, 8, 8), "contiguous", torch.float32),
    ((32, 64, 56, 56), "contiguous", torch.float32),
    ((32, 64, 56, 56), "channels_last", torch.float32),
    ((64, 256, 14, 14), "contiguous", torch.float32),
    ((64, 256, 14, 14), "channels_last", torch.float32),
    ((32, 24, 49), "contiguous", torch.float32),
    ((64, 256, 14, 14), "contiguous", torch.bfloat16),
    ((4096, 512), "contiguous", torch.bfloat16),
    ((65536, 3), "contiguous", torch.bfloat16),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # over 1 + |value|: rounding of one dtype
DOMAINS = ("first", "second")


def inputs(shape: tuple[int, ...], memory: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and the gradient of its output."""
    x, dy = (torch.randn(shape, dtype=torch.float32).to(dtype) for _ in range(2))
    if memory == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return x.requires_grad_(), dy


def step(layer: bn.BatchNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward. None is the gradient of another domain's parameters."""
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy, allow_unused=True)


def compare(layer: bn.BatchNorm, x: Tensor, dy: Tensor, domain: Tensor) -> None:
    """The mixed pass gives what a pass for each domain gives.

    Raises:
        AssertionError: it does not.
    """
    with bn.domain(layer, domain):
        y, dx, *parameters = step(layer, x, dy)
    sums = [torch.zeros_like(p) for p in parameters]
    for number in range(len(DOMAINS)):
        of_it = domain == number
        with bn.domain(layer, number):
            own_y, own_dx, *own = step(layer, x.detach()[of_it].requires_grad_(), dy[of_it])
        sums = [a if b is None else a + b for a, b in zip(sums, own, strict=True)]
        for mixed, alone in ((y[of_it], own_y), (dx[of_it], own_dx)):
            torch.testing.assert_close(mixed, alone, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])
    for mixed, alone in zip(parameters, sums, strict=True):
        torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-3)


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print("| shape | memory | dtype | plain, ms | sorted | random | random, own weights |")
    print("|---|---|---|---|---|---|---|")
    for shape, memory, dtype in CASES:
        x, dy = inputs(shape, memory, dtype)
        plain = bn.BatchNorm(shape[1], activation="relu")
        halves = torch.arange(shape[0]) * 2 // shape[0]
        at_random = halves[torch.randperm(shape[0])]
        mixed = {"sorted": (halves, False), "random": (at_random, False), "own weights": (at_random, True)}
        works: dict[str, Callable[[], object]] = {"plain": partial(step, plain, x, dy)}
        with ExitStack() as choices:
            for name, (domain, own) in mixed.items():
                layer = bn.BatchNorm(shape[1], activation="relu", domains=DOMAINS, own_affine=own)
                compare(layer, x, dy, domain)
                choices.enter_context(bn.domain(layer, domain))
                works[name] = partial(step, layer, x, dy)
            seconds = medians(works)
        ratios = " | ".join(f"{seconds[name] / seconds['plain']:.2f}" for name in mixed)
        name = str(dtype).removeprefix("torch.")
        print(f"| {shape} | {memory} | {name} | {1e3 * seconds['plain']:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()

"""Ours beside torch's: BN + ReLU in training, float32, forward and forward + backward.

Both run in one process, interleaved, on the same values, after their answers were compared; a time is the median over
the repeats. Outputs are fresh memory, as in a training loop. Machines are noisy: read the ratios.

    python benchmarks/layers.py [--repeats N] [--case TEXT]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import batchnorm

CASES = [
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 2048, 7, 7),
    (128, 64, 32, 32),
    (8, 64, 32, 32),
    (4096, 256),
    (32, 64),
]


@dataclass(frozen=True)
class Setup:
    """One shape in one memory format, and the two layers on it."""

    name: str
    x: Tensor
    dy: Tensor
    layers: dict[str, nn.Module]


def setups() -> list[Setup]:
    """Every case in every memory format that it has."""
    made = []
    for shape in CASES:
        formats = (
            {"": torch.contiguous_format}
            if len(shape) == 2
            else {"": torch.contiguous_format, " channels_last": torch.channels_last}
        )
        for suffix, memory_format in formats.items():
            ours, theirs = (
                (batchnorm.BatchNorm2d, nn.BatchNorm2d) if len(shape) == 4 else (batchnorm.BatchNorm1d, nn.BatchNorm1d)
            )
            made.append(
                Setup(
                    f"{shape}{suffix}",
                    torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_(),
                    torch.randn(shape).contiguous(memory_format=memory_format),
                    {"ours": ours(shape[1], activation="relu"), "torch": nn.Sequential(theirs(shape[1]), nn.ReLU())},
                )
            )
    return made


def forward(setup: Setup, layer: nn.Module) -> Tensor:
    """One forward pass in training mode."""
    y: Tensor = layer(setup.x)
    return y


def both(setup: Setup, layer: nn.Module) -> Tensor:
    """A forward and a backward pass."""
    (dx,) = torch.autograd.grad(layer(setup.x), setup.x, setup.dy)
    return dx


def measure(setup: Setup, work: Callable[[Setup, nn.Module], Tensor], repeats: int) -> dict[str, float]:
    """Seconds of each layer, the median of interleaved repeats."""
    answers = [work(setup, layer) for layer in setup.layers.values()]
    # A ReLU's derivative jumps where z is 0: there the two may round to different sides.
    wrong = ((answers[0] - answers[1]).abs() > 1e-4 * (1 + answers[1].abs())).float().mean().item()
    assert wrong < 1e-5, f"{setup.name}: the answers differ in {wrong:.1e} of the values"
    del answers
    times: dict[str, list[float]] = {name: [] for name in setup.layers}
    for _ in range(repeats):
        for name, layer in setup.layers.items():
            start = time.perf_counter()
            work(setup, layer)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement (small shapes get ten times more)")
    parser.add_argument("--case", default="", help="only the cases whose name has this in it")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {batchnorm.kernels()[0].implementation}\n")
    print("| case | forward, ms: ours / torch | ratio | forward + backward, ms: ours / torch | ratio |")
    print("|---|---|---|---|---|")
    for setup in setups():
        if arguments.case not in setup.name:
            continue
        cells = []
        for work in (forward, both):
            times = measure(setup, work, arguments.repeats * (10 if setup.x.numel() < 1 << 20 else 1))
            ours, theirs = times["ours"], times["torch"]
            cells += [f"{ours * 1e3:.3f} / {theirs * 1e3:.3f}", f"{theirs / ours:.2f}"]
        print(f"| {setup.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

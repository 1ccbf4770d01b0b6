"""What layers with domains that share their statistics do in two processes, whose parts may be of different domains.

python tests/domain_sync_scenarios.py SCENARIO,... RANK SIZE FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import batchnorm as bn
from batchnorm.surgery.freeze import freeze
from support import processes

NAMES = ("a", "b", "c")
# Of each process: a domain for each of its samples, or for all.
CHOICES: dict[str, tuple[Any, Any]] = {
    "mixed": ([0, 1, 1, 0], [1, 1, 0]),
    "one each": ("a", "b"),
    "one and mixed": ("b", [0, 1, 0]),
    "nothing here": ([], [1, 0, 0, 1]),
    "one value each": ([0, 1, 1], [0]),
}
SAMPLES = {"one each": (3, 4), "one and mixed": (4, 3)}


def choice(name: str, rank: int) -> tuple[Any, list[int]]:
    """What a process's samples are of: as it is told, and one number for each."""
    told = CHOICES[name][rank]
    if isinstance(told, str):
        return told, [NAMES.index(told)] * SAMPLES[name][rank]
    return told, told


def part(name: str, rank: int) -> dict[str, Tensor]:
    """A process's input and its output's gradient."""
    numbers = torch.tensor(choice(name, rank)[1], dtype=torch.int64)
    generator = torch.Generator().manual_seed(rank)
    positions = () if name == "one value each" else (4,)
    x, dy = (torch.randn(len(numbers), 2, *positions, generator=generator) for _ in range(2))
    return {"x": x + 5 * numbers.view(-1, *[1] * (x.dim() - 1)), "dy": dy}


def layer(**options: Any) -> bn.BatchNorm:
    """The same in every process."""
    made = bn.BatchNorm(2, **{"sync": True, "domains": NAMES, "own_affine": True, **options})
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.fill_(number / 4 + 0.5)
    return made


def step(name: str, rank: int, size: int, *, frozen: bool = False, **options: Any) -> dict[str, Any]:
    """Outputs, gradients and statistics of a training step."""
    own, made = part(name, rank), layer(**options)
    if frozen:
        freeze(made, statistics=False, affine=False, normalization=True)
    x = own["x"].requires_grad_()
    with bn.domain(made, choice(name, rank)[0]):
        y = made(x)
    y.backward(own["dy"])
    gradients = {f"d {key}": parameter.grad for key, parameter in made.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(made.named_buffers())}


def refused(rank: int, size: int) -> dict[str, Any]:
    """One value of a domain in all processes together."""
    made = layer()
    try:
        with bn.domain(made, [0, 0] if rank else [0, 1]):
            made(torch.randn(2, 2))
    except bn.BatchNormError as error:
        return {"error": (type(error).__name__, str(error)), "tracked": made.num_batches_tracked}
    return {"error": None}


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    **{name: partial(step, name) for name in CHOICES},
    "shared affine": partial(step, "mixed", own_affine=False),
    "by running": partial(step, "mixed", frozen=True),
    "renorm": partial(step, "mixed", renorm=bn.Renorm(1.5, 0.5)),
    "refused": refused,
}

if __name__ == "__main__":
    processes.main(SCENARIOS)

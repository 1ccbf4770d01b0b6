"""What monitors are tried on: a network of torch.nn's and our layers, and steps of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 5, 3, bias=False), bn.BatchNorm2d(5, activation="relu")),
        *(nn.Flatten(), nn.Linear(80, 6), bn.BatchNorm1d(6), nn.Linear(6, 1)),
    )


LAYERS = ("1", "4", "7")  # torch.nn's first


def batch(step: int) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 + 1


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.01} | options)


def loss(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def train(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int, *, accumulate: int = 1
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for part in batch(step).chunk(accumulate):
            loss(model(part)).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def hooks(model: nn.Module) -> list[Any]:
    """All that is attached to a model."""
    return [
        (name, vars(module)[name])
        for module in model.modules()
        for name in vars(module)
        if ("hook" in name and vars(module)[name]) or name == "_listeners"
    ]

"""What is trained in the tests of callbacks: a network with dropout, and data in a shuffled order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from support.populations import assert_consistent


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2), nn.BatchNorm1d(2)
    )


def samples(seed: int = 0) -> Tensor:
    return torch.randn(26, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def loader(seed: int | None = None, **options: Any) -> DataLoader[Any]:
    """Shuffled batches of 4, by torch's stream or by a generator of the loader's own."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(samples()), batch_size=4, shuffle=True, generator=generator, **options)


def values(model: nn.Module) -> dict[str, Any]:
    """The trained parameters."""
    return {name: parameter.tolist() for name, parameter in model.named_parameters()}


def is_consistent(model: nn.Module) -> bool:
    """Whether running statistics are those of the training data."""
    try:
        assert_consistent(model, [samples()])
    except AssertionError:
        return False
    return True


def counted() -> tuple[list[int], Callable[[], tuple[Tensor, ...]]]:
    """Training data as a callable, and a list that grows whenever it is called."""
    calls: list[int] = []

    def batches() -> tuple[Tensor, ...]:
        calls.append(1)
        return samples().split(5)

    return calls, batches

"""Networks to look at, whose running statistics are those of their data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import batchnorm as bn


def convolutional(*, ours: bool = False) -> nn.Sequential:
    """Three convolutions with batch norm, and a classifier of ten classes, for (N, 3, 8, 8)."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate([(3, 8), (8, 16), (16, 16)]):
        norm = bn.BatchNorm2d(outputs) if ours or i == 1 else nn.BatchNorm2d(outputs)
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def labelled(batches: int = 8, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Noise of different scales and offsets in its channels, with random classes."""
    generator = torch.Generator().manual_seed(seed)
    scale, offset = torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1), torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator) * scale + offset,
            torch.randint(10, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def healthy(seed: int = 0, *, ours: bool = False) -> nn.Sequential:
    """`convolutional`, recalibrated on `labelled`."""
    torch.manual_seed(seed)
    model = convolutional(ours=ours)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    bn.recalibrate(model, labelled())
    return model

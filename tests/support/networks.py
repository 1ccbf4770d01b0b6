"""Small networks with batch norm in every place that surgery has to tell apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def used(model: nn.Module) -> nn.Module:
    """The model in inference, with statistics and parameters that are not the initial ones, which hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low in (("running_mean", -1.0), ("running_var", 0.3), ("weight", 0.5), ("bias", -1.0)):
                    if (tensor := getattr(module, name)) is not None:
                        tensor.uniform_(low, 2.0, generator=generator)
    return model.eval()


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values of order 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


class Calls(nn.Module):
    """Modules called as a function says, which gets the module itself."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.code = forward

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU module for all, in place, and an addition in place."""

    def __init__(self, channels: int, norm: Any = nn.BatchNorm2d, *, projected: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), norm(channels)) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Untraceable(nn.Module):
    """A network whose forward depends on values, around parts whose forward does not."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for part in self.parts:
            x = part(x) if x.abs().max() > 0 else x
        return x * scale

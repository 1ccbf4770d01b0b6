"""The networks whose memory is measured, and the blocks of each that checkpointing goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from libraries import library


class Twice(nn.Sequential):
    """Convolution, batch norm and ReLU, two times."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Four times down by max pooling, four times up by transposed convolution, as first published, with batch norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(Twice(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(Twice(2 * w, w) for w in reversed(widths[:-1]))
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 2, H, W); H and W are multiples of 16."""
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else self.pool(x))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        y: Tensor = self.head(x)
        return y


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        make: with random weights.
        blocks: the class of its blocks, by name.
        goal: the share of the saved bytes that `recompute` is to save.
        kind: what the goal is for.
    """

    make: Callable[[], nn.Module]
    blocks: str
    goal: float
    kind: str


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = library("torchvision.models").get_model(name, weights=None)
        return model

    return make


NETWORKS = {
    "VGG-16-BN": Network(_torchvision("vgg16_bn"), "", 0.45, "chain"),
    "U-Net": Network(UNet, "Twice", 0.45, "chain"),
    "DenseNet-121": Network(_torchvision("densenet121"), "_DenseLayer", 0.45, "chain"),
    "MobileNetV3-Large": Network(_torchvision("mobilenet_v3_large"), "InvertedResidual", 0.35, "inverted bottlenecks"),
    "EfficientNet-B0": Network(_torchvision("efficientnet_b0"), "MBConv", 0.35, "inverted bottlenecks"),
    "ResNet-50": Network(_torchvision("resnet50"), "Bottleneck", 0.15, "residual blocks"),
}


def with_checkpoints(model: nn.Module, blocks: str) -> nn.Module:
    """The model with each block under `torch.utils.checkpoint`; of VGG, the layers up to each pooling are a block."""
    if not blocks:
        features: nn.Sequential = model.get_submodule("features")  # type: ignore[assignment]  # it is
        groups: list[list[nn.Module]] = [[]]
        for layer in features:
            groups[-1].append(layer)
            if isinstance(layer, nn.MaxPool2d):
                groups.append([])
        parts: list[nn.Module] = [nn.Sequential(*group) for group in groups if group]
        model.features = nn.Sequential(*parts)
    else:
        parts = [module for module in model.modules() if blocks in {cls.__name__ for cls in type(module).__mro__}]
    for part in parts:
        if hasattr(part, "memory_efficient"):  # dense layers: torchvision's own checkpointing of them
            vars(part)["memory_efficient"] = True
            continue
        part.forward = _checkpointed(part.forward)
    return model


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: object) -> Tensor:
        result: Tensor = checkpoint(forward, *args, use_reentrant=False)
        return result

    return call

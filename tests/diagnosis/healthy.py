"""Networks with nothing wrong: trained for some steps on digits or noise, then recalibrated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study import dataset
from support.networks import Block
from support.tools import make_importable

CLASSES = 10
SAMPLES = 16  # in a batch
SIZE = 48  # of an image


class Classifier(nn.Module):
    """Features, their mean over positions, and a linear layer."""

    def __init__(self, channels: int, *features: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        return self.head(y.flatten(2).mean(-1) if y.dim() > 2 else y)


def _mlp(norm: Any) -> nn.Module:
    return Classifier(32, nn.Flatten(), nn.Linear(192, 64), norm(64), nn.ReLU(), nn.Linear(64, 32), norm(32), nn.ReLU())


def _cnn(norm: Any) -> nn.Module:
    stem = (nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU())
    return Classifier(16, *stem, Block(16, norm), Block(16, norm, projected=True))


def _separable(norm: Any) -> nn.Module:
    """Depthwise convolutions and hardswish, with the eps of mobile networks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), norm(16, eps=1e-3), nn.Hardswish()]
    for _ in range(3):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), norm(16, eps=1e-3), nn.Hardswish()]
        layers += [nn.Conv2d(16, 16, 1, bias=False), norm(16, eps=1e-3)]
    return Classifier(16, *layers)


SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (lambda: _mlp(nn.BatchNorm1d), 8),
    "mlp of ours": (lambda: _mlp(bn.BatchNorm1d), 8),
    "cnn": (lambda: _cnn(nn.BatchNorm2d), 8),
    "cnn of ours": (lambda: _cnn(bn.BatchNorm2d), 8),
    "separable": (lambda: _separable(nn.BatchNorm2d), 16),
}
TORCHVISION = ("resnet18", "mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "densenet121", "mnasnet0_5")
TIMM = ("repvgg_a0", "semnasnet_075", "mobileone_s0", "tf_mixnet_s")  # with channels that are dead after few steps


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    part = dataset.digits().train
    return part.inputs, part.labels


def batch(kind: str, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) of "digits" or "noise", and classes."""
    if kind == "noise":
        x = torch.randn(SAMPLES, 3, size, size, generator=generator)
        return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)
    images, labels = _digits()
    chosen = torch.randint(len(images), (SAMPLES,), generator=generator)
    x = F.interpolate(images[chosen].view(-1, 1, 8, 8), size=(size, size), mode="bilinear")
    return x.expand(-1, 3, -1, -1).contiguous(), labels[chosen]


def healthy(model: nn.Module, kind: str, size: int, *, steps: int = 10) -> list[Tensor]:
    """Train a model and recalibrate it.

    Returns:
        The batches of the recalibration.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for _ in range(steps):
        x, y = batch(kind, size, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    batches = [batch(kind, size, generator)[0] for _ in range(4)]
    bn.recalibrate(model.eval(), batches)
    return batches


def made(name: str) -> tuple[nn.Module, int]:
    """A network of `SMALL`, `TORCHVISION` or `TIMM` with new weights, and the size of its images."""
    if name in SMALL:
        network, size = SMALL[name]
        return network(), size
    make_importable()
    if name in TIMM:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES), SIZE
    import torchvision

    return getattr(torchvision.models, name)(num_classes=CLASSES), SIZE

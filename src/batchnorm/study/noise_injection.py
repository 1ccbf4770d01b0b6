"""Batch normalization followed by noise: the covariate shift that it removes, put back on purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.study.networks import Layers, Unit


class Noise(nn.Module):
    """Noise that changes with every pass, of no fixed mean and variance: in training it is `s x + m`, per value.

    For each feature a centre mu from -0.5 to 0.5 and a scale sigma from 1 to 1.25 are drawn in each pass; then for
    each value m from mu - 0.1 to mu + 0.1, uniformly as the others, and s from the normal distribution around sigma
    with standard deviation 0.1. In inference it is the identity.

    Source: Santurkar, Tsipras, Ilyas and Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018,
        appendix A.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) in, (N, C) out."""
        if not self.training:
            return x
        mu, sigma, m = (torch.rand(shape, generator=self.generator) for shape in (x.shape[1], x.shape[1], x.shape))
        s = torch.randn(x.shape, generator=self.generator)
        return x * (1 + 0.25 * sigma + 0.1 * s) + (mu - 0.5 + 0.2 * (m - 0.5))


def add_noise(network: nn.Sequential, layers: Layers, seed: int) -> nn.Sequential:
    """A perceptron with batch normalization before the activation, and noise between the two in every hidden layer.

    Args:
        network: as `networks.perceptron` makes it with the placement "before"; its linear layers are taken over.
        layers: whose batch normalization.
        seed: of the noise, one stream for all layers.
    """
    noise = Noise(torch.Generator().manual_seed(seed))
    modules: list[nn.Module] = []
    features = 0
    for module in network:
        if isinstance(module, nn.Linear):
            features = module.out_features
        modules.append(nn.Sequential(layers.norm(features), noise, nn.ReLU()) if isinstance(module, Unit) else module)
    return nn.Sequential(*modules)

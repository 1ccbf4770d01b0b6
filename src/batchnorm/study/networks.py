"""The networks that the experiments train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from batchnorm.modules import BatchNorm1d


def perceptron(
    inputs: int, hidden: Sequence[int], classes: int, *, normalized: bool, generator: torch.Generator
) -> nn.Sequential:
    """A multilayer perceptron with ReLU, with or without batch normalization before each ReLU.

    Both kinds draw the same numbers from `generator` for the same weights: equal generators give pairs that start
    from the same linear maps. Weights are He's (variance 2 / fan-in), which keep deep ReLU networks trainable without
    normalisation; biases are 0. Before a normalisation there is no bias: the mean would remove it.

    Args:
        inputs: features of the input.
        hidden: features of each hidden layer.
        classes: features of the output.
        normalized: whether the hidden layers are batch-normalised.
        generator: the source of the weights.

    Shapes:
        input (N, inputs), output (N, classes).
    """
    layers: list[nn.Module] = []
    for features in hidden:
        layers.append(_linear(inputs, features, bias=not normalized, nonlinearity="relu", generator=generator))
        layers.append(BatchNorm1d(features, activation="relu") if normalized else nn.ReLU())
        inputs = features
    layers.append(_linear(inputs, classes, bias=True, nonlinearity="linear", generator=generator))
    return nn.Sequential(*layers)


def _linear(
    inputs: int, outputs: int, *, bias: bool, nonlinearity: Literal["relu", "linear"], generator: torch.Generator
) -> nn.Linear:
    # Made without storage, lest torch's own initialisation draw from the global generator.
    linear = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    nn.init.kaiming_normal_(linear.weight, nonlinearity=nonlinearity, generator=generator)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear

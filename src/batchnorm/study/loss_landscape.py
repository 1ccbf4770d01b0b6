"""The loss and its gradient along a step, and what a step of the layers below does to a layer's gradient."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.study.statistics import bounded
from batchnorm.study.training import gradient_step

_LARGEST = 1e6  # where a training diverges

# One forward pass: the loss at the weights as they are. It has to be the same function each time, noise included.
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class AlongStep:
    """How loss and gradient change from where a step starts to points along it.

    With the loss L and its gradient g at the weights w, and points w - eta g:

    Attributes:
        loss_range: the largest L less the smallest, the start included.
        gradient_change: the largest |g(w - eta g) - g(w)|: gradient predictiveness, where less is more predictive.
        smoothness: the largest |g(w - eta g) - g(w)| / |eta g|: effective beta-smoothness, where less is smoother.

    Source: Santurkar, Tsipras, Ilyas and Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018,
        section 3.1.
    """

    loss_range: float
    gradient_change: float
    smoothness: float


def measure_along_step(parameters: Sequence[nn.Parameter], loss: Loss, rates: Sequence[float]) -> AlongStep:
    """Look at the points that the gradient step reaches at several rates; the parameters are left as they were.

    Args:
        parameters: all that are trained.
        loss: computes the loss at them.
        rates: the eta.

    Returns:
        Values from 1e-6 to 1e6; what is not a finite number counts as 1e6.
    """
    value, gradients = _gradients(parameters, loss)
    losses, changes, ratios = [value], [], []
    for rate in rates:
        with _moved(parameters, gradients, rate):
            value, moved = _gradients(parameters, loss)
        change = _norm([b - a for a, b in zip(gradients, moved, strict=True)])
        losses.append(value)
        changes.append(change)
        # At a minimum there is no step, and nothing changes along it.
        ratios.append(change / (rate * _norm(gradients)) if _norm(gradients) else 0.0)
    finite = all(math.isfinite(value) for value in losses)
    return AlongStep(
        bounded(max(losses) - min(losses) if finite else math.inf, _LARGEST),
        max(bounded(change, _LARGEST) for change in changes),
        max(bounded(ratio, _LARGEST) for ratio in ratios),
    )


def disturbance(network: nn.Module, loss: Loss, rate: float) -> float:
    """Internal covariate shift by its definition through gradients: 1 - cos(g_i, g_i'), mean over the linear layers.

    `g_i` is the gradient of layer i's weights where the step starts, `g_i'` the same after all layers below have done
    their gradient step and layer i itself and those above have not. The first layer has none below and is left out.

    Args:
        network: left as it was.
        loss: computes the loss with it.
        rate: of the gradient step.

    Returns:
        0, where the layers below make no difference, to 2; what is not a finite number counts as 1, no relation.

    Source: Santurkar et al., as above, definition 2.1; the cosine as in their figure 2.
    """
    parameters = list(network.parameters())
    _, gradients = _gradients(parameters, loss)
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    values = []
    for weight in weights[1:]:
        below = next(i for i, parameter in enumerate(parameters) if parameter is weight)
        with _moved(parameters[:below], gradients[:below], rate):
            (after,) = torch.autograd.grad(loss(), [weight])
        values.append(1 - _cosine(gradients[below], after))
    return statistics.fmean(values)


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], rate: float) -> Iterator[None]:
    """For a while, the parameters are one gradient step further."""
    saved = [parameter.detach().clone() for parameter in parameters]
    gradient_step(parameters, gradients, rate)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, start in zip(parameters, saved, strict=True):
                parameter.copy_(start)


def _gradients(parameters: Sequence[nn.Parameter], loss: Loss) -> tuple[float, tuple[Tensor, ...]]:
    value = loss()
    return float(value.detach()), torch.autograd.grad(value, list(parameters))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two gradients; 0 where one of them is none, or not finite."""
    lengths = _norm([a]) * _norm([b])
    cosine = float((a.double() * b.double()).sum()) / lengths if lengths else 0.0
    return cosine if math.isfinite(cosine) else 0.0

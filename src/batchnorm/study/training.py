"""The training loop that the experiments share, and prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.study.dataset import Data, Part

NO_CLASS = -1
EVALUATIONS = 5  # whose mean accuracy is where a training settled


@dataclass(frozen=True)
class LearningCurve:
    """How a training went, evaluation by evaluation.

    Attributes:
        steps: optimiser steps done at each evaluation.
        test_accuracy: the share of test samples classified rightly then, in inference mode.
        training_loss: the mean loss of the steps since the evaluation before; None where it is not a finite number.
    """

    steps: tuple[int, ...]
    test_accuracy: tuple[float, ...]
    training_loss: tuple[float | None, ...]


def train(
    network: nn.Module,
    data: Data,
    *,
    learning_rate: float,
    batch_size: int,
    steps: int,
    evaluate_every: int,
    generator: torch.Generator,
) -> LearningCurve:
    """Train by `descend`, and watch.

    Args:
        network: changed in place.
        data: trained on one part, evaluated on the other.
        learning_rate: of every step.
        batch_size: samples in a step.
        steps: how many.
        evaluate_every: steps between two evaluations; the last step is always evaluated.
        generator: the source of the order of the samples.
    """
    at: list[int] = []
    accuracies: list[float] = []
    losses: list[float | None] = []
    loss_sum = torch.zeros((), dtype=torch.float64)
    descent = descend(network, data.train, learning_rate=learning_rate, batch_size=batch_size, generator=generator)
    for step, loss in enumerate(itertools.islice(descent, steps), 1):
        loss_sum += loss
        if step % evaluate_every == 0 or step == steps:
            mean_loss = loss_sum.item() / (step - (at[-1] if at else 0))
            at.append(step)
            losses.append(mean_loss if math.isfinite(mean_loss) else None)
            accuracies.append(accuracy(predict(network, data.test.inputs), data.test.labels))
            loss_sum.zero_()
    return LearningCurve(tuple(at), tuple(accuracies), tuple(losses))


def settle(network: nn.Module, descent: Iterator[Tensor], steps: int, parts: Sequence[Part]) -> list[float]:
    """Train to the end, and say where the accuracy settled.

    At a constant learning rate a network's accuracy moves from step to step, by more than what is looked for at times.
    So it is the mean of several evaluations, in inference mode, evenly spread over the last fifth of the training.

    Args:
        network: changed in place.
        descent: what trains it, from `descend`.
        steps: how many.
        parts: what it is evaluated on.

    Returns:
        A mean accuracy for each part.
    """
    each = max(steps // (5 * EVALUATIONS), 1)
    sums = [0.0] * len(parts)
    for left in reversed(range(steps)):
        next(descent)
        if left % each == 0 and left < each * EVALUATIONS:
            for i, part in enumerate(parts):
                sums[i] += accuracy(predict(network, part.inputs), part.labels)
    return [total / min(EVALUATIONS, steps) for total in sums]


def descend(
    network: nn.Module, part: Part, *, learning_rate: float, batch_size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Plain stochastic gradient descent on the cross-entropy, without end: yields each step's loss after the step.

    Plain, because momentum, weight decay or a schedule would each change what a learning rate means.

    Args:
        network: changed in place, and in training mode at each step.
        part: what it learns from.
        learning_rate: of every step.
        batch_size: samples in a step.
        generator: the source of the order of the samples.
    """
    parameters = list(network.parameters())
    for chosen in batches(len(part.labels), batch_size, generator):
        if not network.training:  # which walks over all modules
            network.train()
        loss = nn.functional.cross_entropy(network(part.inputs[chosen]), part.labels[chosen])
        gradient_step(parameters, torch.autograd.grad(loss, parameters), learning_rate)
        yield loss.detach()


def gradient_step(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], rate: float) -> None:
    """One step of gradient descent.

    torch.optim.SGD does the same to the bit; on networks this small it takes a sixth of a step's time.
    """
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end: each epoch in a new order, its incomplete last batch left out."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def predict(network: nn.Module, inputs: Tensor, batch_size: int | None = None) -> Tensor:
    """The class of each sample, in inference mode.

    Args:
        network: left in the mode that it was in.
        inputs: (N, *shape).
        batch_size: how many samples the network sees at a time; None is all.

    Returns:
        (N,) classes; `NO_CLASS` where an output is not a finite number, which is never right.
    """
    outputs = infer(network, inputs, batch_size)
    return outputs.argmax(1).where(outputs.isfinite().all(1), NO_CLASS)


def infer(network: nn.Module, inputs: Tensor, batch_size: int | None = None) -> Tensor:
    """The outputs, (N, classes), in inference mode; arguments as `predict`."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return torch.cat([network(part) for part in torch.split(inputs, batch_size or len(inputs))])
    finally:
        network.train(training)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of predictions that are right."""
    return int((predictions == labels).sum()) / len(labels)


def first_step(steps: Sequence[int], accuracies: Sequence[float], target: float) -> int | None:
    """The first evaluated step with an accuracy of at least `target`; None where there is none."""
    return next((step for step, reached in zip(steps, accuracies, strict=True) if reached >= target), None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one core: quicker for networks this small, and the same sums whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

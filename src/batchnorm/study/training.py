"""The training loop that the experiments share, and prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.study.data import Digits

NO_CLASS = -1


@dataclass(frozen=True)
class Curve:
    """How a training went, evaluation by evaluation.

    Attributes:
        steps: optimiser steps done at each evaluation.
        test_accuracy: the share of test images classified rightly then, in inference mode.
        training_loss: the mean loss of the steps since the evaluation before; None where it is not a finite number.
    """

    steps: tuple[int, ...]
    test_accuracy: tuple[float, ...]
    training_loss: tuple[float | None, ...]


def train(
    network: nn.Module,
    digits: Digits,
    *,
    learning_rate: float,
    batch_size: int,
    steps: int,
    evaluate_every: int,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> Curve:
    """Train with plain stochastic gradient descent on the cross-entropy, and watch.

    Plain, because momentum, weight decay or a schedule would each change what a learning rate means.

    Args:
        network: changed in place.
        digits: trained on one part, evaluated on the other.
        learning_rate: of every step.
        batch_size: images in a step.
        steps: how many.
        evaluate_every: steps between two evaluations; the last step is always evaluated.
        generator: the source of the order of the images.
        advance: called with the number of steps done since the last call.
    """
    optimizer = torch.optim.SGD(network.parameters(), learning_rate)
    order = batches(len(digits.train.labels), batch_size, generator)
    at: list[int] = []
    accuracies: list[float] = []
    losses: list[float | None] = []
    loss_sum = torch.zeros((), dtype=torch.float64)
    network.train()
    for step in range(1, steps + 1):
        chosen = next(order)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(digits.train.images[chosen]), digits.train.labels[chosen])
        torch.autograd.backward(loss)
        optimizer.step()
        loss_sum += loss.detach()
        if step % evaluate_every == 0 or step == steps:
            done = step - (at[-1] if at else 0)
            mean_loss = loss_sum.item() / done
            at.append(step)
            losses.append(mean_loss if math.isfinite(mean_loss) else None)
            accuracies.append(accuracy(predict(network, digits.test.images), digits.test.labels))
            loss_sum.zero_()
            advance(done)
    return Curve(tuple(at), tuple(accuracies), tuple(losses))


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end: each epoch in a new order, its incomplete last batch left out."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def predict(network: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
    """The class of each image, in inference mode.

    Args:
        network: left in the mode that it was in.
        images: (N, features).
        batch_size: how many images the network sees at a time; None is all.

    Returns:
        (N,) classes; `NO_CLASS` where an output is not a finite number, which is never right.
    """
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            outputs = torch.cat([network(part) for part in torch.split(images, batch_size or len(images))])
    finally:
        network.train(training)
    return outputs.argmax(1).where(outputs.isfinite().all(1), NO_CLASS)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of predictions that are right."""
    return int((predictions == labels).sum()) / len(labels)


def first_step(steps: tuple[int, ...], accuracies: tuple[float, ...], target: float) -> int | None:
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

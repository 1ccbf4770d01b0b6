"""A small network with faults, and data: what `batchnorm check` looks at where it is given nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.population.recalibrate import recalibrate

_SIDE = 12  # pixels
_BATCH, _BATCHES, _STEPS = 32, 8, 60
# The seven segments of a display, as rows and columns of the picture, and which of them each digit lights.
_SEGMENTS = (
    *((slice(2, 3), slice(4, 8)), (slice(2, 6), slice(8, 9)), (slice(6, 10), slice(8, 9)), (slice(9, 10), slice(4, 8))),
    *((slice(6, 10), slice(3, 4)), (slice(2, 6), slice(3, 4)), (slice(5, 6), slice(4, 8))),
)
_LIT = ("012345", "12", "01346", "01236", "1256", "02356", "023456", "012", "0123456", "012356")


class Example(NamedTuple):
    """A network in inference mode, and what to examine it with.

    Attributes:
        model: a network of four blocks of convolution, batch norm and ReLU, trained for a second.
        batches: pairs of pictures of digits and their classes.
        loss: cross entropy.
    """

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def example() -> Example:
    """The network, with four faults planted after training; torch's random stream is left as it was.

    In `second` the running statistics are wrong, in `third` gamma and beta are fixed while the statistics move, in
    `fourth` momentum is what Keras means by it, and in `fourth` too the convolution has a bias that does nothing.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        model = _network()
        batches = [digits(_BATCH, seed) for seed in range(_BATCHES)]
        _train(model, batches)
        recalibrate(model, batches)
        layers: list[Any] = [model.get_submodule(f"{name}.norm") for name in ("second", "third", "fourth")]
    second, third, fourth = layers
    with torch.no_grad():
        second.running_mean += 1.5 * second.running_var.sqrt()
        second.running_var *= 4
    third.requires_grad_(False)
    fourth.momentum = 0.99
    return Example(model, batches, nn.functional.cross_entropy)


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits of a seven-segment display, somewhere in a noisy picture.

    Args:
        count: how many.
        seed: which.

    Returns:
        Pictures (count, 1, 12, 12) and classes (count,).
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(len(_LIT), (count,), generator=generator)
    shifts = torch.randint(-1, 2, (count, 2), generator=generator).tolist()
    pictures = torch.zeros(count, 1, _SIDE, _SIDE)
    for picture, digit, shift in zip(pictures, classes.tolist(), shifts, strict=True):
        for segment in _LIT[digit]:
            rows, columns = _SEGMENTS[int(segment)]
            picture[0, rows, columns] = 1.0
        picture.copy_(picture.roll(shift, (1, 2)))
    return pictures + 0.3 * torch.randn(pictures.shape, generator=generator), classes


def _network() -> nn.Module:
    blocks = [
        ("first", _block(1, 8)),
        ("second", _block(8, 16, stride=2)),
        ("third", _block(16, 16)),
        ("fourth", _block(16, 32, stride=2, bias=True)),
    ]
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(32, len(_LIT)))]
    return nn.Sequential(OrderedDict[str, nn.Module]([*blocks, *head]))


def _block(inputs: int, outputs: int, *, stride: int = 1, bias: bool = False) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
    return nn.Sequential(OrderedDict[str, nn.Module](conv=conv, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The pictures are small: more threads would only wait for each other, and round in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(_STEPS):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    model.eval()

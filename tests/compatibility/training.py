"""What the rows about training train: one network in the forms that our layers give it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import batchnorm as bn
from support import tolerances
from support.comparison import close
from support.networks import used

NORMS = ("1", "4")  # where in the network


def network() -> nn.Sequential:
    """A network of torch.nn, in training, whose parameters and statistics are not the initial ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 2),
    )
    return used(net).train()


def converted(net: nn.Sequential) -> nn.Module:
    """With our layers."""
    return bn.convert(net)


def fused(net: nn.Sequential) -> nn.Module:
    """With the activations taken in by the calls."""
    return bn.fuse(bn.convert(net))


def inside(net: nn.Sequential) -> nn.Module:
    """With the activations inside the layers."""
    for place in NORMS:
        layer = bn.convert(net.get_submodule(place))
        layer.activation = "relu"
        net[int(place) + 1] = nn.Identity()
    return bn.convert(net)


FORMS: tuple[Callable[[nn.Sequential], nn.Module], ...] = (converted, fused, inside)


def batches(rank: int = 0, count: int = 3) -> list[Tensor]:
    """A process's batches, of another mean and scale than the statistics at the start."""
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(6, 3, 10, 10, generator=generator) * 2 + 1 for _ in range(count)]


class Trained(NamedTuple):
    """What came of some steps.

    Attributes:
        losses: one for each step.
        gradients: of all steps, parameter by parameter.
        state: the model's, afterwards.
    """

    losses: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    """What processes have parts of, in one piece."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: nn.Module, data: list[Tensor]) -> Trained:
    """A step of gradient descent for each batch."""
    # Steps small enough that what float32 rounds does not grow.
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses, gradients = [], []
    for x in data:
        optimizer.zero_grad()
        loss = model(x).float().pow(2).mean()
        loss.backward()
        gradients += [whole(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        losses.append(loss.detach())
    return Trained(losses, gradients, state(model))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state, in one piece."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def same(actual: Trained, expected: Trained) -> None:
    """Assert that two trainings went the same way."""
    assert len(actual.gradients) == len(expected.gradients) > 0
    for step, (got, wanted) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        close(got, wanted, name=f"loss {step}")
    for place, (got, wanted) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        close(got, wanted, name=f"gradient {place}")
    same_state(actual.state, expected.state)


def same_in_bfloat16(actual: Trained, expected: Trained) -> None:
    """Assert that a training with bfloat16 inside went the way of one in float32."""
    tolerance = tolerances.SEVERAL_ROUNDINGS[torch.bfloat16]
    close(torch.stack(actual.losses).float(), torch.stack(expected.losses), tolerance, name="losses")
    same_state(actual.state, expected.state, tolerance)
    for place, (got, wanted) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        off, size = float((got - wanted).norm()), float(wanted.norm())
        assert off <= tolerances.TRAINED_IN_BFLOAT16 * size + tolerance, f"gradient {place}: off by {off} of {size}"


def same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    """Assert that two states have the same names, dtypes and values."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        close(actual[name], wanted, tolerance, name=name)

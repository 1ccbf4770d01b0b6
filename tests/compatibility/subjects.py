"""The network that tools are tried with: of torch.nn's layers, and of ours in every way that one comes to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import batchnorm as bn
from support.comparison import close
from support.networks import Block, used

CHANNELS = 8


class Network(nn.Module):
    """A stem, a residual block and a head, of torch.nn's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU()
        self.block = Block(CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.relu(self.norm(self.conv(x)))).mean((2, 3)))
        return y


class OurBlock(Block):
    """`Block` with activations and the residual inside our layers."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, lambda channels: bn.BatchNorm2d(channels, activation="relu"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)
        return y


class OurNetwork(Network):
    """`Network`, written with our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = bn.BatchNorm2d(CHANNELS, activation="relu")
        self.relu = nn.Identity()
        self.block = OurBlock(CHANNELS)


def batch(seed: int = 1) -> Tensor:
    """(4, 3, 10, 10): what the network takes."""
    return torch.randn((4, 3, 10, 10), generator=torch.Generator().manual_seed(seed))


def plain() -> Network:
    """Of torch.nn's layers, in inference, with statistics that are not the initial ones: the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Network()
    used(net)
    return net


def converted() -> nn.Module:
    """`plain`, converted."""
    return bn.convert(plain())


def fused() -> nn.Module:
    """`plain`, converted and fused."""
    net = bn.fuse(plain())
    assert len(net.report.done) == 3
    return net


def inside() -> nn.Module:
    """`plain`, written with activations and the residual inside our layers."""
    net = OurNetwork()
    net.load_state_dict(plain().state_dict())
    return net.eval()


OURS: tuple[Callable[[], nn.Module], ...] = (converted, fused, inside)


def step(net: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """What a training step gives and leaves behind: the output, gradients and running statistics, by name.

    Args:
        net: whose parameters and buffers these are.
        x: the input.
        call: what is called instead of `net`.
    """
    net.train()
    y = (net if call is None else call)(x)
    y.square().sum().backward()
    results = {"output": y.detach()}
    results |= {f"{name}.grad": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    results |= {name: b.clone() for name, b in net.named_buffers()}
    return results


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two steps are the same within rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value, name=name)

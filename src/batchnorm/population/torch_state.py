"""What a forward pass finds around it in torch, and may change: random streams, grad mode, autocast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

RandomState = list[tuple[torch.Generator, Tensor]]


def random_state() -> RandomState:
    """The states of torch's default generators: the CPU's, and CUDA's where it is in use."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [(generator, generator.get_state()) for generator in (torch.default_generator, *cuda)]


def set_random_state(state: RandomState) -> None:
    """Go on from there."""
    for generator, value in state:
        generator.set_state(value)


def seed(value: int) -> None:
    """Begin a new random stream on every device that `random_state` knows."""
    for generator, _ in random_state():
        generator.manual_seed(value)


class Autocast(NamedTuple):
    """One kind of device's part of torch.autocast."""

    device: str
    enabled: bool
    dtype: torch.dtype


class TorchState(NamedTuple):
    """This thread's grad mode, autocast and random streams, to be put back later."""

    grad: bool
    autocast: tuple[Autocast, ...]
    autocast_cache: bool
    random: RandomState

    @classmethod
    def here(cls, devices: Iterable[str]) -> TorchState:
        """As they are now; autocast for these kinds of devices."""
        return cls(
            torch.is_grad_enabled(),
            tuple(Autocast(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices),
            torch.is_autocast_cache_enabled(),
            random_state(),
        )

    def restore(self) -> None:
        """Put them back."""
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        set_random_state(self.random)

"""Networks and training steps for the tests of `recompute`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm import ops
from support.networks import Block

CHANNELS, SIZE = 16, 32  # an output of 4 samples has 256 KiB


def images(*, seed: int = 1, samples: int = 4, size: int = SIZE) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def conv(inputs: int = CHANNELS, outputs: int = CHANNELS, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


def norm(activation: str | None = "relu", **options: Any) -> bn.BatchNorm2d:
    return bn.BatchNorm2d(CHANNELS, activation=activation, **options)


def chain(activation: str | None = "relu", length: int = 3, **options: Any) -> nn.Sequential:
    """Convolution and batch norm in turn, and a convolution at the end."""
    torch.manual_seed(0)
    parts = [conv(3), norm(activation, **options)]
    for _ in range(length - 1):
        parts += [conv(), norm(activation, **options)]
    return nn.Sequential(*parts, conv())


def residual(blocks: int = 4, *, fused: bool = True) -> nn.Sequential:
    """A stem, residual blocks, and a convolution."""
    torch.manual_seed(0)
    net = nn.Sequential(conv(3), norm(), *(Block(CHANNELS, bn.BatchNorm2d) for _ in range(blocks)), conv())
    return bn.fuse(net) if fused else net


def gradients(model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """What a training step gives and leaves behind, by name."""
    torch.manual_seed(7)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (call or model)(x)
    y.float().square().mean().backward()
    found = {"output": y.detach()} | ({} if x.grad is None else {"input.grad": x.grad})
    found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def check(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Any:
    """A step with and without `recompute` is the same, bit for bit. Returns the handle."""
    other = copy.deepcopy(model)
    expected = gradients(other, x, None if call is None else lambda x: call(other, x))
    handle = bn.recompute(model)
    same_bits(gradients(model, x, None if call is None else lambda x: call(model, x)), expected)
    return handle


@contextmanager
def counted(operation: str = "normalize") -> Iterator[list[torch.Size]]:
    """The shapes of what an operation is called with inside."""
    seen: list[torch.Size] = []
    served = {id(choice.eager): choice.eager for choice in ops._TABLE.values()}
    originals = {key: getattr(operations, operation) for key, operations in served.items()}

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any) -> Any:
            seen.append(x.shape)
            return original(x, *args)

        return call

    for key, operations in served.items():
        setattr(operations, operation, counting(originals[key]))
    try:
        yield seen
    finally:
        for key, operations in served.items():
            setattr(operations, operation, originals[key])

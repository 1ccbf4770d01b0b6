"""Who is told of outputs, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm as bn
from batchnorm import functional, recording
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import slices
from batchnorm.kernels.reference import biased_variance


class Recorded:
    """A recorder that takes everything down."""

    def __init__(self) -> None:
        self.notes: list[tuple[Tensor, tuple[Tensor, ...], Callable[..., Tensor], Tensor | None]] = []

    def record(
        self,
        output: Tensor,
        inputs: tuple[Tensor, ...],
        make: Callable[[], Callable[..., Tensor]],
        owner: Tensor | None,
    ) -> None:
        self.notes.append((output, inputs, make(), owner))


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorder = Recorded()
    recording.RECORDERS[get_ident()] = recorder
    yield recorder
    del recording.RECORDERS[get_ident()]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 7, 9), (64, 5), (4, 300, 70)], ids=str)
def test_what_is_computed_again_has_the_same_bits(
    recorded: Recorded, dtype: torch.dtype, activation: str | None, masked: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = bn.BatchNorm(shape[1], activation=activation)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    for x in (torch.randn(shape) * 3 + 5, torch.randn(shape).movedim(1, -1).contiguous().movedim(-1, 1)):
        x = x.to(dtype).requires_grad_()
        residual = torch.randn(shape).to(dtype)
        mask = torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None
        layer(x, mask=mask)
        layer(x, mask=mask, residual=residual)
        layer.eval()(x)
        layer.train()
    assert len(recorded.notes) == 6
    for output, inputs, again, owner in recorded.notes:
        with torch.no_grad():
            other = again(*inputs)
        assert torch.equal(other, output)
        assert other.stride() == output.stride()
        assert owner is layer.weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", [(6, 5, 7, 9), (4, 9, 300, 300)], ids=str)
def test_the_reference_gives_the_same_bits_too(
    dtype: torch.dtype, activation: str | None, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, residual = ((torch.randn(shape) * 3 + 5).to(dtype) for _ in range(2))
    arguments = torch.rand(shape[1]), torch.randn(shape[1]), residual, 1e-5, 1, activation
    y, count, mean, m2 = slices.operation("forward")(x, *arguments, None)
    again = slices.operation("normalize")(x, mean, biased_variance(count, m2), *arguments)
    assert torch.equal(again, y)
    assert again.stride() == y.stride()


def test_the_inputs_are_those_of_the_call(recorded: Recorded) -> None:
    x, r = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    y = functional.batch_norm(x, None, None, training=True, residual=r)
    ((output, inputs, _, owner),) = recorded.notes
    assert output is y
    assert inputs[0] is x
    assert inputs[1] is r
    assert owner is None


def test_parameters_are_those_of_the_call(recorded: Recorded) -> None:
    layer = bn.BatchNorm1d(3)
    y = layer(torch.randn(4, 3))
    expected = y.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(3)
    ((_, inputs, again, _),) = recorded.notes
    assert torch.equal(again(*inputs).detach(), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(x.detach()),
        lambda layer, x: torch.func.vmap(layer.eval())(x[None]),
        lambda layer, x: layer(x[:0]),
    ],
    ids=["no gradient", "a transform", "empty"],
)
def test_of_others_nothing_is_told(recorded: Recorded, call: Callable[[Any, Tensor], Tensor]) -> None:
    call(bn.BatchNorm1d(3, affine=False), torch.randn(4, 3, requires_grad=True))
    assert recorded.notes == []


def test_without_gradients_nothing_is_told_and_nothing_stays(recorded: Recorded) -> None:
    with torch.no_grad():
        bn.BatchNorm1d(3)(torch.randn(4, 3))
    y = bn.BatchNorm1d(3)(torch.randn(4, 3))
    assert len(recorded.notes) == 1
    assert not hasattr(y.grad_fn, "statistics")


def test_without_a_recorder_nothing_is_remembered() -> None:
    y = bn.BatchNorm1d(3)(torch.randn(4, 3))
    assert not hasattr(y.grad_fn, "statistics")

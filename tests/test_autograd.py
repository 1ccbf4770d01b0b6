"""Derivatives of every order, under transforms too, against torch and against differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import batchnorm as bn
from batchnorm.activations import ACTIVATIONS
from batchnorm.functional import batch_norm
from support import tolerances
from support.comparison import close
from support.samples import LAYOUTS, Sample


def function_of(
    training: bool, activation: str | None, dtype: torch.dtype
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Ours as a function of x, weight, bias and residual, and a point away from the activations' kinks."""
    generator = torch.Generator().manual_seed(2)
    x, residual = (torch.randn(5, 3, 2, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(3, generator=generator, dtype=dtype).add(0.5).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        statistics = (None, None) if training else (mean, var)
        return batch_norm(x, *statistics, weight, bias, training, residual=residual, activation=activation)

    return function, [x, weight, bias, residual]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradcheck(training: bool, activation: str | None) -> None:
    function, inputs = function_of(training, activation, torch.float64)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_gradgradcheck(training: bool, activation: str | None) -> None:
    function, inputs = function_of(training, activation, torch.float64)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_the_third_derivative(dtype: torch.dtype, training: bool, activation: str | None) -> None:
    """Against autograd on the formula in plain torch; torch's own third derivative is wrong in training."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        mean, var = (x.mean((0, 2)), x.var((0, 2), correction=0)) if training else (x.new_zeros(3), x.new_ones(3))
        shape = (1, 3, 1)
        z = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape) + residual
        return z if activation is None else getattr(F, activation)(z)

    def third(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        weights = torch.linspace(-1, 2, 30, dtype=torch.float64).view(5, 3, 2).to(inputs[0].dtype)
        scalar = (function(*inputs).pow(3) * weights).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(scalar, inputs, create_graph=True)
            scalar = sum((g.pow(2).sum() for g in gradients), start=torch.zeros((), dtype=inputs[0].dtype))
        return scalar.detach()

    function, inputs = function_of(training, activation, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = third(plain, exact)
    close(third(function, inputs).double(), expected, relative=tolerances.THIRD_DERIVATIVE[dtype])


def test_one_input_computed_from_another() -> None:
    """The gradient of x must not count the way through the weight twice."""

    def function(norm: Callable[..., Tensor], x: Tensor) -> Tensor:
        return norm(x, None, None, x[0].exp(), x[1], True) + x * 2

    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(function(F.batch_norm, x), x, dy)
    for create_graph in (False, True):
        (actual,) = torch.autograd.grad(function(batch_norm, x), x, dy, create_graph=create_graph)
        close(actual.detach(), expected)
    assert torch.autograd.gradgradcheck(
        lambda v: batch_norm(v, None, None, v[0].exp(), v[1], True, residual=v * 2), (x,)
    )


def test_vmap_and_forward_mode_use_the_same_formula() -> None:
    x = torch.randn(4, 6, 3)
    one_by_one = torch.stack([batch_norm(v, None, None, training=True, activation="relu") for v in x])
    mapped = torch.func.vmap(lambda v: batch_norm(v, None, None, training=True, activation="relu"))(x)
    close(mapped, one_by_one)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        tangent = forward_ad.unpack_dual(batch_norm(dual, None, None, training=True)).tangent
    close(tangent, torch.zeros_like(x[0]))  # a shift of everything changes nothing


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_what_is_asked_for(needs: str, training: bool, activation: str | None) -> None:
    t = Sample(LAYOUTS[6], activation, True).tensors()
    inputs = {key: t[key].clone().requires_grad_(key == needs) for key in ("x", "weight", "bias", "residual")}
    everything = {key: t[key].clone().requires_grad_() for key in inputs}
    for leaves in (inputs, everything):
        y = batch_norm(
            leaves["x"],
            torch.zeros(20),
            torch.ones(20),
            leaves["weight"],
            leaves["bias"],
            training,
            residual=leaves["residual"],
            activation=activation,
        )
        y.backward(t["dy"])
    assert torch.equal(inputs[needs].grad, everything[needs].grad)
    assert all(leaf.grad is None for key, leaf in inputs.items() if key != needs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_masked_gradients_of_every_order(weighted: bool, activation: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(5, 3, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    mask = torch.rand(5, 4, dtype=torch.float64, generator=generator)
    mask = mask * (mask > 0.3) if weighted else mask > 0.3

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, bias, True, residual=residual, activation=activation, mask=mask)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))


def test_a_transform_that_may_not_change_the_statistics_is_told_and_changes_nothing() -> None:
    layer, x = bn.BatchNorm1d(3), torch.randn(4, 16, 3)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(bn.errors.TransformError, match="stack_module_state"):
        torch.func.vmap(layer)(x)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])

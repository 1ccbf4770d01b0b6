"""Every activation of the native kernels, over the whole range of z: value and derivative, kinks, and NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import reference
from support import oracle, tolerances

native = torch.ops.batchnorm
DTYPES = [torch.float32, torch.float64]
KINKS = [0.0, -3.0, 3.0, 6.0]


def activate(z: Tensor, name: str) -> Tensor:
    """activation(z), by a normalization that leaves z as it is."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y: Tensor = native.normalize(z[:, None], zero, one, None, None, None, 0.0, 1, name)[:, 0]
    return y


def activate_grad(z: Tensor, name: str) -> Tensor:
    """activation'(z), as the gradient of the same."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    dy = torch.ones_like(z)[:, None]
    dx: Tensor = native.backward_input(dy, z[:, None], zero, one, None, None, None, 0.0, 1, name, None, None)[0]
    return dx[:, 0]


def grid(dtype: torch.dtype) -> Tensor:
    """From -100 to 100, densely around 0, and the kinks' neighbours."""
    fine = torch.linspace(-1, 1, 4001, dtype=torch.float64) ** 3
    return torch.cat([torch.linspace(-100, 100, 20_011, dtype=torch.float64), fine * 10, fine * 1e-3]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_everywhere(name: str, dtype: torch.dtype, level: str) -> None:
    z = grid(dtype)
    for actual, exact in ((activate(z, name), oracle.activate), (activate_grad(z, name), oracle.activate_grad)):
        expected = exact(z.double().numpy(), name)
        error = np.abs(actual.double().numpy() - expected) / (1 + np.abs(expected))
        assert error.max() < tolerances.NATIVE[dtype], z[error.argmax()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_keeps_its_digits_near_zero(dtype: torch.dtype, level: str) -> None:
    z = grid(dtype)
    z = z[z != 0]
    expected = np.tanh(z.double().numpy())
    error = np.abs(activate(z, "tanh").double().numpy() / expected - 1)
    assert error.max() < 4 * torch.finfo(dtype).eps, z[error.argmax()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinks_and_nan_are_torchs(name: str, dtype: torch.dtype, level: str) -> None:
    z = torch.tensor([*KINKS, float("nan")] * 8, dtype=dtype, requires_grad=True)  # whole vectors, and a part of one
    y = ACTIVATIONS[name].formula(z)
    (derivative,) = torch.autograd.grad(y.sum(), z)
    bound = tolerances.NATIVE[dtype]
    torch.testing.assert_close(activate(z.detach(), name), y.detach(), rtol=bound, atol=bound, equal_nan=True)
    finite = ~z.detach().isnan()
    actual = activate_grad(z.detach(), name)
    torch.testing.assert_close(actual[finite], derivative[finite], rtol=bound, atol=bound)


# --- extremes ---------------------------------------------------------------------------------------------------------

EXTREMES = [87.0, 88.5, 89.0, 100.0, 1e4, 1e20, 1e38, 3e38]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_far_out(name: str, dtype: torch.dtype, level: str) -> None:
    large = torch.tensor([*EXTREMES, *((1e300,) if dtype == torch.float64 else ())], dtype=dtype)
    z = torch.cat([large, -large])
    exact = z.double()
    left = {"leaky_relu": exact * 0.01, "elu": -torch.ones_like(exact), "tanh": -torch.ones_like(exact)}
    right = {"relu6": 6.0, "sigmoid": 1.0, "tanh": 1.0}
    y = torch.where(exact < 0, left.get(name, exact * 0), torch.full_like(exact, right[name]) if name in right else z)
    slopes = (0.01 if name == "leaky_relu" else 0.0, 0.0 if name in right else 1.0)
    slope = torch.where(exact < 0, *(torch.full_like(exact, value) for value in slopes))
    bound = tolerances.NATIVE[dtype]
    torch.testing.assert_close(activate(z, name).double(), y, rtol=bound, atol=bound)
    torch.testing.assert_close(activate_grad(z, name).double(), slope, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_in_inference_the_gradient_at_what_is_not_finite(
    name: str | None, dtype: torch.dtype, bad: float, level: str
) -> None:
    z = torch.full((37,), bad, dtype=dtype)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    options = (z[:, None], zero, one, None, None, None, 0.0, 1, name, None, None)
    ones = torch.ones_like(z)[:, None]
    actual, expected = (f.backward_input(ones, *options)[0] for f in (native, reference))
    known = ~expected.isnan()  # elsewhere torch has 0 times infinity, and we the limit
    torch.testing.assert_close(actual[known], expected[known])
    if bad == bad:
        assert actual.isfinite().all()


@pytest.mark.parametrize("eps", [1e-60, 1e-100, 1e-300])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16])
def test_a_constant_channel_is_beta_whatever_eps_is(eps: float, dtype: torch.dtype, level: str) -> None:
    for shape in ((64, 3), (4, 3, 37)):
        x = torch.full(shape, 0.5, dtype=dtype)
        bias = torch.tensor([-1.0, 0.0, 2.0], dtype=dtype)
        y, *_ = native.forward(x, None, bias, None, eps, 1, None)
        assert torch.equal(y.movedim(1, -1), bias.expand_as(y.movedim(1, -1)))

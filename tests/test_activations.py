"""Modules and functions that are an activation of ours, and those that only look like one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm import activations, errors
from batchnorm.activations import ACTIVATIONS, check_activation
from support import oracle
from support.comparison import close

EVERY = pytest.mark.parametrize("name", ACTIVATIONS)
FAR = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.tensor([-800.0, 800.0]).double()])


@EVERY
def test_the_formula_is_the_oracles(name: str) -> None:
    z = torch.linspace(-12, 12, 481, dtype=torch.float64)
    expected = torch.from_numpy(oracle.activate(z.numpy(), name))
    close(ACTIVATIONS[name].formula(z), expected)


@EVERY
def test_the_gradient_is_torchs_at_kinks_and_far_out_too(name: str) -> None:
    row = ACTIVATIONS[name]
    z = torch.cat([FAR, torch.tensor(row.kinks, dtype=torch.float64)]).requires_grad_()
    dy = torch.linspace(-3, 2, len(z), dtype=torch.float64)
    (expected,) = torch.autograd.grad(row.module()(z), z, dy)
    close(row.gradient(dy, z.detach()), expected)


@EVERY
def test_the_gradient_is_the_oracles(name: str) -> None:
    z = torch.linspace(-12, 12, 481, dtype=torch.float64)
    z = z[~torch.isin(z, torch.tensor(ACTIVATIONS[name].kinks, dtype=torch.float64))]
    expected = torch.from_numpy(oracle.activate_grad(z.numpy(), name))
    close(ACTIVATIONS[name].gradient(torch.ones_like(z), z), expected)


@EVERY
def test_the_derivative_jumps_at_the_kinks_alone(name: str) -> None:
    z = torch.arange(-8, 8, 0.25, dtype=torch.float64)
    beside = [ACTIVATIONS[name].gradient(torch.ones_like(z), z + step) for step in (-1e-9, 1e-9)]
    jumps = z[(beside[0] - beside[1]).abs() > 1e-6].tolist()
    assert jumps == [] if name == "elu" else jumps == list(ACTIVATIONS[name].kinks)


@EVERY
def test_modules_and_functions_that_are_recognised_compute_the_same(name: str) -> None:
    row = ACTIVATIONS[name]
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.from_numpy(oracle.activate(z.numpy(), name))
    assert activations.of_module(row.module()) == (name, "")
    close(row.module()(z), expected)
    for function in row.functions:
        assert activations.of_function(function, (z,), {}) == name
        called = getattr(torch.Tensor, function) if isinstance(function, str) else function
        close(called(z.clone()), expected)


@pytest.mark.parametrize("name", ["Tanh", "ReLU", "", "softmax"])
def test_an_unknown_activation_is_shown_all_that_there_are(name: str) -> None:
    every = ", ".join(f'"{known}"' for known in ACTIVATIONS)
    with pytest.raises(errors.OptionError, match=f"got activation='{name}'; it must be one of {every} or None$"):
        check_activation(name)


def test_known_activations_pass() -> None:
    for name in (*ACTIVATIONS, None):
        check_activation(name)


@EVERY
def test_other_libraries_modules_are_recognised_without_them(name: str) -> None:
    for qualified in ACTIVATIONS[name].other_modules:
        module, _, cls = qualified.rpartition(".")
        assert activations.of_module(type(cls, (nn.Module,), {"__module__": module})()) == (name, "")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Softplus(), "Softplus is not one of our activations"),
        (nn.Hardtanh(0.0, 6.0), "Hardtanh is not one of our activations"),
        (nn.LeakyReLU(0.2), "LeakyReLU has negative_slope=0.2, ours 0.01"),
        (nn.ELU(2.0), "ELU has alpha=2.0, ours 1.0"),
        (nn.GELU("tanh"), "GELU has approximate=tanh, ours none"),
    ],
    ids=str,
)
def test_others_are_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    assert activations.of_module(module) == (None, reason)


def test_parameters_of_functions_count() -> None:
    assert activations.of_function(F.leaky_relu, (0, 0.01), {}) == "leaky_relu"
    assert activations.of_function(F.leaky_relu, (0, 0.2), {}) is None
    assert activations.of_function(F.leaky_relu, (0,), {"negative_slope": 0.2}) is None
    assert activations.of_function(F.elu, (0, 2.0), {}) is None
    assert activations.of_function(F.gelu, (0,), {"approximate": "tanh"}) is None
    assert activations.of_function(F.relu, (0,), {"inplace": True}) == "relu"
    assert activations.of_function("relu_", (0,), {}) == "relu"
    assert activations.of_function("sigmoid_", (0,), {}) == "sigmoid"
    assert activations.of_function(F.softplus, (0,), {}) is None

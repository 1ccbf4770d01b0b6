"""Modules and functions that are an activation of ours, and those that only look like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.surgery import activations
from support import oracle, tolerances

FUNCTIONS: dict[str, list[Any]] = {
    "relu": [F.relu, torch.relu],
    "leaky_relu": [F.leaky_relu],
    "silu": [F.silu],
    "gelu": [F.gelu],
    "hardswish": [F.hardswish],
    "elu": [F.elu],
}


def test_there_is_a_module_for_each_of_ours() -> None:
    assert set(activations.MODULES) == set(ACTIVATIONS) == set(FUNCTIONS)


@pytest.mark.parametrize("name", activations.MODULES)
def test_what_is_recognised_computes_the_same(name: str) -> None:
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.from_numpy(oracle.activate(z.numpy(), name))
    module = activations.MODULES[name]()
    assert activations.of_module(module) == (name, "")
    relative, absolute = tolerances.AGAINST_TORCH[torch.float64]
    torch.testing.assert_close(module(z), expected, rtol=relative, atol=absolute)
    for function in FUNCTIONS[name]:
        assert activations.of_function(function, (z,), {}) == name
        torch.testing.assert_close(function(z), expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ReLU6(), "ReLU6 is none of our activations"),
        (nn.Sigmoid(), "Sigmoid is none of our activations"),
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
    assert activations.of_function("sigmoid", (0,), {}) is None

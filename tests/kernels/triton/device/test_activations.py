"""Every activation and its derivative as part of the kernels; they compute in float32 whatever the dtype is."""

from __future__ import annotations

import pytest
import torch

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels import triton as kernels
from batchnorm.kernels.triton import operations
from support import tolerances
from support.comparison import close
from support.operations import EPS, assert_the_oracles
from support.samples import Layout, Sample

LAYOUT = Layout("(N, C)", (16, 3))


def test_all_have_kernels() -> None:
    assert {None, *ACTIVATIONS} == kernels.ACTIVATIONS


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_values_and_gradients(activation: str | None) -> None:
    assert_the_oracles(operations, Sample(LAYOUT, activation, True))


@pytest.mark.parametrize("dtype", kernels.DTYPES[1:])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_the_oracles(operations, Sample(LAYOUT, "gelu", True, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(activation: str) -> None:
    z = torch.tensor([-1e4, -200, -30, -9, -0.05, -1e-3, 0.0, 1e-3, 0.05, 9, 21, 90, 200, 1e4]).view(-1, 1)
    zero, one = torch.zeros(1), torch.ones(1)
    y = operations.normalize(z, zero, one, None, None, None, 0.0, 1, activation)
    close(y, ACTIVATIONS[activation].formula(z.double()).float(), tolerances.OUTPUT)
    dx, _ = operations.backward_input(z * 0 + 1, z, zero, one, None, None, None, 0.0, 1, activation, None, None)
    close(dx, ACTIVATIONS[activation].gradient(torch.ones_like(z).double(), z.double()).float(), tolerances.GRADIENT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation: str) -> None:
    x = torch.full((2, 1), float("nan"))
    assert operations.normalize(x, x[0], x[0], None, None, None, EPS, 1, activation).isnan().all()

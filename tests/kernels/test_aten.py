"""The operations in torch's own operators, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.errors import TransformError
from batchnorm.kernels import aten, reference
from support.comparison import close

OPTIONS = (1e-5, 1, None)


def operands(dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    c = shape[axis]
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return x, torch.randn(c), torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), residual


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((5, 4), 1), ((3, 4, 2, 5), 1), ((3, 2, 5, 4), 3)])
def test_normalize_means_what_the_reference_means(
    activation: str | None, dtype: torch.dtype, shape: tuple[int, ...], axis: int
) -> None:
    x, mean, var, weight, bias, residual = operands(dtype, shape, axis)
    for affine in ((weight, bias), (None, None), (weight.to(dtype), bias.to(dtype))):
        for added in (residual, None):
            arguments: Any = (mean, var, *affine, added, 1e-5, axis, activation)
            expected = reference.normalize(x, *arguments)
            close(aten.normalize(x, *arguments), expected)
            over = x.clone()
            aten.normalize_(over, *arguments)
            close(over, expected)


def test_training_is_torchs() -> None:
    x, _, _, weight, bias, residual = operands(torch.float32, (6, 4, 3), 1)
    y, *_ = aten.forward(x, weight, bias, residual, 1e-5, 1, "relu")
    close(y, reference.forward(x, weight, bias, residual, 1e-5, 1, "relu")[0])
    layer = torch.nn.BatchNorm1d(4, momentum=0.3)
    running = torch.zeros(4), torch.ones(4), torch.tensor(0)
    for _ in range(2):
        y, *_ = aten.forward_commit(x, None, None, None, *OPTIONS, None, *running, None, 0.3)
        close(y, layer(x).detach())
    for actual, expected in zip(running, layer.buffers(), strict=True):
        close(actual, expected)


def test_without_a_momentum_batches_weigh_the_same() -> None:
    x = operands(torch.float32, (6, 4, 3), 1)[0]
    layer = torch.nn.BatchNorm1d(4, momentum=None)
    running = torch.zeros(4), torch.ones(4), torch.tensor(0)
    for batch in (x, x + 1, x * 2):
        aten.forward_commit(batch, None, None, None, *OPTIONS, None, *running, None, None)
        layer(batch)
    close(running[0], layer.running_mean)
    close(running[1], layer.running_var)


def test_what_torchs_operator_has_not_is_refused() -> None:
    x, mean, var, *_ = operands(torch.float32, (6, 4), 1)
    mask = torch.ones(6, dtype=torch.bool)
    with pytest.raises(TransformError, match="a mask in training"):
        aten.forward(x, None, None, None, *OPTIONS, mask)
    with pytest.raises(TransformError, match="a mask in training"):
        aten.forward_commit(x, None, None, None, *OPTIONS, mask, mean, var, None, None, 0.1)
    with pytest.raises(TransformError, match="Export in inference"):
        aten.batch_moments(x, 1)
    with pytest.raises(TransformError, match="Export in inference"):
        aten.commit(mean, var, None, None, torch.tensor(6), mean, var, 0.1)

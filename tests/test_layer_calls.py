"""What one call of a layer may say."""

from __future__ import annotations

import pytest
import torch

import batchnorm as bn
from batchnorm import errors


def test_an_activation_of_one_call() -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    plain, own = bn.BatchNorm2d(3), bn.BatchNorm2d(3, activation="silu")
    assert torch.equal(plain(x, activation="silu"), own(x))
    assert torch.equal(plain.eval()(x, residual=x, activation="silu"), own.eval()(x, residual=x))
    with pytest.raises(errors.OptionError, match="one call has one"):
        own(x, activation="relu")

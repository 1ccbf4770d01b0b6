"""How far a layer is off, in one number."""

from __future__ import annotations

import math

import pytest
import torch

from batchnorm.diagnosis.result import ReportedLayer


def layer(shift: list[float] | None, ratio: list[float] | None) -> ReportedLayer:
    tensors = [None if values is None else torch.tensor(values, dtype=torch.float64) for values in (shift, ratio)]
    return ReportedLayer("a", "BatchNorm1d", 3, None, None, *tensors)


def test_the_worst_keeps_its_sign() -> None:
    one = layer([0.5, -2.0, 1.0], [0.25, 0.125, -0.125])
    assert (one.worst_shift, one.worst_log_variance_ratio, one.off) == (-2.0, 0.25, 2.0)
    assert layer([0.5], [-3.0]).off == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_the_worst(bad: float) -> None:
    one = layer([0.5, bad, 9.0], [0.0, 0.0, 0.0])
    assert one.off == math.inf
    assert one.worst_shift is not None
    assert not math.isfinite(one.worst_shift)


@pytest.mark.parametrize("values", [None, []])
def test_without_numbers(values: list[float] | None) -> None:
    one = layer(values, values)
    assert (one.worst_shift, one.worst_log_variance_ratio, one.off) == (None, None, None)
